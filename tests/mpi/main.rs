//! Averages over several hosts by MPI: network namespaces of this machine, joined by a bridge, in
//! which mpirun, of Open MPI or MPICH, starts ranks that are this very program.

mod averages;
mod network;
mod roles;

use std::process::ExitCode;

use test_support::tests;

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(network::ROLE) {
        roles::run(&role);
    }
    let network = network::missing();
    let devices = network.clone().or_else(test_support::simulator::missing);
    // One at a time: each has the machine's cores, and the network's addresses.
    test_support::main_with_threads(
        1,
        tests![
            averages::two_hosts_average_as_one_world: network,
            averages::ranks_on_devices_average_as_one_world: devices,
            averages::three_hosts_average_over_slow_links: network,
            averages::a_cut_link_changes_no_tensor: network,
            averages::a_killed_rank_ends_the_job: network,
            averages::ranks_on_hosts_without_a_link_are_refused: network,
            averages::other_threads_than_mpis_are_refused: network,
            averages::the_example_trains: network,
        ],
    )
}
