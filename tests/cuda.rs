//! The CUDA backend through the public API: ranks on one device and on several. In CI devices are
//! simulated by `../shared/cudasim` (or the libcuda.so.1 in the folder that `CUDASIM_LIB` names):
//! the real PTX behind the real driver API, with a race detector, but no ptxas, no caches, no weak
//! memory, no time. On a GPU: tests/gpu/suite. Each scenario is a process of its own.

mod common;
#[path = "ptx/simulator.rs"]
mod simulator;
mod cuda {
    pub mod beside;
    pub mod graphs;
    #[cfg(feature = "cuda")]
    pub mod interop;
    pub mod links;
    pub mod model;
    pub mod scenarios;
    pub mod streams;
    pub mod strict;
}

use simulator::{driver_for, no_driver, Driver, Setting, SCENARIO};
use std::path::Path;
use std::process::Command;

/// Not a test by itself: what the others start as a process of its own.
#[test]
fn child_process() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    // A rank that panics ends the process: its peers may wait for it where nothing tells them.
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(101);
    }));
    cuda::scenarios::run(&scenario);
}

/// Runs the scenario with each of some settings.
fn scenario(name: &str, settings: &[&[Setting<'_>]]) {
    simulator::scenario(name, name, settings);
}

/// Runs the scenario on cudasim behind `cuda/strict_driver.cpp`, which refuses more, or prints a
/// SKIPPED line.
fn strict(name: &str, settings: &[Setting<'_>]) {
    let folder = match driver_for(name) {
        None => return,
        Some(Driver::Own) => return common::skipped(name, "about a simulated driver"),
        Some(Driver::Simulated(folder)) => folder,
    };
    let strict = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&strict).unwrap();
    let compiler =
        std::env::var_os("CXX").filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".into());
    let built = Command::new(compiler)
        .args([
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            "-pthread",
            "tests/cuda/strict_driver.cpp",
            "-Wl,--no-as-needed",
            "-o",
        ])
        .args([strict.join("libcuda.so"), folder.join("libcuda.so.1")])
        .arg("-ldl")
        .output();
    match built {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            return common::skipped(name, &format!("the strict driver did not build: {error}"))
        }
    }
    let path = format!("{}:{}", strict.display(), folder.display());
    scenario(name, &[&[&[("LD_LIBRARY_PATH", path.as_str())], settings].concat()]);
}

const ONE: Setting<'_> = ("CUDASIM_DEVICES", "1");

#[test]
fn averages_have_the_bits_of_the_cpu() {
    scenario(
        "averages",
        &[&[ONE, ("CUDASIM_SEED", "1")], &[ONE, ("CUDASIM_SEED", "2"), ("CUDASIM_DELAY", "30")]],
    );
}

#[test]
fn averages_have_no_race() {
    scenario("races", &[&[ONE, ("CUDASIM_RACE", "1")]]);
}

#[test]
fn what_cannot_be_averaged_is_refused_on_every_rank() {
    scenario("refusals", &[&[ONE]]);
}

#[test]
fn failures_are_typed_and_change_nothing() {
    scenario("failures", &[&[ONE]]);
}

#[test]
fn local_sgd_runs_beside_a_trainer() {
    scenario("trainers", &[&[ONE, ("CUDASIM_DELAY", "30")]]);
}

#[test]
fn averages_run_beside_kernels_and_each_other() {
    scenario("beside", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
}

#[test]
fn averages_are_enqueued_on_streams() {
    scenario("streams", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
}

const TWO: (&str, &str) = ("CUDASIM_DEVICES", "2");
const FOUR: (&str, &str) = ("CUDASIM_DEVICES", "4");

#[test]
fn mailboxes_in_memory_of_the_host_make_no_difference() {
    scenario("host-links", &[&[ONE, ("CUDASIM_SEED", "5")], &[ONE, ("CUDASIM_DELAY", "30")]]);
    scenario("host-failures", &[&[ONE]]);
}

#[test]
fn ranks_on_several_devices_have_the_bits_of_the_cpu() {
    scenario(
        "links",
        &[&[FOUR, ("CUDASIM_SEED", "3")], &[FOUR, ("CUDASIM_SEED", "4"), ("CUDASIM_DELAY", "30")]],
    );
    scenario("pairs", &[&[FOUR, ("CUDASIM_P2P", "0-2,1-3")]]);
}

#[test]
fn devices_that_do_not_reach_each_other_go_through_the_host() {
    scenario("no-p2p", &[&[TWO, ("CUDASIM_P2P", "none"), ("CUDASIM_DELAY", "30")]]);
    scenario("broken-p2p", &[&[TWO, ("CUDASIM_P2P", "broken")]]);
}

#[test]
fn links_have_no_race() {
    scenario("link-races", &[&[TWO, ("CUDASIM_RACE", "1")]]);
}

#[test]
fn failures_between_devices_are_typed_and_change_nothing() {
    scenario("link-failures", &[&[TWO]]);
}

#[test]
fn averages_in_graphs_are_replayed() {
    scenario("graphs", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("graphs-devices", &[&[TWO, ("CUDASIM_DELAY", "30")], &[TWO, ("CUDASIM_RACE", "1")]]);
}

#[cfg(feature = "cuda")]
#[test]
fn slices_of_cudarc_are_averaged_in_order() {
    scenario("interop", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("interop-devices", &[&[("CUDASIM_DEVICES", "2")]]);
}

#[test]
fn what_a_graph_would_refuse_is_not_captured() {
    scenario("graph-refusals", &[&[ONE]]);
}

#[test]
fn captures_elsewhere_refuse_nothing_but_what_they_must() {
    strict("graphs", &[ONE]);
    strict("strict-captures", &[ONE]);
    #[cfg(feature = "cuda")]
    strict("strict-slices", &[ONE]);
}

#[test]
fn a_rank_whose_device_fails_tells_its_peers_and_waits_for_none() {
    strict("strict-failures", &[ONE]);
    #[cfg(feature = "cuda")]
    strict("strict-ends", &[ONE]);
}

#[test]
fn a_device_with_too_many_peers_goes_through_the_host() {
    strict("strict-peers", &[FOUR, ("STRICT_PEERS", "1")]);
}

#[test]
fn memory_is_freed_when_nobody_averages_any_more() {
    scenario("memory", &[&[ONE, ("CUDASIM_MEM_MB", "1024")]]); // nobody else takes memory of it
}

#[test]
fn a_device_that_is_full_says_so() {
    scenario("out-of-memory", &[&[ONE, ("CUDASIM_MEM_MB", "64")]]);
}

#[test]
fn machines_that_cannot_run_the_kernels_say_why() {
    scenario("no-device", &[&[("CUDASIM_NO_DEVICE", "1")], &[("CUDA_VISIBLE_DEVICES", "")]]);
    scenario("old-driver", &[&[("CUDASIM_OLD_DRIVER", "11040")]]);
    if simulator::driver_for("no-driver").is_some() {
        no_driver("no-driver");
    }
}
