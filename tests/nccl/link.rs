//! The link itself, with a rank on each host.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use test_support::process::{name, RankProcess};

use crate::hosts::Job;

/// An error that comes before the limit of a minute, on a busy machine.
const EARLY: Duration = Duration::from_secs(45);

fn all_done(mut ranks: Vec<RankProcess>) {
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1);
    }
}

/// Waits for the end of a rank that is to fail, and returns its error.
fn error_of(rank: &mut RankProcess) -> String {
    assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
    rank.said("error").remove(0)
}

/// The error has these words.
fn fails_with(rank: &mut RankProcess, words: &[&str]) {
    let error = error_of(rank);
    assert!(words.iter().all(|word| error.contains(word)), "{error}, not {words:?}");
}

pub fn bytes_arrive_on_all_hosts() {
    for (hosts, ranks) in [(1, 1), (2, 2), (3, 1)] {
        all_done(Job::new(hosts, ranks).start("exchange"));
    }
}

pub fn ids_can_be_passed_by_the_program() {
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-id", name()));
    let job = Job::new(2, 1).with("PA_NCCL_FILE", file.to_str().unwrap());
    all_done(job.start("passed"));
    std::fs::remove_file(file).unwrap();
}

pub fn a_killed_host_is_an_error_of_the_others() {
    let mut ranks = Job::new(3, 1).start("endless");
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let begin = Instant::now();
    ranks[1].signal(Signal::KILL);
    for host in [0, 2] {
        fails_with(&mut ranks[host], &["remote process exited", "NCCL_DEBUG=WARN"]);
    }
    assert!(begin.elapsed() < EARLY);
}

pub fn a_host_that_never_comes_is_an_error_at_the_limit() {
    let short = |hosts| Job::new(hosts, 1).with("PA_NCCL_TIMEOUT_MS", "1500");
    let mut ranks = [
        short(3).start_one("exchange", 0, 0),
        short(2).start_one("exchange", 1, 0),
        short(2).start_one("alone", 0, 0),
    ];
    fails_with(&mut ranks[0], &["rank 0", "hosts [1, 2] have not come for NCCL's id"]);
    fails_with(&mut ranks[1], &["host 0 does not give NCCL's id at 127.0.0.1:", "refused"]);
    fails_with(&mut ranks[2], &["another host is late"]);
}

pub fn a_late_host_is_an_error_at_the_limit() {
    let mut ranks = Job::new(2, 1).start("late");
    ranks[1].wait_for("ready");
    let error = ranks[0].wait_for("found");
    assert!(error.contains("another host is late"), "{error}");
    // The other finds the link closed when it calls, but for what was sent to it before.
    let begin = Instant::now();
    ranks[1].tell("go");
    let error = ranks[1].wait_for("found");
    assert!(error.contains("remote process exited") && begin.elapsed() < EARLY, "{error}");
    for rank in &mut ranks {
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}

pub fn an_aborted_link_is_an_error_of_the_others() {
    let mut ranks = Job::new(2, 1).start("aborted");
    ranks[1].wait_for("ready");
    let begin = Instant::now();
    ranks[0].tell("abort");
    let error = ranks[1].wait_for("found");
    assert!(error.contains("remote process exited") && begin.elapsed() < EARLY, "{error}");
    ranks[0].ask_to_end();
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}

pub fn faults_of_nccl_are_errors() {
    let one = |name, value: &str| Job::new(1, 1).with(name, value).start("exchange").remove(0);
    let nowhere = "/nowhere/libnccl.so.2";
    fails_with(
        &mut one("PARAM_AVERAGER_NCCL", nowhere),
        &[
            "NCCL could not be loaded",
            nowhere,
            "install it",
            "name the file in PARAM_AVERAGER_NCCL",
        ],
    );
    fails_with(&mut one("STANDIN_NCCL", "old"), &["version 22602", "(2.27.3) is needed"]);
    for (name, value) in [("NCCL_COMM_BLOCKING", "1"), ("NCCL_COMM_ID", "127.0.0.1:29500")] {
        fails_with(&mut one(name, value), &[name, value, "unset it on all ranks"]);
    }
    fails_with(&mut one("PA_NCCL_CPU", "1"), &["rank 0 is on a CPU", "Device::cuda"]);
    fails_with(
        &mut one("STANDIN_NCCL", "init"),
        &["unhandled system error; NCCL's last warning: simulated"],
    );
    // Other hosts are told that host 0's NCCL is of no use.
    let job = Job::new(2, 1);
    let mut old = job.variables(0, 0);
    old.push(("STANDIN_NCCL", "old".into()));
    let mut old = test_support::process::start("exchange", &old);
    let text = ["version 22602", "(2.27.3) is needed"];
    let told = ["host 0 has no NCCL id", text[0], text[1]];
    fails_with(&mut job.start_one("exchange", 1, 0), &told);
    fails_with(&mut old, &text);
    for mut rank in Job::new(2, 1).with("STANDIN_NCCL", "group").start("exchange") {
        let error = error_of(&mut rank);
        let early = ["unhandled system error", "remote process exited"];
        assert!(early.iter().any(|text| error.contains(text)), "{error}");
    }
    // Bytes that have arrived are there, whatever fails behind them.
    let mut ranks = Job::new(2, 1).with("STANDIN_NCCL", "after").start("arrived");
    ranks.iter_mut().for_each(|rank| fails_with(rank, &["remote process exited"]));
    // ncclCommAbort does not return, but `abort` does.
    let job = Job::new(2, 1);
    let mut blocked = job.variables(0, 0);
    blocked.push(("STANDIN_NCCL", "abort".into()));
    let mut first = test_support::process::start("aborted", &blocked);
    let mut second = job.start_one("aborted", 1, 0);
    second.wait_for("ready");
    first.tell("abort");
    first.wait_for("aborted");
    first.ask_to_end();
    assert_eq!(first.end(), Some(0), "{:#?}", first.output);
    second.wait_for("found"); // the process that has ended is no rank any more
}

pub fn hosts_that_differ_are_refused() {
    // Two hosts with one number, and one of another run.
    let (job, begin) = (Job::new(3, 1).with("PA_NCCL_TIMEOUT_MS", "45000"), Instant::now());
    let mut first = job.start_one("exchange", 0, 0);
    let mut other_run = job.variables(2, 0);
    other_run.push(("TORCHELASTIC_RUN_ID", "another".into()));
    let mut other_run = test_support::process::start("exchange", &other_run);
    fails_with(&mut other_run, &["host 0 belongs to another run of the launcher"]);
    let twice = |restart: &str| {
        let mut variables = job.variables(1, 0);
        variables.push(("TORCHELASTIC_RESTART_COUNT", restart.into())); // a world of its own
        test_support::process::start("exchange", &variables)
    };
    for rank in [&mut twice("1"), &mut twice("2"), &mut first] {
        fails_with(rank, &["host 1 has come twice: give each host a number of its own"]);
    }
    assert!(begin.elapsed() < EARLY);
}
