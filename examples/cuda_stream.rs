//! Two ranks that share a GPU enqueue a step, an average and a copy of the mean, and wait once.
//!
//!     cargo run --example cuda_stream        (needs a GPU, and nvcc when it is built)

use cudarc::driver::{sys, CudaContext, DevicePtrMut};
use param_averager::{Communicator, Device, Dtype, ParamAverager, RawCudaParams, TensorMut};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
const N: usize = 1000;

fn train(communicator: Communicator) -> Result<f32> {
    let rank = communicator.rank();
    let stream = CudaContext::new(0)?.new_stream()?; // non-blocking, of this rank alone
    let mut weights = stream.alloc_zeros::<f32>(N)?;
    let (address, in_use) = weights.device_ptr_mut(&stream);
    // SAFETY: the memory lives until `average` has been waited for, and all its uses are ordered on
    // the stream.
    let mut params = unsafe {
        let tensor = TensorMut::from_raw_parts(address as *mut u8, N, Dtype::F32, Device::cuda(0));
        RawCudaParams::new(stream.cu_stream().cast(), tensor.named("weights"))
    };
    let mut averager = ParamAverager::builder(communicator).build(&mut params)?;
    let value = (rank as f32).to_bits(); // the training step
                                         // SAFETY: `N` words of own memory, on its stream.
    unsafe { sys::cuMemsetD32Async(address, value, N, stream.cu_stream()) }.result()?;
    let average = averager.start(&mut params)?; // enqueued behind the step
    println!("rank {rank}: {} bytes", average.wait()?.bytes);
    drop(in_use);
    Ok(stream.clone_dtoh(&weights)?[0])
}

fn main() -> Result<()> {
    for (rank, mean) in Communicator::run(&[Device::cuda(0); 2], train)?.into_iter().enumerate() {
        println!("rank {rank}: the mean is {mean}");
    }
    Ok(())
}
