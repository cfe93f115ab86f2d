//! Ranks on several hosts, started by mpirun: averages within each host every 4 steps, and between
//! hosts every 8.
//!
//!     cargo build --release --example hosts --features mpi
//!     mpirun -H host1:2,host2:2 target/release/examples/hosts

use mpi::Threading;
use param_averager::{
    Communicator, Device, Hierarchy, LocalSgd, MpiHosts, ParamAverager, Schedule,
};

fn main() {
    if let Err(error) = train() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn train() -> Result<(), Box<dyn std::error::Error>> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).ok_or("no MPI")?;
    let result = steps();
    if result.is_err() {
        std::mem::forget(universe); // dropped, it would finalise MPI, and wait for lost hosts
    }
    result
}

fn steps() -> Result<(), Box<dyn std::error::Error>> {
    let communicator = Communicator::from_env(Device::cpu())?; // the ranks of this host
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let hosts = communicator.hosts();
    let link = MpiHosts::new(&communicator)?;
    let host = param_averager::Hosts::host(&link);

    let mut params = vec![vec![0.0f32; 1000]];
    let builder = ParamAverager::builder(communicator);
    let builder = builder.hosts(link, Hierarchy::Outer { every: 2 });
    let mut sgd = LocalSgd::new(builder.build(&mut params)?, Schedule::every(4));
    for step in 1..=16 {
        // In the place of an optimizer's step on data of its own: towards the rank's number.
        let target = (host * ranks + rank) as f32;
        params[0].iter_mut().for_each(|value| *value += 0.1 * (target - *value));
        let action = sgd.step(&mut params)?;
        if let (Some(report), 0) = (action.report(), rank) {
            let value = params[0][0];
            println!("host {host}, step {step}: average of {} hosts, {value:.3}", report.hosts);
        }
    }
    let report = sgd.finish(&mut params)?;
    let found = params[0][0];
    println!("rank {rank} of {ranks}, host {host} of {hosts}: {found:.3} ({report:?})");
    Ok(())
}
