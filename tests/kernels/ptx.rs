//! The GPU kernels' PTX, run by the CUDA driver API on a simulated device: `../shared/cudasim`, or
//! the libcuda.so.1 in the folder that `CUDASIM_LIB` names; by tests/gpu/suite, on a GPU. Every
//! result must have the bits that the CPU kernels give. What a simulation can't see: ptxas, caches,
//! weak memory, time.

mod case;
mod machines;
mod probe;
mod scenarios;

use std::path::{Path, PathBuf};
use std::process::Command;

use test_support::simulator::{self, child, driver, no_driver, on_own_driver, scenario, Setting};
use test_support::Skip;

use crate::protocol::mutants;

/// A fatbin to use instead of the crate's.
const FATBIN: &str = "PA_PTX_FATBIN";

/// Runs a scenario in a child process.
pub fn run(scenario: &str) {
    let fatbin = match std::env::var_os(FATBIN) {
        Some(file) => std::fs::read(file).unwrap(),
        None => param_averager::__testing::fatbin().unwrap_or_default().to_vec(),
    };
    scenarios::run(scenario, &fatbin);
}

/// The nvcc that built the kernels.
const NVCC: Option<&str> = option_env!("PARAM_AVERAGER_NVCC");

/// Skips where that nvcc no longer exists.
pub fn nvcc() -> Skip {
    let there = on_own_driver() || NVCC.is_some_and(|nvcc| Path::new(nvcc).is_file());
    (!there).then(|| "the nvcc that built the kernels is gone: build them again".to_owned())
}

pub fn one_device_gives_the_bits_of_the_cpu() {
    scenario("streams", &[&[("CUDASIM_DEVICES", "1"), ("CUDASIM_SEED", "1")]]);
}

pub fn several_devices_give_the_bits_of_the_cpu() {
    scenario("devices", &[&[("CUDASIM_DEVICES", "4"), ("CUDASIM_DELAY", "20")]]);
}

pub fn failures_are_typed_and_change_nothing() {
    scenario("failures", &[&[("CUDASIM_DEVICES", "1")]]);
}

const RACE: [Setting<'_>; 2] = [("CUDASIM_RACE", "1"), ("CUDASIM_DEVICES", "3")];
const RACE_EXIT: Option<i32> = Some(66);

pub fn averages_have_no_race() {
    scenario("race", &[&RACE]);
}

/// A fatbin with the ring alone, without one of its synchronisations. 0: with all of them.
fn mutant(nvcc: &str, number: u32) -> PathBuf {
    let mut kernels = mutants::kernels();
    if let Some(mutant) = mutants::table().iter().find(|mutant| mutant.number == number) {
        kernels = mutant.apply(&kernels);
    }
    let others = |line: &&str| line.starts_with("PA_KERNEL(") && !line.contains("run_ring)");
    let lines: Vec<&str> = kernels["average.cu"].lines().filter(|line| !others(line)).collect();
    let text = lines.join("\n");
    compile(nvcc, &format!("ptx-mutant{number}"), kernels, text)
}

/// A fatbin of these kernels and this text in the place of average.cu.
fn compile(nvcc: &str, name: &str, mut kernels: mutants::Sources, text: String) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let (source, fatbin) = (folder.join("ring.cu"), folder.join("ring.fatbin"));
    kernels.insert("ring.cu".into(), text);
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

pub fn planted_faults_are_reported() {
    if on_own_driver() {
        return simulator::not_here("planted faults: about a simulated machine");
    }
    let (driver, nvcc) = (driver(), NVCC.expect("an nvcc"));
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

/// Two devices, and the probe of the path between them.
pub fn the_probe_finds_what_is_wrong_or_late() {
    scenario("probe", &[&[("CUDASIM_DEVICES", "2")], &[("CUDASIM_DEVICES", "2"), RACE[0]]]);
}

/// Without the release of a flag, or the barriers around it, the probe would find links right that
/// are not, or wrong that are right.
pub fn faults_planted_in_the_probe_are_reported() {
    if on_own_driver() {
        return simulator::not_here("planted faults: about a simulated machine");
    }
    let (driver, nvcc) = (driver(), NVCC.expect("an nvcc"));
    const FILLED: &str = "if (ex.leader()) store_release(at<uint32_t>(to.filled)";
    const DRAINED: &str = "if (ex.leader()) store_release(at<uint32_t>(from.drained)";
    let relaxed = |line: &str| line.replace("release", "relaxed");
    for (index, (right, wrong)) in [
        (FILLED.to_owned(), relaxed(FILLED)),
        (DRAINED.to_owned(), relaxed(DRAINED)),
        (format!("ex.sync();\n    {FILLED}"), FILLED.to_owned()),
        (format!("ex.sync();\n    {DRAINED}"), DRAINED.to_owned()),
        ("load_acquire(word)".into(), "load_relaxed(word)".into()),
    ]
    .into_iter()
    .enumerate()
    {
        let mut kernels = mutants::kernels();
        let probe = kernels["probe.h"].clone();
        assert_eq!(probe.matches(&right).count(), 1, "{right}");
        kernels.insert("probe.h".into(), probe.replace(&right, &wrong));
        let text = kernels["average.cu"].lines().filter(|line| !line.starts_with("PA_KERNEL("));
        let text = text.collect::<Vec<_>>().join("\n");
        let fatbin = compile(nvcc, &format!("ptx-probe{index}"), kernels, text);
        let ended = child(
            "probe",
            Some(&driver),
            &[("CUDASIM_DEVICES", "2"), RACE[0], (FATBIN, fatbin.to_str().unwrap())],
        );
        assert_eq!(ended.code, RACE_EXIT, "{wrong}: {}", ended.said);
    }
}

pub fn missing_device_or_driver_is_named() {
    scenario("no-device", &[&[("CUDASIM_NO_DEVICE", "1")], &[("CUDA_VISIBLE_DEVICES", "")]]);
    no_driver();
}
