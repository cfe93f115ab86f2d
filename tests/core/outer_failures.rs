//! Averages with an outer optimizer that fail: neither tensors nor state change.

use param_averager::{Algorithm, Error, LendError, Loan, Outer, ParamAverager, Phase, TensorState};
use test_support::{bits, ranks, Guarded, Random};

use crate::outer_promises::{builder, fill, filled, HALVES, WAYS};

/// Calls that fail on every rank, with nothing changed.
type Fails = fn(&mut ParamAverager, &mut Vec<Guarded>) -> Option<Error>;

struct NotLent;
impl param_averager::Lend for NotLent {
    fn lend(&mut self, _: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        Err(LendError::new("not now"))
    }
}

fn with_nan(
    model: &mut [Guarded],
    rank: usize,
    call: impl FnOnce(&mut [Guarded]) -> Option<Error>,
) -> Option<Error> {
    let kept = model[2].get(7);
    if rank == 0 {
        model[2].set(7, f64::NAN);
    }
    let error = call(model);
    assert!(rank != 0 || model[2].get(7).is_nan());
    model[2].set(7, kept);
    error
}

const FAILURES: [(&str, Fails); 8] = [
    ("a NaN", |averager, model| {
        let rank = averager.rank();
        with_nan(model, rank, |mut model| averager.average(&mut model).err())
    }),
    ("a NaN that is broadcast", |averager, model| {
        let rank = averager.rank();
        with_nan(model, rank, |mut model| averager.broadcast(0, &mut model).err())
    }),
    ("no weight", |averager, model| averager.average_weighted(model, 0.0).err()),
    ("a negative weight", |averager, model| averager.average_weighted(model, -1.0).err()),
    ("a root that is none", |averager, model| averager.broadcast(9, model).err()),
    ("other calls", |averager, model| match averager.rank() {
        0 => averager.broadcast(0, model).err(),
        _ => averager.average(model).err(),
    }),
    ("other tensors", |averager, model| {
        let last = model.pop().unwrap();
        let error = averager.average(model).err();
        model.push(last);
        error
    }),
    ("tensors that are not lent", |averager, model| match averager.rank() {
        0 => averager.average(&mut NotLent).err(),
        _ => averager.average(model).err(),
    }),
];

/// An average that fails changes neither tensors nor state, whichever call it was: the one after it
/// gives the bits that it would have given.
#[test]
fn an_average_that_fails_changes_no_state() {
    let run = |world, algorithm, outer, fails: Option<Fails>| {
        ranks(world, |communicator| {
            let rank = communicator.rank();
            let mut random = Random(rank as u64);
            let mut model = filled(0.0);
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let builder = builder(communicator, algorithm, outer).reject_non_finite(true);
            let mut averager = builder.build(&mut model).unwrap();
            let mut results = vec![];
            for round in 0..4 {
                for tensor in &mut model {
                    for i in 0..tensor.elements {
                        tensor.set(i, tensor.get(i) + random.value() / 4.0);
                    }
                }
                if let (Some(fails), 1..=2) = (fails, round) {
                    let before = bits(&model);
                    let error = fails(&mut averager, &mut model).expect("an error");
                    assert!(!error.is_fatal(), "{error}");
                    assert_eq!(error.tensors(), TensorState::Unchanged, "{error}");
                    assert_eq!(bits(&model), before, "{error}");
                }
                averager.average(&mut model).unwrap();
                results.push(bits(&model));
            }
            results
        })
    };
    for algorithm in WAYS {
        for outer in [Outer::diloco(), Outer::adam(0.1, 0.9, 0.99, 1e-3), HALVES.keeping(0.5)] {
            for world in [1, 3] {
                let good = run(world, algorithm, outer, None);
                for (what, fails) in FAILURES {
                    if world == 1 && what == "other calls" {
                        continue; // alone, there is no other call
                    }
                    let failed = run(world, algorithm, outer, Some(fails));
                    assert!(failed == good, "{algorithm:?}, {outer}, {world} ranks: {what}");
                }
            }
        }
    }
}

/// A fatal failure before the commit: no rank's tensors change. (That no rank's state does is what
/// tests/processes sees, after a recovery.)
#[test]
fn an_abort_before_the_commit_changes_no_tensor() {
    for algorithm in WAYS {
        let all_are_built = std::sync::Barrier::new(3);
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = filled(8.0);
            let mut averager = builder(communicator, algorithm, HALVES).build(&mut model).unwrap();
            fill(&mut model, rank as f64);
            let before = bits(&model);
            all_are_built.wait();
            if rank == 0 {
                averager.abort_handle().abort(); // without rank 0 there is no commit
            }
            let error = averager.average(&mut model).unwrap_err();
            assert!(error.is_fatal() && error.tensors() == TensorState::Unchanged, "{error}");
            assert_eq!(bits(&model), before);
        });
    }
}

/// The ring commits with an outer optimizer, whatever `all_or_nothing` is.
#[test]
fn a_rank_that_is_lost_while_summing_changes_no_tensor() {
    for all_or_nothing in [true, false] {
        let errors = ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = filled(8.0);
            let builder = builder(communicator, Algorithm::Ring, HALVES);
            let mut averager = builder.all_or_nothing(all_or_nothing).build(&mut model).unwrap();
            fill(&mut model, rank as f64);
            let before = bits(&model);
            if rank == 2 {
                // SAFETY: the ring; no peer touches this rank's tensors.
                unsafe { averager.leave_before_step(6) };
            }
            let error = averager.average(&mut model).unwrap_err();
            assert_eq!(error.tensors(), TensorState::Unchanged, "{error}");
            assert_eq!(bits(&model), before);
            error
        });
        let is_while_summing = |error: &Error| {
            matches!(error, Error::PeerLost { rank: 2, phase: Phase::Reduce, committed: false })
        };
        assert!(errors[..2].iter().all(is_while_summing), "{all_or_nothing}: {errors:?}");
    }
}
