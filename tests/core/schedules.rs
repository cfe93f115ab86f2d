//! Schedules that adapt H: the steps of the averages, and what happens where ranks differ.

use std::time::Duration;

use param_averager::{Action, Error, LocalSgd, Schedule, TensorState};
use test_support::{ranks, Random};

fn sgd(communicator: param_averager::Communicator, model: &mut Vec<f32>, of: Schedule) -> LocalSgd {
    LocalSgd::new(test_support::options(communicator).build(model).unwrap(), of)
}

/// Steps at which each of `n` ranks averages, where the ranks' steps take different times.
fn averages(n: usize, steps: u64, schedule: Schedule, rate: fn(u64) -> f64) -> Vec<u64> {
    let seen = ranks(n, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 1000];
        let mut sgd = sgd(communicator, &mut model, schedule);
        let mut random = Random(rank as u64);
        let mut seen = vec![];
        for step in 1..=steps {
            std::thread::sleep(Duration::from_micros(random.below(300)));
            let is_due = sgd.is_next_due();
            // A skipped step goes on with the rate that its peers have.
            let action = if random.below(8) == 0 && step != 1 {
                sgd.set_learning_rate(rate(step));
                sgd.skip(&mut model)
            } else {
                sgd.step_with(&mut model, rate(step))
            };
            match action.unwrap() {
                Action::Counted { .. } => assert!(!is_due),
                Action::Averaged(report) => {
                    assert!(report.active > Duration::ZERO && report.active <= report.elapsed);
                    seen.push(step);
                }
                Action::Unneeded => seen.push(step), // all ranks have skipped the round's steps
                other => panic!("{other:?}"),
            }
            assert_eq!(is_due, seen.last() == Some(&step));
        }
        sgd.finish(&mut model).unwrap();
        (seen, sgd.local_steps(), model)
    });
    assert!(seen.iter().all(|of| *of == seen[0]), "{seen:?}");
    seen[0].0.clone()
}

#[test]
fn quadratic_rule_averages_less_often_as_the_learning_rate_falls() {
    // (0.2 / 0.2)² = 1, (0.2 / 0.1)² = 4, (0.2 / 0.05)² = 16, and no more averages at 0.
    let rate = |step| match step {
        0..4 => 0.2,
        4..8 => 0.1,
        8..24 => 0.05,
        _ => 0.0,
    };
    assert_eq!(averages(3, 60, Schedule::quadratic(0.2, 2), rate), [2, 4, 8, 24]);
    let limited = Schedule::quadratic(0.2, 2).at_most(10);
    assert_eq!(averages(2, 40, limited, rate), [2, 4, 8, 18, 28, 38]);
    let warm = Schedule::quadratic(0.2, 2).after_warmup(5);
    assert_eq!(averages(2, 40, warm, rate), [1, 2, 3, 4, 5, 9, 25]);
}

#[test]
fn overhead_rule_finds_its_h() {
    let constant = |_| 0.1;
    // Averages take far less than a million times as long as steps: one step less at a time, once
    // two averages have been timed.
    let found = averages(3, 60, Schedule::overhead(1e6), constant);
    assert_eq!(found, [10, 20, 30, 39, 47, 54, 60]);
    // They take far more than a billionth: the largest H at once.
    let found = averages(2, 60, Schedule::overhead(1e-9).at_most(15), constant);
    assert_eq!(found, [10, 20, 30, 45, 60]);
    // Times are also measured in the warm-up.
    let found = averages(2, 60, Schedule::overhead(1e-9).at_most(25).after_warmup(3), constant);
    assert_eq!(found, [1, 2, 3, 28, 53]);
    // Somewhere between: the same on all ranks, whatever it is.
    averages(4, 200, Schedule::overhead(0.05), constant);
}

#[test]
fn overhead_rule_follows_the_ranks_clocks() {
    let found = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 1 << 20];
        let mut sgd = sgd(communicator, &mut model, Schedule::overhead(1.0));
        // Steps of no work against averages of 4 MiB: H grows, however slow the machine is, though
        // it may shrink again where a rank is disturbed.
        let lengths = (0..5000).map(|_| {
            sgd.step(&mut model).unwrap();
            sgd.local_steps()
        });
        lengths.collect::<Vec<u64>>()
    });
    assert_eq!(found[0], found[1]);
    assert!(found[0].iter().max() > Some(&50), "{:?}", found[0].iter().max());
    assert!(found[0].iter().max() <= Some(&200), "flodl's limit");
}

#[test]
fn budget_rule_by_the_extremes() {
    let constant = |_| 0.1;
    let found = averages(2, 40, Schedule::budget(1e-3).at_most(12), constant);
    assert_eq!(found, [10, 22, 34]);
    assert_eq!(averages(2, 14, Schedule::budget(1e30), constant), [10, 11, 12, 13, 14]);
}

#[test]
fn learning_rates_that_differ_are_an_error_on_every_rank() {
    let errors = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 4];
        let mut sgd = sgd(communicator, &mut model, Schedule::quadratic(0.2, 2));
        let start = model.clone();
        // Between averages they may differ: no decision is made there.
        sgd.step_with(&mut model, rank as f64).unwrap();
        let error = sgd.step_with(&mut model, if rank == 2 { 0.2 } else { 0.1 }).unwrap_err();
        assert!(error.tensors() == TensorState::Unchanged && !error.is_fatal());
        assert_eq!(model, start);
        // The rounds go on as if nothing had been decided, on all ranks.
        let due: Vec<bool> = (0..6)
            .map(|_| {
                let action = sgd.step_with(&mut model, 0.1).unwrap();
                matches!(action, Action::Averaged(_))
            })
            .collect();
        assert_eq!(due, [false, true, false, false, false, true]);
        error
    });
    let says = "rank 2 averages after step 2 of quadratic(0.2, 2), with H = 2 from step 0 and \
                learning rate 0.2, rank 0 after step 2 of quadratic(0.2, 2), with H = 2 from step \
                0 and learning rate 0.1";
    assert!(errors.iter().all(|error| error.to_string().contains(says)), "{errors:?}");
}

#[test]
fn a_quadratic_schedule_without_a_learning_rate_averages_on_no_rank() {
    for (bad, found) in [(None, "not given"), (Some(f64::NAN), "NaN"), (Some(-0.1), "-0.1")] {
        for all in [false, true] {
            let errors = ranks(3, |communicator| {
                let rank = communicator.rank();
                let mut model = vec![rank as f32; 4];
                let mut sgd = sgd(communicator, &mut model, Schedule::quadratic(0.2, 1));
                let start = model.clone();
                let error = match bad {
                    _ if rank != 1 && !all => sgd.step_with(&mut model, 0.1),
                    None => sgd.step(&mut model),
                    Some(rate) => sgd.step_with(&mut model, rate),
                };
                assert_eq!((model == start, sgd.position()), (true, 1));
                // Repaired, and all ranks go on.
                assert!(sgd.step_with(&mut model, 0.1).unwrap().report().is_some());
                error.unwrap_err()
            });
            for (rank, error) in errors.iter().enumerate() {
                let is_own = all || rank == 1;
                let says = if is_own { found } else { "and no learning rate" };
                assert!(error.to_string().contains(says), "{all} {rank}: {error}");
                assert_eq!(matches!(error, Error::InvalidOption { .. }), is_own, "{error}");
                assert_eq!(matches!(error, Error::SchedulesDiffer { .. }), !is_own, "{error}");
            }
        }
    }
}

/// Ranks with different numbers of batches decide together again after `done`.
#[test]
fn ranks_that_were_done_take_the_decisions_of_the_others() {
    let found = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 4];
        let mut sgd = sgd(communicator, &mut model, Schedule::overhead(1e6));
        let mut seen = vec![];
        for _epoch in 0..4 {
            for _batch in 0..[50, 23, 41][rank] {
                sgd.step(&mut model).unwrap();
            }
            sgd.done(&mut model).unwrap();
            seen.push((sgd.position(), sgd.local_steps(), sgd.is_next_due()));
        }
        (seen, model)
    });
    assert!(found.iter().all(|of| *of == found[0]), "{found:?}");
    assert!(found[0].0.last().unwrap().1 < 8, "H has changed: {found:?}");
}

/// Alone or not enabled, nothing is decided, and nothing fails.
#[test]
fn a_schedule_that_adapts_counts_alone() {
    ranks(1, |communicator| {
        let mut model = vec![0.0f32; 4];
        let mut sgd = sgd(communicator, &mut model, Schedule::quadratic(1.0, 2));
        for _ in 0..5 {
            assert_eq!(sgd.step(&mut model).unwrap(), Action::Alone);
        }
        assert_eq!((sgd.position(), sgd.local_steps()), (5, 2));
    });
}
