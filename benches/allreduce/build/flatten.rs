//! `flatten.cu` by the nvcc of param-averager's build script.

use std::env;
use std::path::Path;
use std::process::Command;

pub const SOURCE: &str = "src/cuda/flatten.cu";

/// Compiles it to `fatbin`, or says why not.
pub fn compile(fatbin: &Path) -> Result<(), String> {
    // The program and its arguments up to the output, as param-averager's build script has them.
    let line = env::var("DEP_PARAM_AVERAGER_KERNELS_NVCC").unwrap_or_default();
    let mut words = line.split('\u{1f}').filter(|word| !word.is_empty());
    let nvcc = words.next().ok_or("built without nvcc: see Building in README.md")?;
    println!("cargo::rustc-env=ALLREDUCE_BENCH_NVCC={nvcc}");
    let output = Command::new(nvcc).args(words).arg("-o").arg(fatbin).arg(SOURCE).output();
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
