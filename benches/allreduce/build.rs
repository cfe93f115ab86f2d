//! Compiles what is not Rust.
//!
//! * `limit.cpp` once for each instruction set, as param-averager's kernels are.
//! * `flatten.cu` with the nvcc and for the architectures that param-averager's build script chose,
//!   if it found any. Never fails the build: where there is no kernel, `flatten.rs` says why, and
//!   so do the rows that need it.

#[path = "build/flatten.rs"]
mod flatten;
#[path = "../../build/instruction_sets.rs"]
mod instruction_sets;

use std::path::PathBuf;
use std::{env, fs};

const KERNELS: &str = "../../kernels";
const LIMIT: &str = "src/limit.cpp";

fn main() {
    for path in ["build.rs", KERNELS, LIMIT, flatten::SOURCE] {
        println!("cargo::rerun-if-changed={path}");
    }
    for &set in instruction_sets::sets() {
        let name = format!("allreduce_bench_{}", set.0);
        instruction_sets::compiler_for(set).include(KERNELS).file(LIMIT).compile(&name);
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let fatbin = out.join("flatten.fatbin");
    let image = match flatten::compile(&fatbin) {
        Ok(()) => format!("Ok(include_bytes!({:?}))", fatbin.display().to_string()),
        Err(reason) => format!("Err({reason:?})"),
    };
    let source = format!("pub static IMAGE: Result<&[u8], &str> = {image};\n");
    fs::write(out.join("flatten.rs"), source).expect("can write to OUT_DIR");
}
