//! Compiles what is not Rust.
//!
//! * `limit.cpp` once for each instruction set, as param-averager's kernels are.
//! * `flatten.cu` with the nvcc and for the architectures that param-averager's build script chose,
//!   if it found any. Never fails the build: where there is no kernel, `flatten.rs` says why, and
//!   so do the rows that need it.

#[path = "../../build/instruction_sets.rs"]
mod instruction_sets;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const KERNELS: &str = "../../kernels";
const LIMIT: &str = "src/limit.cpp";
const FLATTEN: &str = "src/cuda/flatten.cu";

fn main() {
    for path in ["build.rs", KERNELS, LIMIT, FLATTEN] {
        println!("cargo::rerun-if-changed={path}");
    }
    for &set in instruction_sets::sets() {
        let name = format!("allreduce_bench_{}", set.0);
        instruction_sets::compiler_for(set).include(KERNELS).file(LIMIT).compile(&name);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let fatbin = out.join("flatten.fatbin");
    let image = match compile(&fatbin) {
        Ok(()) => format!("Ok(include_bytes!({:?}))", fatbin.display().to_string()),
        Err(reason) => format!("Err({reason:?})"),
    };
    let source = format!("static FLATTEN: Result<&[u8], &str> = {image};\n");
    fs::write(out.join("flatten.rs"), source).expect("can write to OUT_DIR");
}

/// For a test, too.
pub fn compile(fatbin: &Path) -> Result<(), String> {
    // The program and its arguments up to the output, as param-averager's build script has them.
    let line = env::var("DEP_PARAM_AVERAGER_KERNELS_NVCC").unwrap_or_default();
    let mut words = line.split('\u{1f}').filter(|word| !word.is_empty());
    let nvcc = words.next().ok_or("built without nvcc: see Building in README.md")?;
    println!("cargo::rustc-env=ALLREDUCE_BENCH_NVCC={nvcc}");
    let output = Command::new(nvcc).args(words).arg("-o").arg(fatbin).arg(FLATTEN).output();
    let output = output.map_err(|error| format!("built without: {nvcc} did not run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    for line in said.lines() {
        println!("cargo::warning={line}");
    }
    Err(format!("built without: nvcc failed on flatten.cu: {}", said.lines().next().unwrap_or("")))
}
