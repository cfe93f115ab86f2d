//! cudarc's slices, on cudarc's streams.

use super::scenarios::GPU;
use cudarc::driver::sys::CUgraphInstantiate_flags as Flags;
use cudarc::driver::sys::{CUresult, CUstreamCaptureMode};
use cudarc::driver::{result, CudaContext, CudaSlice, CudaStream, DeviceRepr, DriverError};
use half::{bf16, f16};
use param_averager::*;
use std::sync::Arc;
use std::time::Duration;
use test_support::ranks_on;

pub fn interop() {
    every_dtype();
    other_streams();
    last_stream();
    one_null_stream();
    local_sgd();
    refusals();
}

/// A stream of the non-blocking kind. cudarc waits for the device when a context makes its first,
/// so before any rank averages.
fn stream() -> Arc<CudaStream> {
    CudaContext::new(0).unwrap().new_stream().unwrap()
}

fn build(communicator: Communicator, params: &mut CudaParams<'_>) -> Result<ParamAverager> {
    let builder = test_support::options(communicator).channels(2).timeout(Duration::from_secs(60));
    builder.build(params)
}

fn all<T: DeviceRepr + Clone + Default + PartialEq + std::fmt::Debug>(
    slice: &CudaSlice<T>,
    value: T,
) {
    let found = slice.stream().clone_dtoh(slice).unwrap();
    let wrong = found.iter().position(|element| *element != value);
    assert_eq!(wrong, None, "{:?}, not {value:?}", found[wrong.unwrap()]);
}

/// Slices, views and nothing, on the stream that they were allocated on.
fn every_dtype() {
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank(), stream());
        let mut single = stream.clone_htod(&vec![2.0 * rank as f32; 1001]).unwrap();
        let mut double = stream.clone_htod(&vec![3.0 * rank as f64; 300]).unwrap();
        let mut half = stream.clone_htod(&vec![f16::from_f64(rank as f64); 77]).unwrap();
        let mut brain = stream.clone_htod(&vec![bf16::from_f64(rank as f64); 78]).unwrap();
        let mut more = [stream.alloc_zeros::<f32>(5).unwrap(), stream.alloc_zeros(6).unwrap()];
        let mut averager = None;
        for weighted in [false, true] {
            let mut params = CudaParams::new(&stream);
            params.push(CudaTensorMut::from(&mut single).named("single"));
            let (mut first, rest) = double.split_at_mut(100);
            params.push(first.slice_mut(7..8)); // at a multiple of 8 bytes only
            params.push(rest);
            let (nothing, mut middle) = half.split_at_mut(0);
            params.push(nothing);
            params.push(middle.slice_mut(1..76));
            params.push(&mut brain);
            params.extend(&mut more);
            let averager =
                averager.get_or_insert_with(|| build(communicator.clone(), &mut params).unwrap());
            let report = match weighted {
                false => averager.average(&mut params).unwrap(),
                true => averager.average_weighted(&mut params, 1.0 + rank as f64).unwrap(),
            };
            assert_eq!(report.bytes, 4 * 1001 + 8 * 201 + 2 * 75 + 2 * 78 + 4 * 11);
        }
        all(&single, 1.0);
        all(&brain, bf16::from_f32(0.5));
        let (double, half) =
            (stream.clone_dtoh(&double).unwrap(), stream.clone_dtoh(&half).unwrap());
        for (index, &element) in double.iter().enumerate() {
            let averaged = index == 7 || index >= 100;
            assert_eq!(element, if averaged { 1.5 } else { 3.0 * rank as f64 }, "{index}");
        }
        for (index, element) in half.iter().enumerate() {
            let averaged = (1..76).contains(&index);
            assert_eq!(element.to_f64(), if averaged { 0.5 } else { rank as f64 }, "{index}");
        }
    });
}

/// Slices that other streams write before, read after and free; the host waits for none of it.
fn other_streams() {
    const ELEMENTS: usize = 30_000;
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank(), stream());
        let [work, other] = [(); 2].map(|()| stream.context().new_stream().unwrap());
        let source = |round: usize| vec![(10 * round + 2 * rank) as f32; ELEMENTS];
        let sources = [0, 1, 2].map(|round| work.clone_htod(&source(round)).unwrap());
        let mut seen = [(); 3].map(|()| other.alloc_zeros::<f32>(ELEMENTS).unwrap());
        let mut weights = [(); 3].map(|()| Some(work.alloc_zeros::<f32>(ELEMENTS).unwrap()));
        let mut averager = {
            let mut params = CudaParams::new(&stream);
            params.push(weights[0].as_mut().unwrap());
            build(communicator, &mut params).unwrap()
        };
        for round in 0..3 {
            let tensor = weights[round].as_mut().unwrap();
            work.memcpy_dtod(&sources[round], tensor).unwrap();
            // The last time on a stream that ends at once: the averager keeps it.
            let own = (round == 2).then(|| stream.fork().unwrap());
            let mut params = CudaParams::new(own.as_ref().unwrap_or(&stream));
            params.push(tensor);
            let pending = match round {
                1 => averager.start_weighted(&mut params, 1.0),
                _ => averager.start(&mut params),
            };
            std::mem::forget(pending.unwrap());
            drop(own);
            other.memcpy_dtod(weights[round].as_ref().unwrap(), &mut seen[round]).unwrap();
            drop(weights[round].take()); // freed on `work`
            let reused = work.clone_htod(&vec![f32::NAN; ELEMENTS]).unwrap();
            drop(reused);
        }
        for (round, seen) in seen.iter().enumerate() {
            all(seen, (10 * round + 1) as f32);
        }
        averager
    });
}

/// A stream that ends at once, and was the only one that its context counted; then the slice is
/// freed, on the null stream.
fn last_stream() {
    ranks_on(GPU, 2, |communicator| {
        let context = CudaContext::new(0).unwrap();
        let null = context.default_stream();
        let mut weights =
            [1, 2].map(|_| null.clone_htod(&vec![communicator.rank() as f32; 30_000]).unwrap());
        let stream = context.new_stream().unwrap();
        let mut averager = {
            let mut params = CudaParams::new(&stream);
            params.push(&mut weights[0]);
            build(communicator, &mut params).unwrap()
        };
        let [mut first, mut second] = weights;
        let mut params = CudaParams::new(&stream);
        params.push(&mut first);
        std::mem::forget(averager.start(&mut params).unwrap());
        drop(stream);
        drop(first);
        // Waits for the average before it, which fails if its memory was freed.
        let mut params = CudaParams::new(&null);
        params.push(&mut second);
        averager.average(&mut params).unwrap();
        all(&second, 0.5);
        averager
    });
}

/// Use by a trainer without streams: all ranks are on the null stream, in contexts of their own or
/// in a common one.
fn one_null_stream() {
    let shared = CudaContext::new(0).unwrap();
    for own in [true, false] {
        ranks_on(GPU, 3, |communicator| {
            let rank = communicator.rank() as f32;
            let context = if own { CudaContext::new(0).unwrap() } else { shared.clone() };
            let stream =
                if rank == 1.0 { context.per_thread_stream() } else { context.default_stream() };
            let mut weights = stream.clone_htod(&vec![rank; 5000]).unwrap();
            let mut params = CudaParams::new(&stream);
            params.push(&mut weights);
            let mut averager = build(communicator, &mut params).unwrap();
            averager.average(&mut params).unwrap();
            averager.average(&mut params).unwrap();
            all(&weights, 1.0);
            averager
        });
    }
}

fn local_sgd() {
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank() as f32, stream());
        let mut weights = stream.clone_htod(&vec![rank; 50]).unwrap();
        let mut params = CudaParams::new(&stream);
        params.push(&mut weights);
        let averager = build(communicator, &mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        assert_eq!(sgd.step(&mut params).unwrap(), Action::Counted { until_next: 1 });
        let skipped = sgd.skip(&mut params).unwrap();
        assert_eq!(skipped, Action::Enqueued);
        assert_eq!(sgd.wait().unwrap().map(|report| report.world_size), Some(2));
        let last = sgd.finish(&mut params).unwrap();
        assert_eq!((last, sgd.steps(), sgd.averages()), (Action::Unneeded, 1, 1));
        all(&weights, 0.5);
        sgd
    });
}

/// The error of an average that is to fail.
fn refused(averager: &mut ParamAverager, params: &mut CudaParams<'_>) -> Error {
    let error = averager.average(params).unwrap_err();
    assert!(error.tensors() == TensorState::Unchanged && !error.is_fatal(), "{error}");
    error
}

fn stream_is(error: Error, words: &str) {
    let Error::InvalidOption { option: "stream", found, .. } = &error else { panic!("{error}") };
    assert!(found.contains(words), "{error}");
}

/// Asserts that every rank gets the error about this tensor of rank 1.
fn tensor_is(error: Error, words: &str) {
    let Error::InvalidTensor { rank: 1, tensor, problem } = &error else { panic!("{error}") };
    assert!(tensor.contains("tensor 0 (f32") && problem.contains(words), "{error}");
}

fn refusals() {
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank(), stream());
        let context = stream.context();
        let mut right = stream.clone_htod(&vec![rank as f32; 50]).unwrap();
        let foreign = self::stream();
        let mut foreign = foreign.clone_htod(&vec![9.0f32; 50]).unwrap();
        // SAFETY: the untracked slice is used on one stream only, and waited for.
        unsafe { context.disable_event_tracking() };
        let mut untracked = context.new_stream().unwrap().clone_htod(&vec![9.0f32; 50]).unwrap();
        untracked.stream().synchronize().unwrap();
        // SAFETY: as above.
        unsafe { context.enable_event_tracking() };
        let mut averager = {
            let mut params = CudaParams::new(&stream);
            params.push(&mut right);
            build(communicator, &mut params).unwrap()
        };
        for (wrong, words) in [
            (&mut foreign, "belongs to another CudaContext"),
            (&mut untracked, "cudarc does not track its uses"),
        ] {
            let mut params = CudaParams::new(&stream);
            params.push(if rank == 1 { &mut *wrong } else { &mut right });
            tensor_is(refused(&mut averager, &mut params), words);
            all(wrong, 9.0);
            all(&right, rank as f32);
        }
        // On the stream that it was allocated on, it needs no events.
        let on = untracked.stream().clone();
        let mut params = CudaParams::new(&on);
        params.push(&mut untracked);
        averager.start(&mut params).unwrap().wait().unwrap();
        // A stream that is being captured, and a context that holds an error.
        let mut params = CudaParams::new(&stream);
        params.push(&mut right);
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        stream_is(refused(&mut averager, &mut params), "being captured");
        stream_is(averager.start(&mut params).map(drop).unwrap_err(), "being captured");
        let flags = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        drop(stream.end_capture(flags));
        let _ = context.check_err();
        context.record_err::<()>(Err(DriverError(CUresult::CUDA_ERROR_UNKNOWN)));
        stream_is(
            refused(&mut averager, &mut params),
            "holds an error, DriverError(CUDA_ERROR_UNKNOWN",
        );
        // Nothing is broken.
        averager.average(&mut params).unwrap();
        all(&right, 0.5);
        averager
    });
    // Ranks on CPUs.
    ranks_on(Device::cpu(), 2, |communicator| {
        let mut model = vec![communicator.rank() as f32; 10];
        let mut averager = test_support::options(communicator).build(&mut model).unwrap();
        let stream = stream();
        stream_is(
            refused(&mut averager, &mut CudaParams::new(&stream)),
            "where the rank is on cpu",
        );
    });
}

/// Slices whose last use is a part of a graph, on the strict driver.
pub fn captured_slices() {
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank(), stream());
        let (context, work) = (stream.context(), stream.context().new_stream().unwrap());
        let blocking = context.per_thread_stream();
        let mut right = stream.clone_htod(&vec![rank as f32; 50]).unwrap();
        let mut averager = {
            let mut params = CudaParams::new(&stream);
            params.push(&mut right);
            build(communicator, &mut params).unwrap()
        };
        for written in [true, false] {
            let flags = Flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let mut wrong = work.clone_htod(&vec![9.0f32; 50]).unwrap();
            let mut read = work.alloc_zeros::<f32>(50).unwrap();
            work.synchronize().unwrap();
            work.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
            match written {
                true => work.memset_zeros(&mut wrong).unwrap(),
                false => work.memcpy_dtod(&wrong, &mut read).unwrap(),
            }
            drop(work.end_capture(flags).unwrap());
            // On any kind of stream every rank gets the error, and can go on.
            for on in [&stream, &context.default_stream(), &blocking] {
                let mut params = CudaParams::new(on);
                params.push(if rank == 1 { &mut wrong } else { &mut right });
                tensor_is(refused(&mut averager, &mut params), "a stream that was being captured");
                context.check_err().unwrap();
            }
            all(&right, rank as f32);
            drop((wrong, read));
            let _ = context.check_err(); // cudarc's own waits for it failed, too
            let mut params = CudaParams::new(&stream);
            params.push(&mut right);
            averager.average(&mut params).unwrap();
            all(&right, 0.5);
            right = stream.clone_htod(&vec![rank as f32; 50]).unwrap();
        }
        // While the capture goes on, a stream that waits becomes a part of it: this rank alone gets
        // an error.
        if rank == 1 {
            let on = context.new_stream().unwrap();
            let mut wrong = work.clone_htod(&vec![9.0f32; 50]).unwrap();
            work.synchronize().unwrap();
            work.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
            work.memset_zeros(&mut wrong).unwrap();
            let mut params = CudaParams::new(&on);
            params.push(&mut wrong);
            let error = averager.start(&mut params).map(drop).unwrap_err();
            tensor_is(error, "a stream that was being captured");
            work.join(&on).unwrap();
            // SAFETY: a stream that is being captured, and a graph that is never launched.
            unsafe {
                result::graph::destroy(result::stream::end_capture(work.cu_stream()).unwrap())
            }
            .unwrap();
            drop(wrong);
            let _ = context.check_err();
        }
        let mut params = CudaParams::new(&stream);
        params.push(&mut right);
        averager.average(&mut params).unwrap();
        all(&right, 0.5);
        averager
    });
}

/// Two devices, and ranks on the first.
pub fn devices() {
    ranks_on(GPU, 2, |communicator| {
        let (rank, stream) = (communicator.rank(), stream());
        let elsewhere = CudaContext::new(1).unwrap().new_stream().unwrap();
        let mut right = stream.clone_htod(&vec![rank as f32; 50]).unwrap();
        let mut wrong = elsewhere.clone_htod(&vec![9.0f32; 50]).unwrap();
        let mut averager = {
            let mut params = CudaParams::new(&stream);
            params.push(&mut right);
            build(communicator.clone(), &mut params).unwrap()
        };
        let mut params = CudaParams::new(&stream);
        params.push(if rank == 1 { &mut wrong } else { &mut right });
        tensor_is(refused(&mut averager, &mut params), "is not on cuda:0");
        assert!(build(communicator, &mut params).is_err());
        let mut params = CudaParams::new(&elsewhere);
        params.push(&mut wrong);
        stream_is(
            refused(&mut averager, &mut params),
            "a stream of cuda:1, where the rank is on cuda:0",
        );
        all(&wrong, 9.0);
        // A context that is not the primary one.
        let (device, raw) = (result::device::get(0).unwrap(), right.context().cu_ctx());
        // SAFETY: a context that lives, and that is not destroyed, since its owner is forgotten.
        let other = unsafe { CudaContext::from_raw_context(0, device, raw) }.unwrap();
        let null = other.default_stream();
        stream_is(refused(&mut averager, &mut CudaParams::new(&null)), "not its primary one");
        std::mem::forget((null, other));
        // Neither has left an error in the context, or broken anything.
        right.context().check_err().unwrap();
        let mut params = CudaParams::new(&stream);
        params.push(&mut right);
        averager.average(&mut params).unwrap();
        all(&right, 0.5);
        averager
    });
}
