//! Launcher of these examples: starts this program again as a rank, as torchrun or mpirun would.

use std::process::{Child, Command};

/// Name of the world, unless its ranks were started by hand.
pub fn name() -> String {
    format!("example-{}", std::process::id())
}

/// Starts one rank of a world of `ranks`, with the arguments of this process.
pub fn start(rank: usize, ranks: usize) -> std::io::Result<Child> {
    let mut process = Command::new(std::env::current_exe()?);
    process.args(std::env::args_os().skip(1));
    process.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
    process.env("PARAM_AVERAGER_RENDEZVOUS", name()).spawn()
}
