//! Tools that tests need.

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
