//! A trainer with a CUDA runtime of its own, of which this crate sees addresses and a stream: a few
//! dense f32 tensors, a blocking stream on each GPU, one rank a GPU (two on one if it is alone).
//!
//!     cargo run --example cuda_raw        (needs a GPU, and nvcc when it is built)

use cudarc::driver::sys; // stands for the trainer's own bindings of the driver
use param_averager::{Communicator, Device, Dtype, Lend, LendError, Loan, LocalSgd};
use param_averager::{ParamAverager, Schedule, TensorMut, Topology};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A network in the trainer's own memory on one GPU.
struct Net {
    on: Device,
    stream: sys::CUstream,
    tensors: Vec<(&'static str, sys::CUdeviceptr, usize)>,
}

impl Net {
    /// Uses the primary context of a GPU, which the CUDA runtime and this crate use, too.
    fn new(gpu: usize) -> Result<Net> {
        let (mut context, mut stream, mut tensors) =
            (std::ptr::null_mut(), std::ptr::null_mut(), vec![]);
        // SAFETY: the driver is loaded, and the context is current on this thread.
        unsafe {
            sys::cuDevicePrimaryCtxRetain(&mut context, gpu as i32).result()?;
            sys::cuCtxSetCurrent(context).result()?;
            sys::cuStreamCreate(&mut stream, 0).result()?; // of the blocking kind
            for (name, elements) in [("l0.weights", 768 * 64), ("l0.bias", 64), ("l1", 64)] {
                let mut address = 0;
                sys::cuMemAlloc_v2(&mut address, 4 * elements).result()?;
                tensors.push((name, address, elements));
            }
        }
        // The memory is the process's until it ends: freeing it waits for a peer's average.
        Ok(Net { on: Device::cuda(gpu), stream, tensors })
    }

    /// Enqueues a training step, and does not wait for it.
    fn step(&self, value: f32) -> Result<()> {
        for (_, address, elements) in &self.tensors {
            // SAFETY: own memory of this size, on its stream.
            unsafe { sys::cuMemsetD32Async(*address, value.to_bits(), *elements, self.stream) }
                .result()?;
        }
        Ok(())
    }

    fn first(&self) -> Result<f32> {
        let mut found = 0f32;
        // SAFETY: own memory, on its stream; the copy has ended on return.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2((&raw mut found).cast(), self.tensors[0].1, 4, self.stream)
                .result()?;
            sys::cuStreamSynchronize(self.stream).result()?;
        }
        Ok(found)
    }
}

impl Lend for Net {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        let tensor = |&(name, address, elements): &(&'static str, sys::CUdeviceptr, usize)| {
            // SAFETY: device memory of that many floats, which is used on the stream alone.
            unsafe { TensorMut::from_raw_parts(address as *mut u8, elements, Dtype::F32, self.on) }
                .named(name)
        };
        let mut tensors: Vec<TensorMut<'_>> = self.tensors.iter().map(tensor).collect();
        // SAFETY: as above; the stream and the memory live until the process ends.
        average(unsafe { Loan::on_stream(&mut tensors, self.stream.cast()) });
        Ok(())
    }
}

fn train(communicator: Communicator, gpu: usize) -> Result<f32> {
    let rank = communicator.rank();
    let mut net = Net::new(gpu)?;
    net.step(0.0)?;
    let averager = ParamAverager::builder(communicator).build(&mut net)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(4));
    for _batch in 0..8 {
        net.step(rank as f32)?;
        sgd.step(&mut net)?; // behind the step; waits when an average is due
    }
    sgd.finish(&mut net)?;
    net.first()
}

fn main() -> Result<()> {
    let gpus = Topology::probe()?.devices().len();
    let of_ranks: Vec<usize> = (0..gpus.max(2)).map(|rank| rank % gpus).collect();
    let devices: Vec<Device> = of_ranks.iter().map(|&gpu| Device::cuda(gpu)).collect();
    let world = Communicator::from_devices(&devices)?.into_iter().zip(of_ranks);
    let ranks: Vec<_> =
        world.map(|(rank, gpu)| std::thread::spawn(move || train(rank, gpu))).collect();
    for (rank, (thread, on)) in ranks.into_iter().zip(devices).enumerate() {
        println!("rank {rank} on {on}: the mean is {}", thread.join().expect("a rank panicked")?);
    }
    Ok(())
}
