//! What build.rs does with the nvcc it finds or does not find. Runs the build script itself, as
//! cargo does.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The build script's program: cargo keeps it in a folder beside that of its output.
fn program() -> PathBuf {
    let builds = Path::new(env!("OUT_DIR")).ancestors().nth(2).unwrap();
    let programs = fs::read_dir(builds).unwrap().filter_map(|entry| {
        let program = entry.unwrap().path().join("build-script-build");
        let of_this_crate = program.parent()?.file_name()?.to_str()?.starts_with("param-averager-");
        let modified = program.metadata().ok()?.modified().ok()?;
        of_this_crate.then_some((modified, program))
    });
    programs.max().expect("cargo has built the build script").1
}

fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("build_script").join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs it with these variables and no others that it reads.
fn build(folder: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program());
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env_clear();
    command.envs([
        ("PATH", "/usr/bin:/bin"),
        ("HOST", env!("HOST_TRIPLE")),
        ("TARGET", env!("HOST_TRIPLE")),
    ]);
    command.envs([("OPT_LEVEL", "0"), ("DEBUG", "false"), ("PROFILE", "debug"), ("NUM_JOBS", "2")]);
    command.envs([
        ("CARGO_CFG_TARGET_ARCH", std::env::consts::ARCH),
        ("CARGO_CFG_TARGET_OS", "linux"),
    ]);
    command.envs([("CARGO_CFG_TARGET_ENV", "gnu"), ("CARGO_CFG_TARGET_FEATURE", "fxsr,sse,sse2")]);
    command.env("OUT_DIR", folder).envs(variables.iter().copied()).output().unwrap()
}

/// A stand-in for nvcc.
fn nvcc(folder: &Path, script: &str) -> String {
    let path = folder.join("nvcc");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().into()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn without_nvcc_it_builds_with_one_warning_that_says_what_to_set() {
    let folder = scratch("none");
    let output = build(&folder, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    let warnings: Vec<_> = said.lines().filter(|line| line.starts_with("cargo::warning")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for what in ["built without GPU kernels", "NVCC=", "CUDA_HOME", "pip install"] {
        assert!(warnings[0].contains(what), "{}", warnings[0]);
    }
    let kernels = fs::read_to_string(folder.join("kernels.rs")).unwrap();
    assert!(kernels.contains("Err(") && kernels.contains("NVCC=/path/to/nvcc"), "{kernels}");

    // Runs again for these and nothing else.
    let mut watched: Vec<_> =
        said.lines().filter_map(|line| line.strip_prefix("cargo::rerun-if-")).collect();
    watched.retain(|line| !line.starts_with("env-changed=C") || line.contains("CUDA"));
    for what in [
        "changed=build.rs",
        "changed=kernels",
        "env-changed=NVCC",
        "env-changed=CUDA_HOME",
        "env-changed=PATH",
    ] {
        assert!(watched.contains(&what), "{what} is not watched: {watched:?}");
    }
    let files: Vec<_> = watched.iter().filter(|line| line.starts_with("changed=")).collect();
    assert_eq!(files.len(), 2, "{files:?}");
}

pub fn what_is_named_and_missing_or_required_is_fatal() {
    let folder = scratch("fatal");
    let cases: [(&[(&str, &str)], &str); 5] = [
        (&[("NVCC", "/nonexistent/nvcc")], "NVCC names /nonexistent/nvcc, which does not exist"),
        (&[("NVCC", "no-such-nvcc")], "NVCC names no-such-nvcc, which does not exist"),
        (
            &[("CUDA_HOME", "/nonexistent")],
            "CUDA_HOME names /nonexistent, which is not a directory",
        ),
        (
            &[("PARAM_AVERAGER_REQUIRE_NVCC", "1")],
            "no nvcc was found, but PARAM_AVERAGER_REQUIRE_NVCC=1 asks for it",
        ),
        (
            &[("PARAM_AVERAGER_REQUIRE_NVCC", "1"), ("NVCC", "")],
            "since NVCC is set to nothing, but",
        ),
    ];
    for (variables, message) in cases {
        let output = build(&folder, variables);
        assert!(!output.status.success(), "{variables:?}");
        assert!(text(&output.stderr).contains(message), "{variables:?}: {}", text(&output.stderr));
    }
}

pub fn an_nvcc_that_fails_is_fatal_and_all_it_said_is_shown() {
    let folder = scratch("fails");
    let nvcc =
        nvcc(&folder, "echo to stdout; echo 'kernels/average.cu(1): error: something' >&2; exit 2");
    let output = build(&folder, &[("NVCC", &nvcc), ("CUDA_COMPUTE_CAP", "90")]);
    assert!(!output.status.success());
    let said = text(&output.stderr);
    for what in ["exit status: 2", "to stdout", "kernels/average.cu(1): error: something"] {
        assert!(said.contains(what), "{said}");
    }
}

pub fn architectures_come_from_the_variable_or_from_what_this_nvcc_knows() {
    // Writes down its arguments, then fails: the C++ compiler need not run.
    let record = "echo \"$@\" >&2; exit 1";
    let list = format!(
        "[ \"$1\" = --list-gpu-code ] && echo 'sm_75\nsm_80\nsm_90\nsm_100' && exit 0\n{record}"
    );
    let cases = [
        ("90", vec!["compute_90,code=sm_90", "compute_90,code=compute_90"]),
        (
            "9.0, sm_80",
            vec![
                "compute_80,code=sm_80",
                "compute_90,code=sm_90",
                "compute_80,code=compute_80",
                "compute_90,code=compute_90",
            ],
        ),
        (
            "",
            vec![
                "compute_80,code=sm_80",
                "compute_90,code=sm_90",
                "compute_100,code=sm_100",
                "compute_80,code=compute_80",
                "compute_100,code=compute_100",
            ],
        ),
    ];
    for (asked, wanted) in cases {
        let folder = scratch(&format!("arch-{}", asked.len()));
        let output =
            build(&folder, &[("NVCC", &nvcc(&folder, &list)), ("CUDA_COMPUTE_CAP", asked)]);
        let said = text(&output.stderr);
        let arguments = said.lines().last().unwrap();
        let made: Vec<_> =
            arguments.split("arch=").skip(1).map(|rest| rest.split(' ').next().unwrap()).collect();
        assert_eq!(made, wanted, "CUDA_COMPUTE_CAP={asked:?}: {said}");
    }
    let folder = scratch("arch-bad");
    let output =
        build(&folder, &[("NVCC", &nvcc(&folder, record)), ("CUDA_COMPUTE_CAP", "hopper")]);
    assert!(
        text(&output.stderr).contains("CUDA_COMPUTE_CAP holds `hopper`"),
        "{}",
        text(&output.stderr)
    );
}

pub fn nvcc_is_found_in_a_toolkit_and_in_a_virtual_environment() {
    let folder = scratch("found");
    let home = folder.join("toolkit");
    let python = folder.join("venv/lib/python3.11/site-packages/nvidia/cu13");
    for root in [&home, &python] {
        fs::create_dir_all(root.join("bin")).unwrap();
        nvcc(&root.join("bin"), &format!("echo this is {}; exit 1", root.display()));
    }
    for (variable, value) in
        [("CUDA_HOME", &home), ("CUDA_PATH", &home), ("VIRTUAL_ENV", &folder.join("venv"))]
    {
        let output =
            build(&folder, &[(variable, value.to_str().unwrap()), ("CUDA_COMPUTE_CAP", "90")]);
        let expected = if variable == "VIRTUAL_ENV" { &python } else { &home };
        let said = text(&output.stderr);
        assert!(said.contains(&format!("this is {}", expected.display())), "{variable}: {said}");
    }
}
