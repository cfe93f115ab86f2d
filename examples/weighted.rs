//! A mean weighted by the samples that each rank has seen.
//!
//!     cargo run --example weighted

use param_averager::{Communicator, Device, ParamAverager, Result};

fn train(communicator: Communicator) -> Result<f32> {
    let rank = communicator.rank();
    let mut params = vec![vec![100.0 + rank as f32; 1000]]; // each rank's own random weights
    let mut averager = ParamAverager::builder(communicator).build(&mut params)?; // now rank 0's
    assert_eq!(params[0], [100.0; 1000]);

    // A slow rank has seen 100 samples, a fast one 300. Each changes its model.
    let samples = [100.0, 300.0][rank];
    params[0].iter_mut().for_each(|x| *x += [1.0, 5.0][rank]);
    averager.average_weighted(&mut params, samples)?; // (1 × 100 + 5 × 300) / 400 = 4
    Ok(params[0][0])
}

fn main() -> Result<()> {
    let means = Communicator::run(&[Device::cpu(), Device::cpu()], train)?;
    for (rank, mean) in means.into_iter().enumerate() {
        println!("rank {rank}: {mean}");
    }
    Ok(())
}
