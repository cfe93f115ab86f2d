//! Confirmation: the last step of a rendezvous. Ranks that are connected still need memory and
//! threads, and no rank begins unless all have them. Each rank tells rank 0 on the stream of its
//! `Hello`, and rank 0 tells all.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};

use crate::world::processes::wire::frame::{self, Kind};
use crate::world::processes::wire::private::Private;

/// Time for a rank to confirm. A silent rank is stopped or departed, which its peers detect later
/// in any case.
const PATIENCE: Duration = Duration::from_secs(2);
/// Limit on the characters of a reason.
const MOST_REASON: usize = 2000;

/// The streams of the rendezvous: rank 0's to every other rank, or another rank's to rank 0.
#[derive(Debug, Default)]
pub(crate) struct Confirmation {
    streams: Vec<(usize, Private<UnixStream>)>,
}

impl Confirmation {
    pub(crate) fn of_rank_0(
        connections: impl Iterator<Item = (usize, Private<UnixStream>)>,
    ) -> Confirmation {
        Confirmation { streams: connections.collect() }
    }

    pub(crate) fn of_other_rank(stream: Private<UnixStream>) -> Confirmation {
        Confirmation { streams: vec![(0, stream)] }
    }

    /// Reports whether this rank has all that it needs, and returns when all ranks have reported.
    /// Collective. A refusal is an error on every rank.
    pub(crate) fn give(self, own: Result<(), String>) -> Result<(), String> {
        match &self.streams[..] {
            [(0, first)] => {
                send_verdict(first, own.as_ref().err());
                // Rank 0 waits for every other rank first.
                own.and_then(|()| receive_verdict(first, Instant::now() + 2 * PATIENCE))
            }
            others => {
                let refused =
                    own.as_ref().err().map(|reason| format!("rank 0 can't take part: {reason}"));
                let result = own.and_then(|()| gather(others));
                let told = refused.as_ref().or(result.as_ref().err());
                others.iter().for_each(|(_, stream)| send_verdict(stream, told));
                result
            }
        }
    }
}

/// Tells rank 0 why this rank fails.
pub(crate) fn refuse(stream: &Private<UnixStream>, reason: &String) {
    send_verdict(stream, Some(reason));
}

/// Sends a verdict. A departed receiver is detected when its answer is missing.
fn send_verdict(stream: &Private<UnixStream>, refusal: Option<&String>) {
    let refusal = refusal.map(|reason| reason.chars().take(MOST_REASON).collect::<String>());
    let _ = frame::send(stream, (Kind::Verdict, 0, 0), &refusal, &[], Instant::now() + PATIENCE);
}

/// Receives a verdict. A missing verdict is not a refusal.
fn receive_verdict(stream: &Private<UnixStream>, deadline: Instant) -> Result<(), String> {
    let ready =
        frame::receive(stream, &[Kind::Verdict], 0, deadline).and_then(|frame| frame.parse());
    ready.unwrap_or(None::<String>).map_or(Ok(()), Err)
}

/// Waits until all ranks have confirmed, or one refuses.
fn gather(others: &[(usize, Private<UnixStream>)]) -> Result<(), String> {
    let deadline = Instant::now() + PATIENCE;
    let mut missing: Vec<&(usize, Private<UnixStream>)> = others.iter().collect();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if missing.is_empty() || left.is_zero() {
            return Ok(());
        }
        let watch = missing
            .iter()
            .map(|(_, stream)| PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN));
        let mut watched: Vec<PollFd<'_>> = watch.collect();
        // A wait that is interrupted only repeats the loop.
        let _ = poll(&mut watched, left.try_into().ok().as_ref());
        let readable: Vec<bool> =
            watched.iter().map(|watched| !watched.revents().is_empty()).collect();
        let mut readable = readable.into_iter();
        let (ready, silent): (Vec<_>, Vec<_>) =
            missing.into_iter().partition(|_| readable.next() == Some(true));
        for (rank, stream) in ready {
            receive_verdict(stream, deadline)
                .map_err(|reason| format!("rank {rank} can't take part: {reason}"))?;
        }
        missing = silent;
    }
}
