//! Invariants 4, 5 and 7: after every fault all ranks get the same typed error in time, and unless
//! a rank has written, every tensor holds its bytes from before.

mod leaving;

use std::time::{Duration, Instant};

use param_averager::__testing::Testing;
use param_averager::{
    Algorithm, Builder, Communicator, Dtype, Error, ParamAverager, Phase, TensorState,
};
use test_support::{bits, count, ranks, Guarded, Random};

use leaving::leave_at;

/// Longer than a busy machine delays a rank.
const TIMEOUT: Duration = Duration::from_secs(6);
/// Time that an error may take beyond the timeout on a machine with more threads than cores.
const GRACE: Duration = Duration::from_secs(20);

const WAYS: [(Algorithm, bool); 3] =
    [(Algorithm::Direct, true), (Algorithm::Ring, true), (Algorithm::Ring, false)];

fn builder(communicator: Communicator, (algorithm, all_or_nothing): (Algorithm, bool)) -> Builder {
    let testing = Testing { poison_slots: true, ..Testing::default() };
    let builder =
        test_support::options(communicator).algorithm(algorithm).all_or_nothing(all_or_nothing);
    builder.timeout(TIMEOUT).chunk_bytes(128).slots(2).channels(1).testing(testing)
}

fn model(rank: usize) -> Vec<Guarded> {
    let mut random = Random(rank as u64);
    let shapes = [(Dtype::F32, 700, 0), (Dtype::Bf16, 333, 1), (Dtype::F32, 5, 3)];
    shapes.map(|(dtype, elements, at)| Guarded::random(dtype, elements, at, &mut random)).into()
}

/// Observations of one rank of a failing average.
struct Seen {
    error: Option<Error>,
    unchanged: bool,
    elapsed: Duration,
    again: Option<Error>,
}

/// An average after a good one. `before` may inject a fault on each rank, and returns the weight,
/// or `None` for a rank that does not average.
fn one_average(
    n: usize,
    way: (Algorithm, bool),
    options: impl Fn(Builder) -> Builder + Sync,
    before: impl Fn(usize, &mut ParamAverager, &mut Vec<Guarded>) -> Option<Option<f64>> + Sync,
) -> Vec<Option<Seen>> {
    let barrier = std::sync::Barrier::new(n);
    ranks(n, |communicator| {
        let rank = communicator.rank();
        let mut model = model(rank);
        let mut averager = options(builder(communicator, way)).build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        model = self::model(rank + 100);
        let call = before(rank, &mut averager, &mut model);
        let held = bits(&model);
        barrier.wait();
        let start = Instant::now();
        let seen = call.map(|weight| {
            let result = match weight {
                Some(weight) => averager.average_weighted(&mut model, weight),
                None => averager.average(&mut model),
            };
            let unchanged = bits(&model) == held && model.iter().all(Guarded::guards_are_whole);
            let elapsed = start.elapsed();
            Seen {
                error: result.err(),
                unchanged,
                elapsed,
                again: averager.average(&mut model).err(),
            }
        });
        barrier.wait(); // no rank leaves the world before all have a result
        seen
    })
}

/// Asserts that all ranks that averaged got `error`, in time, with unchanged tensors.
#[track_caller]
fn expect(seen: &[Option<Seen>], error: &Error) {
    for (rank, seen) in
        seen.iter().enumerate().filter_map(|(rank, seen)| Some((rank, seen.as_ref()?)))
    {
        assert_eq!(seen.error.as_ref(), Some(error), "rank {rank}");
        assert!(
            seen.unchanged && error.tensors() == TensorState::Unchanged,
            "rank {rank}: tensors changed"
        );
        assert!(seen.elapsed < TIMEOUT + GRACE, "rank {rank} took {:?}", seen.elapsed);
        if error.is_fatal() {
            let poisoned = Error::Poisoned { cause: Box::new(error.clone()) };
            assert_eq!(seen.again.as_ref(), Some(&poisoned), "rank {rank}");
        }
    }
}

#[test]
fn a_rank_that_never_arrives_is_named_by_all_others() {
    let check = |way, n, late| {
        let seen = one_average(n, way, |b| b, |rank, _, _| (rank != late).then_some(None));
        let phase = Phase::Meet;
        expect(&seen, &Error::Timeout { rank: late, timeout: TIMEOUT, phase, committed: false });
    };
    // They mostly sleep: all at once.
    std::thread::scope(|scope| {
        for way in WAYS {
            for (n, late) in [(2, 1), (3, 0), (4, 2)] {
                scope.spawn(move || check(way, n, late));
            }
        }
    });
}

#[test]
fn a_rank_that_leaves_at_any_step_is_named_and_nothing_is_lost() {
    let stride = (4 / count(1, 4)).max(1);
    let mut cases = vec![];
    for way in WAYS {
        for n in [2, 3] {
            let steps = ranks(n, |communicator| {
                let mut model = model(communicator.rank());
                let mut averager = builder(communicator, way).build(&mut model).unwrap();
                averager.average(&mut model).unwrap();
                averager.steps()
            })[0];
            assert!(steps >= 3, "{way:?}: {steps} steps");
            cases.extend((1..=steps).step_by(stride).map(|step| (n, way, step)));
        }
    }
    // They mostly sleep: many at once.
    let cases = std::sync::Mutex::new(cases.into_iter());
    let next = || cases.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..48 {
            scope.spawn(|| {
                while let Some((n, way, step)) = next() {
                    leave_at(n, way, step);
                }
            });
        }
    });
}

#[test]
fn an_abort_from_another_thread_ends_every_wait() {
    for way in WAYS {
        let seen = one_average(
            3,
            way,
            |b| b.timeout(Duration::from_secs(60)),
            |rank, averager, _| {
                if rank != 2 {
                    return Some(None);
                }
                let handle = averager.abort_handle();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(50));
                    handle.abort();
                });
                None // rank 2 never comes
            },
        );
        expect(&seen, &Error::Aborted { rank: 2, phase: Phase::Meet, committed: false });
    }
}

#[test]
fn abort_between_averages_fails_the_next_average() {
    let seen = one_average(
        2,
        WAYS[0],
        |b| b,
        |rank, averager, _| {
            if rank == 0 {
                averager.abort_handle().abort();
                averager.abort_handle().abort(); // does nothing more
            }
            Some(None)
        },
    );
    expect(&seen, &Error::Aborted { rank: 0, phase: Phase::Meet, committed: false });
}

#[test]
fn a_rank_that_drops_its_averager_is_lost_at_once() {
    for way in WAYS {
        let results = ranks(3, |communicator| {
            let mut model = model(communicator.rank());
            let leaves = communicator.rank() == 1;
            let long = Duration::from_secs(60);
            let mut averager = builder(communicator, way).timeout(long).build(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            if leaves {
                return None; // dropped here, as by a panic or an early return
            }
            let start = Instant::now();
            let error = averager.average(&mut model).unwrap_err();
            assert!(start.elapsed() < GRACE);
            Some(error)
        });
        let lost = Some(Error::PeerLost { rank: 1, phase: Phase::Meet, committed: false });
        assert_eq!(results, [lost.clone(), None, lost], "{way:?}");
    }
}

/// A departure is also noticed by ranks that wait for another rank.
#[test]
fn departed_rank_is_noticed_while_another_is_late() {
    for way in WAYS {
        let known = std::sync::Barrier::new(2);
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = model(rank);
            let long = Duration::from_secs(60);
            let mut averager = builder(communicator, way).timeout(long).build(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            match rank {
                0 => drop(known.wait()), // not before rank 2 has its error
                1 => return,
                _ => {}
            }
            let start = Instant::now();
            let error = averager.average(&mut model).unwrap_err();
            if rank == 2 {
                known.wait();
            }
            assert!(start.elapsed() < GRACE, "{way:?}, rank {rank}");
            assert_eq!(
                error,
                Error::PeerLost { rank: 1, phase: Phase::Meet, committed: false },
                "{way:?}"
            );
        });
    }
}

/// The same while an averager is built, and in an exchange on the hosts.
#[test]
fn departed_rank_is_noticed_while_another_is_late_to_build_or_to_exchange() {
    for builds in [false, true] {
        let known = std::sync::Barrier::new(2);
        ranks(3, |communicator| {
            let (rank, start) = (communicator.rank(), Instant::now());
            let mut model = model(rank);
            let long = Duration::from_secs(60);
            let mut build =
                || builder(communicator.clone(), WAYS[0]).timeout(long).build(&mut model);
            let averager = (!builds).then(|| build().unwrap());
            match rank {
                1 => drop(known.wait()), // not before rank 0 has its error
                2 => return,
                _ => {}
            }
            let error = match averager {
                Some(mut averager) => averager.barrier().unwrap_err(),
                None => build().map(drop).unwrap_err(),
            };
            if rank == 0 {
                known.wait();
                let phase = if builds { Phase::Build } else { Phase::Exchange };
                let lost = Error::PeerLost { rank: 2, phase, committed: false };
                assert_eq!(error, lost, "builds: {builds}");
            }
            assert!(start.elapsed() < GRACE, "builds: {builds}, rank {rank}");
        });
    }
}

#[test]
fn a_nan_is_rejected_by_all_when_asked_and_named() {
    for way in WAYS {
        for (value, tensor, element) in
            [(f64::NAN, 1, 332), (f64::INFINITY, 0, 0), (f64::NEG_INFINITY, 2, 4)]
        {
            let poison = |rank: usize, _: &mut ParamAverager, model: &mut Vec<Guarded>| {
                if rank == 1 {
                    model[tensor].set(element, value);
                }
                Some(None)
            };
            let seen = one_average(3, way, |b| b.reject_non_finite(true), poison);
            let described = [
                "tensor 0 (f32, 700 elements)",
                "tensor 1 (bf16, 333 elements)",
                "tensor 2 (f32, 5 elements)",
            ];
            expect(
                &seen,
                &Error::NonFinite {
                    rank: 1,
                    tensor: described[tensor].into(),
                    element: element as u64,
                },
            );
            // No averager is poisoned: the next average fails by the same error.
            assert!(seen
                .iter()
                .flatten()
                .all(|seen| matches!(seen.again, Some(Error::NonFinite { .. }))));

            // Without `reject_non_finite` a NaN spreads, as in any mean; with weight 0 it does not.
            let seen = one_average(3, way, |b| b.reject_non_finite(false), poison);
            assert!(seen.iter().flatten().all(|seen| seen.error.is_none()));
            let seen = one_average(
                3,
                way,
                |b| b.reject_non_finite(true),
                |rank, averager, model| {
                    poison(rank, averager, model);
                    Some(Some(if rank == 1 { 0.0 } else { 2.0 }))
                },
            );
            assert!(seen.iter().flatten().all(|seen| seen.error.is_none()));
        }
    }
}

#[test]
fn weights_that_make_no_mean_are_refused_by_all() {
    for way in WAYS {
        for (weight, rank) in [(-1.0, 2), (f64::NAN, 0), (f64::INFINITY, 1)] {
            let seen = one_average(
                3,
                way,
                |b| b,
                |r, _, _| Some(Some(if r == rank { weight } else { 1.0 })),
            );
            for seen in seen.iter().flatten() {
                let Some(Error::InvalidWeight { rank: named, weight: found }) = seen.error else {
                    panic!("{:?}", seen.error)
                };
                assert_eq!((named, found.to_bits()), (rank, weight.to_bits()));
                assert!(seen.unchanged);
            }
        }
        let seen = one_average(3, way, |b| b, |_, _, _| Some(Some(0.0)));
        expect(&seen, &Error::AllWeightsZero);
        let seen = one_average(3, way, |b| b, |rank, _, _| Some((rank == 2).then_some(1.0)));
        expect(&seen, &Error::WeightingDiffers { rank: 2 });
    }
}

#[test]
fn tensors_that_changed_are_refused_by_all() {
    type Change = fn(&mut Vec<Guarded>);
    let was = "tensor 1 (bf16, 333 elements)";
    let changes: [(Change, &str, &str); 4] = [
        (
            |model| model[1] = Guarded::new(Dtype::Bf16, 334, 0),
            "bf16, 334 elements, as tensor 1",
            was,
        ),
        (
            |model| model[1] = Guarded::new(Dtype::F16, 333, 0),
            "f16, 333 elements, as tensor 1",
            was,
        ),
        (|model| drop(model.pop()), "only 2 tensors", "3"),
        (|model| model.push(Guarded::new(Dtype::F32, 5, 0)), "more than 3 tensors", "3"),
    ];
    for way in WAYS {
        for (change, found, expected) in changes {
            let seen = one_average(
                3,
                way,
                |b| b,
                |rank, _, model| {
                    if rank == 2 {
                        change(model);
                    }
                    Some(None)
                },
            );
            let error =
                Error::LayoutChanged { rank: 2, found: found.into(), expected: expected.into() };
            expect(&seen, &error);
        }
    }
}
