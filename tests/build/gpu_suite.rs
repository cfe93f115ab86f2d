//! `tests/gpu/suite run` on bundles of shell scripts, with a driver that does nothing.

use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use test_support::{tool, Skip};

const SUITE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/gpu/suite");

/// A driver with one device of this name.
fn driver(folder: &Path, device: &str) -> PathBuf {
    let (source, folder) = (folder.join("driver.c"), folder.join("driver"));
    let text = format!(
        "#include <string.h>\n\
         int cuInit(unsigned flags) {{ return 0; }}\n\
         int cuDriverGetVersion(int* version) {{ *version = 13010; return 0; }}\n\
         int cuDeviceGetCount(int* count) {{ *count = 1; return 0; }}\n\
         int cuDeviceGet(int* device, int ordinal) {{ *device = ordinal; return 0; }}\n\
         int cuDeviceGetName(char* name, int size, int device) {{ strncpy(name, \"{device}\", \
         size); return 0; }}\n\
         int cuDeviceGetAttribute(int* value, int attribute, int device) {{ *value = attribute == \
         75 ? 9 : 0; return 0; }}\n"
    );
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(&source, text).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-w", "-o"]).arg(folder.join("libcuda.so.1")).arg(&source);
    assert!(cc.status().unwrap().success());
    folder
}

/// A bundle whose test binary lists tests that end in different ways.
fn bundle(folder: &Path) -> PathBuf {
    let bundle = folder.join("bundle");
    std::fs::create_dir_all(&bundle).unwrap();
    std::fs::copy(SUITE, bundle.join("suite")).unwrap();
    std::fs::copy(Path::new(SUITE).with_file_name("slot.py"), bundle.join("slot.py")).unwrap();
    let cuda = "#!/bin/sh\n\
        echo \"$1 on $LD_LIBRARY_PATH, $PARAM_AVERAGER_GPU, $PA_PTX_SCENARIO\"\n\
        case $1 in\n\
        --list) for name in good partly unable silent bad hangs; do \
        echo $name: test; done;;\n\
        good) echo 'test good ... RAN it []';;\n\
        partly) echo 'RAN it []'; echo 'SKIPPED other: a reason';;\n\
        unable) echo 'SKIPPED unable: another reason';;\n\
        bad) echo 'RAN it []'; exit 7;;\n\
        hangs) echo 'RAN it []'; sleep 600;;\n\
        esac\n";
    let kernels = "#!/bin/sh\n\
        [ \"$1\" = --list ] && echo 'sass::other: test' && echo 'ptx::good: \
        test' || echo 'RAN it'\n";
    let others = "#!/bin/sh\necho \"$@\"\n";
    let mut files = serde_json::Map::new();
    for (name, kind, text) in [
        ("device", "test", cuda),
        ("kernels", "test", kernels),
        ("average", "bench", others),
        ("allreduce-bench", "bin", others),
        ("compute-sanitizer", "", others),
    ] {
        let file = bundle.join(name);
        std::fs::write(&file, text).unwrap();
        assert!(Command::new("chmod").arg("+x").arg(&file).status().unwrap().success());
        let sum = String::from_utf8(Command::new("sha256sum").arg(&file).output().unwrap().stdout)
            .unwrap();
        if !kind.is_empty() {
            files.insert(name.into(), serde_json::json!({ "kind": kind, "sha256": sum[..64] }));
        }
    }
    let manifest = serde_json::json!({ "commit": "0123", "files": files });
    std::fs::write(bundle.join("MANIFEST.json"), manifest.to_string()).unwrap();
    bundle
}

/// Skips without what these tests need.
pub fn tools() -> Skip {
    ["python3", "cc", "sha256sum"].iter().find_map(|program| tool(program, &["--version"]))
}

/// An empty folder.
fn folder(test: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(test);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn run(suite: &Path, sanitizer: bool, arguments: &[&dyn AsRef<OsStr>]) -> (Output, String) {
    let mut command = Command::new("python3");
    command
        .arg(suite)
        .args(arguments.iter().map(|argument| argument.as_ref()))
        .env_remove("LD_LIBRARY_PATH")
        .env_remove("COMPUTE_SANITIZER");
    if sanitizer {
        command.env("COMPUTE_SANITIZER", suite.with_file_name("compute-sanitizer"));
    }
    let output = command.output().unwrap();
    let said = [&output.stdout, &output.stderr]
        .map(|text| String::from_utf8_lossy(text).into_owned())
        .concat();
    (output, said)
}

fn results(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("results.json")).unwrap()).unwrap()
}

fn status<'a>(results: &'a Value, name: &str) -> &'a str {
    let entries = results["entries"].as_array().unwrap();
    let entry = entries.iter().find(|entry| entry["name"] == name);
    entry.unwrap_or_else(|| panic!("no {name} in {entries:#?}"))["status"].as_str().unwrap()
}

pub fn outcomes_are_distinguished() {
    let folder = folder("outcomes_are_distinguished");
    let (bundle, out) = (bundle(&folder), folder.join("out"));
    for (device, simulated) in [("Some GPU", false), ("cudasim (CPU simulation)", true)] {
        let driver = driver(&folder, device);
        let _ = std::fs::remove_dir_all(&out);
        let (output, said) = run(
            &bundle.join("suite"),
            true,
            &[&"run", &out, &"--driver", &driver, &"--limit", &"10"],
        );
        assert_eq!(output.status.code(), Some(1), "{said}");
        let results = results(&out);
        assert_eq!(
            (&results["complete"], &results["simulated"]),
            (&true.into(), &simulated.into())
        );
        let ends = ["good", "partly", "unable", "silent", "bad", "hangs"]
            .map(|test| status(&results, &format!("device {test}")));
        assert_eq!(
            ends,
            ["passed", "passed", "skipped", "failed", "failed", "timed-out"],
            "{said}"
        );
        // From a program with other tests, only those that need a driver.
        assert!(said.contains("kernels ptx::good") && !said.contains("sass::other"), "{said}");
        let log = std::fs::read_to_string(out.join("device-good.log")).unwrap();
        assert!(log.contains(&format!("good on {}, 1, ", driver.display())), "{log}");
        // Nothing that a simulation gives is a time or looks like one.
        let expected = if simulated { "skipped" } else { "passed" };
        assert_eq!(status(&results, "compute-sanitizer racecheck"), expected, "{said}");
        assert_eq!(
            status(&results, if simulated { "allreduce-bench" } else { "allreduce-bench gpt2" }),
            expected
        );
        let bench = if simulated { "bench average, not timed" } else { "bench average" };
        assert_eq!(status(&results, bench), "passed", "{said}");
        let log = if simulated { "bench-average-not-timed.log" } else { "bench-average.log" };
        let arguments = std::fs::read_to_string(out.join(log)).unwrap();
        assert_eq!(arguments.trim(), if simulated { "--test" } else { "--bench" });
        assert!(
            said.contains("SIMULATED") == simulated && said.contains("2 failed, 1 timed-out"),
            "{said}"
        );
    }
}

/// Tests whose line matches run; an expression that matches none is a failure.
pub fn some_tests_run() {
    let folder = folder("some_tests_run");
    let (bundle, driver) = (bundle(&folder), driver(&folder, "Some GPU"));
    for (only, code, runs) in [("ptx::|partly$", 0, 2), ("nothing", 1, 0)] {
        let out = folder.join(only.replace('|', "-"));
        let (output, said) = run(
            &bundle.join("suite"),
            true,
            &[&"run", &out, &"--driver", &driver, &"--only", &only],
        );
        assert_eq!(output.status.code(), Some(code), "{said}");
        let results = results(&out);
        let entries = results["entries"].as_array().unwrap();
        let names = entries.iter().filter_map(|entry| entry["name"].as_str());
        let tests = names.filter(|name| name.starts_with("device ") || name.contains("ptx::"));
        assert_eq!(tests.count(), runs, "{said}");
        assert_eq!(said.contains("no test matches it"), runs == 0, "{said}");
        assert_eq!(status(&results, "bench average"), "passed", "{said}");
    }
    let (output, said) = run(&bundle.join("suite"), true, &[&"run", &"out", &"--only", &"("]);
    assert!(output.status.code() == Some(2) && said.contains("no regular expression"), "{said}");
}

/// A slot goes on after a part that hangs, ends in time, and writes its page.
pub fn a_slot_survives_a_part_that_hangs() {
    let folder = folder("a_slot_survives_a_part_that_hangs");
    let (bundle, out) = (bundle(&folder), folder.join("out"));
    let driver = driver(&folder, "Some GPU");
    // The bench writes rows for the page; the former way fails, which is a finding.
    let row = r#"[{"dtype": "f32", "algorithm": "direct", "time_us": 510.0}]"#;
    let programs = [
        ("allreduce-bench", format!("for file; do :; done\n[ $# -lt 2 ] || echo '{row}' >$file\n")),
        ("device", "echo 'RAN it []'; [ -z \"$PA_FORMER_WAY\" ]\n".to_owned()),
    ];
    let mut manifest: Value =
        serde_json::from_slice(&std::fs::read(bundle.join("MANIFEST.json")).unwrap()).unwrap();
    for (name, text) in programs {
        std::fs::write(bundle.join(name), format!("#!/bin/sh\n{text}")).unwrap();
        let sum = Command::new("sha256sum").arg(bundle.join(name)).output().unwrap().stdout;
        manifest["files"][name]["sha256"] = String::from_utf8(sum).unwrap()[..64].into();
    }
    std::fs::write(bundle.join("MANIFEST.json"), manifest.to_string()).unwrap();
    let suite = bundle.join("suite");
    let (output, said) = run(&suite, false, &[&"slot", &out, &"--driver", &driver, &"--hang"]);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let results = results(&out);
    assert_eq!(status(&results, "a part that hangs"), "found", "{said}");
    assert_eq!(status(&results, "former way, threads alloc ring 0,0"), "found", "{said}");
    assert_eq!(status(&results, "threads alloc ring 0,0"), "passed", "{said}");
    assert_eq!(status(&results, "bench direct-2"), "passed", "{said}");
    let page = std::fs::read_to_string(out.join("page.md")).unwrap();
    assert!(page.contains("| 2, direct, f32 | 0.51 | 0.52 | 0.49 |"), "{page}");
    assert!(page.contains("| a part that hangs | found |"), "{page}");
    // A slot that is over begins nothing more.
    let _ = std::fs::remove_dir_all(&out);
    let (_, said) = run(&suite, false, &[&"slot", &out, &"--driver", &driver, &"--seconds", &"4"]);
    assert!(said.contains("the time of the slot is over"), "{said}");
}

pub fn refusals_name_the_reason() {
    let folder = folder("refusals_name_the_reason");
    let (bundle, out, driver) = (bundle(&folder), folder.join("out"), driver(&folder, "Some GPU"));
    let refused = |suite: &Path, arguments: &[&dyn AsRef<OsStr>], words: &str| {
        let (output, said) = run(suite, false, arguments);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(words) && !said.contains("passed"), "{words}: {said}");
    };
    let (suite, itself) = (bundle.join("suite"), Path::new(SUITE));
    refused(&suite, &[], "bundle | run");
    refused(&suite, &[&"run"], "OUT");
    refused(&suite, &[&"bundle"], "DIR");
    refused(&suite, &[&"bundle", &out], "runs in a checkout");
    refused(itself, &[&"bundle", &bundle], "is not an empty folder");
    refused(itself, &[&"run", &out], "this is no bundle");
    refused(&suite, &[&"run", &bundle, &"--driver", &driver], "is not an empty folder");
    refused(&suite, &[&"run", &out, &"--driver", &folder], "holds no libcuda.so.1");
    let broken = folder.join("broken");
    std::fs::create_dir_all(&broken).unwrap();
    std::fs::write(broken.join("libcuda.so.1"), "not a library").unwrap();
    refused(&suite, &[&"run", &out, &"--driver", &broken], "no CUDA driver that works");
    std::fs::write(bundle.join("average"), "changed on the way").unwrap();
    refused(&suite, &[&"run", &out, &"--driver", &driver], "is not what was bundled");
    assert!(!out.exists());
}

/// Asks a cargo that does not build for the bundle's targets.
pub fn bundles_are_of_default_members() {
    let folder = folder("bundles_are_of_default_members");
    let (asked, cargo) = (folder.join("asked"), folder.join("cargo"));
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = build ] || exec {} \"$@\"\necho \"$@\" >{}\nexit 1\n",
        env!("CARGO"),
        asked.display()
    );
    std::fs::write(&cargo, text).unwrap();
    assert!(Command::new("chmod").arg("+x").arg(&cargo).status().unwrap().success());
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("python3");
    command.arg(SUITE).arg("bundle").arg(folder.join("bundle")).env("PATH", path);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let asked = std::fs::read_to_string(asked).unwrap();
    let words: Vec<&str> = asked.split_whitespace().collect();
    let is_target = |kind: &str| ["--bin", "--bench", "--test"].contains(&kind);
    let pairs = words.windows(2).filter(|pair| is_target(pair[0]));
    let wanted: Vec<&str> = pairs.map(|pair| pair[1]).collect();
    assert!(wanted.contains(&"allreduce-bench") && wanted.contains(&"device"), "{asked}");
    for target in &wanted {
        let known = ["allreduce-bench", "average", "cuda", "device", "kernels"].contains(target);
        assert!(known, "{target} is no target of a default member: {asked}");
    }
}
