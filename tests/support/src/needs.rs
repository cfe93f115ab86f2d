//! Tools that tests need.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::Skip;

/// Skips where this program does not run. `arguments`: those with which it ends at once, such as
/// `--version`.
pub fn tool(program: &str, arguments: &[&str]) -> Skip {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let runs = command.status().is_ok_and(|status| status.success());
    (!runs).then(|| match arguments {
        [_] => format!("no {program}: install it"),
        _ => format!("`{program} {}` fails here", arguments.join(" ")),
    })
}

/// Skips where the crate was built without GPU kernels.
pub fn gpu_kernels() -> Skip {
    param_averager::__testing::fatbin().err().map(str::to_owned)
}

/// The compiler of C++.
pub fn compiler() -> String {
    std::env::var("CXX").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "c++".into())
}

/// Builds a library that a program loads at run time, of a source in C++. `more`: libraries that it
/// needs, though it may call nothing of them.
pub fn shared_library(source: &Path, library: &Path, more: &[&OsStr]) {
    // Another run of the program may be loading it.
    let made = library.with_extension(std::process::id().to_string());
    let mut command = Command::new(compiler());
    command.args(["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]).arg(source);
    command.arg("-Wl,--no-as-needed").arg("-o").arg(&made).args(more).arg("-ldl");
    let output = command.output().expect("the compiler runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(made, library).expect("a folder that can be written to");
}
