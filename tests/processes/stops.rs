//! Ranks that are stopped while they meet, build or recover: the others name them in time, and the
//! stopped ranks get an error when they go on.

use rustix::process::Signal;

use test_support::process::{name, start, start_all, RankProcess};

/// Timeout of the stage that fails, in ms: longer than a busy machine delays a rank.
const SHORT_MS: u64 = 6000;
/// Timeout of the other stages, in ms.
const LONG_MS: u64 = 20_000;

/// Makes a rank say soon that it waits: by then it has sent its message.
fn patience() -> (&'static str, String) {
    ("PA_TEST_PATIENCE_MS", "200".to_owned())
}

/// Timeouts of the rendezvous, and of builds and recoveries, in ms.
fn timeouts(meet: u64, build: u64) -> [(&'static str, String); 2] {
    [("PA_TEST_MEET_MS", meet.to_string()), ("PA_TEST_TIMEOUT_MS", build.to_string())]
}

/// Runs cases that take long at the same time.
fn at_once<T: Send>(cases: impl IntoIterator<Item = T>, case: impl Fn(T) + Sync) {
    let case = &case;
    std::thread::scope(|scope| {
        for each in cases {
            scope.spawn(move || case(each));
        }
    });
}

/// Starts n ranks, of which `stopped` stops itself at `place`.
fn stopped_at(
    n: usize,
    stopped: usize,
    place: &str,
    timeouts: [(&'static str, String); 2],
) -> Vec<RankProcess> {
    let mut ranks = start_all("stages", n, |rank| {
        let stop = (rank == stopped).then(|| ("PA_TEST_STOP_AT", place.to_owned()));
        timeouts.clone().into_iter().chain(stop).collect()
    });
    ranks[stopped].wait_for("stopping");
    ranks
}

/// Asserts that all ranks but `except` end by `code`, with errors of which each holds one of
/// `with`.
fn ends(ranks: &mut [RankProcess], except: usize, code: i32, with: &[&str]) {
    for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != except) {
        assert_eq!(process.end(), Some(code), "rank {rank}: {:#?}", process.output);
        let errors = process.said("error");
        assert!(
            with.iter().any(|with| errors[0].contains(with)),
            "rank {rank}: {errors:?} without {with:?}"
        );
    }
}

/// Continues a stopped rank, which ends by one of these errors.
fn wakes(rank: &mut RankProcess, with: &[&str]) {
    rank.signal(Signal::CONT);
    assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
    let errors = rank.said("error");
    assert!(with.iter().any(|with| errors[0].contains(with)), "{errors:?} without {with:?}");
}

/// Error of the other ranks when rank 0 is silent until their timeout.
const NO_HOST: &str = "was not found on this host within";

pub fn rank_stopped_before_the_rendezvous() {
    at_once([0, 2], |stopped| {
        let mut ranks = stopped_at(3, stopped, "join", timeouts(SHORT_MS, LONG_MS));
        // Rank 1 may be late, too.
        let late = ["did not arrive within 6s: 2", "did not arrive within 6s: 1, 2", NO_HOST];
        let missing = if stopped == 0 { &[NO_HOST][..] } else { &late };
        ends(&mut ranks, stopped, 3, missing);
        let alone = if stopped == 0 { "did not arrive within 6s: 1, 2" } else { NO_HOST };
        wakes(&mut ranks[stopped], &[alone]);
    });
}

/// The stopped rank has connected, so the world begins, but it does not receive that message.
pub fn rank_stopped_while_it_waits_for_the_others() {
    at_once([0, 2], |stopped| {
        let world = name();
        let come = |rank: usize| {
            let mut variables =
                timeouts(if stopped == 0 { SHORT_MS } else { LONG_MS }, SHORT_MS).to_vec();
            variables.extend([
                ("PA_TEST_RANK", rank.to_string()),
                ("PA_TEST_WORLD", "3".into()),
                ("PA_TEST_NAME", world.clone()),
                patience(),
            ]);
            start("stages", &variables)
        };
        let mut ranks = vec![come(0)];
        ranks[0].wait_for("notice 0: after 200ms, rank 0 of 3 waits for ranks 1, 2"); // it listens
        if stopped == 0 {
            ranks[0].signal(Signal::STOP);
            ranks.extend([come(1), come(2)]);
            ends(&mut ranks, 0, 3, &[NO_HOST]);
            // Their messages may still be in the socket, or not; in both cases rank 0 is alone.
            ranks[0].signal(Signal::CONT);
            ranks[0].ask_to_end();
            assert!([Some(0), Some(3)].contains(&ranks[0].end()), "{:#?}", ranks[0].output);
            let errors = [ranks[0].said("error"), ranks[0].said("failed")].concat();
            let why = ["did not arrive within", "has left the world while building"];
            assert!(why.iter().any(|why| errors[0].contains(why)), "{errors:?}");
            return;
        }
        let mut waiting = come(2);
        waiting.wait_for("notice 2: after 200ms, rank 2 of 3 waits for rank 0");
        waiting.signal(Signal::STOP);
        ranks.extend([come(1), waiting]);
        go_on_without(&mut ranks, 2);
    });
}

/// The others report the stopped rank as late, and go on without it, before it continues.
fn go_on_without(ranks: &mut [RankProcess], stopped: usize) {
    for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != stopped) {
        assert_eq!(process.wait_for("averaged"), "2", "rank {rank}");
        let failed = process.said("failed");
        assert!(
            failed[0].starts_with(&format!("rank {stopped} did not move for 6s while building")),
            "{failed:?}"
        );
    }
    wakes(&mut ranks[stopped], &[&format!("rank {stopped} was excluded")]);
    for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| *rank != stopped) {
        process.ask_to_end();
        assert_eq!(process.end(), Some(0), "rank {rank}: {:#?}", process.output);
    }
}

pub fn rank_stopped_before_it_builds() {
    at_once([0, 2], |stopped| {
        go_on_without(&mut stopped_at(3, stopped, "build", timeouts(LONG_MS, SHORT_MS)), stopped);
    });
}

/// Rank 0 is killed. Rank 2 stops before it recovers, and goes on in time. Rank 1 is stopped
/// meanwhile, while it waits for rank 2, so that it has announced that it takes part: ranks 2 and 3
/// build with it, in vain, and then without it.
pub fn rank_stopped_while_it_recovers() {
    let mut ranks = start_all("stages", 4, |rank| {
        let stop = [Some("build"), None, Some("recover"), None][rank];
        timeouts(LONG_MS, SHORT_MS)
            .into_iter()
            .chain([patience()])
            .chain(stop.map(|place| ("PA_TEST_STOP_AT", place.to_owned())))
            .collect()
    });
    ranks[0].wait_for("stopping");
    ranks[0].signal(Signal::KILL);
    ranks[2].wait_for("stopping");
    // It waits for rank 3, too, if that one is late.
    ranks[1].wait_for("recovering");
    ranks[1].wait_for("notice 1: after 200ms, rank 1 waits for ranks 2");
    ranks[1].signal(Signal::STOP);
    ranks[2].signal(Signal::CONT);
    let mut late = 0;
    for rank in &mut ranks[2..] {
        assert_eq!(rank.wait_for("averaged"), "2");
        let failed = rank.said("failed");
        assert!(failed[0].starts_with("rank 0 has left the world while building"), "{failed:?}");
        // Ranks are renumbered: rank 1 has become rank 0. On a busy machine it may have built
        // before it was stopped, or have told one rank so and not the other: that one goes on to
        // the average, until the other leaves to recover.
        let is_late = failed[1].starts_with("rank 0 did not move for 6s");
        let left = "has left the world at the start of an average";
        assert!(is_late || failed[1].contains(left), "{failed:?}");
        late += usize::from(is_late);
    }
    assert!(late > 0, "no rank waited for the stopped one");
    wakes(&mut ranks[1], &["was excluded: it did not reach the recovery"]);
    for rank in &mut ranks[2..] {
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}

/// Waits until a rank has told its peers that it builds, and waits for them.
fn waits_to_build(process: &mut RankProcess, rank: usize) {
    process.wait_for("building");
    process.wait_for(&format!("notice {rank}: after 200ms, rank {rank} waits for rank"));
}

/// Rank 1 dies when it has told the others that it builds, while rank 2 is stopped before that:
/// rank 0 notices long before its timeout.
pub fn a_rank_that_dies_while_another_is_late_to_build_is_lost_at_once() {
    let long = timeouts(LONG_MS, 600_000);
    let mut ranks = start_all("stages", 3, |rank| {
        let stop = (rank == 2).then(|| ("PA_TEST_STOP_AT", "build".to_owned()));
        long.clone().into_iter().chain([patience()]).chain(stop).collect()
    });
    ranks[2].wait_for("stopping");
    // Each may wait for the other one, too; rank 0 has the message of rank 1 in any case.
    ranks[..2].iter_mut().enumerate().for_each(|(rank, process)| waits_to_build(process, rank));
    ranks[1].signal(Signal::KILL);
    let failed = ranks[0].wait_for("failed");
    assert!(failed.starts_with("rank 1 has left the world while building"), "{failed}");
    ranks[2].signal(Signal::CONT);
    for rank in [0, 2] {
        assert_eq!(ranks[rank].wait_for("averaged"), "2", "rank {rank}");
        ranks[rank].ask_to_end();
        assert_eq!(ranks[rank].end(), Some(0), "rank {rank}: {:#?}", ranks[rank].output);
    }
}

pub fn abort_ends_the_wait_of_building_ranks() {
    let mut ranks = start_all("stages", 3, |rank| match rank {
        2 => vec![("PA_TEST_STOP_AT", "abort".to_owned())],
        _ => vec![patience()],
    });
    ranks[2].wait_for("stopping");
    ranks[..2].iter_mut().enumerate().for_each(|(rank, process)| waits_to_build(process, rank));
    ranks[2].signal(Signal::CONT);
    ends(&mut ranks, 3, 3, &["rank 2 aborted the world while building the averager"]);
}
