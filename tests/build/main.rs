//! What is built, and from what: the build script, the bindings of `kernels/abi.h`, and the suite
//! that goes to machines with a GPU.

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
        build_script::without_nvcc_it_builds_with_one_warning_that_says_what_to_set,
        build_script::the_script_runs_again_for_what_it_has_read,
        build_script::kernels_are_compiled_once_for_all_profiles,
        build_script::what_is_named_and_missing_or_required_is_fatal,
        build_script::an_nvcc_that_fails_is_fatal_and_all_it_said_is_shown,
        build_script::architectures_come_from_the_variable_or_from_what_this_nvcc_knows,
        build_script::nvcc_is_found_in_a_toolkit_and_in_a_virtual_environment,
        gpu_suite::every_end_of_a_test_is_told_apart: tools,
        gpu_suite::what_cannot_begin_says_why: tools,
    ];
    #[cfg(target_arch = "x86_64")]
    tests.extend(tests![build_script::instruction_sets_are_compiled_at_the_same_time]);
    test_support::main(tests)
}
