//! Invariant 5 before the first average: worlds and averagers that can't be are refused, with the same error on every rank.

mod common;

use std::time::Duration;

use common::ranks;
use param_averager::{Communicator, Device, Error, ParamAverager, Stage, World};

const TIMEOUT: Duration = Duration::from_millis(600);

#[test]
fn layouts_and_options_that_differ_are_refused_by_all_at_build() {
    let build = |rank2: fn(Communicator) -> Result<ParamAverager, Error>| {
        ranks(3, |communicator| {
            if communicator.rank() == 2 {
                return rank2(communicator).unwrap_err();
            }
            ParamAverager::builder(communicator).build(&mut vec![vec![0f32; 10], vec![0f32; 20]]).unwrap_err()
        })
    };
    type Build = fn(Communicator) -> Result<ParamAverager, Error>;
    let cases: [(Build, &str); 7] = [
        (|c| ParamAverager::builder(c).timeout(Duration::ZERO).build(&mut vec![0f32; 10]), "`timeout` is 0"),
        (
            |c| ParamAverager::builder(c).build(&mut vec![vec![0f32; 10], vec![0f32; 21]]),
            "tensor 1 (f32, 21 elements)",
        ),
        (
            |c| ParamAverager::builder(c).build(&mut vec![vec![0f64; 10], vec![0f64; 20]]),
            "tensor 0 (f64, 10 elements)",
        ),
        (|c| ParamAverager::builder(c).build(&mut vec![vec![0f32; 10]]), "1 tensors"),
        (
            |c| ParamAverager::builder(c).slots(8).build(&mut vec![vec![0f32; 10], vec![0f32; 20]]),
            "slots = 8",
        ),
        (|c| ParamAverager::builder(c).slots(0).build(&mut vec![vec![0f32; 10]]), "`slots` is 0"),
        (
            |c| ParamAverager::builder(c).slots(3).build(&mut vec![vec![0f32; 10], vec![0f32; 20]]),
            "`slots` is 3",
        ),
    ];
    for (rank2, found) in cases {
        let errors = build(rank2);
        for error in &errors {
            assert_eq!(error, &errors[0]);
            assert!(error.to_string().starts_with("rank 2") && error.to_string().contains(found), "{error}");
            assert!(!error.is_fatal() && error.tensors_unchanged());
        }
    }
}

#[test]
fn a_rank_that_does_not_build_is_a_timeout_and_one_that_is_gone_is_lost() {
    let late = ranks(3, |communicator| {
        if communicator.rank() == 1 {
            std::thread::sleep(2 * TIMEOUT);
        }
        ParamAverager::builder(communicator).timeout(TIMEOUT).build(&mut vec![0f32; 10]).unwrap_err()
    });
    let timeout = Error::Timeout { rank: 1, timeout: TIMEOUT, stage: Stage::Build, committed: false };
    assert_eq!(late, vec![timeout; 3], "the late one, too");

    let gone = ranks(3, |communicator| {
        (communicator.rank() != 1)
            .then(|| ParamAverager::builder(communicator).build(&mut vec![0f32; 10]).unwrap_err())
    });
    let lost = Some(Error::PeerLost { rank: 1, stage: Stage::Build, committed: false });
    assert_eq!(gone, [lost.clone(), None, lost]);
}

#[test]
fn worlds_and_devices_that_cannot_be_are_refused() {
    for n in [0, 17] {
        assert_eq!(World::in_process(&vec![Device::cpu(); n]).unwrap_err(), Error::WorldSize { found: n });
    }
    let error = World::in_process(&[Device::cpu(), Device::cuda(0)]).unwrap_err();
    let Error::DeviceUnavailable { rank: 1, device, reason } = &error else { panic!("{error}") };
    assert!(device == "cuda:0" && reason.contains("different devices"), "{error}");
    // What a machine with a driver says, or one without, is tests/cuda.rs's.
    if let Err(said) = param_averager::__private::fatbin() {
        // Built without nvcc: the same words as the build's warning.
        let error = World::in_process(&[Device::cuda(0)]).unwrap_err();
        let Error::DeviceUnavailable { rank: 0, reason, .. } = &error else { panic!("{error}") };
        assert!(reason == said && said.contains("NVCC"), "{reason}");
    }
}
