//! How code for CPUs is compiled: a copy for each instruction set. Other packages of this workspace
//! that have such code include this file in their build scripts, too.

/// Flags that every instruction set shares. No contraction and no reassociation: CPU and GPU give
/// the same bits. No exceptions, no RTTI: nothing of the C++ runtime is needed at link time.
const FLAGS: [&str; 6] = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
];

/// Instruction sets of x86-64, each with the flags it adds.
const X86_64: [Set; 3] = [
    ("baseline", &[]),
    ("avx2", &["-mavx2", "-mf16c", "-mfma"]),
    (
        "avx512",
        &["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c", "-mfma"],
    ),
];

/// An instruction set and its flags.
pub type Set = (&'static str, &'static [&'static str]);

/// Instruction sets of the machine that is built for.
pub fn sets() -> &'static [Set] {
    match std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("x86_64") => &X86_64,
        _ => &X86_64[..1],
    }
}

/// The compiler for one of them. The code's namespace is `PA_ISA`.
pub fn compiler_for((set, flags): Set) -> cc::Build {
    let mut compiler = cpp_compiler();
    compiler.define("PA_ISA", set).flags(FLAGS).flags(flags);
    compiler
}

/// A C++ compiler with what all instruction sets share.
pub fn cpp_compiler() -> cc::Build {
    let mut compiler = cc::Build::new();
    // Optimised in every profile: scalar loops over a model's parameters would make debug builds
    // crawl, and with -O1, which compiles in half the time, direct averages take twice as long, of
    // bf16 7 times.
    // The same in every profile, so that all share one: CXXFLAGS=-g adds what a debugger needs.
    compiler.cpp(true).cpp_link_stdlib(None).opt_level(3).debug(false).extra_warnings(true);
    compiler
}
