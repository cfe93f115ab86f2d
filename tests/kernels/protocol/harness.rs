//! Builds of protocol/harness.cpp with each sanitizer and instruction set, and their runs.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use test_support::{tool, Skip};

use super::mutants;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const FLAGS: [&str; 7] = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
];
const THREAD: [&str; 1] = ["-fsanitize=thread"];
const ADDRESS: [&str; 1] = ["-fsanitize=address"];
const UNDEFINED: [&str; 2] = ["-fsanitize=undefined", "-fno-sanitize-recover=all"];

/// A way to build the harness.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// ThreadSanitizer, one lane a block.
    Tsan,
    /// ThreadSanitizer, several lanes a block.
    Lanes,
    /// AddressSanitizer, and UBSan where it pays.
    Asan(Vectors),
    /// No sanitizer: the only flavour with streaming stores.
    Plain(Vectors),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vectors {
    Baseline,
    Avx2,
    Avx512,
}

impl Vectors {
    fn flags(self) -> &'static [&'static str] {
        match self {
            Vectors::Baseline => &[],
            Vectors::Avx2 => &["-mavx2", "-mf16c"],
            Vectors::Avx512 => {
                &["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mf16c"]
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub fn here(self) -> bool {
        use std::is_x86_feature_detected as has;
        match self {
            Vectors::Baseline => true,
            Vectors::Avx2 => has!("avx2") && has!("f16c"),
            Vectors::Avx512 => {
                Vectors::Avx2.here()
                    && has!("avx512f")
                    && has!("avx512bw")
                    && has!("avx512vl")
                    && has!("avx512dq")
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    pub fn here(self) -> bool {
        self == Vectors::Baseline
    }
}

impl Flavour {
    fn flags(self) -> Vec<&'static str> {
        match self {
            Flavour::Tsan => THREAD.to_vec(),
            Flavour::Lanes => [&THREAD[..], &["-DPA_LANES"]].concat(),
            // The narrowest and the widest vectors with UBSan too, which doubles the time to
            // compile.
            Flavour::Asan(Vectors::Avx2) => [&ADDRESS[..], Vectors::Avx2.flags()].concat(),
            Flavour::Asan(vectors) => [&ADDRESS[..], &UNDEFINED, vectors.flags()].concat(),
            Flavour::Plain(vectors) => vectors.flags().to_vec(),
        }
    }
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase().replace('(', "-").replace(')', "")
    }
    pub fn here(self) -> bool {
        match self {
            Flavour::Asan(vectors) | Flavour::Plain(vectors) => vectors.here(),
            _ => true,
        }
    }
}

/// Skips without a C++ compiler.
pub fn tools() -> Skip {
    tool(&compiler().to_string_lossy(), &["--version"])
}

fn compiler() -> OsString {
    std::env::var_os("CXX").filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".into())
}

/// Builds the harness of a flavour with the kernels, or with a copy of them that holds all mutants.
/// Error: why this machine cannot build it. Kept from one run of the tests to the next.
pub fn build(flavour: Flavour, with_mutants: Option<&Path>) -> Result<PathBuf, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let program = folder.join(format!(
        "protocol-{}{}",
        flavour.name(),
        if with_mutants.is_some() { "-mutants" } else { "" }
    ));
    let mut command = Command::new(compiler());
    command.args(FLAGS).args(flavour.flags());
    if with_mutants.is_some() {
        command.arg("-DPA_MUTANTS");
    }
    let original = Path::new(ROOT).join("kernels");
    let kernels = with_mutants.unwrap_or(&original);
    command.arg("-I").arg(kernels);
    command.arg(Path::new(ROOT).join("tests/kernels/protocol/harness.cpp")).arg("-o").arg(&program);
    let made_by = program.with_extension("command");
    let line = format!("{command:?}");
    if fs::read_to_string(&made_by).is_ok_and(|made| made == line)
        && modified(&program) > newest_source(kernels)
    {
        return Ok(program);
    }
    let output =
        command.output().map_err(|error| format!("cannot run {:?}: {error}", compiler()))?;
    if !output.status.success() {
        if !is_supported(flavour) {
            return Err(format!("{:?} cannot build with {:?}", compiler(), flavour.flags()));
        }
        panic!("{line}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    fs::write(made_by, line).expect("writing beside the harness");
    Ok(program)
}

/// Checks that the harness compiles with these sources of all mutants. Error: the compiler's.
pub fn check_mutants(kernels: &Path) -> Result<(), String> {
    let mut command = Command::new(compiler());
    command.args(FLAGS).args(["-fsyntax-only", "-DPA_MUTANTS", "-I"]).arg(kernels);
    command.arg(Path::new(ROOT).join("tests/kernels/protocol/harness.cpp"));
    let output = command.output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// True if the compiler supports the flavour's sanitizer and instruction set: it builds an empty
/// program.
fn is_supported(flavour: Flavour) -> bool {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("nothing-{}.cpp", flavour.name()));
    fs::write(&source, "int main() {}\n").expect("writing a source file");
    let mut command = Command::new(compiler());
    command
        .args(FLAGS)
        .args(flavour.flags())
        .arg(&source)
        .arg("-o")
        .arg(source.with_extension("out"));
    command.output().is_ok_and(|output| output.status.success())
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}
fn newest_source(kernels: &Path) -> SystemTime {
    let folders = [kernels, &Path::new(ROOT).join("tests/kernels/protocol")];
    let files = folders.iter().flat_map(|folder| mutants::files(folder));
    let sources =
        files.filter(|path| path.extension().is_some_and(|name| name == "h" || name == "cpp"));
    sources.map(|path| modified(&path)).max().expect("sources")
}

/// Outcome of a run of the harness.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum How {
    Good,
    Race,
    Memory(String),
    Wrong(String),
    Hang,
    Crash(String),
}

impl How {
    /// The word of mutants.txt.
    pub fn word(&self) -> &'static str {
        match self {
            How::Good => "good",
            How::Race => "race",
            How::Memory(_) => "memory",
            How::Wrong(_) => "wrong",
            How::Hang => "hang",
            How::Crash(_) => "crash",
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            How::Good => write!(f, "not at all"),
            How::Race => write!(f, "data race"),
            How::Memory(kind) => write!(f, "{kind}"),
            How::Wrong(what) => {
                write!(f, "wrong result: {}", what.chars().take(110).collect::<String>())
            }
            How::Hang => write!(f, "hang (watchdog)"),
            How::Crash(status) => write!(f, "crash, {status}"),
        }
    }
}

/// Runs a harness, and returns the outcome and the output.
pub fn run(flavour: Flavour, program: &Path, arguments: &[&str]) -> (How, String) {
    let mut command = match flavour {
        // ThreadSanitizer maps its shadow where a randomised layout may have put something already.
        Flavour::Tsan | Flavour::Lanes if has_setarch() => {
            let mut command = Command::new("setarch");
            command.arg("-R").arg(program);
            command
        }
        _ => Command::new(program),
    };
    command
        .args(arguments)
        .env("TSAN_OPTIONS", "halt_on_error=1")
        .env("ASAN_OPTIONS", "")
        .env("UBSAN_OPTIONS", "");
    let output = command.output().expect("the harness runs");
    let text = [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .concat();
    let after = |mark: &str| {
        text.split_once(mark).map(|(_, rest)| rest.lines().next().unwrap_or("").to_owned())
    };
    let how = if output.status.success() {
        How::Good
    } else if text.contains("ThreadSanitizer: data race") {
        How::Race
    } else if let Some(kind) = after("ERROR: AddressSanitizer: ") {
        How::Memory(kind.split(' ').next().unwrap_or("").to_owned())
    } else if let Some(error) = after("runtime error: ") {
        How::Memory(error)
    } else if let Some(what) = after("WRONG ") {
        How::Wrong(what)
    } else if text.contains("HANG ") {
        How::Hang
    } else {
        How::Crash(output.status.to_string())
    };
    (how, text)
}

fn has_setarch() -> bool {
    let quiet =
        |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    quiet(Command::new("setarch").args([OsStr::new("-R"), OsStr::new("true")]))
        .is_ok_and(|status| status.success())
}
/// True if ThreadSanitizer refused this kernel's memory layout.
pub fn unfit(text: &str) -> bool {
    text.contains("unexpected memory mapping")
}

pub fn best_vectors() -> Vectors {
    *[Vectors::Avx512, Vectors::Avx2, Vectors::Baseline]
        .iter()
        .find(|vectors| vectors.here())
        .expect("a baseline")
}
