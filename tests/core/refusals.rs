//! Invariants 5 and 7: invalid worlds, averagers and tensors are refused, with the same error on
//! every rank.

use std::time::Duration;

use param_averager::{
    Algorithm, Communicator, Device, Dtype, Error, Link, ParamAverager, Parameters, Phase,
    TensorMut, TensorState,
};
use test_support::ranks;

/// Longer than a busy machine delays a rank.
const TIMEOUT: Duration = Duration::from_secs(6);

#[test]
fn layouts_and_options_that_differ_are_refused_by_all_at_build() {
    let build = |rank2: fn(Communicator) -> Result<ParamAverager, Error>| {
        ranks(3, |communicator| {
            if communicator.rank() == 2 {
                return rank2(communicator).unwrap_err();
            }
            test_support::options(communicator)
                .build(&mut vec![vec![0f32; 10], vec![0f32; 20]])
                .unwrap_err()
        })
    };
    type Build = fn(Communicator) -> Result<ParamAverager, Error>;
    let cases: [(Build, &str); 7] = [
        (
            |c| test_support::options(c).timeout(Duration::ZERO).build(&mut vec![0f32; 10]),
            "`timeout` is 0",
        ),
        (
            |c| test_support::options(c).build(&mut vec![vec![0f32; 10], vec![0f32; 21]]),
            "tensor 1 (f32, 21 elements)",
        ),
        (
            |c| test_support::options(c).build(&mut vec![vec![0f64; 10], vec![0f64; 20]]),
            "tensor 0 (f64, 10 elements)",
        ),
        (|c| test_support::options(c).build(&mut vec![vec![0f32; 10]]), "1 tensors"),
        (
            |c| test_support::options(c).slots(8).build(&mut vec![vec![0f32; 10], vec![0f32; 20]]),
            "slots = 8",
        ),
        (|c| test_support::options(c).slots(0).build(&mut vec![vec![0f32; 10]]), "`slots` is 0"),
        (
            |c| test_support::options(c).slots(3).build(&mut vec![vec![0f32; 10], vec![0f32; 20]]),
            "`slots` is 3",
        ),
    ];
    for (rank2, found) in cases {
        let errors = build(rank2);
        for error in &errors {
            assert_eq!(error, &errors[0]);
            assert!(
                error.to_string().starts_with("rank 2") && error.to_string().contains(found),
                "{error}"
            );
            assert!(!error.is_fatal() && error.tensors() == TensorState::Unchanged);
        }
    }
}

#[test]
fn a_rank_that_does_not_build_is_a_timeout_and_one_that_is_gone_is_lost() {
    let over = std::sync::Barrier::new(3);
    let late = ranks(3, |communicator| {
        let is_late = communicator.rank() == 1;
        if is_late {
            over.wait();
        }
        let builder = test_support::options(communicator).timeout(TIMEOUT);
        let error = builder.build(&mut vec![0f32; 10]).unwrap_err();
        if !is_late {
            over.wait();
        }
        error
    });
    let timeout =
        Error::Timeout { rank: 1, timeout: TIMEOUT, phase: Phase::Build, committed: false };
    assert_eq!(late, vec![timeout; 3], "the late one, too");

    let gone = ranks(3, |communicator| {
        (communicator.rank() != 1)
            .then(|| test_support::options(communicator).build(&mut vec![0f32; 10]).unwrap_err())
    });
    let lost = Some(Error::PeerLost { rank: 1, phase: Phase::Build, committed: false });
    assert_eq!(gone, [lost.clone(), None, lost]);
}

#[test]
fn worlds_and_devices_that_cannot_be_are_refused() {
    for n in [0, 17] {
        assert_eq!(
            Communicator::from_devices(&vec![Device::cpu(); n]).unwrap_err(),
            Error::WorldSize { found: n }
        );
    }
    let error = Communicator::from_devices(&[Device::cpu(), Device::cuda(0)]).unwrap_err();
    let Error::DeviceUnavailable { rank: 1, device, reason } = &error else { panic!("{error}") };
    assert!(device == "cuda:0" && reason.contains("all on CPUs or all on CUDA devices"), "{error}");
    // Ranks on CPUs accept `Link::Host`, and refuse `Link::Peer`.
    let errors = ranks(2, |communicator| {
        let builder = |link| {
            test_support::options(communicator.clone()).algorithm(Algorithm::Ring).link(link)
        };
        builder(Link::Host)
            .build(&mut vec![0f32; 10])
            .unwrap()
            .average(&mut vec![0f32; 10])
            .unwrap();
        builder(Link::Peer).build(&mut vec![0f32; 10]).map(drop).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, Error::InvalidOption { rank: 0, option: "link", .. }), "{error}");
    }
    // tests/device/cuda.rs tests the errors with a driver and without one.
    if let Err(said) = param_averager::__testing::fatbin() {
        // Built without nvcc: the same words as the build's warning.
        let error = Communicator::from_devices(&[Device::cuda(0)]).unwrap_err();
        let Error::DeviceUnavailable { rank: 0, reason, .. } = &error else { panic!("{error}") };
        assert!(reason == said && said.contains("NVCC"), "{reason}");
    }
}

struct Raw(Vec<(*mut u8, usize, &'static str, Device)>);

impl Parameters for Raw {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        for &(pointer, elements, name, device) in &self.0 {
            // SAFETY: only ever refused, never read.
            visit(
                unsafe { TensorMut::from_raw_parts(pointer, elements, Dtype::F32, device) }
                    .named(name),
            );
        }
    }
}

#[test]
fn pointers_are_checked_and_the_tensor_is_named() {
    let mut memory = vec![0f32; 100];
    let at = memory.as_mut_ptr().cast::<u8>() as usize;
    type Tensors = Vec<(usize, usize, &'static str, Device)>;
    let cases: [(Tensors, &str); 4] = [
        (vec![(0, 3, "wte", Device::cpu())], "rank 0: tensor 0 `wte` (f32, 3 elements) has a null \
            pointer"),
        (vec![(at + 2, 3, "ln", Device::cpu())], "rank 0: tensor 0 `ln` (f32, 3 elements) does not \
            lie at a multiple"),
        (
            vec![(at, 50, "wte", Device::cpu()), (at + 196, 50, "head", Device::cpu())],
            "rank 0: tensor 1 `head` (f32, 50 elements) shares memory with tensor 0 `wte` (f32, 50 \
             elements): pass tied",
        ),
        (vec![(at, 50, "wte", Device::cuda(1))], "rank 0: tensor 0 `wte` (f32, 50 elements) is not \
            on cpu"),
    ];
    for (tensors, message) in cases {
        // A mistake of one rank is an error on every rank.
        let errors = ranks(3, |communicator| {
            let own = communicator.rank() == 0;
            let mut good = vec![0f32; 50];
            let mut raw =
                Raw(tensors.iter().map(|&(a, e, n, d)| (a as *mut u8, e, n, d)).collect());
            let builder = test_support::options(communicator);
            if own { builder.build(&mut raw) } else { builder.build(&mut good) }.unwrap_err()
        });
        for error in errors {
            assert!(error.to_string().starts_with(message), "{error}");
        }
    }
}

/// Overlapping tensors are refused again, even if nothing has moved since the first refusal.
#[test]
fn tensors_that_begin_to_overlap_are_refused_as_long_as_they_do() {
    ranks(2, |communicator| {
        let mut memory = vec![1f32; 30];
        let at = memory.as_mut_ptr();
        let tensors = |second: usize| {
            // SAFETY: inside of `memory`, which lives; the overlap is found out before any rank
            // writes.
            [0, second].map(|element| unsafe {
                TensorMut::from_raw_parts(at.add(element).cast(), 10, Dtype::F32, Device::cpu())
            })
        };
        let own = communicator.rank() == 1;
        let mut averager = test_support::options(communicator).build(&mut tensors(10)).unwrap();
        for _ in 0..3 {
            let error = averager.average(&mut tensors(if own { 9 } else { 10 })).unwrap_err();
            assert!(matches!(error, Error::InvalidTensor { rank: 1, .. }), "{error}");
            assert!(error.to_string().contains("shares memory with tensor 0"), "{error}");
        }
        averager.average(&mut tensors(20)).unwrap();
        assert_eq!(memory, [1f32; 30]);
    });
}

/// The finding of a scan holds for one average only: the next may not read its tensors.
#[test]
fn nan_of_one_average_is_not_reported_in_the_next() {
    for (algorithm, all_or_nothing) in
        [(Algorithm::Direct, true), (Algorithm::Ring, false), (Algorithm::Ring, true)]
    {
        let errors = ranks(3, |communicator| {
            let own = communicator.rank() == 1;
            let model = |elements: usize| vec![vec![1f32; 10], vec![1.0; elements], vec![1.0; 500]];
            let mut averager = test_support::options(communicator)
                .algorithm(algorithm)
                .all_or_nothing(all_or_nothing)
                .reject_non_finite(true)
                .channels(2)
                .build(&mut model(20))
                .unwrap();
            let mut with_nan = model(20);
            if own {
                with_nan[2][499] = f32::NAN;
            }
            let mut errors = vec![averager.average(&mut with_nan).unwrap_err()];
            // One element more, as the last one; and a tensor too few; and a wrong weight; each
            // after the NaN.
            errors.push(averager.average(&mut model(if own { 21 } else { 20 })).unwrap_err());
            averager.average(&mut with_nan).unwrap_err();
            let mut fewer = model(20);
            fewer.truncate(if own { 2 } else { 3 });
            errors.push(averager.average(&mut fewer).unwrap_err());
            averager.average(&mut with_nan).unwrap_err();
            errors.push(
                averager
                    .average_weighted(&mut model(20), if own { -1.0 } else { 1.0 })
                    .unwrap_err(),
            );
            // Rank 1 has weight 0 now, so its NaN does not count.
            averager.average_weighted(&mut with_nan, if own { 0.0 } else { 1.0 }).unwrap();
            averager.average(&mut with_nan).unwrap();
            errors
        });
        for error in &errors {
            assert_eq!(error, &errors[0], "{algorithm:?}");
        }
        let nan = Error::NonFinite {
            rank: 1,
            tensor: "tensor 2 (f32, 500 elements)".into(),
            element: 499,
        };
        assert_eq!(errors[0][0], nan, "{algorithm:?}");
        for (error, found) in
            [(&errors[0][1], "f32, 21 elements, as tensor 1"), (&errors[0][2], "only 2 tensors")]
        {
            assert!(
                matches!(error, Error::LayoutChanged { rank: 1, .. }),
                "{algorithm:?}: {error}"
            );
            assert!(error.to_string().contains(found), "{algorithm:?}: {error}");
        }
        assert_eq!(errors[0][3], Error::InvalidWeight { rank: 1, weight: -1.0 }, "{algorithm:?}");
    }
}
