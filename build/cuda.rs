//! The kernels for CUDA devices: one fatbin, by nvcc.

use std::env;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::instruction_sets::cpp_compiler;
use crate::kept::{kept, Key};
use crate::read;

const DEFAULT_ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];

/// Compiles the GPU kernels to machine code for each architecture, and to PTX for the oldest of
/// them (any GPU since) and the newest (any GPU to come).
pub fn compile(nvcc: &Path, out: &Path) -> Result<PathBuf, String> {
    let architectures = architectures(nvcc)?;
    let fatbin = out.join("average.fatbin");
    let mut command = Command::new(nvcc);
    // -fmad=false for the same reason as -ffp-contract=off.
    command.args(["-fatbin", "-std=c++17", "-O3", "-fmad=false"]);
    // Machine code compresses to a seventh. Drivers unpack it when they load it.
    command.args(["-Xfatbin", "-compress-all"]);
    let mut key = Key::of_sources()?;
    match read("NVCC_CCBIN").filter(|compiler| !compiler.is_empty()) {
        Some(compiler) => key.add_version(Path::new(&compiler)),
        None => {
            // The build machine's compiler, also when the target is another: a fatbin holds no
            // host code.
            let host = env::var("HOST").map_err(|e| format!("HOST: {e}"))?;
            let compiler = cpp_compiler().target(&host).try_get_compiler();
            let compiler =
                compiler.map_err(|e| format!("looking for a C++ compiler for nvcc: {e}"))?;
            command.arg("-ccbin").arg(compiler.path());
            key.add_version(compiler.path());
        }
    }
    for name in &architectures {
        command.args(["-gencode", &format!("arch=compute_{name},code=sm_{name}")]);
    }
    let mut portable = vec![&architectures[0], &architectures[architectures.len() - 1]];
    portable.dedup();
    for name in portable {
        command.args(["-gencode", &format!("arch=compute_{name},code=compute_{name}")]);
    }
    // For build scripts of packages that depend on this one: how to compile kernels of their own.
    let line = [command.get_program()].into_iter().chain(command.get_args());
    let line: Vec<_> = line.map(|word| word.to_string_lossy()).collect();
    println!("cargo::metadata=nvcc={}", line.join("\u{1f}"));
    key.add_command(&command);
    key.add_version(nvcc);
    for variable in ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"] {
        key.add(variable, &format!("{:?}", read(variable)));
    }
    kept(&format!("average-{}.fatbin", key.finish()), out, &fatbin, || {
        command.arg(format!("--threads={}", env::var("NUM_JOBS").unwrap_or_else(|_| "1".into())));
        command.arg("-o").arg(&fatbin).arg("kernels/average.cu");
        let output = run(&mut command)?;
        for line in
            [output.stdout, output.stderr].iter().flat_map(|text| text.split(|&byte| byte == b'\n'))
        {
            if !line.is_empty() {
                println!("cargo::warning={}", String::from_utf8_lossy(line));
            }
        }
        Ok(fatbin.clone())
    })
}

/// Architectures as nvcc spells them after `sm_`, oldest first, none twice. Never empty.
fn architectures(nvcc: &Path) -> Result<Vec<String>, String> {
    let asked = read("CUDA_COMPUTE_CAP").unwrap_or_default().to_string_lossy().into_owned();
    let mut names = Vec::new();
    for word in asked.split([',', ';', ' ']).filter(|word| !word.is_empty()) {
        names.push(architecture(word).ok_or_else(|| {
            format!(
                "CUDA_COMPUTE_CAP holds `{word}`: write compute capabilities such as 90, 9.0 \
                or sm_90, with commas between"
            )
        })?);
    }
    if names.is_empty() {
        let listed = run(Command::new(nvcc).arg("--list-gpu-code"))?.stdout;
        let listed = String::from_utf8_lossy(&listed);
        let known: Vec<&str> =
            listed.split_whitespace().filter_map(|code| code.strip_prefix("sm_")).collect();
        names.extend(
            DEFAULT_ARCHITECTURES
                .iter()
                .filter(|name| known.contains(name))
                .map(|name| name.to_string()),
        );
        if names.is_empty() {
            return Err(format!(
                "{} knows none of sm_80, sm_90, sm_100 and sm_120, only {known:?}: set \
                 CUDA_COMPUTE_CAP, or NVCC to a newer one",
                nvcc.display()
            ));
        }
    }
    // By number; "90" before "90a".
    names.sort_by_key(|name| {
        (name.trim_end_matches(char::is_alphabetic).parse().unwrap_or(u32::MAX), name.clone())
    });
    names.dedup();
    Ok(names)
}

/// `90`, `9.0`, `sm_90`, `compute_90`, with `a` or `f` at the end or without, to `90`.
fn architecture(word: &str) -> Option<String> {
    let name = word.strip_prefix("sm_").or_else(|| word.strip_prefix("compute_")).unwrap_or(word);
    let (major, minor) = name.split_once('.').unwrap_or((name, ""));
    let number = format!("{major}{minor}");
    let digits = number.strip_suffix(['a', 'f']).unwrap_or(&number);
    let plausible =
        (2..=3).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit());
    plausible.then_some(number)
}

/// Runs a command to success; on failure the error holds all it said.
fn run(command: &mut Command) -> Result<Output, String> {
    let output = command.output().map_err(|e| format!("cannot run {command:?}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let mut message = format!("{command:?} failed ({})", output.status);
    for text in [&output.stdout, &output.stderr] {
        let _ = write!(message, "\n{}", String::from_utf8_lossy(text).trim_end());
    }
    Err(message)
}

/// The driver reads the fatbin's header as words, so it must not lie at an odd address.
pub fn fatbin_source(fatbin: &Path) -> String {
    format!(
        "#[repr(align(16))]\n\
         struct Aligned<T: ?Sized>(T);\n\
         static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!({:?}));\n\
         pub(crate) static FATBIN: Result<&[u8], &str> = Ok(&ALIGNED.0);\n",
        fatbin.display().to_string()
    )
}
