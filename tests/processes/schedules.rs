//! Schedules that adapt, when a rank is lost and when a process joins: all ranks go on with the
//! same H, from the same step.

use std::time::Duration;

use param_averager::{Action, LocalSgd, ParamAverager, Schedule};
use test_support::process::{name, start, RankProcess};
use test_support::rank::{die, is_late, join, number, say};

/// Trains with an H that falls; rank 1 dies on the way, and a process joins.
pub fn adapts() -> i32 {
    let communicator = join().unwrap();
    let first = communicator.rank();
    let mut model = vec![first as f64; 1000];
    let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
    // No average takes a million times as long as its steps, so H falls by 1 at each.
    let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::overhead(1e6));
    let (mut lost, mut since) = (false, 0);
    while !is_late() {
        std::thread::sleep(Duration::from_millis(5));
        if first == 1 && sgd.position() == number("PA_TEST_DIES_AT").unwrap() {
            die();
        }
        let before = sgd.local_steps();
        match sgd.step(&mut model) {
            Ok(Action::Admitted { .. }) => {
                // The decision of the average before the admission is not lost.
                assert!(since < 3 || sgd.local_steps() == (before - 1).max(1), "{before}");
                break;
            }
            Ok(Action::Averaged(_)) => {
                since += 1;
                if lost && since == 3 {
                    say("ready"); // and lets a process join
                }
            }
            Ok(_) => {}
            Err(error) => {
                (lost, since) = (true, 0);
                say(&format!("lost {error}"));
                sgd.recover(&mut model).unwrap();
                say(&format!("recovered {} {}", sgd.position(), sgd.local_steps()));
            }
        }
    }
    say(&format!("begins {} {}", sgd.position(), sgd.local_steps()));
    let mut averages = vec![];
    for _ in 0..40 {
        if sgd.step(&mut model).unwrap().report().is_some() {
            averages.push((sgd.position(), sgd.local_steps()));
        }
    }
    sgd.finish(&mut model).unwrap();
    say(&format!("averages {averages:?} {}", model[0]));
    0
}

pub fn ranks_go_on_with_one_h_after_a_death_and_a_join() {
    // Averages follow 10, 20, 30, 39, 47, 54, … steps: two are timed, and then H falls. The last
    // step before an average, and the first one after it.
    for (dies_at, recovered) in [(46, "47 8"), (47, "54 7")] {
        let name = name();
        let variables = [("PA_TEST_NAME", name), ("PA_TEST_DIES_AT", dies_at.to_string())];
        let rank = |rank: usize| {
            let own = [("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", "3".into())];
            start("adapts", &[&variables[..], &own].concat())
        };
        let mut ranks: Vec<RankProcess> = (0..3).map(rank).collect();
        for survivor in [0, 2] {
            ranks[survivor].wait_for("ready");
        }
        let late = [("PA_TEST_JOIN", "1".to_owned())];
        ranks.push(start("adapts", &[&variables[..], &late].concat()));
        for (rank, process) in ranks.iter_mut().enumerate() {
            let expected = if rank == 1 { None } else { Some(0) };
            assert_eq!(process.end(), expected, "{rank}: {:#?}", process.output);
        }
        for survivor in [0, 2] {
            assert_eq!(ranks[survivor].said("recovered"), [recovered]);
        }
        let all = |begin: &str| [0, 2, 3].map(|rank| ranks[rank].said(begin));
        for (begin, count) in [("begins", 1), ("averages", 1)] {
            let said = all(begin);
            assert_eq!(said[0].len(), count, "{said:?}");
            assert!(said.iter().all(|of| *of == said[0]), "{said:?}");
        }
    }
}
