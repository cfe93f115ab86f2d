//! The launcher that is used where there is none: starts a process for each rank, and ends them all
//! when one fails.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::failure::Failure;

/// Tells a rank that this program has started it: the id of that process, and when it began.
const STARTED_BY: &str = "ALLREDUCE_BENCH_STARTED_BY";

/// After the first rank has failed, or rank 0 has ended, the others get so long to end by
/// themselves and print why.
const GRACE: Duration = Duration::from_secs(5);

struct Rank {
    child: Child,
    /// Reads its lines of standard error.
    errors: Option<JoinHandle<Vec<String>>>,
    status: Option<ExitStatus>,
    /// It did not end by itself.
    overdue: bool,
}

impl Drop for Rank {
    /// Leaves no process behind.
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs this program again for each rank; returns when all have ended.
pub fn launch(world: usize, began: f64) -> Result<(), Failure> {
    let start = |rank| {
        start(rank, world, began).map_err(|e| {
            Failure::Failed(format!("cannot start a process for rank {rank}: {e}; use fewer ranks"))
        })
    };
    let mut ranks = (0..world).map(start).collect::<Result<Vec<Rank>, _>>()?;
    let mut deadline = None;
    while ranks.iter().any(|rank| rank.status.is_none()) {
        std::thread::sleep(Duration::from_millis(10));
        for (index, rank) in ranks.iter_mut().enumerate().filter(|(_, rank)| rank.status.is_none())
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
    match verdict(ranks) {
        0 => Ok(()),
        code => Err(Failure::Peer(code)),
    }
}

fn start(rank: usize, world: usize, began: f64) -> std::io::Result<Rank> {
    let me = std::process::id();
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(std::env::args_os().skip(1))
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", world.to_string())
        .env("PARAM_AVERAGER_RENDEZVOUS", format!("allreduce-bench {me} {began}"))
        .env(STARTED_BY, format!("{me} {began}"))
        .env_remove("LOCAL_WORLD_SIZE")
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    if rank > 0 {
        command.stdout(Stdio::null());
    }
    let mut child = command.spawn()?;
    let errors = BufReader::new(child.stderr.take().expect("a pipe"));
    let errors = std::thread::spawn(move || errors.lines().map_while(Result::ok).collect());
    Ok(Rank { child, errors: Some(errors), status: None, overdue: false })
}

/// In a rank that `launch` started: ends with the process that started it, and returns when that
/// began. `None` in others.
pub fn began() -> Option<f64> {
    let value = std::env::var(STARTED_BY).ok()?;
    let (parent, began) = value.split_once(' ')?;
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    // It may have ended before it was asked to take this rank with it.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    if now.as_deref() != Some(parent) {
        std::process::exit(1);
    }
    began.parse().ok()
}

/// Prints what went wrong, each line once: a failure is the same on all ranks that live to see it.
/// Returns the exit code.
fn verdict(ranks: Vec<Rank>) -> u8 {
    let (mut lines, mut said, mut failed) = (vec![], vec![], None);
    for (index, mut rank) in ranks.into_iter().enumerate() {
        let Some(status) = rank.status else { continue };
        if rank.overdue {
            lines.push(format!("error: rank {index} did not end with the others, and was killed"));
        } else if let Some(signal) = status.signal() {
            lines.push(format!("error: rank {index} was killed by signal {signal}"));
        }
        let errors = rank.errors.take().and_then(|errors| errors.join().ok());
        said.extend(errors.unwrap_or_default());
        if !status.success() && failed.is_none() {
            failed = Some((index, status.code().map_or(1, |code| code as u8)));
        }
    }
    for line in said {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let Some((rank, code)) = failed else { return 0 };
    if lines.is_empty() {
        lines.push(format!("error: rank {rank} ended with exit code {code} and said nothing"));
    }
    lines.iter().for_each(|line| eprintln!("{line}"));
    code
}
