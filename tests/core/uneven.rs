//! Ranks with different numbers of batches and samples, and places in a schedule to begin at.

use param_averager::{Action, Error, LocalSgd, Report, Schedule};
use test_support::ranks;

fn sgd(communicator: param_averager::Communicator, model: &mut Vec<f64>, h: u64) -> LocalSgd {
    let averager = test_support::options(communicator).build(model).unwrap();
    LocalSgd::new(averager, Schedule::every(h))
}

fn report(action: &Action) -> &Report {
    action.report().unwrap_or_else(|| panic!("no average: {action:?}"))
}

/// Each rank adds its number to its model at each of its steps.
fn train(steps: &[usize], h: u64, weighted: bool) -> Vec<(f64, u64, u64)> {
    ranks(steps.len(), |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, h);
        for _ in 0..steps[rank] {
            model.iter_mut().for_each(|x| *x += rank as f64 + 1.0);
            let samples = 10.0 * (rank + 1) as f64;
            match weighted {
                true => sgd.step_weighted(&mut model, samples).unwrap(),
                false => sgd.step(&mut model).unwrap(),
            };
        }
        sgd.done(&mut model).unwrap();
        assert!(model.iter().all(|&x| x == model[0]));
        (model[0], sgd.position(), sgd.averages())
    })
}

/// The same, computed: at every average, the mean over the ranks with steps since the last one.
fn expected(steps: &[usize], h: u64, weighted: bool) -> f64 {
    let most = *steps.iter().max().unwrap();
    let (mut models, mut since) = (vec![0.0; steps.len()], vec![0.0; steps.len()]);
    let mut over = vec![false; steps.len()];
    let mut mean = 0.0;
    for step in 1..=most {
        for rank in 0..steps.len() {
            if step <= steps[rank] {
                models[rank] += rank as f64 + 1.0;
                since[rank] += if weighted { 10.0 * (rank + 1) as f64 } else { 1.0 };
            }
        }
        if !(step as u64).is_multiple_of(h) && step != most {
            continue;
        }
        let weight = |rank: usize| match (weighted, over[rank]) {
            (true, _) => since[rank],
            (false, true) => 0.0,
            (false, false) => f64::from(since[rank] > 0.0),
        };
        let weights: Vec<f64> = (0..steps.len()).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        if sum > 0.0 {
            mean = models.iter().zip(&weights).map(|(x, w)| x * w).sum::<f64>() / sum;
            models.fill(mean);
        }
        since.fill(0.0);
        (0..steps.len()).for_each(|rank| over[rank] = steps[rank] <= step);
    }
    mean
}

#[test]
fn ranks_without_batches_receive_until_all_are_done() {
    let cases: [(&[usize], u64); 6] = [
        (&[100, 95], 8),
        (&[8, 16], 8),    // done at an average
        (&[3, 20, 1], 4), // in turn
        (&[0, 5], 2),     // no batch at all
        (&[12, 12, 12], 5),
        (&[0, 0], 3),
    ];
    for (steps, h) in cases {
        for weighted in [false, true] {
            let found = train(steps, h, weighted);
            let most = *steps.iter().max().unwrap() as u64;
            for (rank, &(value, position, averages)) in found.iter().enumerate() {
                let expected = expected(steps, h, weighted);
                let near = (value - expected).abs() <= 1e-12 * expected.abs();
                assert!(near, "{steps:?} {h} {weighted} {rank}: {value}, not {expected}");
                assert_eq!(position, most, "{steps:?} {h} {weighted}");
                let rounds = most / h + u64::from(!most.is_multiple_of(h));
                assert_eq!(averages, rounds, "{steps:?} {h} {weighted}");
            }
        }
    }
}

#[test]
fn epochs_follow_one_another_after_done() {
    let found = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, 8);
        for _epoch in 0..3 {
            for _batch in 0..[100, 95][rank] {
                sgd.step(&mut model).unwrap();
            }
            sgd.done(&mut model).unwrap();
            assert!(sgd.position().is_multiple_of(100), "{}", sgd.position());
        }
        sgd.finish(&mut model).unwrap();
        (sgd.position(), sgd.steps())
    });
    assert_eq!(found, [(300, 300), (300, 285)]);
}

#[test]
fn failures_of_peers_reach_a_rank_that_is_done() {
    let errors = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, 2);
        if rank == 0 {
            let refused = sgd.done(&mut model).unwrap_err();
            assert!(matches!(refused, Error::LayoutChanged { rank: 2, .. }), "{refused}");
            return sgd.done(&mut model).unwrap_err();
        }
        sgd.step(&mut model).unwrap();
        let mut other = vec![0.0; if rank == 2 { 5 } else { 4 }];
        sgd.step(&mut other).unwrap_err();
        if rank == 1 {
            return Error::AllWeightsZero; // it leaves
        }
        sgd.done(&mut model).unwrap_err()
    });
    assert!(matches!(errors[0], Error::PeerLost { rank: 1, .. }), "{}", errors[0]);
    assert!(matches!(errors[2], Error::PeerLost { rank: 1, .. }), "{}", errors[2]);
}

#[test]
fn schedules_of_ranks_that_are_not_done_are_compared() {
    let errors = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, [9, 2, 3][rank]);
        match rank {
            0 => sgd.done(&mut model).unwrap_err(),
            _ => (0..3).find_map(|_| sgd.step(&mut model).err()).unwrap(),
        }
    });
    let text = "rank 2 averages after step 3 of every(3), rank 1 after step 2 of every(2)";
    assert!(errors.iter().all(|error| error.to_string().contains(text)), "{errors:?}");
}

#[test]
fn steps_count_by_their_samples() {
    // Per step, (samples of rank 0, samples of rank 1); an average after every second one.
    let steps =
        [(1.0, 3.0), (1.0, 3.0), (5.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (2.0, 2.0)];
    let found = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, 2);
        let mut seen = vec![];
        for of_ranks in steps {
            model.fill(rank as f64); // what the last average gave is lost
            let samples = [of_ranks.0, of_ranks.1][rank];
            sgd.step_weighted(&mut model, samples).unwrap();
            seen.push(model[0]);
        }
        sgd.finish(&mut model).unwrap();
        seen.push(model[0]);
        assert_eq!(sgd.averages(), 3);
        seen
    });
    // 6 of 8 samples are rank 1's; then all are rank 0's; then there are none, and nothing moves.
    assert_eq!(found[0], [0.0, 0.75, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]);
    assert_eq!(found[1], [1.0, 0.75, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5]);
}

#[test]
fn samples_that_are_no_weight_are_refused() {
    for (samples, due) in [(-1.0, false), (-1.0, true), (f64::NAN, false), (f64::INFINITY, true)] {
        let errors = ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![rank as f64; 4];
            let mut sgd = sgd(communicator, &mut model, if due { 1 } else { 2 });
            let samples = if rank == 1 { samples } else { 1.0 };
            let made = sgd.step_weighted(&mut model, samples);
            assert_eq!((sgd.position(), sgd.steps()), (1, 1));
            sgd.step_weighted(&mut model, 1.0).unwrap();
            assert!(model == [0.5; 4] || model == [1.0 / 3.0; 4], "{model:?}");
            made.err()
        });
        assert!(matches!(errors[1], Some(Error::InvalidWeight { rank: 1, .. })), "{errors:?}");
        assert_eq!(errors[0].is_some(), due, "{errors:?}");
    }
    let errors = ranks(2, |communicator| {
        let mut model = vec![0.0; 4];
        let weighted = communicator.rank() == 1;
        let mut sgd = sgd(communicator, &mut model, 1);
        match weighted {
            true => sgd.step_weighted(&mut model, 1.0).unwrap_err(),
            false => sgd.step(&mut model).unwrap_err(),
        }
    });
    assert_eq!(errors, vec![Error::WeightingDiffers { rank: 1 }; 2]);
}

#[test]
fn a_schedule_begins_where_a_checkpoint_was_written() {
    let seen = ranks(2, |communicator| {
        let mut model = vec![0.0; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let schedule = Schedule::every(4).after_warmup(10);
        let mut sgd = LocalSgd::new(averager, schedule).at(9);
        assert_eq!((sgd.position(), sgd.steps(), sgd.schedule()), (9, 0, schedule));
        let due: Vec<bool> = (0..6)
            .map(|_| {
                let is_due = sgd.is_next_due();
                let made = sgd.step(&mut model).unwrap();
                assert_eq!(made.report().is_some(), is_due);
                is_due
            })
            .collect();
        assert_eq!((sgd.rank(), sgd.world_size()), (sgd.averager().rank(), 2));
        due
    });
    assert_eq!(seen, vec![[true, false, false, false, true, false]; 2]);
    let errors = ranks(2, |communicator| {
        let mut model = vec![0.0; 4];
        let at = 4 * communicator.rank() as u64;
        let mut sgd = sgd(communicator, &mut model, 2).at(at);
        (0..2).find_map(|_| sgd.step(&mut model).err()).unwrap().to_string()
    });
    let text = "rank 1 averages after step 6 of every(2), rank 0 after step 2 of every(2)";
    assert!(errors.iter().all(|error| error.contains(text)), "{errors:?}");
}

#[test]
fn sync_averages_between_due_steps_and_training_goes_on() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0; 4];
        let mut sgd = sgd(communicator, &mut model, 4);
        for epoch in 0..3 {
            for step in 0..6 {
                model.fill((10 * epoch + 2 * rank + step) as f64);
                sgd.step(&mut model).unwrap();
            }
            let made = sgd.sync(&mut model).unwrap();
            if 6 * (epoch + 1) % 4 == 0 {
                assert_eq!(made, Action::Unneeded); // a due average has just been made
            } else {
                assert_eq!(report(&made).world_size, 2);
                assert_eq!(model, [(10 * epoch + 6) as f64; 4]);
            }
        }
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded);
    });
}

#[test]
fn calls_that_move_nothing_do_not_end_a_rank_that_is_done() {
    // At its last two due averages, rank 1 has no step, or a step without samples; or it syncs
    // twice.
    for case in 0..3 {
        let found = ranks(2, |communicator| {
            let mut model = vec![0.0; 4];
            let rank = communicator.rank();
            let mut sgd = sgd(communicator, &mut model, 1);
            if rank == 1 {
                for step in 0..4 {
                    let made = match (case, step) {
                        (0, 1 | 2) => sgd.skip(&mut model).unwrap(),
                        (1, 1 | 2) => sgd.step_weighted(&mut model, 0.0).unwrap(),
                        (2, 1 | 2) => sgd.sync(&mut model).unwrap(),
                        (1, _) => {
                            model.iter_mut().for_each(|x| *x += 1.0);
                            sgd.step_weighted(&mut model, 5.0).unwrap()
                        }
                        _ => {
                            model.iter_mut().for_each(|x| *x += 1.0);
                            sgd.step(&mut model).unwrap()
                        }
                    };
                    let moves = step == 0 || step == 3;
                    assert_eq!(made.report().is_some(), moves, "{case} {step}: {made:?}");
                }
            }
            sgd.done(&mut model).unwrap();
            (model[0], sgd.position())
        });
        assert_eq!(found, [(2.0, if case == 2 { 2 } else { 4 }); 2], "{case}");
    }
}

#[test]
fn a_rank_that_is_done_takes_part_in_no_call_by_hand() {
    type Call = fn(&mut LocalSgd, &mut Vec<f64>) -> param_averager::Result<()>;
    let calls: [(Call, &str); 4] = [
        (|sgd, model| sgd.averager().broadcast(1, model).map(drop), "broadcast from rank 1"),
        (|sgd, model| sgd.averager().broadcast(0, model).map(drop), "broadcast from rank 0"),
        (|sgd, model| sgd.averager().average(model).map(drop), "average"),
        (|sgd, model| sgd.averager().average_weighted(model, 2.0).map(drop), "average"),
    ];
    for (call, name) in calls {
        for steps in [0, 1] {
            let errors = ranks(2, |communicator| {
                let rank = communicator.rank();
                let mut model = vec![10.0 * rank as f64; 4];
                let mut sgd = sgd(communicator, &mut model, 8);
                if rank == 0 {
                    for _ in 0..steps {
                        sgd.step(&mut model).unwrap();
                    }
                    let error = sgd.done(&mut model).unwrap_err();
                    sgd.done(&mut model).unwrap();
                    return error.to_string();
                }
                let error = call(&mut sgd, &mut model).unwrap_err();
                assert_eq!(model, [10.0; 4]);
                sgd.done(&mut model).unwrap();
                error.to_string()
            });
            let text = format!("rank 0 calls LocalSgd::done, rank 1 {name} ");
            assert!(errors.iter().all(|error| error.starts_with(&text)), "{errors:?}");
        }
    }
}

#[test]
fn ranks_that_have_made_no_weighted_step_yet_fit_those_that_have() {
    for case in 0..2 {
        let found = ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![rank as f64; 4];
            let mut sgd = sgd(communicator, &mut model, if case == 0 { 1 } else { 8 });
            match (rank, case) {
                // It skips its first step, or has made none: its values count for nothing.
                (0, 0) => drop(sgd.skip(&mut model).unwrap()),
                (0, _) => {}
                _ => drop(sgd.step_weighted(&mut model, rank as f64).unwrap()),
            }
            sgd.sync(&mut model).unwrap();
            model[0]
        });
        assert_eq!(found, [(1.0 + 2.0 * 2.0) / 3.0; 3], "{case}");
    }
}
