//! The build: the build script, the bindings of `kernels/abi.h`, and the suite that goes to
//! machines with a GPU.

mod abi;
mod build_script;
mod gpu_suite;

use std::process::ExitCode;

use test_support::tests;

fn main() -> ExitCode {
    let libclang = abi::no_libclang();
    let tools = gpu_suite::tools();
    let mut tests = tests![
        abi::abi_rs_is_what_bindgen_makes_of_abi_h: libclang,
        build_script::missing_nvcc_is_one_warning_that_says_what_to_set,
        build_script::a_build_that_is_meant_to_be_without_nvcc_is_silent,
        build_script::a_build_without_the_feature_for_cuda_looks_for_no_nvcc,
        build_script::the_script_runs_again_for_what_it_has_read,
        build_script::kernels_are_compiled_once_for_all_profiles,
        build_script::missing_nvcc_is_fatal_where_named_or_required,
        build_script::failing_nvcc_is_fatal_and_its_output_is_shown,
        build_script::architectures_come_from_the_variable_or_from_what_this_nvcc_knows,
        build_script::nvcc_is_found_in_a_toolkit_and_in_a_virtual_environment,
        gpu_suite::outcomes_are_distinguished: tools,
        gpu_suite::some_tests_run: tools,
        gpu_suite::a_slot_survives_a_part_that_hangs: tools,
        gpu_suite::refusals_name_the_reason: tools,
        gpu_suite::bundles_are_of_default_members: tools,
    ];
    #[cfg(target_arch = "x86_64")]
    tests.extend(tests![build_script::instruction_sets_are_compiled_at_the_same_time]);
    test_support::main(tests)
}
