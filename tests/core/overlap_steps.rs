//! Local SGD whose averages overlap with its steps, or take a fragment of the model at a time.

use param_averager::{
    Action, Communicator, Error, LocalSgd, Outer, Overlap, ParamAverager, Schedule, TensorState,
};
use test_support::ranks;

fn local_sgd(communicator: Communicator, overlap: Overlap, model: &mut Vec<Vec<f32>>) -> LocalSgd {
    let averager = ParamAverager::builder(communicator)
        .allow_unnamed()
        .reject_non_finite(true)
        .overlap(overlap)
        .build(model)
        .unwrap();
    LocalSgd::new(averager, Schedule::every(4))
}

/// The numbers of steps that actions tell of, and a letter for each kind.
fn said(action: &Action) -> (char, u64) {
    match action {
        Action::Counted { until_next } => ('c', *until_next),
        Action::Started { ends_in } => ('s', *ends_in),
        Action::Averaged(report) => ('a', report.bytes),
        other => panic!("{other:?}"),
    }
}

/// Rank r adds r + 1 in each step.
fn step(rank: usize, model: &mut [Vec<f32>]) {
    model.iter_mut().flatten().for_each(|x| *x += (rank + 1) as f32);
}

#[test]
fn a_step_starts_an_average_and_a_later_one_adds_its_result() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0; 10]];
        let overlap = Overlap::default().delay(2);
        let mut sgd = local_sgd(communicator, overlap, &mut model);
        let mut actions = vec![];
        for _ in 0..10 {
            step(rank, &mut model);
            assert_eq!(sgd.is_next_due(), (sgd.position() + 1).is_multiple_of(4));
            actions.push(said(&sgd.step(&mut model).unwrap()));
        }
        let round = [('s', 2), ('c', 3), ('a', 40), ('c', 1)];
        let expected = [&[('c', 3), ('c', 2), ('c', 1)][..], &round, &round].concat();
        assert_eq!(actions, expected[..10]);
        // The means after 4 and 8 steps, and the steps that the rank has made since.
        let mean = |own: f32| own + (1.5 - (rank + 1) as f32) * 8.0;
        assert_eq!(model[0], [mean(10.0 * (rank + 1) as f32); 10]);
        assert_eq!((sgd.averages(), sgd.steps()), (2, 10));
        // The end: all ranks have one model.
        assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
        assert_eq!(model[0], [15.0; 10]);
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded);
    });
}

#[test]
fn the_end_comes_while_an_average_is_under_way() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0; 10]];
        let overlap = Overlap::default().delay(3);
        let mut sgd = local_sgd(communicator, overlap, &mut model);
        for _ in 0..5 {
            step(rank, &mut model);
            sgd.step(&mut model).unwrap();
        }
        let error = sgd.save().unwrap_err();
        assert!(error.to_string().contains("flush"), "{error}");
        let error = sgd.averager().average(&mut model).unwrap_err();
        assert!(error.to_string().contains("under way"), "{error}");
        if rank == 0 {
            assert_eq!(sgd.flush(&mut model).unwrap().unwrap().local_steps, 4);
            assert_eq!(sgd.flush(&mut model).unwrap(), None);
            sgd.save().unwrap();
        }
        let made = sgd.finish(&mut model).unwrap();
        assert_eq!(made.report().unwrap().local_steps, 1);
        assert_eq!(model[0], [7.5; 10]);
    });
}

#[test]
fn fragments_are_averaged_one_at_a_time() {
    for delay in [0, 1] {
        ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![vec![0.0; 10], vec![0.0; 12]];
            let overlap = Overlap::default().fragments(2).delay(delay);
            let mut sgd = local_sgd(communicator, overlap, &mut model);
            let (own, mean) = ((rank + 1) as f32, 1.5);
            let mut actions = vec![];
            for _ in 0..8 {
                step(rank, &mut model);
                actions.push(said(&sgd.step(&mut model).unwrap()));
            }
            if delay == 0 {
                let round = [('c', 1), ('a', 40), ('c', 1), ('a', 48)];
                assert_eq!(actions, [round, round].concat());
                // The first fragment has a mean of 6 steps, the other one of 8.
                assert_eq!(model[0], [6.0 * mean + 2.0 * own; 10]);
                assert_eq!(model[1], [8.0 * mean; 12]);
            } else {
                let round = [('a', 48), ('s', 1), ('a', 40), ('s', 1)];
                let first = [('c', 1), ('s', 1), ('a', 40), ('s', 1)];
                assert_eq!(actions, [first, round].concat());
                assert_eq!(model[0], [6.0 * mean + 2.0 * own; 10]);
                assert_eq!(model[1], [4.0 * mean + 4.0 * own; 12]);
            }
            sgd.finish(&mut model).unwrap();
            assert_eq!(model, [vec![12.0; 10], vec![12.0; 12]]);
        });
    }
}

/// Steps that the ranks make with unequal weights, and a warm-up in which all steps are averaged
/// whole.
#[test]
fn weights_belong_to_the_steps_that_an_average_has() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0f32; 8], vec![0.0; 8]];
        let overlap = Overlap::default().fragments(2).delay(1);
        let builder = ParamAverager::builder(communicator).allow_unnamed().overlap(overlap);
        let averager = builder.build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(4).after_warmup(2));
        // Samples: rank 1 has three times as many.
        let samples = if rank == 0 { 1.0 } else { 3.0 };
        let mut averaged = vec![];
        for _ in 0..7 {
            step(rank, &mut model);
            let action = sgd.step_weighted(&mut model, samples).unwrap();
            averaged.push(action.report().map_or(0, |report| report.bytes));
        }
        assert_eq!(averaged, [64, 64, 0, 0, 32, 0, 32]);
        let (mean, own) = (1.75, (rank + 1) as f32);
        assert_eq!(model[0], [4.0 * mean + 3.0 * own; 8]);
        assert_eq!(model[1], [6.0 * mean + own; 8]);
    });
}

#[test]
fn a_veto_comes_with_the_step_that_ends_the_average_and_the_next_one_begins() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0; 10]];
        let overlap = Overlap::default().delay(4);
        let mut sgd = local_sgd(communicator, overlap, &mut model);
        for number in 1..=8 {
            step(rank, &mut model);
            if number == 4 && rank == 1 {
                model[0][2] = f32::INFINITY;
            }
            if number == 5 && rank == 1 {
                model[0][2] = model[0][3];
            }
            match sgd.step(&mut model) {
                Err(error @ Error::NonFinite { rank: 1, element: 2, .. }) if number == 8 => {
                    assert_eq!(error.tensors(), TensorState::Unchanged);
                }
                Ok(action) => assert!(number < 8 && !matches!(action, Action::Averaged(_))),
                Err(error) => panic!("step {number}: {error}"),
            }
        }
        // The average of step 8 was started all the same, with the steps of the one that failed.
        let report = sgd.flush(&mut model).unwrap().unwrap();
        assert_eq!(report.local_steps, 8);
        assert_eq!(model[0], [12.0; 10]);
    });
}

#[test]
fn schedules_that_do_not_fit_are_errors() {
    let cases = [
        (Overlap::default().fragments(5), Schedule::every(4), "5 fragments, with H = 4"),
        (Overlap::default().delay(5), Schedule::every(4), "delay 5, with H = 4"),
        (Overlap::default().delay(3).fragments(2), Schedule::every(4), "delay 3, with H = 4"),
        (Overlap::default().delay(1), Schedule::quadratic(0.1, 4), "with quadratic(0.1, 4)"),
    ];
    for (overlap, schedule, expected) in cases {
        ranks(2, |communicator| {
            let mut model = vec![vec![0.0f32; 10]; 9];
            let builder = ParamAverager::builder(communicator).allow_unnamed().overlap(overlap);
            let averager = builder.build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, schedule);
            let error = (0..4).find_map(|_| sgd.step_with(&mut model, 0.1).err()).unwrap();
            assert!(error.to_string().contains(expected), "{error}");
            let error = sgd.done(&mut model).unwrap_err();
            assert!(error.to_string().contains("LocalSgd::done"), "{error}");
        });
    }
}

/// A schedule that does not fit on one rank alone is an error on all ranks, before any of them
/// waits for its timeout, and no tensor changes.
#[test]
fn a_schedule_that_does_not_fit_on_one_rank_is_told_to_all() {
    let (fits, unfit) = (Schedule::every(4), Schedule::every(1));
    let cases = [
        (Overlap::default().fragments(2), fits, unfit, "2 fragments, with H = 1"),
        (Overlap::default().fragments(2).delay(1), fits, unfit, "2 fragments, with H = 1"),
        (Overlap::default().delay(4), fits, unfit, "delay 4, with H = 1"),
        (Overlap::default().delay(1), fits, Schedule::overhead(0.1), "with overhead(0.1)"),
        // Telemetry is an option of the averager, which all ranks have alike.
        (Overlap::default(), fits, Schedule::divergence(0.1), "with the schedule divergence"),
    ];
    for (overlap, fits, unfit, expected) in cases {
        // A peer's next average may have begun when it returns the error: no rank leaves before.
        let returned = std::sync::atomic::AtomicUsize::new(0);
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![vec![0.0f32; 10]; 9];
            let builder = ParamAverager::builder(communicator).allow_unnamed().overlap(overlap);
            let averager = builder.build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, if rank == 1 { unfit } else { fits });
            let error = (0..20).find_map(|_| {
                step(rank, &mut model);
                let before = model.clone();
                let error = sgd.step(&mut model).err()?;
                Some((error, model == before))
            });
            crate::hosts::meet(&returned, 3);
            let (error, is_unchanged) = error.unwrap();
            assert!(is_unchanged);
            let text = error.to_string();
            match rank {
                1 => {
                    assert!(matches!(error, Error::InvalidOption { rank: 1, .. }), "{text}");
                    assert!(text.contains(expected), "{text}");
                }
                _ => assert!(matches!(error, Error::SchedulesDiffer { rank: 1, .. }), "{text}"),
            }
            assert_eq!(error.tensors(), TensorState::Unchanged);
        });
    }
}

/// Ranks that are done take part in averages of any schedule, but not in one that is refused.
#[test]
fn a_schedule_that_does_not_fit_is_told_to_ranks_that_are_done() {
    ranks(3, |communicator| {
        let (rank, mut model) = (communicator.rank(), vec![vec![0.0f32; 10]]);
        let averager = ParamAverager::builder(communicator).build(&mut model).unwrap();
        let unfit = rank == 1;
        let schedule = if unfit { Schedule::divergence(0.1) } else { Schedule::every(99) };
        let mut sgd = LocalSgd::new(averager, schedule);
        let error = (0..10).find_map(|_| {
            step(rank, &mut model);
            sgd.step(&mut model).err()
        });
        let before = model.clone();
        let error = error.unwrap_or_else(|| sgd.done(&mut model).unwrap_err());
        let (option, differ) = (
            matches!(error, Error::InvalidOption { option: "telemetry", .. }),
            matches!(error, Error::SchedulesDiffer { .. } | Error::CallsDiffer { .. }),
        );
        assert_eq!((option, differ), (unfit, !unfit), "{error}");
        assert_eq!(error.tensors(), TensorState::Unchanged);
        assert_eq!(model, before);
        assert_eq!(model[0], [10.0 * (rank + 1) as f32; 10]);
    });
}

/// DiLoCo, and its streaming kinds: all ranks end with one model, near the minimum of their mean.
#[test]
fn it_learns_with_an_outer_optimizer() {
    for (fragments, delay, alpha) in
        [(1, 0, 0.0), (1, 2, 0.0), (2, 0, 0.0), (4, 1, 0.0), (2, 2, 0.5)]
    {
        let ends = ranks(3, |communicator| {
            let rank = communicator.rank() as f32;
            let mut model = vec![vec![8.0f32; 5]; 4];
            let averager = ParamAverager::builder(communicator)
                .allow_unnamed()
                .outer(Outer::diloco())
                .overlap(Overlap::default().fragments(fragments).delay(delay).alpha(alpha))
                .build(&mut model)
                .unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(4));
            for _ in 0..400 {
                // Each rank's loss has its minimum at its own number.
                model.iter_mut().flatten().for_each(|x| *x -= 0.05 * (*x - rank));
                sgd.step(&mut model).unwrap();
            }
            sgd.finish(&mut model).unwrap();
            model.concat()
        });
        let what = format!("fragments {fragments}, delay {delay}, alpha {alpha}");
        assert!(ends.iter().all(|end| *end == ends[0]), "{what}");
        assert!(ends[0].iter().all(|x| (x - 1.0).abs() < 0.05), "{what}: {:?}", ends[0]);
    }
}

/// A state is loaded into as many fragments as it was saved with.
#[test]
fn a_state_is_of_its_fragments() {
    let build = |communicator: Communicator, fragments| {
        let mut model = vec![vec![4.0f32; 100]; 4];
        let averager = ParamAverager::builder(communicator)
            .allow_unnamed()
            .outer(Outer::nesterov(0.5, 0.5))
            .overlap(Overlap::default().fragments(fragments).delay(1))
            .build(&mut model)
            .unwrap();
        (LocalSgd::new(averager, Schedule::every(4)), model)
    };
    let train = |sgd: &mut LocalSgd, model: &mut Vec<Vec<f32>>, steps: usize| {
        for _ in 0..steps {
            step(sgd.rank(), model);
            sgd.step(model).unwrap();
        }
        sgd.flush(model).unwrap();
    };
    let saved = ranks(2, |communicator| {
        let (mut sgd, mut model) = build(communicator, 2);
        train(&mut sgd, &mut model, 9);
        let (state, at) = (sgd.save().unwrap(), model.clone());
        train(&mut sgd, &mut model, 8);
        (state, at, model)
    });
    ranks(2, |communicator| {
        let (state, at, end) = &saved[communicator.rank()];
        let other = communicator.clone();
        let (mut sgd, mut model) = build(communicator, 2);
        sgd.load(state).unwrap();
        model.clone_from(at);
        train(&mut sgd, &mut model, 8);
        assert_eq!(model, *end);
        let error = build(other, 4).0.load(state).unwrap_err();
        assert!(error.to_string().contains("2 fragments"), "{error}");
    });
}
