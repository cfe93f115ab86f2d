//! Stages that refuse an average, panic, take too long or leave no number: no tensor of any rank
//! changes, every rank gets one error, and the world lives.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use param_averager::{
    Dtype, Error, ErrorKind, LocalSgd, Outer, Schedule, Shard, Start, TensorState, Veto,
};
use test_support::{bits, count, options, ranks, seed, Random};

use crate::stage::{each, model};

const SIZES: [usize; 3] = [100, 7, 501];

fn vectors(rank: usize) -> Vec<Vec<f32>> {
    SIZES.iter().map(|&n| (0..n).map(|i| (rank * n + i) as f32).collect()).collect()
}

/// A stage that fails in its `at`-th call, counted from 1.
fn fails(at: usize, fail: impl Fn() -> Result<(), Veto> + Send + 'static) -> impl Fn() -> Step {
    let fail = Arc::new(Mutex::new(fail));
    move || {
        let (fail, mut call) = (fail.clone(), 0);
        Box::new(move |shard: &mut Shard<'_>| {
            call += 1;
            // Changes of a shard that the function then refuses have no effect.
            each(shard, |_, _, x| x.set(x.get() + 1.0));
            if call == at {
                fail.lock().unwrap()()
            } else {
                Ok(())
            }
        })
    }
}
type Step = Box<dyn FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send>;

/// A veto by each rank in turn: all ranks get the error, no bit changes, the next average works.
#[test]
fn a_veto_changes_nothing_and_the_world_lives() {
    for world in [1, 2, 3, 4] {
        for bad in 0..world {
            ranks(world, |communicator| {
                let rank = communicator.rank();
                let stage = fails(2, || Err(Veto::new("the norm is 12, more than 10")));
                let never = fails(0, || Ok(()));
                let stage = if rank == bad { stage() } else { never() };
                let mut model = vectors(rank);
                let builder = options(communicator).channels(2).chunk_bytes(128);
                let mut averager = builder.stage(stage).build(&mut model).unwrap();
                averager.average(&mut model).unwrap();
                let mut again = vectors(rank);
                let error = averager.average(&mut again).unwrap_err();
                assert_eq!(again, vectors(rank), "rank {rank}");
                let Error::StageVetoed { rank: named, reason } = &error else { panic!("{error}") };
                assert_eq!(*named, bad);
                assert_eq!(reason, "the norm is 12, more than 10");
                assert_eq!(error.tensors(), TensorState::Unchanged);
                assert_eq!((error.kind(), error.is_fatal()), (ErrorKind::Usage, false));
                averager.average(&mut again).unwrap();
                assert_eq!(again, model, "the next average is the first one again");
            });
        }
    }
}

/// All ranks get the text of the first rank that has refused; of a long one, the others its begin.
#[test]
fn every_rank_gets_the_reason_of_the_first_that_refuses() {
    for text in ["own", "öwn and much more, ".repeat(1000).as_str()] {
        ranks(4, |communicator| {
            let (rank, text) = (communicator.rank(), text.to_owned());
            let mut model = vectors(rank);
            let own = text.clone();
            let builder = options(communicator).stage(move |shard| match shard.rank() {
                0 | 2 => Ok(()),
                rank => Err(Veto::new(format!("{rank}: {own}"))),
            });
            let mut averager = builder.build(&mut model).unwrap();
            let error = averager.average(&mut model).unwrap_err();
            let Error::StageVetoed { rank: 1, reason } = &error else { panic!("{error}") };
            let whole = format!("1: {text}");
            match rank == 1 || whole.len() < 100 {
                true => assert_eq!(*reason, whole),
                false => {
                    let begin = reason.strip_suffix(" …").unwrap();
                    assert!(whole.starts_with(begin) && begin.len() >= 1000, "{}", begin.len());
                }
            }
            assert_eq!(model, vectors(rank));
        });
    }
}

/// A panic is a veto, and so is every later call, since the function's state may be half changed.
#[test]
fn a_panic_is_a_veto_on_every_rank() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let mut model = vectors(rank);
        let builder = options(communicator).stage(move |shard| {
            if counted.fetch_add(1, Relaxed) == 1 && shard.rank() == 1 {
                std::panic::resume_unwind(Box::new("as it should")); // without a message
            }
            Ok(())
        });
        let mut averager = builder.build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        for round in 0..2 {
            let mut again = vectors(rank);
            let error = averager.average(&mut again).unwrap_err();
            let Error::StageVetoed { rank: 1, reason } = &error else { panic!("{error}") };
            let text = ["as it should", "an earlier average"][round];
            assert!(reason.contains(text), "{error}");
            assert_eq!(again, vectors(rank));
        }
        let want = if rank == 0 { 3 } else { 2 };
        assert_eq!(calls.load(Relaxed), want, "calls of rank {rank}");
    });
}

/// State follows commits: the stage learns whether all ranks have what it left.
#[test]
fn a_stage_learns_whether_its_last_call_was_committed() {
    let seen = Arc::new(Mutex::new(vec![]));
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let (seen, mut call) = (seen.clone(), 0);
        let mut model = vectors(rank);
        let builder = options(communicator).stage(move |shard| {
            call += 1;
            if shard.rank() == 0 {
                seen.lock().unwrap().push((shard.sets_values(), shard.was_committed()));
            }
            assert_eq!((shard.world_size(), shard.layout()), (2, 0));
            if shard.rank() == 1 && call == 3 {
                return Err(Veto::new("the third"));
            }
            Ok(())
        });
        let mut averager = builder.build(&mut model).unwrap();
        for round in 0..5 {
            assert_eq!(averager.average(&mut model).is_ok(), round != 2);
        }
        averager.broadcast(1, &mut model).unwrap();
        // A call that is refused before it has summed is none of the stage's.
        let weight = if rank == 0 { -1.0 } else { 1.0 };
        averager.average_weighted(&mut model, weight).unwrap_err();
        averager.average(&mut model).unwrap();
    });
    let seen = seen.lock().unwrap();
    let committed = [false, true, true, false, true, true, true];
    let want: Vec<_> = committed.into_iter().enumerate().map(|(i, it)| (i == 5, it)).collect();
    assert_eq!(*seen, want);
}

/// Values that all ranks begin with are none that a stage may change.
#[test]
fn a_stage_that_changes_what_ranks_begin_with_is_refused() {
    for start in [Start::Rank(1), Start::Mean] {
        ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut model = vectors(rank);
            let builder = options(communicator).start_from(start).stage(|shard| {
                each(shard, |tensor, element, x| {
                    if (tensor, element) == (2, 500) {
                        x.set(x.get() + 0.5);
                    }
                });
                Ok(())
            });
            let error = builder.build(&mut model).unwrap_err();
            let Error::StageVetoed { reason, .. } = &error else { panic!("{error}") };
            assert!(reason.contains("begin with"), "{error}");
            assert_eq!(model, vectors(rank));
        });
    }
}

/// Values that the tensors can't hold are refused, with their place, unless they are let through.
#[test]
fn a_stage_that_leaves_no_number_is_refused() {
    let cases = [
        (Dtype::F32, f64::NAN),
        (Dtype::F64, f64::INFINITY),
        (Dtype::F16, 65520.0),
        (Dtype::Bf16, 3.3962e38),
    ];
    for ((dtype, bad), rejects) in cases.into_iter().flat_map(|case| [(case, true), (case, false)])
    {
        let layout = vec![(dtype, 77), (dtype, 500)];
        ranks(2, |communicator| {
            let mut model = model(&layout, communicator.rank() as u64);
            let before = bits(&model);
            let builder = options(communicator).reject_non_finite(rejects).stage(move |shard| {
                each(shard, |tensor, element, x| {
                    if (tensor, element) == (1, 433) {
                        x.set(bad);
                    }
                });
                Ok(())
            });
            let mut averager = builder.build(&mut model).unwrap();
            let averaged = averager.average(&mut model);
            if !rejects {
                averaged.unwrap();
                assert!(!model[1].get(433).is_finite(), "{dtype}: {}", model[1].get(433));
                return None;
            }
            assert_eq!(bits(&model), before);
            match averaged.unwrap_err() {
                Error::StageVetoed { reason, .. } => Some(reason),
                other => panic!("{other}"),
            }
        })
        .into_iter()
        .flatten()
        .for_each(|reason| {
            let is_placed = reason.contains("tensor 1") && reason.ends_with("element 433");
            assert!(is_placed && reason.contains("its function has left"), "{reason}");
        });
    }
    // The largest that is rounded to a finite one.
    for (dtype, most) in [(Dtype::F16, 65519.0), (Dtype::Bf16, 3.3961e38)] {
        ranks(2, |communicator| {
            let mut model = model(&vec![(dtype, 100)], 1);
            let builder = options(communicator).stage(move |shard| {
                each(shard, |_, _, x| x.set(-most));
                Ok(())
            });
            builder.build(&mut model).unwrap().average(&mut model).unwrap();
            assert!((0..100).all(|i| model[0].get(i).is_finite()));
        });
    }
}

/// Any element of any tensor, whichever rank, channel and chunk it lies in.
#[test]
fn a_value_that_a_stage_leaves_is_named_on_every_rank() {
    let layout = vec![(Dtype::F32, 700), (Dtype::Bf16, 1300), (Dtype::F64, 301), (Dtype::F32, 5)];
    let mut random = Random(seed());
    for _ in 0..count(60, 1000) {
        let (world, tensor) = (1 + random.below(4) as usize, random.below(4) as usize);
        let (channels, chunk) = (1 + random.below(3) as u32, 128 << random.below(3));
        let element = random.below(layout[tensor].1 as u64) as usize;
        let outer = if random.below(3) == 0 { Outer::diloco() } else { Outer::mean() };
        ranks(world, |communicator| {
            let mut model = model(&layout, communicator.rank() as u64);
            let builder = options(communicator).channels(channels).chunk_bytes(chunk).outer(outer);
            let builder = builder.start_from(Start::Rank(0)).stage(move |shard| {
                let spoils = !shard.sets_values();
                each(shard, |t, e, x| {
                    if spoils && (t, e) == (tensor, element) {
                        x.set(f64::NAN);
                    }
                });
                Ok(())
            });
            let mut averager = builder.build(&mut model).unwrap();
            let before = bits(&model);
            let error = averager.average(&mut model).unwrap_err();
            let Error::StageVetoed { reason, .. } = &error else { panic!("{error}") };
            let (tensor, element) = (format!("tensor {tensor}"), format!("element {element}"));
            assert!(reason.contains(&tensor) && reason.ends_with(&element), "{reason}, {element}");
            assert_eq!(bits(&model), before);
        });
    }
}

/// The rank that holds a NaN is named, not the ranks whose stages see it in the mean.
#[test]
fn a_value_that_is_not_finite_is_told_rather_than_a_veto() {
    for bad in 0..3 {
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = vectors(rank);
            if rank == bad {
                model.iter_mut().flatten().for_each(|x| *x = f32::NAN);
            }
            let mut averager = options(communicator)
                .stage(|shard| {
                    each(shard, |_, _, x| assert!(x.get().is_finite()));
                    Ok(())
                })
                .build(&mut model)
                .unwrap();
            let error = averager.average(&mut model).unwrap_err();
            assert!(matches!(error, Error::NonFinite { rank, .. } if rank == bad), "{error}");
            model = vectors(rank);
            averager.average(&mut model).unwrap();
        });
    }
}

/// A stage that takes longer than its peers wait: they name its rank, and nothing hangs.
#[test]
fn a_stage_that_takes_too_long_is_a_timeout_of_its_rank() {
    let given_up = Arc::new(AtomicUsize::new(0));
    ranks(3, |communicator| {
        let (rank, seen) = (communicator.rank(), given_up.clone());
        let mut model = vectors(rank);
        let builder = options(communicator).timeout(Duration::from_secs(5)).stage(move |shard| {
            let end = Instant::now() + Duration::from_secs(60);
            while shard.rank() == 1 && seen.load(Relaxed) < 2 && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
        let mut averager = builder.build(&mut model).unwrap();
        let error = averager.average(&mut model).unwrap_err();
        given_up.fetch_add(1, Relaxed);
        assert!(matches!(error, Error::Timeout { rank: 1, committed: false, .. }), "{error}");
        assert_eq!(model, vectors(rank));
    });
}

/// Schedules go on after a veto, as after any error that is not fatal.
#[test]
fn local_sgd_averages_again_after_a_veto() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vectors(rank);
        let mut call = 0;
        let builder = options(communicator).stage(move |_| {
            call += 1;
            if call == 1 {
                Err(Veto::new("the first"))
            } else {
                Ok(())
            }
        });
        let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(2));
        let made: Vec<bool> = (0..6).map(|_| sgd.step(&mut model).is_ok()).collect();
        assert_eq!(made, [true, false, true, true, true, true]);
        sgd.finish(&mut model).unwrap();
        let mean: Vec<f32> = vectors(0)
            .concat()
            .iter()
            .zip(vectors(1).concat())
            .map(|(a, b)| (a + b) / 2.0)
            .collect();
        assert_eq!(model.concat(), mean);
    });
}
