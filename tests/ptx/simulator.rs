//! Finds or builds `../shared/cudasim`, and runs scenarios in child processes: a library must be on LD_LIBRARY_PATH
//! when a process starts, and the simulator's settings are environment variables.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The scenario that a child is to run.
pub const SCENARIO: &str = "PA_PTX_SCENARIO";
/// A fatbin to use instead of the crate's.
#[allow(dead_code)] // of ptx.rs
pub const FATBIN: &str = "PA_PTX_FATBIN";

/// The folder of libcuda.so.1, or why there is none.
fn folder() -> Result<PathBuf, String> {
    static FOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    FOLDER.get_or_init(find_or_build).clone()
}

/// It, or a SKIPPED line of this test's.
pub fn folder_for(test: &str) -> Option<PathBuf> {
    match param_averager::__private::fatbin().map_err(str::to_owned).and_then(|_| folder()) {
        Ok(folder) => Some(folder),
        Err(reason) => {
            crate::common::skipped(test, &reason);
            None
        }
    }
}

fn find_or_build() -> Result<PathBuf, String> {
    if let Some(folder) = std::env::var_os("CUDASIM_LIB").map(PathBuf::from) {
        let there = folder.join("libcuda.so.1").is_file();
        return there
            .then(|| folder.clone())
            .ok_or(format!("CUDASIM_LIB={} holds no libcuda.so.1", folder.display()));
    }
    let source = Path::new("../shared/cudasim");
    if !source.is_dir() {
        return Err("no ../shared/cudasim, and CUDASIM_LIB is not set".into());
    }
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cudasim");
    let make = Command::new("make")
        .args(["-j2", "-C"])
        .arg(source)
        .arg(format!("BUILD={}", build.display()))
        .output();
    match make {
        Err(error) => Err(format!("make did not run: {error}")),
        Ok(output) if !output.status.success() => {
            Err(format!("cudasim did not build: {}", String::from_utf8_lossy(&output.stderr)))
        }
        Ok(_) => Ok(build),
    }
}

/// What a child said, and how it ended.
pub struct Ended {
    pub code: Option<i32>,
    pub said: String,
}

/// Runs a scenario in a child. `folder`: of libcuda.so.1; none: a process without one.
pub fn child(scenario: &str, folder: Option<&Path>, settings: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child_process", "--exact", "--nocapture", "--test-threads=1"]);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CUDASIM_")) {
        command.env_remove(name);
    }
    command.env_remove("CUDA_VISIBLE_DEVICES").env_remove("LD_LIBRARY_PATH").env(SCENARIO, scenario);
    if let Some(folder) = folder {
        command.env("LD_LIBRARY_PATH", folder);
    }
    // Kernels that make no progress end in an error, not in a test that hangs.
    command.env("CUDASIM_KILL_S", "60").envs(settings.iter().copied());
    let output = command.output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    Ended { code: output.status.code(), said }
}
