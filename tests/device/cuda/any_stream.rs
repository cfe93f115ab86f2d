//! Averages on streams of every kind: order before and after, streams that ranks share, graphs.
//!
//! Copies to the host go through the streams, whose order is what is tested.

use std::sync::Barrier;
use std::time::Duration;

use super::model::{ordinal, Model};
use super::scenarios::GPU;
use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::ranks_of;

const ELEMENTS: usize = 20_000;
const TENSORS: [(Dtype, usize, usize); 1] = [(Dtype::F32, ELEMENTS, 0)];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    NonBlocking,
    /// As bullet makes them.
    Blocking,
    /// As candle's default.
    PerThread,
    Null,
    /// The same by its name.
    Legacy,
}
use Kind::*;

/// A stream, and a model that is used on it alone.
struct Trainer {
    on: Device,
    kind: Kind,
    stream: sys::CUstream,
    model: Model,
    seen: Model,
}

// SAFETY: a stream can be used from any thread.
unsafe impl Send for Trainer {}

impl Trainer {
    /// Uses the null stream, and so comes before any average.
    fn new(on: Device, kind: Kind) -> Trainer {
        let context = CudaContext::new(ordinal(on)).unwrap();
        context.bind_to_thread().unwrap();
        let mut stream = std::ptr::null_mut();
        let create = |stream: &mut sys::CUstream, flags| {
            // SAFETY: a context is bound.
            unsafe { sys::cuStreamCreate(stream, flags) }.result().unwrap()
        };
        match kind {
            NonBlocking => create(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32),
            Blocking => create(&mut stream, 0),
            PerThread => stream = 2 as sys::CUstream,
            Null => {}
            Legacy => stream = 1 as sys::CUstream,
        }
        let [model, seen] = [9, 10].map(|seed| Model::new(on, &TENSORS, seed));
        Trainer { on, kind, stream, model, seen }
    }

    fn step(&self, value: usize) {
        let bits = (value as f32).to_bits();
        // SAFETY: own memory and stream.
        unsafe {
            // Work that takes a while comes first.
            for _ in 0..4 {
                let other = self.seen.tensor_address(0);
                sys::cuMemsetD32Async(other, 0, ELEMENTS, self.stream).result().unwrap();
            }
            let weights = self.model.tensor_address(0);
            sys::cuMemsetD32Async(weights, bits, ELEMENTS, self.stream).result().unwrap();
        }
    }

    /// Enqueues a use of the weights.
    fn look(&self) {
        let (to, from) = (self.seen.tensor_address(0), self.model.tensor_address(0));
        // SAFETY: own memory and stream.
        unsafe { result::memcpy_dtod_async(to, from, 4 * ELEMENTS, self.stream) }.unwrap();
    }

    /// Asserts what the last look saw, and what the weights are.
    fn saw(&self, value: usize) {
        for model in [&self.seen, &self.model] {
            let mut found = vec![0f32; ELEMENTS];
            // SAFETY: own memory and stream; the copy has ended on return.
            unsafe {
                result::memcpy_dtoh_async(&mut found, model.tensor_address(0), self.stream)
                    .unwrap();
                result::stream::synchronize(self.stream).unwrap();
            }
            let wrong = found.iter().find(|&&found| found != value as f32);
            assert_eq!(wrong, None, "{:?}, not {value}", self.kind);
        }
    }

    fn params(&mut self) -> RawCudaParams<&mut Model> {
        // SAFETY: own memory and stream, which live until all is done.
        unsafe { RawCudaParams::new(self.stream.cast(), &mut self.model) }
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        if matches!(self.kind, NonBlocking | Blocking) {
            CudaContext::new(ordinal(self.on)).unwrap().bind_to_thread().unwrap();
            // SAFETY: made by `new`.
            unsafe { sys::cuStreamDestroy_v2(self.stream) }.result().unwrap();
        }
    }
}

fn build(communicator: Communicator, algorithm: Algorithm, model: &mut Model) -> ParamAverager {
    let builder = ParamAverager::builder(communicator).algorithm(algorithm).channels(2);
    builder.timeout(Duration::from_secs(50)).build(model).unwrap()
}

/// Each rank's step, the average and a use of the mean are enqueued, on streams of these kinds.
fn starts(devices: &[Device], kinds: &[Kind], algorithm: Algorithm) {
    let all_ready = Barrier::new(devices.len());
    ranks_of(devices, |communicator| {
        let rank = communicator.rank();
        let mut trainer = Trainer::new(communicator.device(), kinds[rank]);
        let mut averager = build(communicator, algorithm, &mut trainer.model);
        all_ready.wait();
        let mean = |round: usize| 10 * round + (kinds.len() - 1);
        for round in 0..4 {
            trainer.step(10 * round + 2 * rank);
            let pending = match round {
                1 => averager.start_weighted(&mut trainer.params(), 1.0).unwrap(),
                _ => averager.start(&mut trainer.params()).unwrap(),
            };
            match round {
                // The host waits for nothing, and the next average for this one.
                2 => std::mem::forget(pending),
                // It waits before anything is enqueued behind the average.
                3 => drop(pending.wait().unwrap()),
                _ => {
                    trainer.look();
                    assert_eq!(pending.wait().unwrap().bytes, 4 * ELEMENTS as u64);
                }
            }
            if round >= 2 {
                trainer.look();
            }
            trainer.saw(mean(round));
        }
        // And an average that is waited for.
        trainer.step(2 * rank);
        averager.average(&mut trainer.params()).unwrap();
        trainer.look();
        trainer.saw(mean(0));
        all_ready.wait();
        (averager, trainer) // freed when all are done
    });
}

pub fn on_one_device() {
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        starts(&[GPU; 3], &[Blocking; 3], algorithm);
        starts(&[GPU; 3], &[PerThread; 3], algorithm);
        starts(&[GPU; 3], &[Blocking, NonBlocking, PerThread], algorithm);
        starts(&[GPU; 3], &[NonBlocking, Null, Blocking], algorithm);
    }
    starts(&[GPU; 2], &[Legacy, NonBlocking], Algorithm::Ring);
    shared_streams();
    steps_beside_the_null_stream();
    streams_that_wait_for_each_other();
}

/// Each device has a null stream of its own.
pub fn on_two_devices() {
    let devices = [0, 1].map(Device::cuda);
    for kinds in [[Null; 2], [Blocking; 2], [PerThread; 2], [Legacy, PerThread]] {
        starts(&devices, &kinds, Algorithm::Ring);
        starts(&devices, &kinds, Algorithm::Direct);
    }
    in_graphs(&devices);
}

/// An average that is waited for can be on any stream, one that all ranks share included.
fn shared_streams() {
    for kind in [NonBlocking, Blocking, Null] {
        let all_ready = Barrier::new(3);
        let owner = Trainer::new(GPU, kind);
        let shared = owner.stream as usize;
        ranks_of(&[GPU; 3], |communicator| {
            let rank = communicator.rank();
            let mut trainer = Trainer::new(GPU, Null);
            trainer.stream = shared as sys::CUstream;
            let mut averager = build(communicator, Algorithm::Ring, &mut trainer.model);
            all_ready.wait();
            for round in 0..3 {
                trainer.step(10 * round + rank);
                averager.average(&mut trainer.params()).unwrap();
                trainer.look();
                trainer.saw(10 * round + 1);
            }
            all_ready.wait();
            (averager, trainer)
        });
        drop(owner);
    }
}

/// Two ranks on one device that train as a program without streams of its own does: what one rank
/// does on the null stream waits for the other's stream, which must not wait for an average.
fn steps_beside_the_null_stream() {
    for kind in [Blocking, PerThread, Null, NonBlocking] {
        let all_ready = Barrier::new(2);
        ranks_of(&[GPU; 2], |communicator| {
            let rank = communicator.rank();
            let mut trainer = Trainer::new(GPU, kind);
            let builder = ParamAverager::builder(communicator).channels(2);
            let builder = builder.timeout(Duration::from_secs(50));
            let averager = builder.build(&mut trainer.params()).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            all_ready.wait();
            for batch in 0..6 {
                trainer.step(10 * batch + 2 * rank);
                if kind != NonBlocking {
                    // The simulator's race detector sees no order between the null stream and work
                    // of a blocking stream that has ended already.
                    // SAFETY: own stream.
                    unsafe { result::stream::synchronize(trainer.stream) }.unwrap();
                    trainer.seen.download(); // on the null stream
                }
                let is_due = sgd.is_next_due();
                let action = sgd.step(&mut trainer.params()).unwrap();
                assert_eq!(action == Action::Enqueued, is_due, "{action:?}");
                if is_due {
                    trainer.look();
                    trainer.saw(10 * batch + 1);
                }
            }
            assert_eq!(sgd.wait().unwrap().map(|report| report.bytes), Some(4 * ELEMENTS as u64));
            assert_eq!(sgd.averages(), 3);
            all_ready.wait();
            (sgd, trainer)
        });
    }
}

/// Two ranks whose streams wait for each other, by their rules or because they are one stream,
/// start their averages at the same time: the launch is behind the work of both, and before
/// neither's.
fn streams_that_wait_for_each_other() {
    for (first, second, waits) in [
        (NonBlocking, None, false),
        (NonBlocking, None, true),
        (Blocking, None, false),
        (Null, None, false),
        (Null, Some(Blocking), false),
        (PerThread, Some(Null), false),
        (Blocking, Some(Null), true),
    ] {
        let all_ready = Barrier::new(2);
        let owner = Trainer::new(GPU, first);
        let shared = owner.stream as usize;
        ranks_of(&[GPU; 2], |communicator| {
            let rank = communicator.rank();
            let mut trainer =
                Trainer::new(GPU, if rank == 1 { second.unwrap_or(Null) } else { Null });
            if rank == 0 || second.is_none() {
                trainer.stream = shared as sys::CUstream;
            }
            let mut averager = build(communicator, Algorithm::Ring, &mut trainer.model);
            all_ready.wait();
            for round in 0..3 {
                trainer.step(10 * round + 2 * rank);
                if rank == 1 && waits {
                    averager.average(&mut trainer.params()).unwrap();
                } else {
                    let pending = averager.start(&mut trainer.params()).unwrap();
                    trainer.look();
                    pending.wait().unwrap();
                }
                trainer.look();
                trainer.saw(10 * round + 1);
                all_ready.wait(); // on one stream, what a rank looks at is between its own steps
            }
            (averager, trainer)
        });
        drop(owner);
    }
}

/// Streams of the blocking kind are captured, too.
fn in_graphs(devices: &[Device]) {
    const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    for kind in [Blocking, PerThread, NonBlocking] {
        let all_ready = Barrier::new(devices.len());
        ranks_of(devices, |communicator| {
            let rank = communicator.rank();
            let mut trainer = Trainer::new(communicator.device(), kind);
            let mut averager = build(communicator, Algorithm::Ring, &mut trainer.model);
            all_ready.wait();
            // SAFETY: what is enqueued lives until all is done.
            let graph = unsafe {
                result::stream::begin_capture(trainer.stream, MODE).unwrap();
                drop(averager.start(&mut trainer.params()).unwrap());
                trainer.look();
                let graph = result::stream::end_capture(trainer.stream).unwrap();
                let mut ready = std::ptr::null_mut();
                sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result().unwrap();
                result::graph::destroy(graph).unwrap();
                ready
            };
            all_ready.wait(); // instantiating may wait for the device
            for round in 0..3 {
                trainer.step(10 * round + 2 * rank);
                if round == 1 {
                    // An average between two replays.
                    averager.start(&mut trainer.params()).unwrap().wait().unwrap();
                }
                // SAFETY: as above.
                unsafe {
                    sys::cuGraphLaunch(graph, trainer.stream).result().unwrap();
                    averager.graph_outcome(trainer.stream.cast()).unwrap();
                }
                trainer.saw(10 * round + 1);
            }
            all_ready.wait();
            // SAFETY: no replay is under way.
            unsafe { sys::cuGraphExecDestroy(graph) }.result().unwrap();
            all_ready.wait();
            (averager, trainer)
        });
    }
}
