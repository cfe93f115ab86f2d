//! Calls that NVIDIA's driver refuses and cudasim accepts, and failing calls, on
//! `strict_driver.cpp`.

use super::model::Model;
use super::scenarios::GPU;
use cudarc::driver::{sys, CudaContext};
#[cfg(feature = "cuda")]
use param_averager::__testing::Testing;
use param_averager::*;
use std::ffi::{c_char, c_int, CStr};
use std::sync::Barrier;
use std::time::{Duration, Instant};
use test_support::{ranks_of, ranks_on};

/// Makes a call of this function by this thread fail, after so many more.
fn fail(function: &'static CStr, calls: c_int) {
    // SAFETY: strict_driver.cpp exports the function, and the name that it keeps is static.
    unsafe {
        let library = libloading::Library::new("libcuda.so").unwrap();
        let fail = library
            .get::<unsafe extern "C" fn(*const c_char, c_int)>(b"strict_fail\0")
            .expect("the strict driver");
        fail(function.as_ptr(), calls);
        std::mem::forget(library);
    }
}

const TENSORS: [(Dtype, usize, usize); 1] = [(Dtype::F32, 40_000, 0)];
const LAUNCH: &CStr = c"cuLaunchKernel";

/// Each call of an average fails on rank 0: before ranks meet, and it returns at once although its
/// peer has not come; or as it launches for both. The peer gets an error, too, and no rank hangs.
pub fn failures() {
    for (algorithm, function, calls, is_met) in [
        (Algorithm::Ring, c"cuEventRecord", 0, false),
        (Algorithm::Direct, c"cuEventRecord", 0, false),
        (Algorithm::Ring, LAUNCH, 0, true),
        (Algorithm::Direct, LAUNCH, 0, true),
        (Algorithm::Direct, LAUNCH, 1, true), // after the scan
        (Algorithm::Direct, c"cuMemcpyHtoDAsync_v2", 0, true),
        (Algorithm::Ring, c"cuStreamWaitEvent", 0, true),
        (Algorithm::Ring, c"cuStreamWaitEvent", 1, true),
        (Algorithm::Ring, c"cuStreamWaitEvent", 2, true), // the average is launched
        (Algorithm::Direct, c"cuEventRecord", 1, true),   // likewise
    ] {
        for peer_is_there in [false, true] {
            let failed = Barrier::new(2);
            ranks_on(GPU, 2, |communicator| {
                let rank = communicator.rank();
                let mut model = Model::new(GPU, &TENSORS, rank as u64);
                let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
                let builder = test_support::options(communicator).algorithm(algorithm).channels(2);
                let builder = builder.reject_non_finite(true).timeout(Duration::from_secs(50));
                let mut averager = builder.build(&mut model).unwrap();
                let before = model.bytes().to_vec();
                let what = format!("{algorithm:?}, {function:?} {calls}, {peer_is_there}");
                if rank == 0 {
                    if peer_is_there {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    let start = Instant::now();
                    fail(function, calls);
                    // SAFETY: own memory and stream, which live until all is done.
                    let error = unsafe {
                        averager
                            .start(&mut RawCudaParams::new(stream.cu_stream().cast(), &mut model))
                    }
                    .map(drop);
                    let Err(Error::DeviceFailed { rank: 0, source: reason }) = &error else {
                        panic!("{what}: {error:?}")
                    };
                    assert!(reason.to_string().contains("OUT_OF_RESOURCES"), "{what}: {reason}");
                    assert!(start.elapsed() < Duration::from_secs(25), "{what}");
                    failed.wait();
                    assert!(
                        matches!(averager.average(&mut model), Err(Error::Poisoned { .. })),
                        "{what}"
                    );
                } else {
                    match (peer_is_there, is_met) {
                        (true, _) => {}
                        (false, true) => std::thread::sleep(Duration::from_millis(200)),
                        (false, false) => drop(failed.wait()),
                    }
                    match averager.average(&mut model) {
                        Err(Error::PeerLost { rank: 0, committed: false, .. }) => {
                            model.download();
                            assert!(model.bytes() == before, "{what}");
                        }
                        // The average was launched, and may have been made.
                        Ok(_) | Err(Error::PeerLost { rank: 0, committed: true, .. })
                            if is_met && calls > 0 && function != LAUNCH => {}
                        other => panic!("{what}: {other:?}"),
                    }
                    if peer_is_there || is_met {
                        failed.wait();
                    }
                    assert!(averager.average(&mut model).is_err(), "{what}");
                }
                failed.wait();
                (averager, model) // freed when both are done
            });
        }
    }
}

/// Enqueued averages of a rank end before peers see its departure.
#[cfg(feature = "cuda")]
pub fn whole_averages_end() {
    let done = Barrier::new(2);
    ranks_on(GPU, 2, |communicator| {
        let rank = communicator.rank();
        let mut model = Model::new(GPU, &TENSORS, rank as u64);
        let context = CudaContext::new(0).unwrap();
        let (stream, blocking) = (context.new_stream().unwrap(), context.per_thread_stream());
        let mut slice = blocking.clone_htod(&vec![0.0f32; TENSORS[0].1]).unwrap();
        // Rank 0 is slow, so that rank 1 has to wait, and checks whether rank 0 has departed.
        let testing =
            Testing { delay_ns: if rank == 0 { 3_000_000 } else { 0 }, ..Testing::default() };
        let builder = test_support::options(communicator).algorithm(Algorithm::Ring).channels(2);
        let builder = builder.chunk_bytes(4096).slots(2).testing(testing);
        let mut averager = builder.timeout(Duration::from_secs(50)).build(&mut model).unwrap();
        if rank == 0 {
            // SAFETY: own memory and stream, which live until all is done.
            std::mem::forget(
                unsafe {
                    averager.start(&mut RawCudaParams::new(stream.cu_stream().cast(), &mut model))
                }
                .unwrap(),
            );
            let mut params = CudaParams::new(&blocking);
            params.push(&mut slice);
            fail(c"cuEventRecord", 0); // the averager's stream can't be ordered behind this one
            let error = averager.average(&mut params).unwrap_err();
            assert!(matches!(error, Error::DeviceFailed { rank: 0, .. }), "{error}");
            let _ = context.check_err();
        } else {
            std::thread::sleep(Duration::from_millis(500));
            averager.average(&mut model).unwrap();
            let error = averager.average(&mut model).unwrap_err();
            assert!(matches!(error, Error::PeerLost { rank: 0, committed: false, .. }), "{error}");
        }
        done.wait();
        (averager, model, slice)
    });
}

/// The null stream waits for blocking streams, so a driver refuses it while one is being captured:
/// this rank alone gets an error.
pub fn beside_a_blocking_capture() {
    let ended = Barrier::new(2);
    ranks_of(&[0, 1].map(Device::cuda), |communicator| {
        let rank = communicator.rank();
        let mut model = Model::new(communicator.device(), &TENSORS, rank as u64);
        let mut averager =
            test_support::options(communicator).channels(2).build(&mut model).unwrap();
        if rank == 0 {
            let context = CudaContext::new(0).unwrap();
            context.bind_to_thread().unwrap();
            let (mut stream, mut graph) = (std::ptr::null_mut(), std::ptr::null_mut());
            let refused = |error: Error| {
                let Error::InvalidOption { rank: 0, option: "stream", found, .. } = &error else {
                    panic!("{error}")
                };
                assert!(
                    found.starts_with("the null stream while a blocking stream is being captured"),
                    "{found}"
                );
                assert!(error.tensors() == TensorState::Unchanged && !error.is_fatal());
            };
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
            // SAFETY: a context is bound, and the stream is blocking.
            unsafe {
                sys::cuStreamCreate(&mut stream, 0).result().unwrap();
                sys::cuStreamBeginCapture_v2(stream, mode).result().unwrap();
            }
            refused(averager.average(&mut model).unwrap_err());
            #[cfg(feature = "cuda")]
            refused(averager.average(&mut CudaParams::new(&context.default_stream())).unwrap_err());
            // SAFETY: as above.
            unsafe {
                // A stream that is being captured cannot be waited for either.
                refused(averager.graph_outcome(std::ptr::null_mut()).unwrap_err());
                let error = averager.graph_outcome(stream.cast()).unwrap_err();
                assert!(matches!(error, Error::InvalidOption { option: "stream", .. }), "{error}");
                sys::cuStreamEndCapture(stream, &mut graph).result().unwrap();
                sys::cuGraphDestroy(graph).result().unwrap();
                sys::cuStreamDestroy_v2(stream).result().unwrap();
                // A capture that the driver has invalidated.
                let stream = context.new_stream().unwrap();
                let raw = stream.cu_stream();
                sys::cuStreamBeginCapture_v2(
                    raw,
                    sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
                )
                .result()
                .unwrap();
                assert!(sys::cuStreamSynchronize(raw).result().is_err());
                let error = averager
                    .start(&mut RawCudaParams::new(raw.cast(), &mut model))
                    .map(drop)
                    .unwrap_err();
                let Error::InvalidOption { option: "stream", found, .. } = &error else {
                    panic!("{error}")
                };
                assert!(found.starts_with("a stream whose capture has failed"), "{error}");
                assert!(sys::cuStreamEndCapture(raw, &mut graph).result().is_err());
            }
        }
        ended.wait();
        averager.average(&mut model).unwrap();
        ended.wait();
        (averager, model)
    });
}

/// Four devices, each with access to one other at most: later pairs use memory of the host.
pub fn one_peer_each() {
    let verified = |devices: [usize; 2]| {
        let [one, other] = devices.map(Device::cuda);
        let links = ranks_of(&[one, other], |communicator| {
            let mut model = Model::new(communicator.device(), &TENSORS, 0);
            let builder = test_support::options(communicator).channels(2);
            let peer = builder.clone().link(Link::Peer).build(&mut model).is_ok();
            builder.build(&mut model).unwrap().average(&mut model).unwrap();
            peer
        });
        links[0]
    };
    assert!(verified([0, 1]));
    // 2 had been given access to 0 when 0 had no room: that is taken back
    assert!(!verified([2, 0]));
    assert!(verified([2, 3]));
    let topology = Topology::probe().unwrap();
    assert_eq!(topology.peer_access(3, 0), PeerAccess::Unsupported);
    assert_eq!(topology.peer_access(1, 0), PeerAccess::Verified);
}
