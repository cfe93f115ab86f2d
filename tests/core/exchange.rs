//! Scalars and barriers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use param_averager::{
    Communicator, Error, LocalSgd, ParamAverager, Phase, Reduction, Result, Schedule, TensorState,
};
use test_support::ranks;

fn averager(communicator: Communicator) -> ParamAverager {
    test_support::options(communicator)
        .timeout(Duration::from_secs(60))
        .build(&mut vec![0.0f32; 10])
        .unwrap()
}

#[test]
fn scalars_are_reduced_in_the_order_of_ranks() {
    let values = |rank: usize| [rank as f64 + 0.1, -1e300 * rank as f64, 1e-300, f64::INFINITY];
    for (reduction, n) in [Reduction::Sum, Reduction::Mean, Reduction::Max]
        .into_iter()
        .flat_map(|reduction| [1, 2, 5].map(|n| (reduction, n)))
    {
        let found = ranks(n, |communicator| {
            let mut averager = averager(communicator);
            let mut own = values(averager.rank());
            averager.all_reduce_scalars(&mut own, reduction).unwrap();
            own.map(f64::to_bits)
        });
        let mut expected = values(0);
        for rank in 1..n {
            for (value, more) in expected.iter_mut().zip(values(rank)) {
                *value = if reduction == Reduction::Max { value.max(more) } else { *value + more };
            }
        }
        if reduction == Reduction::Mean {
            expected.iter_mut().for_each(|value| *value /= n as f64);
        }
        assert_eq!(found, vec![expected.map(f64::to_bits); n], "{reduction:?} of {n}");
    }
}

#[test]
fn largest_is_nan_if_any_value_is() {
    for at in 0..3 {
        let found = ranks(3, |communicator| {
            let mut averager = averager(communicator);
            let mut own = [if averager.rank() == at { f64::NAN } else { 1.0 }];
            averager.all_reduce_scalars(&mut own, Reduction::Max).unwrap();
            own[0]
        });
        assert!(found.iter().all(|value| value.is_nan()), "{at}: {found:?}");
    }
}

#[test]
fn exchanges_of_different_calls_are_an_error_on_all_ranks_and_change_nothing() {
    type Call = fn(&mut ParamAverager) -> Result<()>;
    fn scalars<const N: usize>(averager: &mut ParamAverager) -> Result<()> {
        let mut own = [1.0; N];
        let made = averager.all_reduce_scalars(&mut own, Reduction::Sum);
        assert_eq!(own, [1.0; N]);
        made
    }
    let mean: Call = |averager| averager.all_reduce_scalars(&mut [1.0], Reduction::Mean);
    let barrier: Call = ParamAverager::barrier;
    let cases: [([Call; 2], &str); 5] = [
        (
            [scalars::<1>, scalars::<2>],
            "rank 1 calls all_reduce_scalars of 2 values, Sum, rank 0 all_reduce_scalars of 1 \
             values, Sum",
        ),
        ([scalars::<1>, mean], "rank 1 calls all_reduce_scalars of 1 values, Mean"),
        ([barrier, scalars::<0>], "all_reduce_scalars of 0 values, Sum, rank 0 barrier"),
        ([scalars::<1>, scalars::<1025>], "rank 1 calls all_reduce_scalars of 1025 values"),
        ([scalars::<1025>, scalars::<1025>], "the option `values` is 1025 numbers: 1,024 at most"),
    ];
    for (calls, expected) in cases {
        let errors = ranks(2, |communicator| {
            let mut averager = averager(communicator);
            let error = calls[averager.rank()](&mut averager).unwrap_err();
            assert!(!error.is_fatal() && error.tensors() == TensorState::Unchanged);
            averager.barrier().unwrap();
            averager.average(&mut vec![0.0f32; 10]).unwrap();
            error.to_string()
        });
        assert!(errors.iter().all(|text| text.contains(expected)), "{errors:?}");
    }
}

#[test]
fn no_rank_passes_a_barrier_before_all_have_reached_it() {
    for n in [2, 4] {
        let reached = AtomicUsize::new(0);
        ranks(n, |communicator| {
            let mut averager = averager(communicator);
            for round in 1..=50 {
                if averager.rank() == round % n {
                    std::thread::sleep(Duration::from_micros(300));
                }
                reached.fetch_add(1, Ordering::Relaxed);
                averager.barrier().unwrap();
                assert_eq!(reached.load(Ordering::Relaxed), round * n);
                averager.barrier().unwrap();
            }
        });
    }
}

#[test]
fn exchange_without_a_rank_fails_on_all_others() {
    // A rank that drops its averager and keeps its communicator, one that drops both, one that
    // aborts, and one that is late.
    const LATE: Duration = Duration::from_secs(6); // longer than a busy machine delays a rank
    for case in 0..4 {
        let (start, over) = (Instant::now(), Barrier::new(3));
        let errors = ranks(3, |communicator| {
            let kept = communicator.clone();
            let mut averager = test_support::options(communicator)
                .timeout(if case == 3 { LATE } else { 10 * LATE })
                .build(&mut vec![0.0f32; 10])
                .unwrap();
            if kept.rank() == 1 {
                match case {
                    0 => drop(averager),
                    1 => drop((averager, kept)),
                    2 => averager.abort_handle().abort(),
                    _ => {
                        over.wait();
                        // The others have given up, and so has the world.
                        let error = averager.average(&mut vec![0.0f32; 10]).unwrap_err();
                        assert!(error.is_fatal(), "{error}");
                        return None;
                    }
                }
                std::thread::sleep(Duration::from_millis(300));
                return None;
            }
            let error = averager.barrier().unwrap_err();
            let again = averager.average(&mut vec![0.0f32; 10]).unwrap_err();
            assert!(matches!(again, Error::Poisoned { .. }), "{again}");
            if case == 3 {
                over.wait();
            }
            Some(error)
        });
        for error in errors.into_iter().flatten() {
            let (phase, committed) = (Phase::Exchange, false);
            let timeout = LATE;
            let expected = match case {
                0 | 1 => Error::PeerLost { rank: 1, phase, committed },
                2 => Error::Aborted { rank: 1, phase: error_phase(&error), committed },
                _ => Error::Timeout { rank: 1, timeout, phase, committed },
            };
            // Of two ranks that wait, one may learn of the failure from the other.
            let follows = matches!(&error, Error::PeerLost { rank, .. } if *rank != 1)
                || matches!(&error, Error::Poisoned { .. });
            assert!(error == expected || follows, "{case}: {error:?}");
        }
        assert!(start.elapsed() < 9 * LATE, "{case}: it waited for the timeout");
    }
}

/// An abort may be found at the start of a call.
fn error_phase(error: &Error) -> Phase {
    match error {
        Error::Aborted { phase, .. } => *phase,
        _ => Phase::Exchange,
    }
}

#[test]
fn two_averagers_exchange_on_their_own() {
    ranks(2, |communicator| {
        let mut model = vec![0.0f32; 10];
        let mut first = averager(communicator.clone());
        let mut second = averager(communicator);
        let order: [usize; 2] = if first.rank() == 0 { [0, 1] } else { [1, 0] };
        std::thread::scope(|scope| {
            for (which, one) in [&mut first, &mut second].into_iter().enumerate() {
                scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(5 * order[which] as u64));
                    let mut own = [which as f64];
                    one.all_reduce_scalars(&mut own, Reduction::Sum).unwrap();
                    assert_eq!(own, [2.0 * which as f64]);
                });
            }
        });
        first.average(&mut model).unwrap();
        let mut sgd = LocalSgd::new(second, Schedule::every(1));
        sgd.step(&mut model).unwrap();
        sgd.averager().barrier().unwrap();
    });
}
