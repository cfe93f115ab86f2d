//! Averages on streams of the trainer's own.

use super::model::Model;
use super::scenarios::GPU;
use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use test_support::ranks_on;

/// A trainer that enqueues everything: its step, the average, and the use of the mean.
pub fn streams() {
    const ELEMENTS: usize = 20_000;
    let bits = |value: f32| value.to_bits();
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        let waiting = AtomicUsize::new(0);
        ranks_on(GPU, 3, |communicator| {
            let (rank, abort) = (communicator.rank(), communicator.abort_handle());
            let mut model = Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 9);
            let mut seen = Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 10);
            let (weights, copy) = (model.tensor_address(0), seen.tensor_address(0));
            // Non-blocking streams. cudarc waits for the device when it makes the first, so before
            // any rank averages.
            let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
            let raw = stream.cu_stream();
            let builder = test_support::options(communicator).algorithm(algorithm).channels(2);
            let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut model).unwrap();
            for round in 0..3 {
                // SAFETY: own memory and stream, which live until all is done.
                let pending = unsafe {
                    let step = bits((10 * round + rank) as f32);
                    sys::cuMemsetD32Async(weights, step, ELEMENTS, raw).result().unwrap();
                    let pending =
                        averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)).unwrap();
                    result::memcpy_dtod_async(copy, weights, 4 * ELEMENTS, raw).unwrap();
                    pending
                };
                let report = pending.wait().unwrap();
                assert_eq!((report.bytes, report.algorithm), (4 * ELEMENTS as u64, algorithm));
                stream.synchronize().unwrap();
                seen.download();
                let mean = bits((10 * round + 1) as f32).to_ne_bytes();
                assert!(
                    seen.tensor(0).chunks_exact(4).all(|element| element == mean),
                    "{algorithm:?}"
                );
            }
            // The host does not wait for them; the next average does. SAFETY: as above.
            unsafe {
                drop(
                    averager
                        .start_weighted(
                            &mut RawCudaParams::new(raw.cast(), &mut model),
                            1.0 + rank as f64,
                        )
                        .unwrap(),
                );
                std::mem::forget(
                    averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)).unwrap(),
                );
            }
            // Other tensors: new tables.
            averager.average(&mut seen).unwrap();
            // Work on the null stream comes first. SAFETY: as above; the other ranks' work is on
            // the null stream, too, and waits for no rank.
            unsafe {
                sys::cuMemsetD32Async(weights, bits(rank as f32), ELEMENTS, std::ptr::null_mut())
            }
            .result()
            .unwrap();
            averager.average(&mut model).unwrap();
            model.download();
            assert!(model
                .tensor(0)
                .chunks_exact(4)
                .all(|element| element == bits(1.0).to_ne_bytes()));
            // An abort while ranks meet for an average, and the averages after it.
            model.download();
            let before = model.bytes().to_vec();
            if rank == 2 {
                while waiting.load(Ordering::Acquire) < 2 {
                    std::thread::yield_now();
                }
                abort.abort();
                return;
            }
            waiting.fetch_add(1, Ordering::AcqRel);
            // SAFETY: as above.
            let error = unsafe { averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)) }
                .map(drop)
                .unwrap_err();
            assert!(matches!(error, Error::Aborted { rank: 2, committed: false, .. }), "{error}");
            model.download();
            assert!(model.bytes() == before && error.tensors() == TensorState::Unchanged);
            // SAFETY: as above.
            let again = unsafe { averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)) }
                .map(drop);
            assert!(matches!(again, Err(Error::Poisoned { .. })), "{again:?}");
        });
    }
    // On CPUs the average has ended on return.
    let on_cpus = ranks_on(Device::cpu(), 2, |communicator| {
        let mut model = vec![communicator.rank() as f32; 10];
        let mut averager = test_support::options(communicator).build(&mut model).unwrap();
        // SAFETY: no stream is used, and the model lives until the average is done.
        let pending =
            unsafe { averager.start(&mut RawCudaParams::new(std::ptr::null_mut(), &mut model)) }
                .unwrap();
        assert!(pending.is_done());
        pending.wait().unwrap();
        model
    });
    assert_eq!(on_cpus, [[0.5; 10], [0.5; 10]]);
}
