//! Compiles `kernels/` twice: by the C++ compiler for the CPU backend, and by nvcc into one fatbin
//! for the GPU.
//!
//! CPU: `average_cpu.cpp` once per instruction set (x86-64: baseline, AVX2, AVX-512; elsewhere:
//! baseline), always optimised, into the archive `param_averager_kernels`. Which copy runs is
//! decided at run time. The compiler is the one the `cc` crate picks (`CXX`, `CXXFLAGS`, …).
//!
//! CUDA: `average.cu` into `$OUT_DIR/average.fatbin`, reachable through `$OUT_DIR/kernels.rs`.
//! Variables read:
//!
//! * `NVCC`: this nvcc, as a path or a name on `PATH`, and no other: if it is missing, the build
//!   fails. Empty: build without nvcc
//! * `CUDA_HOME`, `CUDA_PATH`: a toolkit with `bin/nvcc`. One without nvcc is passed over; a
//!   directory that does not exist is an error
//! * `PATH`: searched next; after it `/usr/local/cuda/bin/nvcc`
//! * `VIRTUAL_ENV`: last: `lib/python*/site-packages/nvidia/cu*/bin/nvcc`, where PyPI's toolkit
//!   puts it
//! * `CUDA_COMPUTE_CAP`: architectures, such as `90`, `8.0,9.0` or `sm_100`; default: those of
//!   80, 90, 100 and 120 that nvcc knows
//! * `NVCC_CCBIN`: the host compiler for nvcc; default: the one `cc` picks
//! * `NVCC_PREPEND_FLAGS`, `NVCC_APPEND_FLAGS`: read by nvcc itself
//! * `PARAM_AVERAGER_REQUIRE_NVCC`: `1`: fail instead of building without GPU kernels
//! * `DOCS_RS`: set: do not look for nvcc
//!
//! Without nvcc the crate builds, with one warning unless that is meant (`NVCC=`); an nvcc that was
//! found and fails, fails the build. The script runs again when a file in `kernels/` changes, or
//! one of these variables that it has read: where `NVCC` is a path, neither `PATH` nor
//! `VIRTUAL_ENV`. A toolkit that is installed later in one of those places changes neither: set
//! `NVCC`.
//!
//! Compiled kernels are kept in `target/param-averager-kernels`, under a hash of the sources, the
//! compiler and its flags: all profiles and features share it, and compile each kernel once.

#[path = "build/cpu.rs"]
mod cpu;
#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/instruction_sets.rs"]
mod instruction_sets;
#[path = "build/kept.rs"]
mod kept;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::exit;

use nvcc::Absent;

const HOW_TO_GET_NVCC: &str =
    "install the CUDA toolkit (or, in an active virtual environment, `pip install \
    cuda-toolkit[nvcc,cccl]`), set NVCC=/path/to/nvcc or CUDA_HOME, and build again";

fn main() {
    // Ranks that are processes of one host.
    println!("cargo::rustc-check-cfg=cfg(processes)");
    let linux = env::var_os("CARGO_CFG_TARGET_OS").is_some_and(|system| system == "linux");
    if linux && env::var_os("CARGO_FEATURE_PROCESSES").is_some() {
        println!("cargo::rustc-cfg=processes");
    }
    // Cargo looks into a directory recursively, by modification time.
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    // tests/build/build_script.rs runs this script again.
    println!("cargo::rustc-env=HOST_TRIPLE={}", env::var("HOST").unwrap_or_default());
    if let Err(message) = build() {
        eprintln!("param-averager: {message}");
        exit(1);
    }
}

fn build() -> Result<(), String> {
    let out =
        PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this through cargo")?);
    let kernels = match nvcc::find()? {
        Ok(nvcc) => {
            let fatbin = cuda::compile(&nvcc, &out)?;
            // The static checks look for cuobjdump and nvdisasm beside this nvcc.
            println!("cargo::rustc-env=PARAM_AVERAGER_NVCC={}", nvcc.display());
            cuda::fatbin_source(&fatbin)
        }
        Err(Absent { reason, .. })
            if read("PARAM_AVERAGER_REQUIRE_NVCC").is_some_and(|value| value == "1") =>
        {
            return Err(format!(
                "{reason}, but PARAM_AVERAGER_REQUIRE_NVCC=1 asks for it: {HOW_TO_GET_NVCC}"
            ));
        }
        Err(Absent { reason, is_meant }) => {
            let message =
                format!("built without GPU kernels, {reason}. For CUDA devices {HOW_TO_GET_NVCC}");
            if !is_meant {
                println!("cargo::warning={message}");
            }
            println!("cargo::rustc-env=PARAM_AVERAGER_NVCC=");
            format!("pub(crate) static FATBIN: Result<&[u8], &str> = Err({message:?});\n")
        }
    };
    write(&out.join("kernels.rs"), &kernels)?;
    cpu::compile(&out)
}

/// A variable, whose changes run this script again.
fn read(variable: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={variable}");
    env::var_os(variable)
}

/// Entries of a folder whose names begin with `prefix`.
fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
