//! The launcher that is used where there is none: starts a process for each rank, and ends them all
//! when one fails.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::now;
use crate::failure::Failure;

/// Tells a rank that it is one of ours: the process that started it, and when that began.
const STARTED_BY: &str = "ALLREDUCE_BENCH_STARTED_BY";

/// After the first has failed or the last figures are there, the others get so long to end by
/// themselves and say why.
const GRACE: Duration = Duration::from_secs(5);

struct Rank {
    child: Child,
    /// What it wrote to standard error.
    said: Option<JoinHandle<Vec<String>>>,
    status: Option<ExitStatus>,
    /// It had to be ended.
    overdue: bool,
}

/// Runs this program again for each rank; returns when all have ended.
pub fn launch(ranks: usize, began: u64) -> Result<(), Failure> {
    let mut crew = Crew(vec![]);
    for rank in 0..ranks {
        let started = start(rank, ranks, began);
        crew.0.push(started.map_err(|e| {
            Failure::Failed(format!("cannot start a process for rank {rank}: {e}; use fewer ranks"))
        })?);
    }
    let mut deadline = None;
    while crew.0.iter().any(|rank| rank.status.is_none()) {
        std::thread::sleep(Duration::from_millis(10));
        for (index, rank) in crew.0.iter_mut().enumerate().filter(|(_, rank)| rank.status.is_none())
        {
            rank.status = rank.child.try_wait()?;
            if rank.status.is_some_and(|status| !status.success() || index == 0) {
                deadline.get_or_insert(Instant::now() + GRACE);
            } else if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                rank.overdue = true;
                rank.child.kill()?;
            }
        }
    }
    match crew.verdict() {
        0 => Ok(()),
        code => Err(Failure::Told(code)),
    }
}

fn start(rank: usize, ranks: usize, began: u64) -> std::io::Result<Rank> {
    let me = std::process::id();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(std::env::args_os().skip(1))
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", ranks.to_string())
        .env("PARAM_AVERAGER_RENDEZVOUS", format!("allreduce-bench {me} {began}"))
        .env(STARTED_BY, format!("{me} {began}"))
        .env_remove("LOCAL_WORLD_SIZE")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    if rank > 0 {
        command.stdout(Stdio::null());
    }
    let mut child = command.spawn()?;
    let said = child.stderr.take().map(|pipe| {
        std::thread::spawn(move || BufReader::new(pipe).lines().map_while(Result::ok).collect())
    });
    Ok(Rank { child, said, status: None, overdue: false })
}

/// In a rank that `launch` started: ends with the process that started it, and returns when that
/// began. `None` in others.
pub fn started() -> Option<u64> {
    let value = std::env::var(STARTED_BY).ok()?;
    let (parent, began) = value.split_once(' ')?;
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // It may have ended before it was asked to take this rank with it.
    if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string()).as_deref()
        != Some(parent)
    {
        std::process::exit(1);
    }
    Some(began.parse().unwrap_or_else(|_| now()))
}

struct Crew(Vec<Rank>);

impl Crew {
    /// Says what went wrong, each line once: a failure is the same on all ranks that live to see
    /// it. Returns the exit code.
    fn verdict(&mut self) -> u8 {
        let (mut lines, mut said, mut codes) = (vec![], vec![], vec![]);
        for (index, rank) in self.0.iter_mut().enumerate() {
            let Some(status) = rank.status else { continue };
            if rank.overdue {
                lines.push(format!(
                    "error: rank {index} did not end with the others, and was killed"
                ));
            } else if let Some(signal) = status.signal() {
                lines.push(format!("error: rank {index} was killed by signal {signal}"));
            }
            said.extend(rank.said.take().and_then(|said| said.join().ok()).unwrap_or_default());
            codes.push(status.code().map_or(1, |code| code as u8));
        }
        for line in said {
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        let failed = codes.iter().zip(0..).find(|(&code, _)| code != 0);
        if let (Some((code, rank)), true) = (failed, lines.is_empty()) {
            lines.push(format!("error: rank {rank} ended with exit code {code} and said nothing"));
        }
        lines.iter().for_each(|line| eprintln!("{line}"));
        failed.map_or(0, |(&code, _): (_, i32)| code)
    }
}

impl Drop for Crew {
    /// Nobody is left behind, whatever went wrong.
    fn drop(&mut self) {
        for rank in self.0.iter_mut().filter(|rank| rank.status.is_none()) {
            let _ = rank.child.kill();
            let _ = rank.child.wait();
        }
    }
}
