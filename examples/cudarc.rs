//! Two ranks that share a GPU average slices of cudarc, without unsafe code.
//!
//!     cargo run --example cudarc        (needs a GPU, and nvcc when it is built)

use cudarc::driver::CudaContext;
use param_averager::{Communicator, CudaParams, CudaTensorMut, Device, LocalSgd};
use param_averager::{ParamAverager, Schedule};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn train(communicator: Communicator) -> Result<f32> {
    let rank = communicator.rank();
    let stream = CudaContext::new(0)?.new_stream()?; // of this rank alone
    let mut weight = stream.alloc_zeros::<f32>(1000)?;
    let mut bias = stream.alloc_zeros::<f32>(10)?;

    let mut params = CudaParams::new(&stream);
    params.push(CudaTensorMut::from(&mut weight).named("weight"));
    params.push(CudaTensorMut::from(&mut bias).named("bias"));
    let averager = ParamAverager::builder(communicator).build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(2));
    stream.memcpy_htod(&vec![rank as f32; 1000], &mut weight)?; // as if each rank had trained
    for _batch in 0..8 {
        // train_step(&stream, &mut weight, &mut bias), with `params` made again after it
        let mut params = CudaParams::new(&stream);
        params.push(CudaTensorMut::from(&mut weight).named("weight"));
        params.push(CudaTensorMut::from(&mut bias).named("bias"));
        sgd.step(&mut params)?;
    }
    Ok(stream.clone_dtoh(&weight)?[0])
}

fn main() -> Result<()> {
    for (rank, mean) in Communicator::run(&[Device::cuda(0); 2], train)?.into_iter().enumerate() {
        println!("rank {rank}: the mean is {mean}");
    }
    Ok(())
}
