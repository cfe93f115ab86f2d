//! Two ranks that are threads of this process fit one line to data that each sees half of.
//!
//!     cargo run --example threads

use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};

/// Trains this rank's model y = w·x + b on its part of the data, and returns w and b.
fn train(communicator: Communicator) -> Result<(f32, f32)> {
    let rank = communicator.rank() as f32;
    let mut params = [0.0f32, 0.0]; // w and b
    let averager = ParamAverager::builder(communicator).build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    for step in 0..2000 {
        let x = (step % 10) as f32 / 10.0 - rank; // rank 0 sees 0 to 0.9, rank 1 -1 to -0.1
        let error = params[0] * x + params[1] - (3.0 * x + 1.0);
        params[0] -= 0.1 * error * x;
        params[1] -= 0.1 * error;
        sgd.step(&mut params)?; // averages every 8 steps
    }
    sgd.finish(&mut params)?;
    Ok((params[0], params[1]))
}

fn main() -> Result<()> {
    let lines = Communicator::run(&[Device::cpu(), Device::cpu()], train)?;
    for (rank, (w, b)) in lines.into_iter().enumerate() {
        println!("rank {rank}: y = {w:.3} x + {b:.3}");
    }
    Ok(())
}
