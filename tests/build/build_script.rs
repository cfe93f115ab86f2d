//! build.rs with and without nvcc. Runs the build script itself, as cargo does.

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

/// Runs the build script with these variables, and no others that it reads.
fn build(folder: &Path, variables: &[(&str, &str)]) -> Output {
    build_in(Path::new(env!("CARGO_MANIFEST_DIR")), folder, variables)
}

/// [`build`] for sources in another folder.
fn build_in(sources: &Path, folder: &Path, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program());
    command.current_dir(sources).env_clear();
    command.envs([
        ("PATH", "/usr/bin:/bin"),
        ("HOST", env!("HOST_TRIPLE")),
        ("TARGET", env!("HOST_TRIPLE")),
    ]);
    command.envs([("OPT_LEVEL", "0"), ("DEBUG", "false"), ("PROFILE", "debug"), ("NUM_JOBS", "2")]);
    command.envs([
        ("CARGO_CFG_TARGET_ARCH", std::env::consts::ARCH),
        ("CARGO_CFG_TARGET_OS", "linux"),
        ("CARGO_FEATURE_CUDA", "1"),
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

pub fn missing_nvcc_is_one_warning_that_says_what_to_set() {
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
}

/// What was asked for needs no warning. CUDA devices say at run time why there are no kernels.
pub fn a_build_that_is_meant_to_be_without_nvcc_is_silent() {
    for (variable, value) in [("NVCC", ""), ("DOCS_RS", "1")] {
        let folder = scratch("silent");
        let output = build(&folder, &[(variable, value)]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(!text(&output.stdout).contains("cargo::warning"), "{}", text(&output.stdout));
        let kernels = fs::read_to_string(folder.join("kernels.rs")).unwrap();
        assert!(kernels.contains("NVCC=/path/to/nvcc") && kernels.contains(variable), "{kernels}");
    }
}

/// A build for CPUs lacks nothing, so it has nothing to say.
pub fn a_build_without_the_feature_for_cuda_looks_for_no_nvcc() {
    let folder = scratch("cpu");
    let output = build(&folder, &[("NVCC", "/nonexistent/nvcc"), ("CARGO_FEATURE_CUDA", "")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stdout).contains("cargo::warning"), "{}", text(&output.stdout));
    let kernels = fs::read_to_string(folder.join("kernels.rs")).unwrap();
    assert!(kernels.contains("Err(") && kernels.contains("feature `cuda`"), "{kernels}");
}

/// Lines of the output that say what runs the script again.
fn watched(output: &Output) -> Vec<String> {
    let said = text(&output.stdout);
    let watched = said.lines().filter_map(|line| line.split_once("cargo::rerun-if-"));
    watched.map(|(_, what)| what.to_owned()).collect()
}

/// A change of `PATH`, as where a virtual environment is activated, costs nothing where it was not
/// looked at.
pub fn the_script_runs_again_for_what_it_has_read() {
    let folder = scratch("watched");
    fs::write(folder.join("CACHEDIR.TAG"), "").unwrap();
    let compiler = compiler(&folder, "");
    let writes = "while [ $# -gt 0 ]; do [ \"$1\" = -o ] && touch \"$2\"; shift; done; exit 0";
    let nvcc = nvcc(&folder, writes);
    let other = build(&folder, &[("CXX", &compiler)]);
    let named = [("CXX", compiler.as_str()), ("NVCC", &nvcc), ("CUDA_COMPUTE_CAP", "90")];
    let named = build(&folder, &named);
    let none = build(&folder, &[("CXX", &compiler), ("NVCC", "")]);
    for output in [&other, &named, &none] {
        let watched = watched(output);
        let files: Vec<_> = watched.iter().filter(|what| what.starts_with("changed=")).collect();
        assert_eq!(files, ["changed=build.rs", "changed=kernels"]);
        assert!(watched.contains(&"env-changed=NVCC".to_owned()), "{watched:?}");
    }
    for variable in ["PATH", "VIRTUAL_ENV", "CUDA_HOME", "CUDA_PATH"] {
        let what = format!("env-changed={variable}");
        assert!(watched(&other).contains(&what), "{what}: {:?}", watched(&other));
        for output in [&named, &none] {
            assert!(!watched(output).contains(&what), "{what}: {:?}", watched(output));
        }
    }
    for variable in ["CUDA_COMPUTE_CAP", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS"] {
        let what = format!("env-changed={variable}");
        assert!(watched(&named).contains(&what), "{what}: {:?}", watched(&named));
        assert!(!watched(&none).contains(&what), "{what}: {:?}", watched(&none));
    }
}

/// A stand-in for the C++ compiler, which writes down what it compiles in `compiled` beside it. In
/// `more` the object is `$o`.
fn compiler(folder: &Path, more: &str) -> String {
    let path = folder.join("fake-g++");
    let script = format!(
        "#!/bin/sh\n\
         [ \"$1\" = --version ] && cat {folder}/version && exit 0\n\
         o=\nfor a in \"$@\"; do [ \"$b\" = -o ] && o=$a; b=$a; done\n\
         case \" $* \" in *' -c '*) echo \"$o\" >> {folder}/compiled;; *) exit 1;; esac\n\
         {more}\necho object > \"$o\"\n",
        folder = folder.display()
    );
    fs::write(folder.join("version"), "fake g++ 1\n").unwrap();
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().into()
}

/// Features and profiles have folders of their own, and share what was compiled.
pub fn kernels_are_compiled_once_for_all_profiles() {
    let folder = scratch("once");
    let compiler = compiler(&folder, "");
    let sources = folder.join("sources");
    fs::create_dir_all(&sources).unwrap();
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let copied = Command::new("cp").arg("-r").arg(kernels).arg(&sources).status().unwrap();
    assert!(copied.success());
    let target = folder.join("target");
    // Numbers of objects that a build has compiled, and has in its archive.
    let compiles = |place: &str, variables: &[(&str, &str)]| {
        let out = target.join(place);
        fs::create_dir_all(&out).unwrap();
        let _ = fs::remove_file(folder.join("compiled"));
        let all = [&[("CXX", compiler.as_str()), ("NVCC", "")], variables].concat();
        let output = build_in(&sources, &out, &all);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let archive = out.join("libparam_averager_kernels.a");
        let listed = Command::new("ar").arg("t").arg(archive).output().unwrap();
        let listed = text(&listed.stdout).lines().count();
        let compiled = fs::read_to_string(folder.join("compiled")).unwrap_or_default();
        assert_eq!(listed, SETS);
        compiled.lines().count()
    };
    const SETS: usize = if cfg!(target_arch = "x86_64") { 3 } else { 1 };

    // The scratch folder is inside cargo's target folder, but has a nearer one.
    fs::create_dir_all(&target).unwrap();
    fs::write(target.join("CACHEDIR.TAG"), "").unwrap();
    assert_eq!(compiles("debug/build/one/out", &[]), SETS);
    let release = [("PROFILE", "release"), ("OPT_LEVEL", "3"), ("DEBUG", "true")];
    assert_eq!(compiles("release/build/two/out", &release), 0);
    assert_eq!(compiles("debug/build/three/out", &[("CARGO_FEATURE___TESTING", "1")]), 0);
    // Everything that changes the code changes the key.
    assert_eq!(compiles("debug/build/one/out", &[("CXXFLAGS", "-g")]), SETS);
    assert_eq!(compiles("debug/build/one/out", &[("CPATH", "/elsewhere")]), SETS);
    fs::write(folder.join("version"), "fake g++ 2\n").unwrap();
    assert_eq!(compiles("debug/build/one/out", &[]), SETS);
    for file in ["kernels/abi.h", "kernels/pack/cpu.h"] {
        fs::write(sources.join(file), "// another\n").unwrap();
        assert_eq!(compiles("debug/build/one/out", &[]), SETS, "{file}");
    }
    assert_eq!(compiles("debug/build/three/out", &[]), 0);
}

/// Each compilation waits until all have begun.
#[cfg(target_arch = "x86_64")]
pub fn instruction_sets_are_compiled_at_the_same_time() {
    let folder = scratch("parallel");
    fs::write(folder.join("CACHEDIR.TAG"), "").unwrap();
    let wait = format!(
        "n=0\nwhile [ $(wc -l < {folder}/compiled) -lt 3 ]; do\n\
         sleep 0.1; n=$((n + 1)); [ $n -gt 300 ] && echo alone >&2 && exit 3\ndone",
        folder = folder.display()
    );
    let compiler = compiler(&folder, &wait);
    let output = build(&folder, &[("CXX", &compiler), ("NVCC", "")]);
    assert!(output.status.success(), "{}", text(&output.stderr));
}

pub fn missing_nvcc_is_fatal_where_named_or_required() {
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

pub fn failing_nvcc_is_fatal_and_its_output_is_shown() {
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
