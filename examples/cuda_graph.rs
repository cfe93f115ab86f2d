//! Two ranks with a GPU each capture a step and an average in a CUDA graph, and replay it. Ranks
//! that share a GPU can't: nothing promises that their graphs run at the same time.
//!
//!     cargo run --example cuda_graph        (needs two GPUs, and nvcc when it is built)

use std::sync::Barrier;

use cudarc::driver::{sys, CudaContext, DevicePtrMut};
use param_averager::{Communicator, Device, Dtype, ParamAverager, RawCudaParams, TensorMut};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
const N: usize = 1000;
static CAPTURED: Barrier = Barrier::new(2);

fn train(communicator: Communicator) -> Result<f32> {
    let (rank, device) = (communicator.rank(), communicator.device());
    let stream = CudaContext::new(rank)?.new_stream()?; // non-blocking, of this rank alone
    let mut weights = stream.alloc_zeros::<f32>(N)?;
    let (address, in_use) = weights.device_ptr_mut(&stream);
    let raw = stream.cu_stream();
    // SAFETY: the memory lives until the last replay has ended, and all its uses are ordered on the
    // stream.
    let mut params = unsafe {
        let tensor = TensorMut::from_raw_parts(address as *mut u8, N, Dtype::F32, device);
        RawCudaParams::new(raw.cast(), tensor.named("weights"))
    };
    let mut averager = ParamAverager::builder(communicator).build(&mut params)?;

    stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    // SAFETY: `N` words of own memory, on its stream: the training step.
    unsafe { sys::cuMemsetD32Async(address, (rank as f32).to_bits(), N, raw) }.result()?;
    drop(averager.start(&mut params)?); // a part of the graph: nothing to wait for
    let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;

    CAPTURED.wait(); // no rank instantiates a graph while a peer's average waits on the device
    for _replay in 0..10 {
        graph.launch()?; // as often on every rank
    }
    // SAFETY: the stream is this rank's, and the averager makes no other average meanwhile.
    println!("rank {rank}: {} bytes", unsafe { averager.graph_outcome(raw.cast()) }?.bytes);
    drop((graph, in_use));
    Ok(stream.clone_dtoh(&weights)?[0])
}

fn main() -> Result<()> {
    let world = Communicator::from_devices(&[Device::cuda(0), Device::cuda(1)])?;
    let or_exit = |error| {
        eprintln!("Error: {error:?}");
        std::process::exit(1) // the other rank may be at the barrier
    };
    let spawn = |rank| std::thread::spawn(move || train(rank).unwrap_or_else(or_exit));
    let ranks: Vec<_> = world.into_iter().map(spawn).collect();
    for (rank, thread) in ranks.into_iter().enumerate() {
        println!("rank {rank}: the mean is {}", thread.join().expect("a rank panicked"));
    }
    Ok(())
}
