//! The examples that train, for a pass over the data or less: they end, learn, and threads and
//! processes agree.

use std::path::PathBuf;
use std::process::Command;

/// Path of an example. `cargo test` builds all of them; `cargo test --test examples` may not.
fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(|deps| deps.parent()).unwrap().join("examples").join(name);
    if !program.exists() {
        let mut cargo = Command::new(env!("CARGO"));
        let built = cargo.args(["build", "--quiet", "--example", name]).status();
        assert!(built.unwrap().success(), "{name} does not build");
    }
    program
}

/// Output of an example.
fn run(name: &str, arguments: &str) -> String {
    let mut command = Command::new(built(name));
    // A launcher's variables for this test are not the example's.
    for variable in ["RANK", "WORLD_SIZE", "PARAM_AVERAGER_RENDEZVOUS"] {
        command.env_remove(variable);
    }
    let output = command.args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Columns of the CSV's rows: step, averages, bytes sent, loss and accuracy.
fn columns(text: &str) -> Vec<Vec<f64>> {
    let row = |line: &str| line.split(',').take(5).map(|it| it.parse().unwrap()).collect();
    text.lines().skip(1).map(row).collect()
}

#[test]
fn digits_learns_and_threads_and_processes_agree() {
    let threads = columns(&run("digits", "--ranks 2 --every 8 --epochs 3"));
    let (first, last) = (&threads[0], &threads[threads.len() - 1]);
    assert_eq!((last[0], last[1]), (132.0, 17.0), "steps, and averages with the last one");
    assert_eq!(last[2], 17.0 * 4.0 * (3.0 * (64.0 * 64.0 + 64.0) + 650.0));
    assert!(last[4] > 0.8 && last[3] < first[3] / 2.0, "{threads:?}");
    let processes = columns(&run("digits", "--ranks 2 --every 8 --epochs 3 --processes"));
    assert_eq!(threads, processes); // two ranks: the same bits by either algorithm
}

#[test]
fn chars_learns() {
    let points = columns(&run("chars", "--ranks 2 --every 4 --epochs 0.05"));
    let (first, last) = (&points[0], &points[points.len() - 1]);
    assert!(last[3] < first[3] - 0.5, "{points:?}");
}

#[test]
fn curves_writes_rows_and_pictures() {
    let folder = std::env::temp_dir().join(format!("candle-curves-{}", std::process::id()));
    let path = folder.display();
    run("curves", &format!("all {path} --seeds 1 --digits-epochs 3 --chars-epochs 0.004"));
    for (task, kinds) in [("digits", 22), ("chars", 4)] {
        let rows = std::fs::read_to_string(folder.join(format!("{task}.csv"))).unwrap();
        let starts = rows.lines().filter(|line| line.split(',').nth(8) == Some("0")).count();
        assert_eq!(starts, kinds, "runs of {task}");
        let picture = std::fs::read_to_string(folder.join(format!("{task}.svg"))).unwrap();
        for text in ["H = 64", "MB that each rank has sent", "seconds over 1 Gbit/s, computed"] {
            let wanted = task == "digits" || text != "H = 64"; // too short for a curve
            assert!(!wanted || picture.contains(text), "{task}: {text}");
        }
        let table = std::fs::read_to_string(folder.join(format!("{task}.md"))).unwrap();
        assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), kinds + 1);
    }
    let outer = format!("outer {path}/outer --seeds 1 --digits-epochs 6 --chars-epochs 0");
    run("curves", &outer);
    let folder_of_outer = folder.join("outer");
    let record = folder_of_outer.join("digits.csv");
    let rows = std::fs::read_to_string(&record).unwrap();
    run("curves", &outer); // which has no run left to make
    assert_eq!(std::fs::read_to_string(&record).unwrap(), rows);
    for (outer, runs) in
        [("mean()", 13), ("\"nesterov(0.7, 0.9)\"", 2), ("\"momentum(1, 0.5)\"", 2)]
    {
        let starts = rows.lines().filter(|line| {
            line.split(',').nth(8) == Some("0") && line.contains(&format!(",{outer},"))
        });
        assert_eq!(starts.count(), runs, "{outer}: {rows}");
    }
    let picture = std::fs::read_to_string(folder_of_outer.join("digits.svg")).unwrap();
    assert!(["DiLoCo, H = 64", "QSR from 8", "1 rank"].iter().all(|text| picture.contains(text)));
    let table = std::fs::read_to_string(folder_of_outer.join("digits.md")).unwrap();
    assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), 24, "{table}");
    std::fs::remove_dir_all(folder).unwrap();
}
