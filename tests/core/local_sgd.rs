//! Local SGD: when it averages, the actions that it returns, and that it learns.

use param_averager::{Action, Error, LocalSgd, Schedule, TensorState};
use test_support::{ranks, Random};

#[test]
fn averages_when_due_and_says_what_it_did() {
    let done = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 10];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(3).after_warmup(1));
        let mut said = vec![];
        for step in 1..=6 {
            model.iter_mut().for_each(|x| *x += (rank * step) as f32);
            said.push(match sgd.step(&mut model).unwrap() {
                Action::Averaged(report) => {
                    assert_eq!((report.bytes, report.world_size), (40, 3));
                    assert!(report.algbw() > 0.0 && report.busbw() > report.algbw());
                    0
                }
                Action::Counted { until_next } => until_next,
                other => panic!("{other:?}"),
            });
        }
        assert_eq!((sgd.steps(), sgd.averages()), (6, 2));
        assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded, "finish is idempotent");
        assert_eq!(sgd.averages(), 3);
        (said, model)
    });
    for (said, model) in &done {
        assert_eq!(said, &[0, 2, 1, 0, 2, 1]);
        assert_eq!(model, &done[0].1);
    }
}

#[test]
fn finish_averages_uneven_ends_and_nothing_when_no_rank_stepped() {
    let done = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f64; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(10));
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded);
        assert_eq!(model, [rank as f64; 4]);
        if rank == 1 {
            sgd.step(&mut model).unwrap(); // one batch more than rank 0 has
        }
        assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
        model
    });
    assert_eq!(done, [[0.5; 4], [0.5; 4]]);
}

#[test]
fn a_skipped_step_still_takes_part_when_the_others_are_due() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        for step in 1..=4 {
            // Rank 1's loss scaler skips every second optimizer step.
            let action = if rank == 1 && step % 2 == 0 {
                sgd.skip(&mut model)
            } else {
                sgd.step(&mut model)
            };
            assert_eq!(matches!(action.unwrap(), Action::Averaged(_)), step % 2 == 0);
        }
        assert_eq!(sgd.steps(), if rank == 1 { 2 } else { 4 });
    });
}

#[test]
fn alone_or_disabled_it_only_counts() {
    for n in [1, 2] {
        ranks(n, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![rank as f32; 4];
            let averager = test_support::options(communicator).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2)).enabled(n == 1);
            for _ in 0..5 {
                assert_eq!(sgd.step(&mut model).unwrap(), Action::Alone);
            }
            assert_eq!(sgd.finish(&mut model).unwrap(), Action::Alone);
            assert_eq!((sgd.steps(), sgd.averages()), (5, 0));
            assert_eq!(model, [rank as f32; 4]);
        });
    }
}

#[test]
fn schedules_that_differ_are_an_error_everywhere_and_never_a_hang() {
    // Other H; other warm-up; one rank finishes while the others are due.
    let cases: [(Schedule, bool, &str, &str); 3] = [
        (Schedule::every(4), false, "after step 4 of every(4)", "after step 2 of every(2)"),
        (
            Schedule::every(2).after_warmup(2),
            false,
            "after step 1 of every(2).after_warmup(2)",
            "after step 2 of every(2)",
        ),
        (
            Schedule::every(2),
            true,
            "in `sync` or `finish` after step 1 of every(2)",
            "after step 2 of every(2)",
        ),
    ];
    for (schedule, finishes, found, expected) in cases {
        let errors = ranks(3, |communicator| {
            let odd = communicator.rank() == 2;
            let mut model = vec![communicator.rank() as f32; 4];
            let averager = test_support::options(communicator).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, if odd { schedule } else { Schedule::every(2) });
            if odd && finishes {
                sgd.step(&mut model).unwrap();
                return sgd.finish(&mut model).unwrap_err();
            }
            let error = (0..4).find_map(|_| sgd.step(&mut model).err()).unwrap();
            assert!(error.tensors() == TensorState::Unchanged);
            error
        });
        let (found, expected) = (found.to_owned(), expected.to_owned());
        assert_eq!(
            errors,
            vec![Error::SchedulesDiffer { rank: 2, reference: 0, found, expected }; 3]
        );
    }
    // Two schedules that average at the same step.
    let errors = ranks(2, |communicator| {
        let schedule = Schedule::every(2 + communicator.rank() as u64).after_warmup(1);
        let mut model = vec![1.0f32; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, schedule);
        sgd.step(&mut model).unwrap_err().to_string()
    });
    let says = "rank 1 averages after step 1 of every(3).after_warmup(1), rank 0 after step 1 of \
                every(2).after_warmup(1)";
    assert!(errors[0].contains(says) && errors[0] == errors[1], "{errors:?}");
}

/// Remedy that the error names: a rank without further steps calls `finish` until the others
/// finish.
#[test]
fn a_rank_with_fewer_steps_finishes_until_the_others_do() {
    let seen = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        let mut differed = 0;
        for _ in 0..if rank == 1 { 3 } else { 8 } {
            differed +=
                usize::from(matches!(sgd.step(&mut model), Err(Error::SchedulesDiffer { .. })));
        }
        while let Err(error) = sgd.finish(&mut model) {
            assert!(matches!(error, Error::SchedulesDiffer { .. }), "{error}");
            differed += 1;
        }
        (model, differed)
    });
    assert!(seen.iter().all(|(model, differed)| *model == seen[0].0 && *differed == 3), "{seen:?}");
}

#[test]
fn a_panic_in_the_training_loop_starts_no_collective() {
    let seen = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 4];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        sgd.step(&mut model).unwrap();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            if rank == 0 {
                std::panic::resume_unwind(Box::new("a bad batch"));
            }
            let error = sgd.step(&mut model).unwrap_err();
            assert_eq!(model, [rank as f32; 4]);
            error
        }));
        result.ok()
    });
    assert!(
        matches!(seen[..], [None, Some(Error::PeerLost { rank: 0, committed: false, .. })]),
        "{seen:?}"
    );
}

/// Linear regression with each rank seeing its own part of the data: the ranks agree, and all of
/// them find the weights that only all the data together determine.
#[test]
fn ranks_learn_together_what_none_could_alone() {
    const WEIGHTS: [f64; 4] = [1.0, -2.0, 0.5, 3.0];
    let models = ranks(4, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0f64; 2]; 2];
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(8));
        let mut random = Random(rank as u64);
        for _ in 0..4000 {
            // Rank r only ever sees feature r.
            let mut features = [0.0; 4];
            features[rank] = random.value();
            let predicted: f64 =
                features.iter().enumerate().map(|(i, f)| f * model[i / 2][i % 2]).sum();
            let error = predicted - features[rank] * WEIGHTS[rank];
            for (i, feature) in features.iter().enumerate() {
                model[i / 2][i % 2] -= 0.5 * error * feature;
            }
            sgd.step(&mut model).unwrap();
        }
        sgd.finish(&mut model).unwrap();
        model.concat()
    });
    for model in &models {
        assert_eq!(model, &models[0]);
        for (found, wanted) in model.iter().zip(WEIGHTS) {
            assert!((found - wanted).abs() < 1e-3, "{model:?}");
        }
    }
}
