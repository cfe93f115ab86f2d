//! The GPU kernels' PTX, run through the CUDA driver API on a simulated device:
//! `../shared/cudasim`, or the libcuda.so.1 in the folder that `CUDASIM_LIB` names; by
//! tests/gpu/suite, on a GPU. Every result must have the bits that the CPU kernels give. What a
//! simulation can't see: ptxas, caches, weak memory, time.

mod common;
#[path = "protocol/mutants.rs"]
mod mutants;
mod ptx {
    pub mod case;
    pub mod machines;
    pub mod scenarios;
    pub mod simulator;
}

use ptx::simulator::{
    child, driver_for, no_driver, on_own_driver, scenario, Setting, FATBIN, SCENARIO,
};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Not a test by itself: what the others start as a process of its own.
#[test]
fn child_process() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let fatbin = match std::env::var_os(FATBIN) {
        Some(file) => std::fs::read(file).unwrap(),
        None => param_averager::__testing::fatbin().unwrap_or_default().to_vec(),
    };
    ptx::scenarios::run(&scenario, &fatbin);
}

#[test]
fn ptx_gives_the_bits_of_the_cpu_on_one_device() {
    let test = "ptx_gives_the_bits_of_the_cpu_on_one_device";
    scenario(test, "streams", &[&[("CUDASIM_DEVICES", "1"), ("CUDASIM_SEED", "1")]]);
}

#[test]
fn ptx_gives_the_bits_of_the_cpu_on_several_devices() {
    let test = "ptx_gives_the_bits_of_the_cpu_on_several_devices";
    scenario(test, "devices", &[&[("CUDASIM_DEVICES", "4"), ("CUDASIM_DELAY", "20")]]);
}

#[test]
fn ptx_failures_are_typed_and_change_nothing() {
    scenario(
        "ptx_failures_are_typed_and_change_nothing",
        "failures",
        &[&[("CUDASIM_DEVICES", "1")]],
    );
}

const RACE: [Setting<'_>; 2] = [("CUDASIM_RACE", "1"), ("CUDASIM_DEVICES", "3")];
const RACE_EXIT: Option<i32> = Some(66);

#[test]
fn ptx_has_no_race() {
    scenario("ptx_has_no_race", "race", &[&RACE]);
}

/// A fatbin with the ring alone, without one of its synchronisations. 0: with all of them.
fn mutant(nvcc: &str, number: u32) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ptx-mutant{number}"));
    let (source, fatbin) = (folder.join("ring.cu"), folder.join("ring.fatbin"));
    let mut kernels = mutants::kernels();
    if let Some(mutant) = mutants::table().iter().find(|mutant| mutant.number == number) {
        kernels = mutant.apply(&kernels);
    }
    let text = "#include \"ring.h\"\n\
        extern \"C\" __global__ void pa_ring(const __grid_constant__ PaArgs args) {\n\
        PA_ISA::run_ring<PA_RING>(PA_ISA::Exec{}, args);\n}\n";
    kernels.insert("ring.cu".into(), text.into());
    mutants::write(&kernels, &folder);
    let output = Command::new(nvcc)
        .args([
            "-fatbin",
            "-std=c++17",
            "-O3",
            "-fmad=false",
            "-gencode",
            "arch=compute_90,code=compute_90",
        ])
        .arg("-o")
        .args([&fatbin, &source])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    fatbin
}

#[test]
fn planted_faults_are_reported() {
    let test = "planted_faults_are_reported";
    if on_own_driver() {
        return common::skipped(test, "about a simulated machine");
    }
    let Some(driver) = driver_for(test) else { return };
    let nvcc = option_env!("PARAM_AVERAGER_NVCC").unwrap_or_default();
    if !Path::new(nvcc).is_file() {
        return common::skipped(test, "the nvcc that built the kernels is gone");
    }
    const PANIC: Option<i32> = Some(101);
    // 0: nothing is planted. 1: `filled` is published relaxed. 3: no block barrier before it is
    // published. 17: a last pack is taken for a full one, and what lies behind a tensor is averaged
    // too.
    for (number, settings, expected) in [
        (0, &RACE[..], Some(0)),
        (1, &RACE[..], RACE_EXIT),
        (3, &RACE[..], RACE_EXIT),
        (17, &[][..], PANIC),
    ] {
        let fatbin = mutant(nvcc, number);
        let ended = child(
            "mutant",
            Some(&driver),
            &[settings, &[(FATBIN, fatbin.to_str().unwrap())]].concat(),
        );
        assert_eq!(ended.code, expected, "mutant {number}: {}", ended.said);
    }
}

#[test]
fn a_machine_without_a_device_or_a_driver_says_so() {
    let test = "a_machine_without_a_device_or_a_driver_says_so";
    scenario(test, "no-device", &[&[("CUDASIM_NO_DEVICE", "1")], &[("CUDA_VISIBLE_DEVICES", "")]]);
    if driver_for(test).is_some() {
        no_driver(test);
    }
}
