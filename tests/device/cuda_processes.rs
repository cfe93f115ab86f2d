//! Ranks that are processes, each on a CUDA device: they share one, or reach each other's, or go
//! through the host. In CI devices are simulated, see cuda.rs; every process loads the simulator by
//! itself, and they share its memory as processes share a GPU's.
#![cfg(target_os = "linux")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../kernels/ptx/simulator.rs"]
#[allow(dead_code)] // here worlds, not scenarios, are processes
mod simulator;
mod cuda {
    #[allow(dead_code)] // of cuda.rs
    pub mod model;
    pub mod processes;
}
#[path = "../processes/crew.rs"]
mod crew;
#[path = "../processes/model.rs"]
mod model;
#[path = "../processes/pairs.rs"]
mod pairs;
#[path = "../processes/roles.rs"]
mod roles;
#[path = "../processes/worker.rs"]
mod worker;

const WORKER: &str = "child_process";

/// Not a test by itself: what a rank does, in a process of its own.
#[test]
fn child_process() {
    match std::env::var("PA_TEST_ROLE").as_deref() {
        Ok(role @ ("devices" | "abort" | "threads")) => {
            std::process::exit(cuda::processes::rank(role))
        }
        Ok(role) => worker::run(role),
        Err(_) => {}
    }
}
