//! Three processes train, one crashes, and the other two go on. It starts them itself, or by hand:
//!
//!     export WORLD_SIZE=3 PARAM_AVERAGER_RENDEZVOUS=my-run
//!     for rank in 0 1 2; do RANK=$rank target/debug/examples/recover & done; wait

mod launch;

#[cfg(not(target_os = "linux"))]
use launch::Processes as _;
use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};

fn train() -> Result<()> {
    let communicator = Communicator::from_env(Device::cpu())?;
    let first = communicator.rank();
    let mut params = vec![vec![0.0f32; 1000]];
    let averager = ParamAverager::builder(communicator).build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    params[0].fill(first as f32); // as if each rank had trained on its own data
    while sgd.position() < 100 {
        if first == 1 && sgd.position() == 20 {
            std::process::exit(1); // before its third average
        }
        // train_step(&mut params, batch);
        match sgd.step(&mut params) {
            Err(error) if error.is_fatal() => {
                println!("rank {first}: {error}");
                sgd.recover(&mut params)? // makes the average that failed, without rank 1
            }
            done => done?,
        };
    }
    sgd.finish(&mut params)?;
    let (rank, ranks) = (sgd.averager().rank(), sgd.averager().world_size());
    println!("rank {first} has become rank {rank} of {ranks}: {}", params[0][0]);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if Communicator::is_launched() {
        return Ok(train()?);
    }
    let ranks: Vec<_> = (0..3).map(|rank| launch::start(rank, 3)).collect();
    for (rank, process) in ranks.into_iter().enumerate() {
        assert_eq!(process?.wait()?.success(), rank != 1, "rank {rank}");
    }
    Ok(())
}
