//! Averages in CUDA graphs, and replays of them.

use super::model::Model;
use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use std::sync::Barrier;
use std::time::Duration;
use test_support::ranks_of;

const ELEMENTS: usize = 5000;
/// The strictest mode: no thread may make a call that might wait.
const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;

/// Averages of several ranks on one device are not captured: nothing promises that their graphs run
/// at the same time. All ranks get the same error, and average on as before.
pub fn on_one_device() {
    refused(&[Device::cuda(0); 2]);
}

pub fn on_devices() {
    let ways = [(Algorithm::Ring, true), (Algorithm::Ring, false), (Algorithm::Direct, true)];
    for (algorithm, commit) in ways {
        replay(&[0, 1, 2].map(Device::cuda), algorithm, commit);
    }
    refused(&[0, 1, 0].map(Device::cuda));
}

fn refused(devices: &[Device]) {
    ranks_of(devices, |communicator| {
        let on = communicator.device();
        let mut model = Model::new(on, &[(Dtype::F32, ELEMENTS, 0)], 1);
        let stream = CudaContext::new(super::model::ordinal(on)).unwrap().new_stream().unwrap();
        let raw = stream.cu_stream();
        let mut averager =
            test_support::options(communicator).channels(2).build(&mut model).unwrap();
        // SAFETY: own memory and stream, which live until all is done.
        unsafe {
            result::stream::begin_capture(raw, MODE).unwrap();
            let error = averager
                .start(&mut RawCudaParams::new(raw.cast(), &mut model))
                .map(drop)
                .unwrap_err();
            let Error::InvalidOption { option: "stream", found, .. } = &error else {
                panic!("{error}")
            };
            assert!(found.contains("where ranks share a device"), "{found}");
            assert!(error.tensors() == TensorState::Unchanged && !error.is_fatal());
            let graph = result::stream::end_capture(raw).unwrap();
            let mut nodes = usize::MAX;
            sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result().unwrap();
            assert_eq!(nodes, 0);
            result::graph::destroy(graph).unwrap();
        }
        averager.average(&mut model).unwrap();
        (averager, model)
    });
}

/// Captures work on the stream.
///
/// # Safety
/// All that `f` enqueues stays valid for every replay.
unsafe fn capture(stream: sys::CUstream, f: impl FnOnce()) -> sys::CUgraphExec {
    // SAFETY: the caller's promise.
    unsafe {
        result::stream::begin_capture(stream, MODE).unwrap();
        f();
        let graph = result::stream::end_capture(stream).unwrap();
        let mut ready = std::ptr::null_mut();
        sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result().unwrap();
        result::graph::destroy(graph).unwrap();
        ready
    }
}

/// An average that every replay would refuse is refused at capture, and the graph stays empty.
pub fn refusals() {
    let weights = [-1.0, f64::INFINITY, f64::NAN];
    for commit in [true, false] {
        let all_ready = Barrier::new(2);
        ranks_of(&[0, 1].map(Device::cuda), |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let tensors = [(Dtype::F32, ELEMENTS, 0), (Dtype::F32, 3, 1)];
            let mut model = Model::new(on, &tensors, rank as u64);
            let mut others = [&tensors[..1], &[(Dtype::F64, ELEMENTS, 0), tensors[1]]]
                .map(|tensors| Model::new(on, tensors, 5));
            let stream = CudaContext::new(rank).unwrap().new_stream().unwrap();
            let raw = stream.cu_stream();
            let builder = test_support::options(communicator).all_or_nothing(commit).channels(2);
            let builder = builder.algorithm(Algorithm::Ring);
            let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut model).unwrap();
            let mut wrong = |averager: &mut ParamAverager, model: &mut Model| {
                for other in &mut others {
                    // SAFETY: own memory and stream, which live until all is done.
                    let error =
                        unsafe { averager.start(&mut RawCudaParams::new(raw.cast(), &mut *other)) }
                            .map(drop)
                            .unwrap_err();
                    assert!(
                        matches!(error, Error::LayoutChanged { rank: at, .. } if at == rank),
                        "{error}"
                    );
                }
                for weight in weights {
                    // SAFETY: as above.
                    let error = unsafe {
                        averager.start_weighted(
                            &mut RawCudaParams::new(raw.cast(), &mut *model),
                            weight,
                        )
                    }
                    .map(drop)
                    .unwrap_err();
                    assert!(
                        matches!(error, Error::InvalidWeight { rank: at, .. } if at == rank),
                        "{error}"
                    );
                }
            };
            // SAFETY: as above.
            let graph = unsafe {
                if rank == 1 {
                    let mut nodes = usize::MAX;
                    result::stream::begin_capture(raw, MODE).unwrap();
                    wrong(&mut averager, &mut model);
                    let graph = result::stream::end_capture(raw).unwrap();
                    sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result().unwrap();
                    assert_eq!(nodes, 0);
                    result::graph::destroy(graph).unwrap();
                }
                capture(raw, || {
                    wrong(&mut averager, &mut model);
                    drop(
                        averager
                            .start_weighted(
                                &mut RawCudaParams::new(raw.cast(), &mut model),
                                rank as f64,
                            )
                            .unwrap(),
                    );
                })
            };
            all_ready.wait();
            averager.average(&mut model).unwrap();
            let set = |address: u64, value: usize| {
                // SAFETY: as above.
                unsafe { sys::cuMemsetD32Async(address, (value as f32).to_bits(), ELEMENTS, raw) }
                    .result()
                    .unwrap()
            };
            for round in 0..2 {
                set(model.tensor_address(0), 10 * round + rank);
                // SAFETY: as above.
                unsafe {
                    sys::cuGraphLaunch(graph, raw).result().unwrap();
                    averager.graph_outcome(raw.cast()).unwrap();
                }
                model.download();
                let mean = ((10 * round + 1) as f32).to_ne_bytes();
                assert!(model.tensor(0).chunks_exact(4).all(|element| element == mean), "{commit}");
            }
            // Without a capture every rank gets the error, as usual.
            let weight = if rank == 1 { -1.0 } else { 1.0 };
            // SAFETY: as above.
            let pending = unsafe {
                averager.start_weighted(&mut RawCudaParams::new(raw.cast(), &mut model), weight)
            }
            .unwrap();
            assert!(matches!(pending.wait(), Err(Error::InvalidWeight { rank: 1, .. })));
            all_ready.wait();
            // SAFETY: no replay is under way.
            unsafe { sys::cuGraphExecDestroy(graph) }.result().unwrap();
            (averager, model, others)
        });
    }
}

fn replay(devices: &[Device], algorithm: Algorithm, commit: bool) {
    let bits = |value: f32| value.to_bits();
    let all_ready = Barrier::new(devices.len());
    ranks_of(devices, |communicator| {
        let (rank, on, abort) =
            (communicator.rank(), communicator.device(), communicator.abort_handle());
        let tensors = [(Dtype::F32, ELEMENTS, 0), (Dtype::F32, 3, 1)];
        let models: Vec<Model> = (0..3).map(|seed| Model::new(on, &tensors, seed)).collect();
        let [mut model, mut other, mut seen] = <[Model; 3]>::try_from(models).ok().unwrap();
        let weights = model.tensor_address(0);
        let stream = CudaContext::new(super::model::ordinal(on)).unwrap().new_stream().unwrap();
        let raw = stream.cu_stream();
        let builder = test_support::options(communicator).all_or_nothing(commit).channels(2);
        let builder = builder.algorithm(algorithm).overlap(Overlap::default().delay(1));
        let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut model).unwrap();
        // SAFETY: the stream lives, and nothing runs on it.
        let none = unsafe { averager.graph_outcome(raw.cast()) };
        assert!(matches!(none, Err(Error::InvalidOption { option: "stream", .. })), "{none:?}");
        // What comes before makes no difference.
        averager.average(&mut other).unwrap();
        // SAFETY: own memory and stream, which live until all is done.
        let graph = unsafe {
            capture(raw, || {
                let pending =
                    averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)).unwrap();
                let Err(Error::InvalidOption { option: "stream", found, .. }) = pending.wait()
                else {
                    panic!("it has not run")
                };
                assert!(found.starts_with("being captured"), "{found}");
                result::memcpy_dtod_async(seen.tensor_address(0), weights, 4 * ELEMENTS, raw)
                    .unwrap();
            })
        };
        all_ready.wait(); // instantiating may wait for the device

        // Averages before the capture, and behind the last replay, are no replays.
        let has_no_replay = |averager: &mut ParamAverager| {
            // SAFETY: the stream lives, and no replay is under way.
            let none = unsafe { averager.graph_outcome(raw.cast()) }.unwrap_err().to_string();
            assert!(none.contains("no captured average has been replayed"), "{none}");
        };
        has_no_replay(&mut averager);
        for round in 0..4 {
            if round == 2 {
                averager.average(&mut other).unwrap(); // with tensors elsewhere, between replays
                has_no_replay(&mut averager);
                std::mem::forget(averager.start(&mut other).unwrap());
                has_no_replay(&mut averager);
                averager.average(&mut other).unwrap();
                let _dropped = averager.start_overlapped(0, &mut other).unwrap();
                averager.drop_overlapped();
                has_no_replay(&mut averager);
            }
            // SAFETY: as above.
            let report = unsafe {
                sys::cuMemsetD32Async(weights, bits((10 * round + rank) as f32), ELEMENTS, raw)
                    .result()
                    .unwrap();
                sys::cuGraphLaunch(graph, raw).result().unwrap();
                averager.graph_outcome(raw.cast()).unwrap()
            };
            assert_eq!(
                (report.bytes, report.world_size),
                (4 * ELEMENTS as u64 + 12, devices.len())
            );
            seen.download();
            let mean = bits((10 * round + 1) as f32).to_ne_bytes();
            assert!(
                seen.tensor(0).chunks_exact(4).all(|element| element == mean),
                "{commit}, replay {round}"
            );
        }
        all_ready.wait();
        // After the end of the world nothing changes, and every replay reports it.
        model.download();
        let before = model.bytes().to_vec();
        if rank == 1 {
            abort.abort();
        }
        all_ready.wait();
        for again in [false, true] {
            // SAFETY: as above.
            let error = unsafe {
                sys::cuGraphLaunch(graph, raw).result().unwrap();
                averager.graph_outcome(raw.cast()).unwrap_err()
            };
            match again {
                false => {
                    assert!(
                        matches!(error, Error::Aborted { rank: 1, committed: false, .. }),
                        "{error}"
                    )
                }
                true => assert!(matches!(error, Error::Poisoned { .. }), "{error}"),
            }
        }
        stream.synchronize().unwrap();
        model.download();
        assert!(model.bytes() == before);
        // SAFETY: no replay is under way.
        unsafe { sys::cuGraphExecDestroy(graph) }.result().unwrap();
        all_ready.wait();
        (averager, model, other, seen) // freed when all ranks are done
    });
}

/// Coded averages in graphs: each replay has the bits of an average that is not captured, and is
/// told as coded, also after a failure, and after an average in full between two replays.
pub fn coded() {
    for code in [Compression::Bf16, Compression::Int8] {
        for outer in [Outer::mean(), Outer::diloco()] {
            replay_coded(code, outer);
        }
    }
}

fn replay_coded(code: Compression, outer: Outer) {
    const ROUNDS: usize = 6;
    const FAILS: usize = 3;
    let devices = [0, 1].map(Device::cuda);
    let all_ready = Barrier::new(devices.len());
    ranks_of(&devices, |communicator| {
        let (rank, on) = (communicator.rank(), communicator.device());
        let new = |seed: usize| Model::new(on, &[(Dtype::F32, ELEMENTS, 0)], seed as u64);
        let build = |communicator: &Communicator, start, model: &mut Model| {
            let builder = test_support::options(communicator.clone()).start_from(start);
            let builder = builder.compression(code).outer(outer).channels(2);
            builder.timeout(Duration::from_secs(60)).build(model).unwrap()
        };
        let mut sources: Vec<Model> = (0..ROUNDS).map(|round| new(10 * round + rank)).collect();
        let (mut model, mut twins, mut other) = (new(1000), new(1000), [new(2000), new(2000)]);
        let mut averager = build(&communicator, Start::Rank(0), &mut model);
        let mut twin = build(&communicator, Start::Rank(0), &mut twins);
        let stream = CudaContext::new(super::model::ordinal(on)).unwrap().new_stream().unwrap();
        let raw = stream.cu_stream();
        // Its average that gave the values was none of a graph.
        // SAFETY: the stream lives, and nothing runs on it.
        let none = unsafe { averager.graph_outcome(raw.cast()) };
        assert!(matches!(none, Err(Error::InvalidOption { option: "stream", .. })), "{none:?}");
        let mut kept = vec![];
        if outer == Outer::mean() {
            let mut without = build(&communicator, Start::Own, &mut other[0]);
            // SAFETY: own memory and stream, which live until all is done.
            unsafe {
                result::stream::begin_capture(raw, MODE).unwrap();
                let refused = without.start(&mut RawCudaParams::new(raw.cast(), &mut other[0]));
                let error = refused.map(drop).unwrap_err().to_string();
                assert!(error.contains("before the first average"), "{error}");
                let graph = result::stream::end_capture(raw).unwrap();
                result::graph::destroy(graph).unwrap();
            }
            kept.push(without); // its drop is a copy, which the race detector takes for a race
        }
        // SAFETY: as above.
        let graph = unsafe {
            capture(raw, || {
                drop(averager.start(&mut RawCudaParams::new(raw.cast(), &mut model)).unwrap());
            })
        };
        all_ready.wait(); // instantiating may wait for the device
        if rank == 1 {
            sources[FAILS].set(0, 300, f32::NAN);
        }
        for (round, source) in sources.iter_mut().enumerate() {
            if round == 2 || round == 5 {
                for (averager, model) in [&mut averager, &mut twin].into_iter().zip(&mut other) {
                    let report = averager.broadcast(0, model).unwrap();
                    assert_eq!(report.compression, Compression::None);
                }
            }
            let from = source.tensor_address(0);
            // SAFETY: as above.
            let replayed = unsafe {
                for to in [&mut model, &mut twins].map(|model| model.tensor_address(0)) {
                    result::memcpy_dtod_async(to, from, 4 * ELEMENTS, raw).unwrap();
                }
                sys::cuGraphLaunch(graph, raw).result().unwrap();
                averager.graph_outcome(raw.cast())
            };
            let made = twin.average(&mut twins);
            match (replayed, made) {
                (Ok(replayed), Ok(made)) if round != FAILS => {
                    assert_eq!((replayed.compression, made.compression), (code, code));
                    assert_eq!(replayed.bytes, made.bytes);
                }
                (Err(Error::NonFinite { element: 300, .. }), Err(Error::NonFinite { .. }))
                    if round == FAILS => {}
                (replayed, made) => panic!("round {round}: {replayed:?}, {made:?}"),
            }
            model.download();
            twins.download();
            assert!(model.bytes() == twins.bytes(), "{code:?}, {outer:?}, round {round}");
            assert!(model.guards_are_whole());
        }
        all_ready.wait();
        // SAFETY: no replay is under way.
        unsafe { sys::cuGraphExecDestroy(graph) }.result().unwrap();
        all_ready.wait();
        (averager, twin, kept, model, twins, other, sources) // freed when all ranks are done
    });
}
