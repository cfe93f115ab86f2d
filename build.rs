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

// Over 400 lines in one file: it is read from top to bottom, and has no module tree of its own.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{exit, Command, Output};

const DEFAULT_ARCHITECTURES: [&str; 4] = ["80", "90", "100", "120"];

const HOW_TO_GET_NVCC: &str =
    "install the CUDA toolkit (or, in an active virtual environment, `pip install \
    cuda-toolkit[nvcc,cccl]`), set NVCC=/path/to/nvcc or CUDA_HOME, and build again";

/// Flags that every instruction set shares. No contraction and no reassociation: CPU and GPU give
/// the same bits. No exceptions, no RTTI: nothing of the C++ runtime is needed at link time.
const CPU_FLAGS: [&str; 6] = [
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
];

/// Instruction sets of x86-64, each with the flags it adds.
const X86_64: [(&str, &[&str]); 3] = [
    ("baseline", &[]),
    ("avx2", &["-mavx2", "-mf16c", "-mfma"]),
    (
        "avx512",
        &["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c", "-mfma"],
    ),
];

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
    let kernels = match nvcc_or_reason()? {
        Ok(nvcc) => {
            let fatbin = compile_cuda(&nvcc, &out)?;
            // The static checks look for cuobjdump and nvdisasm beside this nvcc.
            println!("cargo::rustc-env=PARAM_AVERAGER_NVCC={}", nvcc.display());
            fatbin_source(&fatbin)
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
    compile_cpu(&out)
}

/// True if the crate is built with its feature `cuda`.
fn has_cuda() -> bool {
    env::var_os("CARGO_FEATURE_CUDA").is_some_and(|set| !set.is_empty())
}

/// A variable, whose changes run this script again.
fn read(variable: &str) -> Option<OsString> {
    println!("cargo::rerun-if-env-changed={variable}");
    env::var_os(variable)
}

/// Compiles the CPU kernels once per instruction set, at the same time if cargo has several jobs,
/// and links them into one archive.
fn compile_cpu(out: &Path) -> Result<(), String> {
    let sets = match env::var("CARGO_CFG_TARGET_ARCH").as_deref() {
        Ok("x86_64") => &X86_64[..],
        _ => &X86_64[..1],
    };
    let compile = |&(set, flags): &_| compile_set(out, set, flags);
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
fn compile_set(out: &Path, set: &str, flags: &[&str]) -> Result<PathBuf, String> {
    let source = "kernels/average_cpu.cpp";
    let failed = |e: cc::Error| format!("compiling {source} for {set}: {e}");
    let mut compiler = cpp_compiler();
    // An own directory each: cc names an object after its source, which is the same for all.
    compiler.out_dir(out.join(set)).file(source).define("PA_ISA", set);
    compiler.flags(CPU_FLAGS).flags(flags);
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

/// Hash of all that a kernel is made from.
struct Key(DefaultHasher);

impl Key {
    /// Names and contents of all files in `kernels/`.
    fn of_sources() -> Result<Key, String> {
        let mut key = Key(DefaultHasher::new());
        let mut folders = vec![PathBuf::from("kernels")];
        while let Some(folder) = folders.pop() {
            let mut found = children(&folder, "");
            found.sort();
            for path in found {
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text =
                    fs::read(&path).map_err(|e| format!("reading {}: {e}", path.display()))?;
                (&path, text).hash(&mut key.0);
            }
        }
        Ok(key)
    }

    fn add(&mut self, what: &str, value: &str) {
        (what, value).hash(&mut self.0);
    }

    /// A program and its arguments.
    fn add_command(&mut self, command: &Command) {
        command.get_program().hash(&mut self.0);
        command.get_args().for_each(|argument| argument.hash(&mut self.0));
    }

    /// Adds the version that a compiler reports: its path may be another compiler's later.
    fn add_version(&mut self, compiler: &Path) {
        let output = Command::new(compiler).arg("--version").output();
        let said = output.map(|output| output.stdout).unwrap_or_default();
        (compiler, said).hash(&mut self.0);
    }

    fn finish(self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// The file of this name that an earlier run of this script has kept, as `copy`; or else what
/// `make` makes, which is kept. Nothing is kept where `OUT_DIR` is not in a folder of cargo's.
fn kept(
    name: &str,
    out: &Path,
    copy: &Path,
    make: impl FnOnce() -> Result<PathBuf, String>,
) -> Result<PathBuf, String> {
    // The folder of all that cargo builds: it has one of these, in which nothing is looked for.
    let is_target = |folder: &&Path| {
        ["CACHEDIR.TAG", ".rustc_info.json"].iter().any(|name| folder.join(name).is_file())
    };
    let target = out.ancestors().find(is_target);
    let Some(folder) = target.map(|target| target.join("param-averager-kernels")) else {
        return make();
    };
    let file = folder.join(name);
    let parent = copy.parent().expect("a folder in OUT_DIR");
    if fs::create_dir_all(parent).is_ok() && fs::copy(&file, copy).is_ok() {
        return Ok(copy.to_owned());
    }
    let made = make()?;
    // Whole, or not at all: another run may be looking. It is no error if nothing can be kept.
    let part = folder.join(format!("{name}.{}", std::process::id()));
    let _ = fs::create_dir_all(&folder)
        .and_then(|()| fs::copy(&made, &part))
        .and_then(|_| fs::rename(&part, &file));
    Ok(made)
}

fn cpp_compiler() -> cc::Build {
    let mut compiler = cc::Build::new();
    // Optimised in every profile: scalar loops over a model's parameters would make debug builds
    // crawl, and with -O1, which compiles in half the time, direct averages take twice as long, of
    // bf16 7 times.
    // The same in every profile, so that all share one: CXXFLAGS=-g adds what a debugger needs.
    compiler.cpp(true).cpp_link_stdlib(None).opt_level(3).debug(false).extra_warnings(true);
    compiler
}

/// Reason to build without nvcc.
struct Absent {
    reason: &'static str,
    /// True if it was asked for, so that no warning is needed.
    is_meant: bool,
}

/// The nvcc to use, or the reason there is none. An error if one was named that can't be used.
fn nvcc_or_reason() -> Result<Result<PathBuf, Absent>, String> {
    let meant = |reason| Ok(Err(Absent { reason, is_meant: true }));
    if !has_cuda() {
        return meant("without the feature `cuda`");
    }
    if read("DOCS_RS").is_some() {
        return meant("since DOCS_RS is set");
    }
    if let Some(named) = read("NVCC") {
        if named.is_empty() {
            return meant("since NVCC is set to nothing");
        }
        let path = if Path::new(&named).components().count() > 1 {
            Some(PathBuf::from(&named)).filter(|path| path.is_file())
        } else {
            on_path(&named)
        };
        return match path {
            Some(path) => Ok(Ok(path)),
            None => Err(format!(
                "NVCC names {}, which does not exist: correct NVCC, unset it to search for nvcc, \
                 or set it to nothing \
                 to build without GPU kernels",
                Path::new(&named).display()
            )),
        };
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        let Some(home) = read(variable).filter(|home| !home.is_empty()) else { continue };
        let home = PathBuf::from(home);
        if !home.is_dir() {
            return Err(format!(
                "{variable} names {}, which is not a directory: correct it or unset it",
                home.display()
            ));
        }
        if home.join("bin/nvcc").is_file() {
            return Ok(Ok(home.join("bin/nvcc")));
        }
    }
    let found = on_path(&OsString::from("nvcc"))
        .or_else(|| Some(PathBuf::from("/usr/local/cuda/bin/nvcc")).filter(|path| path.is_file()))
        .or_else(in_virtual_environment);
    Ok(found.ok_or(Absent { reason: "since no nvcc was found", is_meant: false }))
}

fn on_path(name: &OsString) -> Option<PathBuf> {
    env::split_paths(&read("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// PyPI's toolkit of the newest CUDA in the active virtual environment.
fn in_virtual_environment() -> Option<PathBuf> {
    let root = PathBuf::from(read("VIRTUAL_ENV")?);
    let mut found: Vec<PathBuf> = children(&root.join("lib"), "python")
        .iter()
        .flat_map(|python| children(&python.join("site-packages/nvidia"), "cu"))
        .map(|toolkit| toolkit.join("bin/nvcc"))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop()
}

fn children(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

/// Compiles the GPU kernels to machine code for each architecture, and to PTX for the oldest of
/// them (any GPU since) and the newest (any GPU to come).
fn compile_cuda(nvcc: &Path, out: &Path) -> Result<PathBuf, String> {
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
fn fatbin_source(fatbin: &Path) -> String {
    format!(
        "#[repr(align(16))]\n\
         struct Aligned<T: ?Sized>(T);\n\
         static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!({:?}));\n\
         pub(crate) static FATBIN: Result<&[u8], &str> = Ok(&ALIGNED.0);\n",
        fatbin.display().to_string()
    )
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}
