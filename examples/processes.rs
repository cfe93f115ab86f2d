//! Three ranks that are processes of one host. Started without a launcher, it starts them itself.
//!
//!     cargo run --example processes
//!     mpirun -n 3 target/debug/examples/processes
//!     torchrun --no-python --nproc-per-node 3 target/debug/examples/processes

mod launch;

#[cfg(not(target_os = "linux"))]
use launch::Processes as _;
use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};

fn train() -> Result<()> {
    let communicator = Communicator::from_env(Device::cpu())?; // waits for the other ranks
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let mut params = vec![vec![0.0f32; 1000]];
    let averager = ParamAverager::builder(communicator).build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    params[0].fill(rank as f32); // as if each rank had trained on its own data
    for _batch in 0..100 {
        // train_step(&mut params, batch);
        sgd.step(&mut params)?;
    }
    sgd.finish(&mut params)?;
    println!("rank {rank} of {ranks}: {}", params[0][0]);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if Communicator::is_launched() {
        return Ok(train()?);
    }
    let ranks: Vec<_> = (0..3).map(|rank| launch::start(rank, 3)).collect();
    for process in ranks {
        assert!(process?.wait()?.success(), "a rank failed");
    }
    Ok(())
}
