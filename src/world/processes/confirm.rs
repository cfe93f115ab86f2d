//! The end of a meeting: ranks that were made known to one another still need memory and threads, and no rank begins before all
//! have them. Each tells rank 0, on the stream that it came by, and rank 0 tells all.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};

use super::frame::{self, Kind};

/// How long ranks have at least, also where the last one came at the last moment.
const LEAST: Duration = Duration::from_secs(2);
/// Bytes of a reason that are told.
const MOST_REASON: usize = 4 << 10;

/// The streams that a rank came by: rank 0's to every other, and every other's to rank 0.
#[derive(Debug, Default)]
pub(super) struct Confirmation {
    streams: Vec<(usize, UnixStream)>,
}

impl Confirmation {
    pub(super) fn of_rank_0(visitors: impl Iterator<Item = (usize, UnixStream)>) -> Confirmation {
        Confirmation { streams: visitors.collect() }
    }

    pub(super) fn of_a_visitor(stream: UnixStream) -> Confirmation {
        Confirmation { streams: vec![(0, stream)] }
    }

    /// Collective: says whether this rank has all that it needs, and returns when all have said it. An error is every rank's.
    pub(super) fn give(self, own: Result<(), String>, deadline: Instant) -> Result<(), String> {
        let deadline = deadline.max(Instant::now() + LEAST);
        match &self.streams[..] {
            [] => own, // of a world of one
            [(0, first)] => {
                say(first, own.as_ref().err(), deadline);
                own?;
                hear(first, deadline).unwrap_or_else(|| Err("rank 0 has ended while ranks began".into()))
            }
            others => {
                let result = own.and_then(|()| gather(others, deadline));
                others.iter().for_each(|(_, stream)| say(stream, result.as_ref().err(), deadline));
                result
            }
        }
    }
}

/// Says on the stream to rank 0 why this rank does not get so far.
pub(super) fn refuse(stream: &UnixStream, reason: &String, deadline: Instant) {
    say(stream, Some(reason), deadline.max(Instant::now() + LEAST));
}

/// A stream whose other end is gone is found out by what is heard there.
fn say(stream: &UnixStream, refusal: Option<&String>, deadline: Instant) {
    let short = |reason: &String| reason.chars().take(MOST_REASON / 4).collect::<String>();
    let _ = frame::send(stream, (Kind::Verdict, 0, 0), &refusal.map(short), &[], deadline);
}

/// What was said on a stream. None: its other end is gone.
fn hear(stream: &UnixStream, deadline: Instant) -> Option<Result<(), String>> {
    let frame = frame::receive(stream, &[Kind::Verdict], 0, deadline).ok()?;
    Some(frame.parse::<Option<String>>().ok()?.map_or(Ok(()), Err))
}

/// Until all have all that they need, or one has not, whichever comes first.
fn gather(others: &[(usize, UnixStream)], deadline: Instant) -> Result<(), String> {
    let mut missing: Vec<_> = others.iter().collect();
    while !missing.is_empty() {
        let mut watched: Vec<_> =
            missing.iter().map(|(_, stream)| PollFd::new(stream, PollFlags::IN)).collect();
        let patience = deadline.saturating_duration_since(Instant::now());
        let patience = patience.min(LEAST).try_into().ok(); // looks at the clock from time to time
        let _ = poll(&mut watched, patience.as_ref());
        let ready: Vec<bool> = watched.iter().map(|watched| !watched.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        let mut refusal = None;
        missing.retain(|(rank, stream)| {
            if ready.next() != Some(true) {
                return true;
            }
            let said = hear(stream, deadline).unwrap_or_else(|| Err("it has ended while ranks began".into()));
            refusal =
                refusal.take().or(said.err().map(|reason| format!("rank {rank} can't take part: {reason}")));
            false
        });
        refusal.map_or(Ok(()), Err)?;
        if let (Some((rank, _)), true) = (missing.first(), Instant::now() >= deadline) {
            return Err(format!(
                "rank {rank} did not say in time whether it can take part: see what it does"
            ));
        }
    }
    Ok(())
}
