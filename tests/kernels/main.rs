//! The kernels by themselves: the protocol under sanitizers, mutants, models explored in every
//! interleaving, and the output of nvcc. `cargo test --test kernels -- sass` runs a part.

mod model;
mod protocol;
mod ptx;
mod sass;

use std::process::ExitCode;

use test_support::{simulator, tests};

fn main() -> ExitCode {
    if let Ok(scenario) = std::env::var(simulator::SCENARIO) {
        ptx::run(&scenario);
        return ExitCode::SUCCESS;
    }
    let (cpp, spin, sass_tools) = (protocol::tools(), model::tools(), sass::tools());
    let (driver, nvcc) = (simulator::missing(), ptx::nvcc());
    test_support::main(tests![
        protocol::every_scenario_is_clean_in_every_build: cpp,
        protocol::every_mutant_is_caught: cpp,
        protocol::mutants_compile: cpp,
        protocol::mutants_fit_the_kernels,
        protocol::mutants_that_do_not_fit_are_named,
        protocol::mutants_are_woven_as_expressions_and_statements,
        model::every_interleaving_is_good: spin,
        model::every_planted_fault_is_found: spin,
        sass::kernels_are_compiled_as_they_are_meant: sass_tools,
        sass::ptx_is_ordered_and_coherent: sass_tools,
        sass::the_checks_find_what_they_look_for: sass_tools,
        ptx::one_device_gives_the_bits_of_the_cpu: driver,
        ptx::several_devices_give_the_bits_of_the_cpu: driver,
        ptx::failures_are_typed_and_change_nothing: driver,
        ptx::averages_have_no_race: driver,
        ptx::planted_faults_are_reported: driver & nvcc,
        ptx::the_probe_finds_what_is_wrong_or_late: driver,
        ptx::faults_planted_in_the_probe_are_reported: driver & nvcc,
        ptx::missing_device_or_driver_is_named: driver,
    ])
}
