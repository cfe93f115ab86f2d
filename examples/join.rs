//! Two processes train, and a third one joins them: this one, which starts the others. By hand:
//!
//!     export WORLD_SIZE=2 PARAM_AVERAGER_RENDEZVOUS=my-run; program=target/debug/examples/join
//!     for rank in 0 1; do RANK=$rank $program & done; $program; wait

mod launch;

#[cfg(not(target_os = "linux"))]
use launch::Processes as _;
use param_averager::{Action, Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};

fn train(communicator: Communicator, joins: bool) -> Result<()> {
    let mut params = vec![vec![if joins { 0.0f32 } else { 7.0 }; 1000]];
    // In the process that joins, this gives the tensors the values of the others.
    let averager = ParamAverager::builder(communicator).build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    let mut last = if joins { sgd.position() + 16 } else { u64::MAX };
    while sgd.position() < last {
        std::thread::sleep(std::time::Duration::from_millis(1)); // train_step(&mut params, batch);
        if let Action::Admitted { .. } = sgd.step(&mut params)? {
            last = sgd.position() + 16; // the same on every rank
        }
    }
    sgd.finish(&mut params)?;
    let (rank, ranks) = (sgd.averager().rank(), sgd.averager().world_size());
    println!("rank {rank} of {ranks}: {}", params[0][0]);
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if Communicator::is_launched() {
        return Ok(train(Communicator::from_env(Device::cpu())?, false)?);
    }
    let by_hand = std::env::var("PARAM_AVERAGER_RENDEZVOUS").ok();
    let started = if by_hand.is_some() { 0 } else { 2 };
    let ranks: Vec<_> = (0..started).map(|rank| launch::start(rank, 2)).collect();
    train(Communicator::join(by_hand.unwrap_or(launch::name()), Device::cpu())?, true)?;
    for process in ranks {
        assert!(process?.wait()?.success(), "a rank failed");
    }
    Ok(())
}
