//! Tries NCCL in a process of its own first. Where it can't be used it may not only return an
//! error: on some machines it waits for ever, or ends the process. Then only its rows are left out.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

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

/// Checks that this many ranks can average with NCCL here. The error says why not.
pub fn ask(ranks: usize, limit: Duration) -> Result<(), String> {
    let failed =
        |error: std::io::Error| format!("this program can't start itself to try NCCL: {error}");
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg(format!("--nccl-probe={ranks}")).arg(format!("--timeout={}", limit.as_secs_f64()));
    command.args(["--backend", "cuda"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    // A start, a meeting, an average, and the end.
    let (begin, limit) = (Instant::now(), 4 * limit);
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if begin.elapsed() > limit => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if status.is_none() {
        let _ = child.kill(); // it may be over by now
        let _ = child.wait();
    }
    // One line, which the pipe holds.
    let mut said = String::new();
    let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut said));
    let answer = said.lines().rev().find_map(|line| line.strip_prefix(ANSWER));
    match (answer, status) {
        (Some("ok"), _) => Ok(()),
        (Some(reason), _) => Err(reason.into()),
        (None, Some(status)) => Err(format!(
            "NCCL ended the process that tried it ({status}); NCCL_DEBUG=INFO says more"
        )),
        (None, None) => Err(format!("NCCL did not come back within {limit:?} when it was tried")),
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
