//! The programs in `examples/`: each runs, ends, and prints what it promises.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Path of an example. `cargo test` builds all of them; `cargo test --test examples` may not.
fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples");
    let program = folder.join(name);
    if !program.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        let built = cargo.args(["build", "--quiet", "--example", name]).status();
        assert!(built.unwrap().success(), "{name} does not build");
    }
    program
}

/// Folder of a simulated driver, for the examples on CUDA devices: `CUDASIM_LIB`, or where the
/// tests of devices build it. `PARAM_AVERAGER_GPU=1` is this machine's own.
fn simulator() -> Option<PathBuf> {
    if std::env::var("PARAM_AVERAGER_GPU").is_ok_and(|value| value == "1") {
        return None;
    }
    let built = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cudasim");
    let folder = std::env::var_os("CUDASIM_LIB").map_or(built, PathBuf::from);
    folder.join("libcuda.so.1").is_file().then_some(folder)
}

/// Success of an example, the lines that it printed, sorted, and its errors.
fn run(name: &str) -> (bool, Vec<String>, String) {
    run_on("1", name, &[])
}

/// [`run`] with that many simulated CUDA devices, and arguments.
fn run_on(devices: &str, name: &str, arguments: &[&str]) -> (bool, Vec<String>, String) {
    let mut command = Command::new(built(name));
    command.args(arguments);
    // A launcher's variables for this test are not the example's.
    for variable in ["RANK", "WORLD_SIZE", "PARAM_AVERAGER_RENDEZVOUS"] {
        command.env_remove(variable);
    }
    if let Some(folder) = simulator() {
        command.env("LD_LIBRARY_PATH", folder).env("CUDASIM_DEVICES", devices);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{name} hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let mut lines: Vec<_> = text(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    (output.status.success(), lines, text(&output.stderr))
}

fn prints(name: &str, expected: &[&str]) {
    let (ends_well, lines, errors) = run(name);
    assert!(ends_well, "{name}: {lines:#?}\n{errors}");
    assert_eq!(lines, expected, "{name}: {errors}");
}

#[test]
fn threads_learn_one_line() {
    prints("threads", &["rank 0: y = 3.000 x + 1.000", "rank 1: y = 3.000 x + 1.000"]);
}

/// Two ranks learn the digits as threads and as processes, to the same bits.
#[test]
#[cfg(all(target_os = "linux", feature = "processes"))]
fn digits_are_learned_by_threads_and_processes() {
    let learned = [&[][..], &["--processes"]].map(|how| {
        let (ends_well, lines, errors) = run_on("1", "digits", &[&["--epochs", "3"], how].concat());
        assert!(ends_well && lines.len() == 1, "{lines:#?}\n{errors}");
        let found = lines[0].split_once("accuracy ").and_then(|(_, rest)| rest.rsplit_once(','));
        let found = found.map(|(found, _time)| found.to_owned()).expect("an accuracy and a time");
        let percent: f64 = found.split_once(' ').unwrap().0.parse().unwrap();
        assert!(percent > 80.0, "{found}");
        found
    });
    assert_eq!(learned[0], learned[1]);
}

/// Ranks learn other weights with an outer optimizer, also as processes; a text that names none is
/// refused, with those that there are.
#[test]
#[cfg(all(target_os = "linux", feature = "processes"))]
fn digits_are_learned_with_an_outer_optimizer() {
    let learned = ["mean", "diloco", "ease(0.5)"].map(|outer| {
        let arguments = ["--epochs", "3", "--every", "16", "--outer", outer];
        let [threads, processes] = [&[][..], &["--processes"]].map(|how| {
            let (ends_well, lines, errors) = run_on("1", "digits", &[&arguments, how].concat());
            assert!(ends_well && lines.len() == 1, "{lines:#?}\n{errors}");
            lines[0].rsplit_once(',').expect("a time").0.to_owned()
        });
        assert_eq!(threads, processes);
        let percent = threads.split_once("accuracy ").and_then(|(_, rest)| rest.split_once(' '));
        assert!(percent.unwrap().0.parse::<f64>().unwrap() > 70.0, "{threads}");
        threads
    });
    for (line, outer) in learned.iter().zip(["mean()", "nesterov(0.7, 0.9)", "sgd(1).keeping(0.5)"])
    {
        assert!(line.contains(&format!("H 16, {outer}, seed 1")), "{line}");
    }
    let found = learned.each_ref().map(|line| line.split_once("accuracy ").unwrap().1);
    assert!(found[0] != found[1] && found[0] != found[2], "{found:?}");
    for wrong in [&["--outer", "dilco"][..], &["--outer"]] {
        let (ends_well, _, errors) = run_on("1", "digits", wrong);
        assert!(!ends_well && errors.contains("use mean, sgd(lr)"), "{errors}");
    }
}

#[test]
fn weighted_mean_counts_samples() {
    prints("weighted", &["rank 0: 104", "rank 1: 104"]);
}

#[test]
#[cfg(all(target_os = "linux", feature = "processes"))]
fn processes_average() {
    prints("processes", &["rank 0 of 3: 1", "rank 1 of 3: 1", "rank 2 of 3: 1"]);
}

#[test]
#[cfg(all(target_os = "linux", feature = "processes"))]
fn recover_goes_on_without_a_rank() {
    let (ends_well, lines, errors) = run("recover");
    assert!(ends_well, "{lines:#?}\n{errors}");
    let (become_, lost): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.contains("become"));
    let expected = ["rank 0 has become rank 0 of 2: 1", "rank 2 has become rank 1 of 2: 1"];
    assert_eq!(become_, expected.each_ref(), "{errors}");
    assert!(lost.iter().all(|line| line.contains("rank 1 has left the world")), "{lost:?}");
    assert_eq!(lost.len(), 2, "{lost:?}");
}

#[test]
#[cfg(all(target_os = "linux", feature = "processes"))]
fn join_gets_the_model() {
    prints("join", &["rank 0 of 3: 7", "rank 1 of 3: 7", "rank 2 of 3: 7"]);
}

/// Asserts that an example prints the mean on a GPU or a simulated one, and this crate's typed
/// error elsewhere.
#[cfg(feature = "cuda")]
fn cuda(devices: &str, name: &str) {
    let (ends_well, lines, errors) = run_on(devices, name, &[]);
    let means = lines.iter().filter(|line| line.ends_with("the mean is 0.5")).count();
    let is_typed = ["DeviceUnavailable", "CudaUnavailable"].iter().any(|it| errors.contains(it));
    match ends_well {
        true => assert_eq!(means, 2, "{name}: {lines:#?}"),
        false => assert!(is_typed && lines.is_empty(), "{name}: {lines:#?}\n{errors}"),
    }
}

#[test]
#[cfg(feature = "cuda")]
fn cuda_examples_average_or_say_why_not() {
    ["cuda_stream", "cuda_graph", "cudarc"].iter().for_each(|name| cuda("1", name));
    ["1", "2"].iter().for_each(|devices| cuda(devices, "cuda_raw"));
}

/// Programs in README, rustdoc and the examples, which users copy, drop no rank's handle: with a
/// dropped handle a program would exit with 0 in spite of the rank's error.
#[test]
fn no_program_drops_a_handle() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders = vec![root.join("src"), root.join("examples")];
    let mut texts = vec![root.join("README.md")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { &mut folders } else { &mut texts }.push(path);
        }
    }
    let mut programs = 0;
    for path in texts {
        let text = std::fs::read_to_string(&path).unwrap();
        let is_program = |line: &&str| {
            let is_rust = path.extension().is_some_and(|extension| extension == "rs");
            !is_rust || path.starts_with(root.join("examples")) || line.contains("//")
        };
        let runs = |line: &&str| line.contains("spawn(") || line.contains("Communicator::run(");
        for line in text.lines().filter(is_program).filter(runs) {
            programs += 1;
            let code = line.trim_start_matches(['/', '!', ' ']);
            let is_dropped = code.starts_with("std::thread::spawn(") || code.starts_with("scope.");
            assert!(!is_dropped, "{}: {line}", path.display());
        }
    }
    assert!(programs >= 8, "{programs}: this test has lost what it looks at");
}
