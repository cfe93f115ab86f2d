//! `NcclHosts`, on simulated devices and with a stand-in for NCCL, `standin.cpp`: it shows that the
//! link calls NCCL as it should, and what it makes of the answers, not what NCCL does. Hosts are
//! groups of processes, this very program, with the variables that torchrun sets.

mod devices;
mod hosts;
mod link;
mod roles;

use std::process::ExitCode;

use test_support::{process, simulator, tests, tool, Skip};

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(process::ROLE) {
        process::exit_as(move || roles::run(&role));
    }
    let own = || Some("about a simulated machine: unset PARAM_AVERAGER_GPU".to_owned());
    let simulated: Skip =
        simulator::missing().or_else(|| simulator::on_own_driver().then(own).flatten());
    let compiler = tool(&test_support::compiler(), &["--version"]);
    let namespaces = test_support::network::Network::missing();
    test_support::main_with_threads(
        2,
        tests![
            link::bytes_arrive_on_all_hosts: simulated & compiler,
            link::ids_can_be_passed_by_the_program: simulated & compiler,
            link::a_killed_host_is_an_error_of_the_others: simulated & compiler,
            link::a_host_that_never_comes_is_an_error_at_the_limit: simulated & compiler,
            link::a_late_host_is_an_error_at_the_limit: simulated & compiler,
            link::an_aborted_link_is_an_error_of_the_others: simulated & compiler,
            link::faults_of_nccl_are_errors: simulated & compiler,
            link::hosts_that_differ_are_refused: simulated & compiler,
            devices::ranks_of_two_hosts_average_as_one_world: simulated & compiler,
            devices::a_killed_host_changes_no_tensor: simulated & compiler,
            devices::the_example_averages_in_two_namespaces: simulated & compiler & namespaces,
        ],
    )
}
