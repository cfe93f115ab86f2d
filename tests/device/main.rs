//! The CUDA backend through the public API: ranks on one device and on several, as threads and as
//! processes.
//!
//! In CI devices are simulated by `../shared/cudasim` (or the libcuda.so.1 in the folder that
//! `CUDASIM_LIB` names): the real PTX behind the real driver API, with a race detector, but no
//! ptxas, no caches, no weak memory, no time. On a GPU: tests/gpu/suite. Each scenario is a process
//! of its own, and so is each rank of a world of processes: this very program.

mod cuda;
#[cfg(target_os = "linux")]
mod cuda_processes;
#[cfg(target_os = "linux")]
mod unkind;

use std::process::ExitCode;

use test_support::{simulator, tests};

fn main() -> ExitCode {
    if let Ok(scenario) = std::env::var(simulator::SCENARIO) {
        simulator::run_child(|| cuda::run(&scenario));
        return ExitCode::SUCCESS;
    }
    #[cfg(target_os = "linux")]
    if let Ok(role) = std::env::var(test_support::process::ROLE) {
        test_support::process::exit_as(move || match role.as_str() {
            role @ ("devices" | "abort" | "threads" | "captures" | "coded-copies"
            | "shared-bits" | "shared-dies") => cuda_processes::rank(role),
            "unkind" => unkind::process(),
            role => test_support::rank::run(role),
        });
    }
    #[cfg(target_os = "linux")]
    if let Some(file) = std::env::var_os(unkind::matrix::FILE) {
        unkind::matrix::write(file.as_ref());
        return ExitCode::SUCCESS;
    }

    let driver = simulator::missing();
    let strict_driver = cuda::no_strict_driver();
    let mut tests = tests![
        cuda::averages_have_the_bits_of_the_cpu: driver,
        cuda::outer_steps_have_the_bits_of_the_cpu: driver,
        cuda::stages_have_the_bits_of_the_cpu: driver,
        cuda::stages_refuse_averages_and_nothing_changes: driver,
        cuda::stages_are_enqueued_on_streams: driver,
        cuda::averages_of_several_hosts_have_the_bits_of_the_cpu: driver,
        cuda::averages_of_several_hosts_have_no_race: driver,
        cuda::hosts_that_fail_change_nothing_on_devices: driver,
        cuda::coded_averages_have_the_bits_of_the_cpu: driver,
        cuda::coded_averages_have_no_race: driver,
        cuda::telemetry_has_the_numbers_of_the_cpu: driver,
        cuda::outer_calls_that_differ_are_an_error_on_every_rank: driver,
        cuda::outer_states_are_saved_and_loaded: driver,
        cuda::averages_of_copies_have_the_bits_of_the_cpu: driver,
        cuda::coded_averages_of_copies_have_the_bits_of_the_cpu: driver,
        cuda::averages_of_copies_are_ordered_with_a_stream: driver,
        cuda::averages_have_no_race: driver,
        cuda::refusals_reach_every_rank: driver,
        cuda::failures_are_typed_and_change_nothing: driver,
        cuda::local_sgd_runs_beside_a_trainer: driver,
        cuda::averages_run_beside_kernels_and_each_other: driver,
        cuda::averages_are_enqueued_on_streams: driver,
        cuda::averages_are_enqueued_on_streams_of_any_kind: driver,
        cuda::steps_are_enqueued_and_their_outcome_is_asked_for_later: driver,
        cuda::mailboxes_in_memory_of_the_host_make_no_difference: driver,
        cuda::ranks_on_several_devices_have_the_bits_of_the_cpu: driver,
        cuda::devices_that_do_not_reach_each_other_go_through_the_host: driver,
        cuda::a_probe_that_kills_its_process_does_not_kill_the_trainer: driver,
        cuda::links_have_no_race: driver,
        cuda::failures_between_devices_are_typed_and_change_nothing: driver,
        cuda::a_device_that_fails_while_it_writes_is_not_waited_for: driver,
        cuda::averages_in_graphs_are_replayed: driver,
        cuda::coded_averages_in_graphs_are_replayed: driver,
        cuda::graph_refusals_are_errors_of_the_capture: driver,
        cuda::captures_elsewhere_refuse_only_what_they_must: strict_driver,
        cuda::failing_device_is_reported_to_peers_and_waits_for_none: strict_driver,
        cuda::a_device_with_too_many_peers_goes_through_the_host: strict_driver,
        cuda::memory_is_freed_after_the_last_average: driver,
        cuda::a_device_that_is_full_says_so: driver,
        cuda::unfit_machines_say_why: driver,
    ];
    #[cfg(feature = "cuda")]
    tests.extend(tests![cuda::slices_of_cudarc_are_averaged_in_order: driver]);
    #[cfg(target_os = "linux")]
    tests.extend(tests![
        cuda_processes::processes_share_a_device: driver,
        cuda_processes::processes_on_two_devices_reach_each_other_or_go_through_the_host: driver,
        cuda_processes::a_link_that_is_not_there_is_refused_by_all_processes: driver,
        cuda_processes::blocks_of_processes_that_share_a_device_must_fit_on_it_together: driver,
        cuda_processes::cpus_and_devices_are_not_in_one_world: driver,
        cuda_processes::missing_device_is_reported_to_all_processes: driver,
        cuda_processes::two_ranks_of_one_process_go_through_the_host: driver,
        cuda_processes::an_abort_ends_the_kernels_of_all_processes: driver,
        cuda_processes::kill_at_a_step_leaves_survivors_running: driver,
        cuda_processes::kill_at_any_time_leaves_survivors_running: driver,
        cuda_processes::kill_beside_a_stage_leaves_survivors_running: driver,
        cuda_processes::kill_of_a_joiner_leaves_members_running: driver,
        cuda_processes::a_process_joins_processes_on_devices: driver,
        cuda_processes::stopped_process_disturbs_no_peer_when_it_resumes: driver,
        cuda_processes::coded::coded_averages_have_the_bits_of_the_cpu: driver,
        cuda_processes::outer::kills_carry_the_velocity_over: driver,
        cuda_processes::outer::a_joiner_takes_over_its_shard_of_the_velocity: driver,
        cuda_processes::outer::a_process_joins_ranks_that_share_their_states: driver,
        cuda_processes::shared_state::a_shared_state_has_the_bits_of_one_on_the_device: driver,
        cuda_processes::shared_state::nothing_of_a_lost_state_is_lost: driver,
        cuda_processes::shared_state::a_step_that_was_made_is_not_lost_with_its_average: driver,
        cuda_processes::shared_state::a_kernel_that_was_cut_off_leaves_its_state: driver,
        cuda_processes::shared_state::kills_lose_nothing_of_shared_states: driver,
        cuda_processes::outer::a_capture_before_the_first_average_since_a_recovery_is_refused:
            driver,
    ]);
    #[cfg(target_os = "linux")]
    tests.extend(unkind::tests(&driver));
    test_support::main(tests)
}
