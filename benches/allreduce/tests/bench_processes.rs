//! `allreduce-bench --processes`: started by itself, by a shell and by mpirun; right, wrong, and
//! with a rank that is killed.
#![cfg(target_os = "linux")]

use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};
use serde_json::Value;
use test_support::{tests, Skip};

fn command(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    command.args(["--processes"]).args(line.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Standard output and standard error.
fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// Waits, but not for ever.
fn ended(mut child: Child) -> Output {
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it hangs: {:?}", text(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// Processes whose parent this is, and that are not dead.
fn children(parent: u32) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
        let (state, of) = state(pid)?;
        (of == parent && state != "Z").then(|| Pid::from_raw(pid))?
    });
    let mut processes: Vec<Pid> = processes.collect();
    processes.sort_by_key(|pid| pid.as_raw_nonzero());
    processes
}

/// The state of a process, and its parent.
fn state(pid: i32) -> Option<(String, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    Some((words.next()?.into(), words.next()?.parse().ok()?))
}

fn wait_for<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A table with the rows of processes and threads, in which all is right.
fn is_right(printed: &str, rows: usize) {
    let lines: Vec<Vec<&str>> = printed
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), rows, "{printed}");
    for pair in lines.chunks(2) {
        assert!(pair[0].contains(&"processes") && pair[1].contains(&"threads"), "{printed}");
        assert!(pair.iter().all(|row| row[row.len() - 2] == "0"), "{printed}");
        assert!(pair[0].last().unwrap().parse::<f64>().unwrap() > 0.0, "{printed}");
    }
    assert!(printed.contains("Out of bounds values : 0 OK"), "{printed}");
}

fn worlds_of_2_and_4_are_right_and_recorded() {
    for (ranks, flags, rows) in [
        (2, "-b 1000 -e 64K -f 8 -d all", 24),
        (4, "--layout gpt2 --scale 0.0001", 2),
        (
            3,
            "-b 10001 -e 10001 -d all --no-commit --weighted --narrow-wire --chunk 1K --channels 2",
            8,
        ),
    ] {
        let folder = env!("CARGO_TARGET_TMPDIR");
        let (json, csv) =
            (format!("{folder}/processes-{ranks}.json"), format!("{folder}/processes-{ranks}.csv"));
        let line = format!("-g {ranks} -n 3 -w 1 {flags} --json {json} --csv {csv}");
        let output = ended(command(&line).spawn().unwrap());
        let (printed, said) = text(&output);
        assert_eq!((output.status.code(), said.as_str()), (Some(0), ""), "{printed}");
        is_right(&printed, rows);
        assert!(printed.contains(&format!("# start     {ranks} processes: ")), "{printed}");

        let records: Vec<Value> =
            serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
        assert_eq!(records.len(), rows);
        for pair in records.chunks(2) {
            for (record, ranks_are) in pair.iter().zip(["processes", "threads"]) {
                assert_eq!(record["ranks_are"], ranks_are);
                assert_eq!((&record["wrong"], &record["ranks"]), (&0.into(), &ranks.into()));
                assert_eq!(record["algorithm"], "ring");
                assert!(record["start_ms"].as_f64().unwrap() > 0.0);
            }
            // Mailboxes are 4 slots of 256 KiB or less, whatever the tensors; a page is the least.
            let extra = pair[0]["extra_rss_bytes"].as_u64().unwrap();
            assert!((4096..64 << 20).contains(&extra), "{extra}");
            assert!(pair[1]["extra_rss_bytes"].is_null());
            let number = |index: usize, field: &str| pair[index][field].as_f64().unwrap();
            let ratio = number(0, "time_us") / number(1, "time_us");
            assert!((number(0, "ratio_to_threads") / ratio - 1.0).abs() < 0.01, "{pair:?}");
        }
        let csv = std::fs::read_to_string(csv).unwrap();
        assert!(csv
            .lines()
            .next()
            .unwrap()
            .ends_with(",ranks_are,ratio_to_threads,start_ms,extra_rss_bytes"));
        assert_eq!(csv.lines().count(), rows + 1);
    }
}

fn a_wrong_element_of_one_process_is_seen() {
    let output = ended(command("-g 3 -b 64K -e 64K -d all -n 1 -w 0 --corrupt").spawn().unwrap());
    let (printed, said) = text(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(printed.contains("Out of bounds values : 8 FAILED"), "{printed}");
    assert!(said.starts_with("error: 8 elements"), "{said}");
}

fn wrong_command_lines_say_what_to_do() {
    for (line, code, says) in [
        ("--backend cuda", 2, "on CPUs only"),
        ("--algorithm ring,direct", 2, "share an address space"),
        ("--baseline", 2, "the same ring between threads"),
        ("-g 2,4", 2, "one number with -g"),
        ("-b 2M -e 1M", 2, "swap them"),
        ("-b 1K -e 1K --slots 3", 2, "a power of two"),
        ("-b 1K -e 1K --json /nowhere/at/all.json", 1, "cannot write /nowhere/at/all.json"),
        ("-b 1T -e 1T -g 16", 1, "GiB of memory"),
    ] {
        let output = ended(command(line).spawn().unwrap());
        let (_, said) = text(&output);
        assert_eq!(output.status.code(), Some(code), "{line}: {said}");
        assert!(said.starts_with("error: ") && said.contains(says), "{said} does not say {says}");
        assert!(!said.contains("killed"), "{said}");
    }
}

fn closed_output_is_no_error() {
    let mut child = command("-b 1K -e 1M -n 2").spawn().unwrap();
    drop(child.stdout.take());
    let output = ended(child);
    assert_eq!((output.status.code(), text(&output).1.as_str()), (Some(0), ""));
}

/// More than a test waits for.
const LONG: &str = "-g 3 -b 1K -e 1M -n 1000000";

fn killed_rank_is_named_and_no_rank_hangs() {
    for killed in 0..3 {
        let child = command(LONG).spawn().unwrap();
        let me = child.id();
        let ranks = wait_for("three ranks", || Some(children(me)).filter(|ranks| ranks.len() == 3));
        std::thread::sleep(Duration::from_millis(300 * (killed as u64 + 1)));
        kill_process(ranks[killed], Signal::KILL).unwrap();
        let begin = Instant::now();
        let output = ended(child);
        let (_, said) = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("error: rank {killed} was killed by signal 9")), "{said}");
        assert!(said.contains(&format!("error: rank {killed} has left the world")), "{said}");
        assert!(!said.contains("did not end"), "after {:?}: {said}", begin.elapsed());
    }
}

fn ranks_end_with_the_process_that_started_them() {
    let mut child = command(LONG).spawn().unwrap();
    let me = child.id();
    let ranks = wait_for("three ranks", || Some(children(me)).filter(|ranks| ranks.len() == 3));
    std::thread::sleep(Duration::from_millis(300));
    child.kill().unwrap();
    child.wait().unwrap();
    let gone = |pid: &Pid| {
        state(pid.as_raw_nonzero().get()).is_none_or(|(state, _)| state == "Z" || state == "X")
    };
    wait_for("the ranks end", || ranks.iter().all(gone).then_some(()));
}

/// Rank `rank` of `world`, as a shell would start it.
fn by_hand(line: &str, rank: usize, world: usize, port: &str) -> Child {
    let (rank, world) = (rank.to_string(), world.to_string());
    let variables = [
        ("RANK", rank.as_str()),
        ("WORLD_SIZE", &world),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", port),
    ];
    command(line).envs(variables).spawn().unwrap()
}

fn a_shell_loop_is_a_launcher() {
    let port = format!("bench-{}", std::process::id());
    let ranks: Vec<Child> =
        (0..3).map(|rank| by_hand("-b 100K -e 100K -n 2", rank, 3, &port)).collect();
    for (rank, child) in ranks.into_iter().enumerate() {
        let output = ended(child);
        let (printed, said) = text(&output);
        assert_eq!((output.status.code(), said.as_str()), (Some(0), ""), "{printed}");
        if rank == 0 {
            is_right(&printed, 2);
        } else {
            assert_eq!(printed, "");
        }
    }
    // The second of these is killed.
    let mut ranks: Vec<Child> = (0..3).map(|rank| by_hand(LONG, rank, 3, &port)).collect();
    std::thread::sleep(Duration::from_millis(800));
    ranks.remove(1).kill().unwrap();
    for child in ranks {
        let output = ended(child);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            text(&output).1.starts_with("error: rank 1 has left the world"),
            "{:?}",
            text(&output)
        );
    }
    // And these were told another number.
    for child in [0, 1].map(|rank| by_hand("-g 3", rank, 2, &port)) {
        let output = ended(child);
        assert_eq!(output.status.code(), Some(2));
        assert!(
            text(&output).1.contains("-g 3, but the launcher has started 2 ranks"),
            "{:?}",
            text(&output)
        );
    }
}

fn mpirun_is_a_launcher() {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--oversubscribe", "--bind-to", "none", "-n", "2"]);
    mpirun.arg(env!("CARGO_BIN_EXE_allreduce-bench")).args([
        "--processes",
        "-b",
        "100K",
        "-e",
        "100K",
        "-n",
        "2",
    ]);
    mpirun
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("NO_COLOR", "1");
    let child = mpirun.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let output = ended(child.unwrap());
    let (printed, said) = text(&output);
    assert!(output.status.success(), "{said}");
    is_right(&printed.replace('\r', ""), 2);
}

/// Skips without an mpirun that is Open MPI's.
fn open_mpi() -> Skip {
    let version = Command::new("mpirun").arg("--version").output();
    let found = version.is_ok_and(|output| text(&output).0.contains("Open MPI"));
    (!found).then(|| "no mpirun of Open MPI: install openmpi-bin".to_owned())
}

fn main() -> ExitCode {
    let open_mpi = open_mpi();
    test_support::main(tests![
        worlds_of_2_and_4_are_right_and_recorded,
        a_wrong_element_of_one_process_is_seen,
        wrong_command_lines_say_what_to_do,
        closed_output_is_no_error,
        killed_rank_is_named_and_no_rank_hangs,
        ranks_end_with_the_process_that_started_them,
        a_shell_loop_is_a_launcher,
        mpirun_is_a_launcher: open_mpi,
    ])
}
