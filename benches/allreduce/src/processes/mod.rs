//! `--processes`: every rank is a process of its own, on CPUs. A launcher has started them, or this
//! program is its own launcher; ranks can't tell the difference. Rank 0 measures the same ring
//! between threads beside it, and prints.

mod exchange;
mod launch;
mod print;
mod rank;

use std::time::Duration;

use param_averager::{Communicator, Device};
use rustix::time::{clock_gettime, ClockId};

use crate::cli::{Algorithm, Args, Backend, Baseline};
use crate::failure::Failure;
use crate::plan;

/// Nanoseconds of the clock that all processes of a host share.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32).as_nanos() as u64
}

/// Returns the number of wrong elements, on rank 0.
pub fn run(args: &Args) -> Result<u64, Failure> {
    let began = now();
    refuse(args)?;
    let ranks = args.ranks.first().map_or(2, |&ranks| ranks.into());
    plan::plan(&settled(args, ranks))?; // what is wrong with it is said once
    let began = launch::started().unwrap_or(began);
    if !Communicator::is_launched() {
        return launch::launch(ranks, began).map(|()| 0);
    }
    let communicator = Communicator::from_env(Device::cpu())?;
    let world = communicator.world_size();
    if !args.ranks.is_empty() && ranks != world {
        return Err(Failure::Usage(format!(
            "-g {ranks}, but the launcher has started {world} ranks: leave -g out"
        )));
    }
    rank::run(&settled(args, world), communicator, began)
}

fn refuse(args: &Args) -> Result<(), Failure> {
    let refused = if args.backend == Backend::Cuda {
        "--processes has ranks on CPUs only: leave --backend cuda or --processes out"
    } else if args.algorithm.contains(&Algorithm::Direct) {
        "--algorithm direct is for ranks that share an address space, which processes don't: use \
         ring with --processes"
    } else if args.baseline.iter().any(|&baseline| baseline != Baseline::None) {
        "--baseline has rows for ranks that are threads: leave it out with --processes, whose \
         yardstick is the same ring \
         between threads"
    } else if args.ranks.len() > 1 {
        "--processes measures one world in a run: give one number with -g"
    } else {
        return Ok(());
    };
    Err(Failure::Usage(refused.into()))
}

/// The ring, on so many ranks, and nothing else.
fn settled(args: &Args, ranks: usize) -> Args {
    Args {
        algorithm: vec![Algorithm::Ring],
        baseline: vec![Baseline::None],
        ranks: vec![ranks as u16],
        ..args.clone()
    }
}
