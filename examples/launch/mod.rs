//! Launcher of these examples: starts this program again as a rank, as torchrun or mpirun would.

use std::process::{Child, Command};

/// Name of the world, unless its ranks were started by hand.
pub fn name() -> String {
    format!("example-{}", std::process::id())
}

/// Starts one rank of a world of `ranks`, with the arguments of this process.
pub fn start(rank: usize, ranks: usize) -> std::io::Result<Child> {
    if cfg!(not(target_os = "linux")) {
        return Err(std::io::Error::other(NEEDS_LINUX));
    }
    let mut process = Command::new(std::env::current_exe()?);
    process.args(std::env::args_os().skip(1));
    process.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
    process.env("PARAM_AVERAGER_RENDEZVOUS", name()).spawn()
}

const NEEDS_LINUX: &str =
    "ranks that are processes need Linux; the example `threads` runs everywhere";

/// Stand-ins for what `Communicator` has on Linux: elsewhere the examples compile, and say so.
#[cfg(not(target_os = "linux"))]
#[allow(dead_code)] // each example uses a part
pub trait Processes: Sized {
    fn is_launched() -> bool {
        false
    }

    fn from_env(_: param_averager::Device) -> param_averager::Result<Self> {
        Err(param_averager::Error::Environment { problem: NEEDS_LINUX.into() })
    }

    fn join(_: String, device: param_averager::Device) -> param_averager::Result<Self> {
        Self::from_env(device)
    }
}

#[cfg(not(target_os = "linux"))]
impl Processes for param_averager::Communicator {}
