//! The kernels for CPUs: one object for each instruction set, in one archive.

use std::env;
use std::path::{Path, PathBuf};

use crate::instruction_sets::{compiler_for, sets, Set};
use crate::kept::{kept, Key};

/// Compiles the CPU kernels once per instruction set, at the same time if cargo has several jobs,
/// and links them into one archive.
pub fn compile(out: &Path) -> Result<(), String> {
    let sets = sets();
    let compile = |set: &Set| compile_set(out, *set);
    let objects: Vec<Result<PathBuf, String>> = match env::var("NUM_JOBS").as_deref() {
        Ok("1") => sets.iter().map(compile).collect(),
        _ => std::thread::scope(|scope| {
            let threads: Vec<_> = sets.iter().map(|set| scope.spawn(|| compile(set))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        }),
    };
    let mut archive = cc::Build::new();
    archive.cargo_warnings(true);
    for object in objects {
        archive.object(object?);
    }
    archive
        .try_compile("param_averager_kernels")
        .map_err(|e| format!("archiving the CPU kernels: {e}"))
}

/// Compiles the CPU kernels for one instruction set.
fn compile_set(out: &Path, (set, flags): Set) -> Result<PathBuf, String> {
    let source = "kernels/average_cpu.cpp";
    let failed = |e: cc::Error| format!("compiling {source} for {set}: {e}");
    let mut compiler = compiler_for((set, flags));
    // An own directory each: cc names an object after its source, which is the same for all.
    compiler.out_dir(out.join(set)).file(source);
    let tool = compiler.try_get_compiler().map_err(failed)?;
    let mut key = Key::of_sources()?;
    key.add_command(&tool.to_command());
    key.add_version(tool.path());
    // Further variables that gcc and clang read.
    for variable in ["CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"] {
        key.add(variable, &format!("{:?}", env::var_os(variable)));
    }
    kept(&format!("{set}-{}.o", key.finish()), out, &out.join(set).join("kept.o"), || {
        let objects = compiler.try_compile_intermediates().map_err(failed)?;
        objects.into_iter().next().ok_or(format!("{source} has no object"))
    })
}
