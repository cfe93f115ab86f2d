//! Models that lend their tensors: when they are asked, and the errors on all ranks when one cannot
//! lend.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Mutex;

use param_averager::{
    Action, Algorithm, Error, Lend, LendError, Loan, LocalSgd, Parameters, Schedule, TensorMut,
    TensorState,
};
use test_support::ranks;

/// Tensors behind locks, as frameworks keep them.
struct Locked {
    weights: Vec<Mutex<Vec<f32>>>,
    lent: usize,
    fails: Fails,
}

#[derive(Clone, Copy, PartialEq)]
enum Fails {
    No,
    Says,
    Wraps,
    Forgets,
    Repeats,
    SaysAfterwards,
    CatchesAPanic,
}

impl Locked {
    fn new(value: f32) -> Self {
        let weights = [5, 1000, 1].map(|elements| Mutex::new(vec![value; elements])).into();
        Locked { weights, lent: 0, fails: Fails::No }
    }

    fn values(&self) -> Vec<f32> {
        self.weights.iter().flat_map(|weights| weights.lock().unwrap().clone()).collect()
    }
}

impl Lend for Locked {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        self.lent += 1;
        if self.fails == Fails::CatchesAPanic {
            let caught = catch_unwind(AssertUnwindSafe(|| average(Loan::new(&mut Panics))));
            assert!(caught.is_err());
            return Ok(());
        }
        if self.fails == Fails::Says {
            return Err(LendError::new("tensor `w1` is not contiguous"));
        }
        if self.fails == Fails::Wraps {
            "three".parse::<u32>()?;
        }
        let mut guards: Vec<_> =
            self.weights.iter().map(|weights| weights.lock().unwrap()).collect();
        let mut tensors: Vec<_> =
            guards.iter_mut().map(|weights| TensorMut::from(&mut weights[..])).collect();
        if self.fails != Fails::Forgets {
            average(Loan::new(&mut tensors));
        }
        if self.fails == Fails::Repeats {
            average(Loan::new(&mut tensors));
        }
        if self.fails == Fails::SaysAfterwards {
            "three".parse::<u32>()?;
        }
        Ok(())
    }
}

struct Panics;

impl Parameters for Panics {
    fn visit<'a>(&'a mut self, _: &mut dyn FnMut(TensorMut<'a>)) {
        std::panic::resume_unwind(Box::new("a panic")); // without a message on standard error
    }
}

const ALGORITHMS: [Algorithm; 2] = [Algorithm::Direct, Algorithm::Ring];

#[test]
fn a_model_is_asked_only_when_an_average_is_made() {
    ranks(2, |communicator| {
        let mut model = Locked::new(communicator.rank() as f32);
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let built = model.lent;
        let mut sgd = LocalSgd::new(averager, Schedule::every(8));
        for step in 1..=20 {
            sgd.step(&mut model).unwrap();
            assert_eq!(model.lent - built, step / 8, "after step {step}");
        }
        sgd.finish(&mut model).unwrap();
        assert_eq!((model.lent - built, model.values()), (3, vec![0.5; 1006]));
    });
}

/// Averages twice with three ranks; rank 1 fails in the first average only.
fn with_a_rank_that(fails: Fails, check: impl Fn(usize, Result<(), Error>) + Sync) {
    for algorithm in ALGORITHMS {
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = Locked::new(rank as f32);
            let builder = test_support::options(communicator).algorithm(algorithm);
            let mut averager = builder.build(&mut model).unwrap();
            if rank == 1 {
                model.fails = fails;
            }
            let ended = averager.average(&mut model);
            let state = ended.as_ref().map_or_else(Error::tensors, |_| TensorState::Averaged);
            let value = if state == TensorState::Averaged { 1.0 } else { rank as f32 };
            assert_eq!(model.values(), vec![value; 1006], "rank {rank}");
            check(rank, ended.map(drop));
            model.fails = Fails::No;
            averager.average_weighted(&mut model, 1.0).unwrap();
            assert_eq!(model.values(), vec![1.0; 1006], "rank {rank}");
        });
    }
}

#[test]
fn a_rank_that_can_not_lend_is_an_error_on_every_rank() {
    with_a_rank_that(Fails::Says, |rank, ended| {
        let error = ended.unwrap_err();
        let Error::LendFailed { rank: 1, reason, source: None } = &error else {
            panic!("{error:?}")
        };
        assert!(!error.is_fatal() && error.tensors() == TensorState::Unchanged);
        let own = "tensor `w1` is not contiguous";
        assert_eq!(reason == own, rank == 1, "{error}");
    });
}

/// The error that `lend` had, of its own type. Peers have its text at most.
#[test]
fn the_rank_that_fails_has_its_own_error_as_the_source() {
    use std::error::Error as _;
    let is_own = |error: &(dyn std::error::Error + 'static)| {
        error.source().is_some_and(|source| source.is::<std::num::ParseIntError>())
    };
    with_a_rank_that(Fails::Wraps, |rank, ended| {
        let error = ended.unwrap_err();
        assert!(matches!(error, Error::LendFailed { rank: 1, .. }), "{error:?}");
        assert_eq!((is_own(&error), error == error.clone()), (rank == 1, true), "rank {rank}");
    });
    with_a_rank_that(Fails::SaysAfterwards, |rank, ended| {
        let own = ended.err().is_some_and(|error| error.source().is_some_and(is_own));
        assert_eq!(own, rank == 1);
    });
}

#[test]
fn a_rank_that_lends_nothing_is_an_error_on_every_rank() {
    for fails in [Fails::Forgets, Fails::CatchesAPanic] {
        with_a_rank_that(fails, |_, ended| {
            assert!(matches!(ended.unwrap_err(), Error::LendFailed { rank: 1, .. }));
        });
    }
}

#[test]
fn each_rank_that_fails_gets_its_own_reason() {
    ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = Locked::new(rank as f32);
        let mut averager = test_support::options(communicator).build(&mut model).unwrap();
        model.fails = [Fails::Says, Fails::No, Fails::Forgets][rank];
        let error = averager.average(&mut model).unwrap_err();
        let reason = ["not contiguous", "own error", "without calling"][rank];
        let named = [0, 0, 2][rank];
        assert!(matches!(error, Error::LendFailed { rank, .. } if rank == named), "{error:?}");
        assert!(error.to_string().contains(reason), "{error}");
    });
}

/// Its schedule goes on as that of its peers, which know nothing of it.
#[test]
fn a_fault_after_the_average_changes_no_schedule() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = Locked::new(rank as f32);
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        if rank == 1 {
            model.fails = Fails::SaysAfterwards;
        }
        let step = sgd.step(&mut model);
        assert_eq!(step.is_ok(), rank == 0);
        let late = |error: &Error| matches!(error, Error::AfterAverage { averaged: Some(_), .. });
        assert!(step.as_ref().err().is_none_or(late), "{step:?}");
        model.fails = Fails::No;
        assert_eq!(sgd.averages(), 1);
        assert_eq!(sgd.finish(&mut model), Ok(Action::Unneeded));
        assert_eq!(model.values(), vec![0.5; 1006]);
    });
}

/// The average was made before the fault showed, so peers get no error.
#[test]
fn fault_after_the_average_is_reported_as_such() {
    for fails in [Fails::Repeats, Fails::SaysAfterwards] {
        with_a_rank_that(fails, |rank, ended| match (rank, ended) {
            (1, Err(Error::AfterAverage { averaged: Some(_), cause })) => {
                let Error::LendFailed { rank: 1, reason, .. } = &*cause else {
                    panic!("{cause:?}")
                };
                let text = if fails == Fails::Repeats { "more than once" } else { "invalid digit" };
                assert!(reason.contains(text), "{reason}");
            }
            (_, ended) => ended.unwrap(),
        });
    }
}

#[test]
fn no_rank_builds_where_one_can_not_lend() {
    use Fails::*;
    for fails in [Says, Wraps, Forgets, Repeats, SaysAfterwards, CatchesAPanic] {
        ranks(2, |communicator| {
            let mut model = Locked::new(0.0);
            if communicator.rank() == 1 {
                model.fails = fails;
            }
            let error = test_support::options(communicator).build(&mut model).unwrap_err();
            assert!(matches!(error, Error::LendFailed { rank: 1, .. }), "{error:?}");
        });
    }
}

#[test]
fn single_rank_that_can_not_lend_gets_an_error() {
    ranks(1, |communicator| {
        let mut model = Locked::new(0.0);
        let mut averager = test_support::options(communicator).build(&mut model).unwrap();
        model.fails = Fails::Says;
        assert!(matches!(averager.average(&mut model), Err(Error::LendFailed { rank: 0, .. })));
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        assert_eq!(sgd.step(&mut model), Ok(Action::Alone));
    });
}

/// A started average of host memory has been made when `start` returns.
#[test]
fn host_memory_is_averaged_by_start() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = Locked::new(rank as f32);
        let mut averager = test_support::options(communicator).build(&mut model).unwrap();
        let pending = averager.start_weighted(&mut model, 1.0 + 2.0 * rank as f64).unwrap();
        assert!(pending.is_done());
        assert_eq!(model.values(), vec![0.75; 1006]);
        assert_eq!(pending.wait().unwrap().bytes, 4024);
    });
}
