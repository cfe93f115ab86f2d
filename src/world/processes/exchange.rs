//! Exchange of small messages between processes.

use std::time::{Duration, Instant};

use super::frame::{Frame, Kind};
use super::ProcessBootstrap;
use crate::deadline;
use crate::error::Phase;
use crate::notice::{self, Notice};
use crate::world::exchange::{in_exchange, ExchangeId, Shown, LOOK};
use crate::world::waits_for_call;
use crate::{Error, Result};

/// Longest way of a message between two processes of one host, one of which may be stopped for a
/// while.
const UNDER_WAY: Duration = Duration::from_secs(2);

/// Number of an exchange in messages: 16 bits for the averager, the first of them for those that
/// were built again, and 16 for the exchange. Ranks are never far apart: each waits for the others.
fn key_of(ExchangeId { averager, number }: ExchangeId) -> u32 {
    ((averager & 0x7fff) | (averager >> 31) << 15) << 16 | (number & 0xffff)
}

/// True if a message of an exchange has no receiver any more, since its sender has shown `newer`:
/// it shows one only when all ranks have completed the last but one before it.
pub(super) fn is_over(number: u32, newer: u32) -> bool {
    let ahead = (newer as u16).wrapping_sub(number as u16) as i16;
    number >> 16 == newer >> 16 && ahead >= 4 && ahead % 2 == 0
}

/// An event of an exchange.
enum Event {
    Message(usize, Frame),
    Failed(Error),
}

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
            return Err(in_exchange(failure));
        }
        let (deadline, own) = (deadline::after(timeout), self.rank());
        let (mut notice, call) = (Notice::new(Some(own)), format!("call {}", shown.call));
        let key = (Kind::Exchange, self.number(), key_of(id));
        let sent = self.peer_set.send_to_all(self.others(), key, &shown, &[], deadline);
        sent.expect("only a message that is too large can't be sent");
        let members = self.members();
        let mut all: Vec<Option<Shown>> = vec![None; members.len()];
        all[own] = Some(shown);
        let (phase, committed) = (Phase::Exchange, false);
        let mut left_at = None;
        loop {
            let missing: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].is_none()).collect();
            let Some(&first) = missing.first() else {
                return Ok(all.into_iter().flatten().collect());
            };
            let event = self.peer_set.wait(deadline.min(Instant::now() + LOOK), |state| {
                let message =
                    |&rank: &usize| Some(Event::Message(rank, state.take(members[rank], key)?));
                if let Some(message) = missing.iter().find_map(message) {
                    return Some(message);
                }
                let silence = |&rank: &usize| {
                    let error = self.reason_for_silence(rank, members[rank], state, phase)?;
                    Some(Event::Failed(match error {
                        // Its messages can't be received any more, so it is lost for this rank.
                        Error::SharedMemory { reason, .. } => {
                            notice::warn(Some(own), &reason);
                            Error::PeerLost { rank, phase, committed }
                        }
                        error => in_exchange(error),
                    }))
                };
                missing.iter().find_map(silence)
            });
            match event {
                Some(Event::Message(rank, frame)) => match frame.parse() {
                    Ok(shown) => all[rank] = Some(shown),
                    Err(error) => {
                        let text = format!("the message of rank {rank} can't be parsed: {error}");
                        notice::warn(Some(own), &text);
                        return Err(Error::PeerLost { rank, phase, committed });
                    }
                },
                Some(Event::Failed(error)) => return Err(error),
                None => {
                    notice.look(|| waits_for_call(own, &missing, &call, timeout));
                    let left = missing.iter().copied().find(|&rank| has_left(rank));
                    // It may have left after the exchange, with its message still under way.
                    let since = left_at.get_or_insert_with(Instant::now);
                    match left {
                        None => left_at = None,
                        Some(rank) if since.elapsed() >= UNDER_WAY => {
                            return Err(Error::PeerLost { rank, phase, committed });
                        }
                        Some(_) => {}
                    }
                    if Instant::now() >= deadline {
                        return Err(Error::Timeout { rank: first, timeout, phase, committed });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averagers_built_again_have_numbers_of_their_own() {
        let key = |averager, number| key_of(ExchangeId { averager, number });
        assert_ne!(key(0, 0), key(1 << 31, 0));
        assert_ne!(key(3, 0), key(3 | 1 << 31, 0));
        assert_ne!(key(0, 2), key(1, 2));
    }

    #[test]
    fn messages_are_over_when_their_sender_is_two_exchanges_ahead() {
        let key = |number| key_of(ExchangeId { averager: 1, number });
        for (number, newer, expected) in [
            (0, 0, false),
            (0, 2, false), // its sender has completed this one, and this rank perhaps not
            (0, 4, true),
            (4, 0, false),
            (0, 5, false),     // exchanges of descriptions have odd numbers
            (65_534, 2, true), // numbers wrap around
        ] {
            assert_eq!(is_over(key(number), key(newer)), expected, "{number} {newer}");
        }
        assert!(!is_over(key(0), key_of(ExchangeId { averager: 2, number: 8 })));
    }
}
