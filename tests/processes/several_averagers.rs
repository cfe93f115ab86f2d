//! Recovery of several averagers of one world after a rank was killed.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use test_support::process::start_all;
use test_support::{count, seed, Random};

/// Every process recovers its averagers in another order, at any point of each average.
pub fn averagers_are_recovered_in_any_order() {
    let rounds = count(3, 30);
    let mut chance = Random(seed());
    for round in 0..rounds {
        let (n, averagers) = (3 + round % 3, 2 + round % 2);
        let deaths = 1 + round / 2 % 2;
        let mut ranks = start_all("many_recover", n, |_| {
            vec![
                ("PA_TEST_FINAL", (n - deaths).to_string()),
                ("PA_TEST_AVERAGERS", averagers.to_string()),
            ]
        });
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        std::thread::sleep(Duration::from_micros(chance.below(30_000)));
        let first = chance.below(n as u64) as usize;
        for dead in (0..deaths).map(|next| (first + next) % n) {
            ranks[dead].signal(Signal::KILL);
            // the next one may be recovering
            std::thread::sleep(Duration::from_micros(chance.below(3_000)));
        }
        let is_dead = |rank: usize| (rank + n - first) % n < deaths;
        for (rank, process) in ranks.iter_mut().enumerate().filter(|(rank, _)| !is_dead(*rank)) {
            assert_eq!(process.end(), Some(0), "round {round}, rank {rank}: {:#?}", process.output);
            assert_eq!(process.said("many of"), [(n - deaths).to_string()]);
            assert!(!process.said("recovered").is_empty());
        }
    }
}

/// Averagers built by clones of one communicator recover one after the other, in one new
/// generation.
pub fn two_averagers_of_a_world_recover() {
    let n = 3;
    let mut ranks = start_all("two", n, |_| vec![]);
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[0].signal(Signal::KILL);
    for rank in &mut ranks[1..] {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("two of"), ["2"]);
    }
}

/// Each `LocalSgd` makes an average when it is recovered, so ranks that begin with different ones
/// would wait for one another: they fail at once instead.
pub fn local_sgds_recovered_in_different_orders_fail_at_once() {
    let mut ranks = start_all("two_sgd", 3, |_| vec![("PA_TEST_TIMEOUT_MS", "60000".to_owned())]);
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[2].signal(Signal::KILL);
    let start = Instant::now();
    for rank in &mut ranks[..2] {
        let error = rank.wait_for("error");
        assert!(
            error.contains("rank 1") && error.contains("in the same order on every rank"),
            "{error}"
        );
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("two of"), ["2"]);
    }
    assert!(start.elapsed() < Duration::from_secs(50), "they waited for the timeout of 60 s");
}

/// An averager that one rank has dropped can't be built again; the others can.
pub fn dropped_averager_is_named() {
    let mut ranks = start_all("one_dropped", 3, |_| vec![]);
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[2].signal(Signal::KILL);
    for rank in &mut ranks[..2] {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("one of"), ["2"]);
    }
    let error = &ranks[0].said("error")[0];
    assert!(error.contains("rank 1") && error.contains("has dropped this averager"), "{error}");
}
