//! Tries NCCL in a process of its own first. Where it can't be used it may not only return an
//! error: on some machines it waits for ever, or ends the process. Then only its rows are left out.

use std::process::{Command, Stdio};
use std::time::Duration;

use indicatif::ProgressBar;
use param_averager::Dtype;

use super::Cuda;
use crate::cli::Args;
use crate::failure::Failure;
use crate::layout::Layout;
use crate::plan::{Group, Section};
use crate::record::Details;
use crate::rows;
use crate::run::Bench;

/// Bytes that are averaged.
const BYTES: u64 = 4 << 16;
const ANSWER: &str = "nccl-probe: ";

/// Checks that this many ranks can average with NCCL here. The error says why not; a call that does
/// not come back within the limit is one, too.
pub fn ask(ranks: usize, limit: Duration) -> Result<(), String> {
    let failed =
        |error: std::io::Error| format!("this program can't start itself to try NCCL: {error}");
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg(format!("--nccl-probe={ranks}")).arg(format!("--timeout={}", limit.as_secs_f64()));
    command.args(["--backend", "cuda"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().map_err(failed)?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().rev().find_map(|line| line.strip_prefix(ANSWER)) {
        Some("ok") => Ok(()),
        Some(reason) => Err(reason.into()),
        None => Err(format!(
            "NCCL ended the process that tried it ({}); NCCL_DEBUG=INFO says more",
            output.status
        )),
    }
}

/// The process of its own: measures and checks one of NCCL's rows, and returns the line that tells
/// the result.
pub fn answer(args: &Args, ranks: usize) -> String {
    let reason = try_once(args, ranks).unwrap_or_else(|failure| failure.to_string());
    format!("{ANSWER}{}", reason.replace('\n', " "))
}

fn try_once(args: &Args, ranks: usize) -> Result<String, Failure> {
    let (layout, rows) = (Layout::flat(BYTES, Dtype::F32), vec![rows::NCCL[0].into()]);
    let group = Group { layout, ranks, rows, iterations: 1, warmup: 0 };
    let section = Section { heading: String::new(), groups: vec![group.clone()] };
    let mut cuda = Cuda::open(args, &[section])?;
    let mut bench = Bench::new(args, ProgressBar::hidden());
    let record = bench.measure(&mut cuda, &group)?.remove(0);
    let note = match record.details {
        Details::Cuda { note, .. } => note.unwrap_or_default(),
        _ => String::new(),
    };
    Ok(match record.wrong {
        Some(0) => "ok".into(),
        Some(wrong) => format!("{wrong} elements of ncclAvg's result are wrong"),
        None => note.split_once(": ").map_or(note.clone(), |(_, reason)| reason.to_owned()),
    })
}
