//! Ranks that run as threads, and the error of all of them.

use std::panic::{catch_unwind, AssertUnwindSafe};

use param_averager::{Communicator, Device, Error, ParamAverager};

#[test]
fn results_come_by_rank() {
    let ranks = Communicator::run(&[Device::cpu(); 4], |communicator| {
        Ok::<_, Error>((communicator.rank(), communicator.world_size()))
    });
    assert_eq!(ranks.unwrap(), [(0, 4), (1, 4), (2, 4), (3, 4)]);
    let none = Communicator::run(&[], |_| Ok::<_, Error>(()));
    assert_eq!(none, Err(Error::WorldSize { found: 0 }));
}

/// Builds and averages, unless `fails` does, in which case its peers lose it.
fn train(communicator: Communicator, fails: impl Fn() -> Result<(), Error>) -> Result<(), Error> {
    let mut own = vec![0.0f32; 100];
    let mut averager = ParamAverager::builder(communicator).build(&mut own)?;
    fails()?;
    averager.average(&mut own).map(drop)
}

#[test]
fn error_is_that_of_the_rank_that_failed_and_not_of_its_peers() {
    for at_fault in 0..3 {
        for _ in 0..20 {
            let ended = Communicator::run(&[Device::cpu(); 3], |communicator| {
                let rank = communicator.rank();
                train(communicator, || match rank == at_fault {
                    true => Err(Error::InvalidWeight { rank, weight: -1.0 }),
                    false => Ok(()),
                })
            });
            assert_eq!(ended, Err(Error::InvalidWeight { rank: at_fault, weight: -1.0 }));
        }
    }
    let apart = Communicator::run(&[Device::cpu(); 2], |communicator| {
        let mut own = vec![0.0f32; 10 + communicator.rank()];
        ParamAverager::builder(communicator).build(&mut own).map(drop)
    });
    assert!(matches!(apart, Err(Error::LayoutsDiffer { rank: 1, .. })), "{apart:?}");
}

#[test]
fn panic_of_a_rank_goes_on_when_all_have_ended() {
    let panic = catch_unwind(AssertUnwindSafe(|| {
        Communicator::run(&[Device::cpu(); 2], |communicator| {
            let rank = communicator.rank();
            train(communicator, || match rank {
                0 => Ok(()),
                _ => panic!("of rank 1"),
            })
        })
    }));
    assert_eq!(panic.unwrap_err().downcast_ref(), Some(&"of rank 1"));
}

#[test]
fn errors_of_the_program_are_kept() {
    type Any = Box<dyn std::error::Error + Send + Sync>;
    let ended = Communicator::run(&[Device::cpu(); 2], |communicator| -> Result<(), Any> {
        train(communicator, || Ok(()))?;
        Err("no data".into())
    });
    assert_eq!(ended.unwrap_err().to_string(), "no data");
}
