//! A mean weighted by the samples that each rank has seen, after a copy of rank 0's weights.
//!
//!     cargo run --example weighted

use param_averager::{Communicator, Device, ParamAverager, Result};

fn train(communicator: Communicator) -> Result<f32> {
    let rank = communicator.rank();
    let mut params = vec![vec![100.0 + rank as f32; 1000]]; // Each rank's own random weights.
    let mut averager = ParamAverager::builder(communicator).build(&mut params)?;

    // Only rank 0 has a weight: every rank begins with rank 0's weights.
    averager.average_weighted(&mut params, if rank == 0 { 1.0 } else { 0.0 })?;
    assert_eq!(params[0], [100.0; 1000]);

    // A slow rank has seen 100 samples, a fast one 300. Each changes its model.
    let samples = [100.0, 300.0][rank];
    params[0].iter_mut().for_each(|x| *x += [1.0, 5.0][rank]);
    averager.average_weighted(&mut params, samples)?; // (1 × 100 + 5 × 300) / 400 = 4
    Ok(params[0][0])
}

fn main() -> Result<()> {
    let world = Communicator::from_devices(&[Device::cpu(), Device::cpu()])?;
    let ranks: Vec<_> = world.into_iter().map(|rank| std::thread::spawn(|| train(rank))).collect();
    for (rank, thread) in ranks.into_iter().enumerate() {
        println!("rank {rank}: {}", thread.join().expect("a rank panicked")?);
    }
    Ok(())
}
