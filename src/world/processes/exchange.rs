//! Exchange of small messages between processes.

use std::time::{Duration, Instant};

use super::frame::Kind;
use super::ProcessBootstrap;
use crate::deadline;
use crate::error::Phase;
use crate::notice::Notice;
use crate::world::exchange::{waits, ExchangeId, Shown, LOOK};
use crate::{Error, Result};

impl ProcessBootstrap {
    /// See `Communicator::all_gather`.
    pub(in crate::world) fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let deadline = deadline::after(timeout);
        // Ranks are never 2^15 exchanges apart: each waits for the others.
        let number = id.averager << 16 | (id.number & 0xffff);
        let key = (Kind::Exchange, self.number(), number);
        let sent = self.peer_set.send_to_all(self.others(), key, &shown, &[], deadline);
        sent.map_err(|error| Error::SharedMemory { rank: self.rank(), reason: error.to_string() })?;
        let (mut notice, call) = (Notice::new(Some(self.rank())), shown.call.clone());
        let members = self.members();
        let mut all: Vec<Option<Shown>> = vec![None; members.len()];
        all[self.rank()] = Some(shown);
        loop {
            let look = deadline.min(Instant::now() + LOOK);
            let came = self.peer_set.wait(look, |state| {
                let missing = || (0..members.len()).filter(|&rank| all[rank].is_none());
                let Some(first) = missing().next() else { return Some(Ok(None)) };
                let new = missing().find_map(|rank| Some((rank, state.take(members[rank], key)?)));
                if let Some(new) = new {
                    return Some(Ok(Some(new)));
                }
                let phase = Phase::Exchange;
                let silent = missing()
                    .find_map(|rank| self.reason_for_silence(rank, members[rank], state, phase));
                silent.map(|error| Err((first, error)))
            });
            match came {
                Some(Ok(None)) => return Ok(all.into_iter().flatten().collect()),
                Some(Ok(Some((rank, frame)))) => {
                    let reason = |error| format!("its message can't be parsed: {error}");
                    let parsed = frame.parse();
                    all[rank] =
                        Some(parsed.map_err(|error| Error::PeerBuildFailed {
                            rank,
                            reason: reason(error),
                        })?);
                }
                Some(Err((_, error))) => return Err(error),
                None => {
                    let missing = (0..members.len()).filter(|&rank| all[rank].is_none());
                    notice.look(|| {
                        let missing: Vec<usize> = missing.clone().collect();
                        waits(self.rank(), &missing, &call, timeout)
                    });
                    let lost = missing.clone().find(|&rank| has_left(rank));
                    let (phase, committed) = (Phase::Exchange, false);
                    if let Some(rank) = lost {
                        return Err(Error::PeerLost { rank, phase, committed });
                    }
                    if Instant::now() >= deadline {
                        let rank = missing.clone().next().expect("a message is missing");
                        return Err(Error::Timeout { rank, timeout, phase, committed });
                    }
                }
            }
        }
    }
}
