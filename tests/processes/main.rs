//! Ranks that are processes: they meet, average, and go on when a rank is killed or stopped. Every
//! rank is this very program, run with `PA_TEST_ROLE`.

#[cfg(target_os = "linux")]
mod admissions;
#[cfg(target_os = "linux")]
mod coded;
mod deaths;
#[cfg(target_os = "linux")]
mod forks;
#[cfg(target_os = "linux")]
mod held;
#[cfg(target_os = "linux")]
mod hosts;
#[cfg(target_os = "linux")]
mod jobs;
#[cfg(target_os = "linux")]
mod joins;
#[cfg(target_os = "linux")]
mod launchers;
#[cfg(target_os = "linux")]
mod limited;
#[cfg(target_os = "linux")]
mod limits;
#[cfg(target_os = "linux")]
mod meeting;
#[cfg(target_os = "linux")]
mod namespaces;
#[cfg(target_os = "linux")]
mod notices;
#[cfg(target_os = "linux")]
mod outer;
#[cfg(target_os = "linux")]
mod outer_joins;
#[cfg(target_os = "linux")]
mod partly;
#[cfg(target_os = "linux")]
mod resume;
#[cfg(target_os = "linux")]
mod schedules;
#[cfg(target_os = "linux")]
mod several_averagers;
#[cfg(target_os = "linux")]
mod shared_state;
#[cfg(target_os = "linux")]
mod stage;
#[cfg(target_os = "linux")]
mod stops;
#[cfg(target_os = "linux")]
mod trainers;
#[cfg(target_os = "linux")]
mod unknown;
mod waits;

#[cfg(not(target_os = "linux"))]
fn main() {}

#[cfg(target_os = "linux")]
fn main() -> std::process::ExitCode {
    use test_support::{process, rank, stress, tests, tool};

    if let Ok(role) = std::env::var(process::ROLE) {
        process::exit_as(move || match role.as_str() {
            "limited" => limited::limited(),
            "leaves_hosts" => hosts::leaves_hosts(),
            "stage" => stage::stage(),
            "left_alone" => partly::left_alone(),
            "shared_state" => shared_state::shared_state(),
            "stage_sgd" => stage::stage_sgd(),
            "keeps_a_share" => outer_joins::keeps_a_share(),
            "has_large_state" => outer_joins::has_large_state(),
            "limited_threads" => limited::limited_threads(),
            "copies" => admissions::copies(),
            "admits" => admissions::admits(),
            "joins_only" => admissions::joins_only(),
            "fails_late" => admissions::fails_late(),
            "adapts" => schedules::adapts(),
            "waits" => waits::waits(),
            "first_day" => trainers::first_day(),
            "done_beside_a_death" => trainers::done_beside_a_death(),
            "mean_on_one_core" => trainers::mean_on_one_core(),
            "saves" => resume::saves(),
            "starts_from_a_rank_that_dies" => trainers::starts_from_a_rank_that_dies(),
            "two_averagers_of_one_view" => trainers::two_averagers_of_one_view(),
            "last_barriers" => trainers::last_barriers(),
            "barrier_beside_a_death" => trainers::barrier_beside_a_death(),
            role => rank::run(role),
        });
    }

    let stress = stress();
    let (mpirun, torchrun) = (tool("mpirun", &["--version"]), meeting::torchrun());
    let another_user = launchers::another_user();
    let (containers, pid_namespaces) = (namespaces::containers(), namespaces::pid_namespaces());
    let network_namespaces = namespaces::network_namespaces();
    let unmapped_users = namespaces::unmapped_users();
    let other_containers = namespaces::containers_of_another_user();

    // Ranks mostly wait.
    test_support::main_with_threads(
        8,
        tests![
            admissions::admission_changes_no_other_model,
            admissions::late_failure_of_a_model_does_not_stop_an_admission,
            admissions::abort_during_an_admission_reports_both_halves,
            admissions::lost_joiner_does_not_hide_the_average,
            admissions::joiner_killed_at_any_time_leaves_whole_models,
            coded::kills_leave_equal_values_within_their_bound,
            coded::kills_in_averages_of_copies_leave_values_within_their_bound,
            coded::kill_at_any_step_of_a_coded_average,
            coded::kill_at_any_step_of_a_coded_average_of_a_copy,
            coded::a_joiner_counts_from_the_values_of_the_others,
            deaths::kill_at_any_step_of_3_ranks,
            deaths::kill_at_some_steps_of_4_and_8_ranks: stress,
            deaths::kill_at_any_step_of_2_ranks,
            deaths::longest_timeouts_work,
            deaths::kill_is_noticed_at_once,
            deaths::stopped_rank_is_late_and_excluded,
            deaths::kill_is_noticed_at_once_beside_a_stopped_rank,
            deaths::kills_at_any_time,
            hosts::ranks_recover_within_their_host,
            outer::kills_advance_the_velocity_of_all_ranks_or_of_none,
            outer::kills_while_averages_are_under_way_lose_no_step,
            outer::a_joiner_takes_over_its_shard_of_the_velocity,
            outer::a_process_joins_ranks_whose_averages_are_under_way,
            outer::kills_lose_nothing_of_shared_states,
            outer::a_process_joins_ranks_that_share_their_states,
            stage::vetoes_and_kills_at_any_time,
            stage::stages_are_told_of_a_process_that_joins,
            stage::stages_are_told_of_a_recovery,
            outer_joins::a_joiner_takes_over_a_large_state,
            outer_joins::ranks_that_keep_a_share_and_a_joiner_begin_from_one_model,
            deaths::stops_and_kills_at_any_time: stress,
            deaths::training_goes_on_without_a_rank_that_panics,
            deaths::killed_world_leaves_no_socket_and_no_file,
            forks::a_forked_child_holds_neither_the_name_nor_a_socket,
            jobs::one_job_meets_however_its_ranks_are_started,
            jobs::jobs_of_ended_shells_and_of_one_shell_never_mix,
            jobs::jobs_of_ended_shells_never_mix_where_a_process_of_their_session_adopts_them,
            jobs::shell_loops_meet_by_themselves,
            jobs::ranks_of_an_ended_shell_meet,
            jobs::jobs_with_one_name_never_mix,
            jobs::an_early_rank_of_another_job_takes_no_place,
            jobs::jobs_of_one_process_are_distinguished_by_their_arguments,
            held::a_second_job_of_one_port_is_refused_by_the_pid_that_holds_it,
            held::a_job_restarts_while_its_former_run_ends,
            jobs::duplicate_rank_fails_the_rendezvous_on_every_rank,
            held::a_name_is_held_for_the_life_of_a_world,
            held::a_job_that_was_killed_restarts_at_once,
            jobs::job_names_distinguish_jobs,
            joins::processes_join_one_after_the_other_and_at_once,
            joins::a_process_joins_a_world_that_rejects_and_one_that_is_aborted,
            joins::a_process_joins_a_world_with_two_averagers,
            joins::joiners_may_be_stopped_at_any_time,
            joins::joins_and_kills_at_any_time,
            joins::a_process_joins_when_a_member_that_was_stopped_goes_on,
            joins::refusal_names_the_reason_and_harms_no_member,
            joins::training_goes_on_with_a_process_that_joins,
            joins::failed_attempts_by_the_thousand_use_up_no_ids: stress,
            joins::joiners_learn_the_world_id,
            launchers::slurm_shell_is_no_rank,
            launchers::environment_errors_are_reported_at_once,
            launchers::one_rank_alone_needs_no_port,
            launchers::agents_of_torchrun_on_one_host_meet,
            launchers::ranks_of_mpich_meet_through_wrappers,
            launchers::waiting_rank_says_for_what_and_what_to_set,
            launchers::names_have_a_maximum_length,
            launchers::rank_0_without_threads_says_so: another_user,
            limits::limits_while_starting_are_named_on_all_ranks,
            limits::limits_while_building_are_named_on_all_ranks,
            limits::limit_met_on_a_peers_memory_names_the_rank_that_met_it: stress,
            limits::limits_while_averaging_are_not_met: stress,
            limits::limits_while_recovering_are_named_on_all_ranks: stress,
            limits::limits_while_joining_harm_no_member: stress,
            limits::limits_of_members_are_reported_to_joiners: stress,
            limits::limits_of_ranks_that_are_threads_are_typed_errors,
            limits::any_amount_of_memory_is_enough_or_an_error: stress,
            meeting::worlds_of_2_3_4_and_8_processes_average,
            meeting::the_environment_of_torchrun_is_enough,
            meeting::open_mpi_starts_ranks: mpirun,
            meeting::torchrun_starts_ranks: torchrun,
            meeting::ranks_that_disagree_are_named_on_every_rank,
            meeting::a_rank_that_refuses_by_itself_is_named_on_every_rank,
            meeting::ranks_that_do_not_come_are_named,
            meeting::a_rank_may_have_too_few_file_descriptors,
            meeting::foreign_connections_are_not_waited_for,
            meeting::timeouts_of_any_length_work,
            namespaces::ranks_in_containers_meet_die_and_join: containers,
            namespaces::ranks_in_pid_namespaces_meet_die_and_join: pid_namespaces,
            namespaces::a_name_is_held_across_namespaces: containers,
            namespaces::ranks_in_two_network_namespaces_are_an_error: network_namespaces,
            namespaces::users_that_are_not_mapped_are_refused: unmapped_users,
            namespaces::a_user_in_a_container_meets_itself_outside: other_containers,
            notices::a_rank_that_waits_to_meet_says_so,
            notices::a_rank_that_waits_to_build_says_so,
            notices::a_rank_that_waits_to_recover_says_so,
            partly::a_rank_that_is_left_alone_by_half_an_average_says_so,
            resume::a_world_killed_after_a_save_loads_it_and_ends_as_one_that_ran_through,
            schedules::ranks_go_on_with_one_h_after_a_death_and_a_join,
            waits::every_rank_tells_how_long_all_have_waited,
            shared_state::nothing_of_a_lost_state_is_lost,
            shared_state::a_shared_state_takes_no_more_memory,
            shared_state::a_large_state_is_carried_over,
            shared_state::ranks_that_keep_a_share_lose_nothing,
            shared_state::a_state_saved_after_a_recovery_can_be_loaded,
            shared_state::a_step_that_was_made_is_not_lost_with_its_average,
            shared_state::a_step_that_was_made_in_part_leaves_whole_numbers,
            shared_state::the_state_of_a_rank_and_of_the_next_one_can_be_lost,
            shared_state::states_are_passed_on_until_a_step_is_made,
            shared_state::a_state_that_may_not_be_loaded_is_lost,
            several_averagers::averagers_are_recovered_in_any_order,
            several_averagers::two_averagers_of_a_world_recover,
            several_averagers::local_sgds_recovered_in_different_orders_fail_at_once,
            several_averagers::dropped_averager_is_named,
            stops::rank_stopped_before_the_rendezvous,
            stops::rank_stopped_while_it_waits_for_the_others,
            stops::rank_stopped_before_it_builds,
            stops::rank_stopped_while_it_recovers,
            stops::a_rank_that_dies_while_another_is_late_to_build_is_lost_at_once,
            stops::abort_ends_the_wait_of_building_ranks,
            trainers::every_process_begins_with_one_model_and_a_joiner_with_the_one_that_is_trained,
            trainers::a_rank_that_is_done_survives_the_death_of_a_peer,
            trainers::reproducible_averages_have_the_same_bits_on_threads_and_processes,
            trainers::a_rank_that_all_began_from_may_die,
            trainers::averagers_that_were_built_again_exchange_on_their_own,
            trainers::a_rank_that_leaves_after_a_barrier_is_not_lost,
            trainers::a_barrier_ends_when_a_rank_dies_and_the_others_recover,
            unknown::ranks_meet_whatever_unknown_processes_do,
            unknown::bytes_for_the_fuzzer_do_no_harm,
        ],
    )
}
