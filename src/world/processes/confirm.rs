//! The end of a meeting: ranks that were made known to one another still need memory and threads,
//! and no rank begins where one can't have them. Each tells rank 0, on the stream that it came by,
//! and rank 0 tells all.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};

use super::frame::{self, Kind};
use super::private::Private;

/// How long a rank is waited for that says nothing. It is stopped or gone, as it may be at any
/// later time, and is found out as a peer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Characters of a reason that are told.
const MOST_REASON: usize = 2000;

/// The streams that ranks came by: rank 0's to every other, and every other's to rank 0.
#[derive(Debug, Default)]
pub(super) struct Confirmation {
    streams: Vec<(usize, Private<UnixStream>)>,
}

impl Confirmation {
    pub(super) fn of_rank_0(
        connections: impl Iterator<Item = (usize, Private<UnixStream>)>,
    ) -> Confirmation {
        Confirmation { streams: connections.collect() }
    }

    pub(super) fn of_a_visitor(stream: Private<UnixStream>) -> Confirmation {
        Confirmation { streams: vec![(0, stream)] }
    }

    /// Collective: says whether this rank has all that it needs, and returns when all have said it.
    /// A refusal is every rank's error.
    pub(super) fn give(self, own: Result<(), String>) -> Result<(), String> {
        match &self.streams[..] {
            [(0, first)] => {
                say(first, own.as_ref().err());
                // Rank 0 waits for every other first.
                own.and_then(|()| hear(first, Instant::now() + 2 * PATIENCE))
            }
            others => {
                let refused =
                    own.as_ref().err().map(|reason| format!("rank 0 can't take part: {reason}"));
                let result = own.and_then(|()| gather(others));
                let told = refused.as_ref().or(result.as_ref().err());
                others.iter().for_each(|(_, stream)| say(stream, told));
                result
            }
        }
    }
}

/// Tells rank 0 why this rank does not get so far.
pub(super) fn refuse(stream: &Private<UnixStream>, reason: &String) {
    say(stream, Some(reason));
}

/// An end that is gone is found out by what is heard there.
fn say(stream: &Private<UnixStream>, refusal: Option<&String>) {
    let refusal = refusal.map(|reason| reason.chars().take(MOST_REASON).collect::<String>());
    let _ = frame::send(stream, (Kind::Verdict, 0, 0), &refusal, &[], Instant::now() + PATIENCE);
}

/// What is said on a stream. No word is no refusal.
fn hear(stream: &Private<UnixStream>, deadline: Instant) -> Result<(), String> {
    let said =
        frame::receive(stream, &[Kind::Verdict], 0, deadline).and_then(|frame| frame.parse());
    said.unwrap_or(None::<String>).map_or(Ok(()), Err)
}

/// Until all have all that they need, or one says that it has not, whichever comes first.
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
        // A wait that is interrupted only means another look.
        let _ = poll(&mut watched, left.try_into().ok().as_ref());
        let speaks: Vec<bool> =
            watched.iter().map(|watched| !watched.revents().is_empty()).collect();
        let mut speaks = speaks.into_iter();
        let (said, silent): (Vec<_>, Vec<_>) =
            missing.into_iter().partition(|_| speaks.next() == Some(true));
        for (rank, stream) in said {
            hear(stream, deadline)
                .map_err(|reason| format!("rank {rank} can't take part: {reason}"))?;
        }
        missing = silent;
    }
}
