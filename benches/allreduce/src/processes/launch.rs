//! The launcher that is used where there is none: starts a process for each rank, and ends them all
//! when one fails.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::failure::Failure;

/// Tells a rank that this program has started it: the id of that process, and when it began.
const STARTED_BY: &str = "ALLREDUCE_BENCH_STARTED_BY";

/// After the first rank has failed, or rank 0 has ended, the others get so long to end by
/// themselves and print why.
const GRACE: Duration = Duration::from_secs(5);

/// A process, until it has ended, and a thread that reads its lines of standard error.
type Rank = (Option<Child>, JoinHandle<Vec<String>>);

/// Runs this program again for each rank; returns when all have ended. Ranks end with this process.
pub fn launch(world: usize, began: f64) -> Result<(), Failure> {
    let start = |rank| {
        start(rank, world, began).map_err(|e| {
            Failure::Failed(format!("cannot start a process for rank {rank}: {e}; use fewer ranks"))
        })
    };
    let mut ranks = (0..world).map(start).collect::<Result<Vec<Rank>, _>>()?;
    let (mut deadline, mut lines, mut code) = (None, vec![], 0);
    while ranks.iter().any(|(child, _)| child.is_some()) {
        std::thread::sleep(Duration::from_millis(10));
        for (index, (running, _)) in ranks.iter_mut().enumerate() {
            let Some(child) = running else { continue };
            let status = match child.try_wait()? {
                None if deadline.is_some_and(|deadline| Instant::now() > deadline) => {
                    let what = "did not end with the others, and was killed";
                    lines.push(format!("error: rank {index} {what}"));
                    child.kill()?;
                    child.wait()?
                }
                None => continue,
                Some(status) => {
                    let signal = status.signal();
                    lines.extend(signal.map(|signal| {
                        format!("error: rank {index} was killed by signal {signal}")
                    }));
                    status
                }
            };
            *running = None;
            if index == 0 || !status.success() {
                deadline.get_or_insert(Instant::now() + GRACE);
            }
            // A mistake in the command line, 2, is the reason why other ranks fail with 1.
            code = code.max(status.code().unwrap_or(1) as u8);
        }
    }
    // Each line once: a failure is the same on all ranks that live to see it.
    for line in ranks.into_iter().flat_map(|(_, errors)| errors.join().unwrap_or_default()) {
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    if code != 0 && lines.is_empty() {
        lines.push(format!("error: a rank ended with exit code {code} and said nothing"));
    }
    lines.iter().for_each(|line| eprintln!("{line}"));
    if code == 0 {
        return Ok(());
    }
    Err(Failure::Silent(code))
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
    Ok((Some(child), errors))
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
