//! Ranks that are threads on CUDA devices.

mod any_stream;
mod beside;
mod coded;
mod graphs;
mod hosts;
#[cfg(feature = "cuda")]
mod interop;
mod links;
pub mod model;
mod outer;
mod overlap;
mod reach;
mod scenarios;
mod stage;
mod steps;
mod streams;
mod strict;
mod telemetry;
mod way;

use std::path::{Path, PathBuf};

use test_support::simulator::{self, no_driver, scenario, Driver, Setting};
use test_support::{tool, Skip};

pub use hosts::on_hosts;
pub use outer::outers;
pub use scenarios::run;
pub use stage::{staged, with_stage};

/// Skips where the driver of `cuda/strict_driver.cpp` can't be had.
pub fn no_strict_driver() -> Skip {
    match simulator::on_own_driver() {
        true => None, // the test itself tells it from a simulated driver
        false => simulator::missing().or_else(|| tool(&test_support::compiler(), &["--version"])),
    }
}

/// Runs the scenario on cudasim behind `cuda/strict_driver.cpp`, which refuses more.
fn strict(name: &str, settings: &[Setting<'_>]) {
    let folder: PathBuf = match simulator::driver() {
        Driver::Own => {
            return simulator::not_here(&format!("{name}: about a simulated driver"));
        }
        Driver::Simulated(folder) => folder,
    };
    let strict = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&strict).unwrap();
    test_support::shared_library(
        "tests/device/cuda/strict_driver.cpp".as_ref(),
        &strict.join("libcuda.so"),
        &[folder.join("libcuda.so.1").as_ref()],
    );
    let path = format!("{}:{}", strict.display(), folder.display());
    scenario(name, &[&[&[("LD_LIBRARY_PATH", path.as_str())], settings].concat()]);
}

const ONE: Setting<'_> = ("CUDASIM_DEVICES", "1");

pub fn averages_have_the_bits_of_the_cpu() {
    scenario(
        "averages",
        &[&[ONE, ("CUDASIM_SEED", "1")], &[ONE, ("CUDASIM_SEED", "2"), ("CUDASIM_DELAY", "30")]],
    );
}

pub fn outer_steps_have_the_bits_of_the_cpu() {
    scenario("outer", &[&[ONE, ("CUDASIM_SEED", "1")]]);
    scenario("outer-devices", &[&[TWO, ("CUDASIM_SEED", "1")]]);
}

pub fn outer_calls_that_differ_are_an_error_on_every_rank() {
    scenario("outer-calls", &[&[ONE]]);
}

pub fn outer_states_are_saved_and_loaded() {
    scenario("outer-saved", &[&[ONE]]);
}

pub fn stages_have_the_bits_of_the_cpu() {
    scenario("stage", &[&[ONE, ("CUDASIM_SEED", "1")]]);
    scenario("stage-devices", &[&[TWO, ("CUDASIM_DELAY", "30")]]);
    scenario("stage-races", &[&[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn stages_refuse_averages_and_nothing_changes() {
    scenario("stage-vetoes", &[&[TWO, ("CUDASIM_SEED", "1")]]);
    scenario("stage-failures", &[&[TWO]]);
    scenario("stage-refusals", &[&[TWO]]);
}

pub fn stages_are_enqueued_on_streams() {
    scenario("stage-streams", &[&[TWO, ("CUDASIM_DELAY", "30")], &[TWO, ("CUDASIM_RACE", "1")]]);
}

pub fn averages_of_several_hosts_have_the_bits_of_the_cpu() {
    scenario("hosts", &[&[TWO, ("CUDASIM_SEED", "1")]]);
    scenario("hosts-devices", &[&[FOUR, ("CUDASIM_DELAY", "30")]]);
    scenario("hosts-streams", &[&[TWO, ("CUDASIM_DELAY", "30")]]);
}

pub fn averages_of_several_hosts_have_no_race() {
    scenario("hosts-races", &[&[TWO, ("CUDASIM_RACE", "1")]]);
}

pub fn hosts_that_fail_change_nothing_on_devices() {
    scenario("hosts-failures", &[&[TWO, ("CUDASIM_SEED", "1")]]);
    scenario("hosts-losses", &[&[TWO]]);
    scenario("hosts-unneeded", &[&[TWO]]);
}

pub fn coded_averages_have_the_bits_of_the_cpu() {
    scenario("coded", &[&[ONE, ("CUDASIM_SEED", "1")]]);
    scenario("coded-devices", &[&[TWO, ("CUDASIM_SEED", "1")]]);
    scenario("coded-failures", &[&[ONE]]);
}

pub fn coded_averages_have_no_race() {
    scenario("coded-races", &[&[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn telemetry_has_the_numbers_of_the_cpu() {
    scenario("telemetry", &[&[ONE, ("CUDASIM_SEED", "1")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("telemetry-devices", &[&[("CUDASIM_DEVICES", "2")]]);
}

pub fn averages_of_copies_have_the_bits_of_the_cpu() {
    scenario("overlap", &[&[ONE, ("CUDASIM_SEED", "1")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("overlap-devices", &[&[("CUDASIM_DEVICES", "2")]]);
}

pub fn coded_averages_of_copies_have_the_bits_of_the_cpu() {
    scenario(
        "coded-copies-devices",
        &[&[TWO, ("CUDASIM_SEED", "1")], &[TWO, ("CUDASIM_RACE", "1")]],
    );
}

pub fn averages_of_copies_are_ordered_with_a_stream() {
    scenario("overlap-streams", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn averages_have_no_race() {
    scenario("races", &[&[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn refusals_reach_every_rank() {
    scenario("refusals", &[&[ONE]]);
}

pub fn failures_are_typed_and_change_nothing() {
    scenario("failures", &[&[ONE]]);
}

pub fn local_sgd_runs_beside_a_trainer() {
    scenario("trainers", &[&[ONE, ("CUDASIM_DELAY", "30")]]);
}

pub fn averages_run_beside_kernels_and_each_other() {
    scenario("beside", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn averages_are_enqueued_on_streams() {
    scenario("streams", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
}

pub fn averages_are_enqueued_on_streams_of_any_kind() {
    scenario("any-stream", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("any-stream-devices", &[&[TWO, ("CUDASIM_DELAY", "30")], &[TWO]]);
}

pub fn steps_are_enqueued_and_their_outcome_is_asked_for_later() {
    scenario("steps", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_SEED", "3")]]);
}

const TWO: (&str, &str) = ("CUDASIM_DEVICES", "2");
const FOUR: (&str, &str) = ("CUDASIM_DEVICES", "4");

pub fn mailboxes_in_memory_of_the_host_make_no_difference() {
    scenario("host-links", &[&[ONE, ("CUDASIM_SEED", "5")], &[ONE, ("CUDASIM_DELAY", "30")]]);
    scenario("host-failures", &[&[ONE]]);
}

pub fn ranks_on_several_devices_have_the_bits_of_the_cpu() {
    scenario(
        "reach",
        &[&[FOUR, ("CUDASIM_SEED", "3")], &[FOUR, ("CUDASIM_SEED", "4"), ("CUDASIM_DELAY", "30")]],
    );
    scenario(
        "links",
        &[&[FOUR, ("CUDASIM_SEED", "3")], &[FOUR, ("CUDASIM_SEED", "4"), ("CUDASIM_DELAY", "30")]],
    );
    scenario("pairs", &[&[FOUR, ("CUDASIM_P2P", "0-2,1-3")]]);
}

pub fn devices_that_do_not_reach_each_other_go_through_the_host() {
    scenario("no-p2p", &[&[TWO, ("CUDASIM_P2P", "none"), ("CUDASIM_DELAY", "30")]]);
    scenario("broken-p2p", &[&[TWO, ("CUDASIM_P2P", "broken")]]);
    scenario("p2p-off", &[&[TWO, ("CUDASIM_P2P", "all"), ("PARAM_AVERAGER_P2P", "0")]]);
}

/// A process of its own tries peer access first, where that may end a process.
pub fn a_probe_that_kills_its_process_does_not_kill_the_trainer() {
    const CHILD: &str = "PA_PROBE_CHILD";
    scenario("child-crashes", &[&[TWO, ("CUDASIM_P2P", "all"), (CHILD, "crash")]]);
    scenario("child-works", &[&[TWO, ("CUDASIM_P2P", "all"), (CHILD, "1")]]);
    scenario("broken-p2p", &[&[TWO, ("CUDASIM_P2P", "broken"), (CHILD, "1")]]);
}

pub fn links_have_no_race() {
    scenario("link-races", &[&[TWO, ("CUDASIM_RACE", "1")]]);
}

pub fn a_device_that_fails_while_it_writes_is_not_waited_for() {
    match simulator::driver() {
        Driver::Own => simulator::not_here("lost-device: about a simulated driver"),
        Driver::Simulated(_) => {
            // A device that has failed is lost to its process.
            for name in ["lost-device", "lost-device-unseen", "lost-device-shared"] {
                scenario(name, &[&[TWO]]);
            }
        }
    }
}

pub fn failures_between_devices_are_typed_and_change_nothing() {
    scenario("link-failures", &[&[TWO]]);
}

pub fn averages_in_graphs_are_replayed() {
    const THREE: Setting<'_> = ("CUDASIM_DEVICES", "3");
    scenario("graphs", &[&[ONE]]);
    scenario(
        "graphs-devices",
        &[&[THREE, ("CUDASIM_DELAY", "30")], &[THREE, ("CUDASIM_RACE", "1")]],
    );
}

#[cfg(feature = "cuda")]
pub fn slices_of_cudarc_are_averaged_in_order() {
    scenario("interop", &[&[ONE, ("CUDASIM_DELAY", "30")], &[ONE, ("CUDASIM_RACE", "1")]]);
    scenario("interop-devices", &[&[("CUDASIM_DEVICES", "2")]]);
}

pub fn coded_averages_in_graphs_are_replayed() {
    scenario(
        "coded-graphs-devices",
        &[&[TWO, ("CUDASIM_DELAY", "30")], &[TWO, ("CUDASIM_RACE", "1")]],
    );
}

pub fn graph_refusals_are_errors_of_the_capture() {
    scenario("graph-refusals", &[&[TWO]]);
}

pub fn captures_elsewhere_refuse_only_what_they_must() {
    strict("graphs-devices", &[("CUDASIM_DEVICES", "3")]);
    strict("strict-captures", &[TWO]);
    #[cfg(feature = "cuda")]
    strict("strict-slices", &[ONE]);
}

pub fn failing_device_is_reported_to_peers_and_waits_for_none() {
    strict("strict-failures", &[ONE]);
    #[cfg(feature = "cuda")]
    strict("strict-ends", &[ONE]);
}

pub fn a_device_with_too_many_peers_goes_through_the_host() {
    strict("strict-peers", &[FOUR, ("STRICT_PEERS", "1")]);
}

pub fn memory_is_freed_after_the_last_average() {
    scenario("memory", &[&[ONE, ("CUDASIM_MEM_MB", "1024")]]); // no other process uses its memory
}

pub fn a_device_that_is_full_says_so() {
    scenario("out-of-memory", &[&[ONE, ("CUDASIM_MEM_MB", "64")]]);
}

pub fn unfit_machines_say_why() {
    scenario("no-device", &[&[("CUDASIM_NO_DEVICE", "1")], &[("CUDA_VISIBLE_DEVICES", "")]]);
    scenario("old-driver", &[&[("CUDASIM_OLD_DRIVER", "11040")]]);
    no_driver();
}
