//! Every public number and duration, over its whole range: an answer or an error, never a panic.

use std::time::Duration;

use param_averager::{
    Algorithm, Communicator, Device, Dtype, Error, LocalSgd, Schedule, TensorMut,
};
use proptest::prelude::*;
use test_support::{count, ranks};

/// Numbers of every magnitude, and those beside powers of two and the ends of the range.
fn number() -> impl Strategy<Value = u64> {
    let near = (0u32..64, -2i64..=2).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off));
    prop_oneof![any::<u64>(), near, 0u64..20, (0u64..20).prop_map(|off| u64::MAX - off)]
}

fn duration() -> impl Strategy<Value = Duration> {
    let any =
        (number(), 0u32..1_000_000_000).prop_map(|(seconds, rest)| Duration::new(seconds, rest));
    prop_oneof![any, Just(Duration::MAX), Just(Duration::ZERO), Just(Duration::from_nanos(1))]
}

fn weight() -> impl Strategy<Value = f64> {
    let special = prop::sample::select(vec![
        0.0,
        -0.0,
        -1.0,
        f64::NAN,
        f64::INFINITY,
        f64::MIN_POSITIVE,
        f64::MAX,
    ]);
    prop_oneof![any::<u64>().prop_map(f64::from_bits), special]
}

fn one() -> Communicator {
    Communicator::from_devices(&[Device::cpu()]).unwrap().into_iter().next().unwrap()
}

/// True if an averager may be built with these options, by their documentation.
fn are_valid(channels: u32, slots: u32, chunk: usize, timeout: Duration) -> bool {
    (1..=1024).contains(&channels)
        && slots.is_power_of_two()
        && (2..=1024).contains(&slots)
        && (128..=64 << 20).contains(&chunk)
        && !timeout.is_zero()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: count(100, 300) as u32,
        failure_persistence: None,
        ..Default::default()
    })]

    #[test]
    fn any_options_are_taken_or_refused_by_name(
        channels in number(),
        slots in number(),
        chunk in number(),
        timeout in duration(),
        ring in any::<bool>(),
    ) {
        let (channels, slots, chunk) = (channels as u32, slots as u32, chunk as usize);
        let valid = are_valid(channels, slots, chunk, timeout);
        // Valid options may ask for more memory or threads than a test should take.
        let bytes = || u64::from(channels) * u64::from(slots) * (chunk as u64);
        prop_assume!(!valid || bytes() < 64 << 20 && channels < 16);
        let results = ranks(2, |communicator| {
            let algorithm = if ring { Algorithm::Ring } else { Algorithm::Direct };
            let builder = test_support::options(communicator).algorithm(algorithm);
            let builder = builder.channels(channels).slots(slots).chunk_bytes(chunk);
            builder.timeout(timeout).build(&mut vec![1.0f32; 100]).map(drop)
        });
        let is_late = |result: &Result<(), Error>| {
            matches!(result, Err(Error::Timeout { .. } | Error::PeerLost { .. }))
        };
        if timeout < Duration::from_secs(20) && results.iter().any(is_late) {
            return Ok(()); // a rank may take so long to come
        }
        prop_assert_eq!(&results[0], &results[1]);
        match &results[0] {
            Ok(()) => prop_assert!(valid),
            Err(Error::InvalidOption { option, .. }) => {
                let options = ["channels", "slots", "chunk_bytes", "timeout"];
                prop_assert!(!valid && options.contains(option))
            }
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    /// Timeouts that are long end nothing early, and overflow nothing.
    #[test]
    fn any_timeout_averages(
        timeout in duration(),
        ring in any::<bool>(),
        weights in (weight(), weight()),
    ) {
        prop_assume!(timeout > Duration::from_secs(20));
        let results = ranks(2, |communicator| {
            let rank = communicator.rank();
            let algorithm = if ring { Algorithm::Ring } else { Algorithm::Direct };
            let mut model = vec![rank as f32; 1000];
            let builder = test_support::options(communicator).algorithm(algorithm);
            let mut averager = builder.timeout(timeout).build(&mut model).unwrap();
            let weight = if rank == 0 { weights.0 } else { weights.1 };
            let weighted = averager.average_weighted(&mut model, weight);
            if weighted.is_ok() {
                assert!(model.iter().all(|x| (0.0..=1.0).contains(x)), "{weights:?} give \
                    {}", model[0]);
            }
            model.fill(rank as f32);
            averager.average(&mut model).unwrap();
            assert!(model.iter().all(|&x| x == 0.5));
            weighted.map(drop)
        });
        // a NaN may be in it
        prop_assert_eq!(format!("{:?}", results[0]), format!("{:?}", results[1]));
        let is_weight = |weight: f64| weight >= 0.0 && weight.is_finite();
        match &results[0] {
            Ok(()) => prop_assert!(is_weight(weights.0) && is_weight(weights.1)),
            Err(Error::InvalidWeight { .. }) => {
                prop_assert!(!is_weight(weights.0) || !is_weight(weights.1))
            }
            Err(Error::AllWeightsZero) => prop_assert!(weights.0 == 0.0 && weights.1 == 0.0),
            Err(error) => prop_assert!(false, "{}", error),
        }
    }

    #[test]
    fn any_schedule_steps(every in number(), warmup in number(), steps in 0usize..20) {
        let mut model = vec![1.0f32];
        let averager = test_support::options(one()).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(every.max(1)).after_warmup(warmup));
        for _ in 0..steps {
            sgd.step(&mut model).unwrap();
            sgd.skip(&mut model).unwrap();
        }
        sgd.finish(&mut model).unwrap();
    }

    /// Null pointers of any length are refused, and so is a length that no memory has.
    #[test]
    fn any_length_is_refused_by_name(
        elements in number(),
        dtype in 0..4usize,
        null in any::<bool>(),
    ) {
        let dtype = Dtype::ALL[dtype];
        let pointer = if null { std::ptr::null_mut() } else { 16 as *mut u8 };
        let longest = isize::MAX as u64 / dtype.size() as u64;
        prop_assume!(elements > longest || null && elements > 0);
        // SAFETY: the tensor is refused, so nothing is read.
        let tensor = unsafe {
            TensorMut::from_raw_parts(pointer, elements as usize, dtype, Device::cpu())
        };
        let mut tensors = [tensor];
        let mut builder = test_support::options(one());
        builder = builder.channels(1);
        let error = builder.build(&mut tensors).map(drop).unwrap_err();
        prop_assert!(matches!(error, Error::InvalidTensor { rank: 0, .. }), "{}", error);
    }

    #[test]
    fn any_device_and_size_is_answered(ordinal in number(), size in 0usize..40) {
        // Ordinals that a machine may have are not tried.
        let device = Device::cuda(ordinal.max(1000) as usize);
        if size > 0 {
            let error = Communicator::from_devices(&vec![device; size]).map(drop).unwrap_err();
            use Error::{DeviceUnavailable, WorldSize};
            let is_typed = matches!(error, DeviceUnavailable { .. } | WorldSize { .. });
            prop_assert!(is_typed, "{}", error);
        }
        let world = Communicator::from_devices(&vec![Device::cpu(); size]);
        prop_assert_eq!(world.is_ok(), (1..=16).contains(&size));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn any_rank_and_world_size_is_answered(
        rank in number(),
        size in number(),
        timeout in duration(),
    ) {
        let (rank, size) = (rank as usize, size as usize);
        prop_assume!(rank >= size || size > 16); // others would be waited for
        let world = Communicator::builder().rank(rank).world_size(size).rendezvous("extremes");
        let error = world.timeout(timeout).build().map(drop).unwrap_err();
        let is_typed = matches!(error, Error::WorldSize { .. } | Error::Environment { .. });
        prop_assert!(is_typed, "{}", error);
        let refused = Error::RecoveryUnsupported { rank: 0 };
        prop_assert_eq!(one().recover(timeout).unwrap_err(), refused);
    }
}
