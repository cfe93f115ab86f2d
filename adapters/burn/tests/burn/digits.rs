//! The trainer in `examples/`, which `cargo test` has built.

use std::process::Command;

/// Accuracy and what follows it, up to the time, that the example prints.
fn learned(arguments: &[&str]) -> String {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples");
    let mut command = Command::new(folder.join("burn-digits"));
    for variable in ["RANK", "WORLD_SIZE", "PARAM_AVERAGER_RENDEZVOUS"] {
        command.env_remove(variable);
    }
    let output = command.args(["--epochs", "3"]).args(arguments).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let found = text.split_once("accuracy ").and_then(|(_, rest)| rest.rsplit_once(','));
    found.expect("an accuracy and a time").0.to_owned()
}

/// Two ranks learn the digits as threads and as processes, to the same bits.
#[test]
fn digits_are_learned_by_threads_and_processes() {
    let found = learned(&[]);
    let percent: f64 = found.split_once(' ').unwrap().0.parse().unwrap();
    assert!(percent > 80.0, "{found}");
    if cfg!(target_os = "linux") {
        assert_eq!(learned(&["--processes"]), found);
    }
}
