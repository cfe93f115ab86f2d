//! Ranks that wait for long say so once, through `tracing`, with the rank that they wait for.

use std::time::Duration;

use rustix::process::Signal;

use test_support::process::{name, start, start_all, RankProcess};

/// Waits are told of after this time, in ms.
const PATIENCE: &str = "400";

fn stages(n: usize, stops: impl Fn(usize) -> Option<&'static str>) -> Vec<RankProcess> {
    start_all("stages", n, |rank| {
        let stop = stops(rank).map(|place| ("PA_TEST_STOP_AT", place.to_owned()));
        let all = [
            ("PA_TEST_PATIENCE_MS", PATIENCE.to_owned()),
            ("PA_TEST_MEET_MS", "60000".to_owned()),
            ("PA_TEST_TIMEOUT_MS", "50000".to_owned()),
        ];
        all.into_iter().chain(stop).collect()
    })
}

/// Waits for the end of all ranks that are left, each of which has averaged.
fn end(ranks: &mut [RankProcess], members: usize) {
    for rank in ranks.iter_mut() {
        assert_eq!(rank.wait_for("averaged"), members.to_string());
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert!(rank.said("stderr: param-averager").is_empty(), "{:#?}", rank.output);
    }
}

pub fn a_rank_that_waits_to_meet_says_so() {
    let port = name();
    let rank = |rank: usize| {
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "3".to_owned()),
            ("MASTER_PORT", port.clone()),
            ("PA_TEST_MEET_MS", "6000".to_owned()),
            ("PA_TEST_PATIENCE_MS", PATIENCE.to_owned()),
        ];
        start("meet", &variables)
    };
    let join = [
        ("PA_TEST_JOIN", "1".to_owned()),
        ("PA_TEST_NAME", name()),
        ("PA_TEST_MEET_MS", "6000".to_owned()),
        ("PA_TEST_PATIENCE_MS", PATIENCE.to_owned()),
    ];
    let mut ranks = [rank(0), rank(1), start("meet", &join)];
    let waits = [
        // Rank 1 may be late, too.
        &[
            "0: after 400ms, rank 0 of 3 waits for ranks 2",
            "0: after 400ms, rank 0 of 3 waits for \
            ranks 1, 2",
        ][..],
        &["1: after 400ms, rank 1 of 3 waits for rank 0"],
        &[": after 400ms, a process looks for a world named"],
    ];
    for (rank, waits) in ranks.iter_mut().zip(waits) {
        assert_eq!(rank.end(), Some(3));
        let notices = rank.said("notice ");
        let is_right = waits.iter().any(|waits| notices[0].starts_with(waits));
        assert!(notices.len() == 1 && is_right, "{:#?}", rank.output);
        assert!(rank.said("stderr: param-averager").is_empty(), "{:#?}", rank.output);
    }
}

pub fn a_rank_that_waits_to_build_says_so() {
    let mut ranks = stages(3, |rank| (rank == 2).then_some("build"));
    ranks[2].wait_for("stopping");
    // A busy machine may delay further ranks: these are named, too, and so are slow meetings.
    let build = |rank: usize| {
        let begin = format!("notice {rank}: after 400ms, rank {rank} waits for ");
        ["rank 2 to build", "ranks 0, 2 to build", "ranks 1, 2 to build"]
            .map(|ranks| begin.clone() + ranks)
    };
    let of_build = |rank: usize, process: &RankProcess| -> Vec<String> {
        build(rank).iter().flat_map(|begin| process.said(begin)).collect()
    };
    for (rank, process) in ranks[..2].iter_mut().enumerate() {
        while of_build(rank, process).is_empty() {
            process.wait_for_next();
        }
        let notice = of_build(rank, process).remove(0);
        assert!(notice.starts_with("an averager") && notice.ends_with("after 50s"), "{notice}");
    }
    std::thread::sleep(Duration::from_millis(1000)); // time for another one, which there is not
    for (rank, process) in ranks[..2].iter_mut().enumerate() {
        process.listen();
        assert_eq!(of_build(rank, process).len(), 1, "{:#?}", process.output);
    }
    ranks[2].signal(Signal::CONT);
    end(&mut ranks, 3);
}

pub fn a_rank_that_waits_to_recover_says_so() {
    let mut ranks = stages(3, |rank| [Some("build"), None, Some("recover")][rank]);
    ranks[0].wait_for("stopping");
    ranks[0].signal(Signal::KILL);
    ranks[2].wait_for("stopping");
    ranks[1].wait_for("recovering");
    let notice = ranks[1].wait_for("notice 1: after 400ms, rank 1 waits for ranks 2 to recover");
    assert!(notice.contains("50s are left out"), "{notice}");
    ranks[2].signal(Signal::CONT);
    end(&mut ranks[1..], 2);
    for (rank, process) in ranks.iter().enumerate().skip(1) {
        let lost = format!("notice {rank}: the world goes on without rank 0: 2 ranks are left");
        assert_eq!(process.said(&lost).len(), 1, "{:#?}", process.output);
    }
}
