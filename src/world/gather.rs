//! The wait for one message of every other rank: the only loop of its kind. Worlds differ in how
//! messages travel ([`Inbox`]), not in how they are waited for.

use std::time::{Duration, Instant};

use crate::error::Phase;
use crate::notice::Notice;
use crate::Error;

/// Time between two looks for what sends no notification: ranks that have dropped an averager.
const LOOK: Duration = Duration::from_millis(50);
/// Time to wait for further ranks after one has refused.
const SOON: Duration = Duration::from_millis(300);

/// The messages that one rank receives in one call that all ranks make.
pub(super) trait Inbox {
    type Message;

    /// Longest way of a message: it may still arrive when its sender has left.
    const UNDER_WAY: Duration;

    /// Takes the messages of `missing` ranks that have arrived, by rank. Waits for the first one,
    /// until `until`. An error if a message will never arrive.
    fn take(
        &self,
        missing: &[usize],
        until: Instant,
    ) -> Result<Vec<(usize, Self::Message)>, Silence>;

    /// True if a rank has departed, or has left the view.
    fn has_departed(&self, _: usize) -> bool {
        false
    }

    /// True if the message of a rank says that the call fails on every rank.
    fn is_refusal(&self, _: &Self::Message) -> bool {
        false
    }
}

/// A call that all ranks make.
pub(super) struct Call<'a> {
    /// This rank, of `size` ranks.
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The call in words, for a notice.
    pub(super) name: &'a str,
    /// Phase that errors name.
    pub(super) phase: Phase,
    pub(super) timeout: Duration,
    /// End of the timeout, which may have begun before this call.
    pub(super) deadline: Instant,
}

/// Why a message is missing.
#[derive(Debug)]
pub(super) enum Why {
    /// The rank has departed, or has left the view.
    Lost,
    /// The rank has aborted the world. It may be another rank than the one that was waited for.
    Aborted,
    /// Messages of the rank can't be received, for this reason.
    Unreadable(String),
    /// The world has failed before.
    Failed(Error),
    /// The deadline has passed.
    Late,
}

/// A rank whose message is missing.
#[derive(Debug)]
pub(super) struct Silence {
    pub(super) rank: usize,
    pub(super) why: Why,
}

impl Silence {
    /// The error of a call.
    pub(super) fn error(self, call: &Call<'_>) -> Error {
        let Call { phase, timeout, .. } = *call;
        let (rank, committed) = (self.rank, false);
        match self.why {
            Why::Lost => Error::PeerLost { rank, phase, committed },
            Why::Aborted => Error::Aborted { rank, phase, committed },
            Why::Unreadable(reason) => {
                let reason = format!("messages of rank {rank} can't be received: {reason}");
                Error::SharedMemory { rank: call.rank, reason }
            }
            Why::Failed(error) => error,
            Why::Late => Error::Timeout { rank, timeout, phase, committed },
        }
    }
}

impl Call<'_> {
    /// Waits for one message of every other rank, and returns them by rank; `None` for this rank.
    /// `has_left` tells whether a rank has given up what the call is about. After a refusal, by
    /// this rank (`refuses`) or another, further messages are waited for briefly, and may be
    /// `None`.
    pub(super) fn receive<I: Inbox>(
        &self,
        inbox: &I,
        mut refuses: bool,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Option<I::Message>>, Silence> {
        let mut all: Vec<Option<I::Message>> = (0..self.size).map(|_| None).collect();
        let (mut deadline, mut notice) = (self.deadline, Notice::new(Some(self.rank)));
        let mut left_at = None;
        loop {
            let is_missing = |&rank: &usize| rank != self.rank && all[rank].is_none();
            let missing: Vec<usize> = (0..self.size).filter(is_missing).collect();
            let Some(&first) = missing.first() else { return Ok(all) };
            if refuses {
                deadline = deadline.min(Instant::now() + SOON);
            }
            let new = match inbox.take(&missing, deadline.min(Instant::now() + LOOK)) {
                Ok(new) => new,
                Err(_) if refuses => return Ok(all),
                Err(silence) => return Err(silence),
            };
            if new.is_empty() {
                notice.look(|| waits_for_call(self.rank, &missing, self.name, self.timeout));
                // It may have left after the call, with its message still under way.
                let left = missing.iter().copied().find(|&rank| has_left(rank));
                // A build has more messages than this one: it can't end without a rank that has
                // sent this one and departed, unless all the others are under way.
                let departed = |&rank: &usize| {
                    rank != self.rank && all[rank].is_some() && inbox.has_departed(rank)
                };
                let is_build = self.phase == Phase::Build;
                let left = left.or_else(|| (0..self.size).filter(|_| is_build).find(departed));
                let since = *left_at.get_or_insert_with(Instant::now);
                match left {
                    None => left_at = None,
                    Some(rank) if since.elapsed() >= I::UNDER_WAY => {
                        return Err(Silence { rank, why: Why::Lost });
                    }
                    Some(_) => {}
                }
                if Instant::now() >= deadline {
                    let late = Silence { rank: first, why: Why::Late };
                    return if refuses { Ok(all) } else { Err(late) };
                }
            }
            for (rank, message) in new {
                refuses |= inbox.is_refusal(&message);
                all[rank] = Some(message);
            }
        }
    }
}

/// Text of a notice: `rank` waits for these to make the same call.
fn waits_for_call(rank: usize, missing: &[usize], call: &str, timeout: Duration) -> String {
    let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
    let (several, missing) = (if missing.len() > 1 { "s" } else { "" }, missing.join(", "));
    format!(
        "rank {rank} waits for rank{several} {missing} to {call}, which every rank does at the \
            same time, on a thread or process of its own; the wait ends after {timeout:?}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Messages by rank, which arrive one by one. Where none is left, the inbox fails, if it has a
    /// reason, or waits.
    struct Fake {
        arriving: RefCell<Vec<(usize, &'static str)>>,
        departed: Option<usize>,
        silence: Option<fn() -> Silence>,
    }

    impl Inbox for Fake {
        type Message = &'static str;
        const UNDER_WAY: Duration = Duration::from_millis(200);

        fn take(
            &self,
            missing: &[usize],
            until: Instant,
        ) -> Result<Vec<(usize, &'static str)>, Silence> {
            if let Some((rank, message)) = self.arriving.borrow_mut().pop() {
                assert!(missing.contains(&rank));
                return Ok(vec![(rank, message)]);
            }
            self.silence.map_or(Ok(()), |silence| Err(silence()))?;
            std::thread::sleep(until.saturating_duration_since(Instant::now()));
            Ok(vec![])
        }

        fn has_departed(&self, rank: usize) -> bool {
            self.departed == Some(rank)
        }

        fn is_refusal(&self, message: &&'static str) -> bool {
            *message == "no"
        }
    }

    const LONG: Duration = Duration::from_secs(600);

    fn receive(
        timeout: Duration,
        arriving: &[(usize, &'static str)],
        silence: Option<fn() -> Silence>,
        refuses: bool,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Option<&'static str>>, Silence> {
        let deadline = crate::deadline::after(timeout);
        let phase = Phase::Build;
        let call = Call { rank: 1, size: 4, name: "test", phase, timeout, deadline };
        let inbox = Fake { arriving: RefCell::new(arriving.to_vec()), departed: None, silence };
        call.receive(&inbox, refuses, has_left)
    }

    const ALL: [(usize, &str); 3] = [(0, "a"), (2, "c"), (3, "d")];

    #[test]
    fn all_messages_are_returned_by_rank() {
        let all = receive(LONG, &ALL, None, false, &|_| false).unwrap();
        assert_eq!(all, [Some("a"), None, Some("c"), Some("d")]);
    }

    #[test]
    fn the_first_late_rank_is_named_at_the_deadline() {
        let begin = Instant::now();
        let late = receive(Duration::from_millis(120), &ALL[..1], None, false, &|_| false);
        assert!(matches!(late, Err(Silence { rank: 2, why: Why::Late })), "{late:?}");
        assert!(begin.elapsed() >= Duration::from_millis(120), "{:?}", begin.elapsed());
    }

    #[test]
    fn a_reason_for_silence_ends_the_call() {
        let lost = || Silence { rank: 3, why: Why::Lost };
        let lost = receive(LONG, &ALL[..2], Some(lost), false, &|_| false);
        assert!(matches!(lost, Err(Silence { rank: 3, why: Why::Lost })), "{lost:?}");
    }

    /// A refusal, of this rank or of another, is every rank's error, so nothing else matters.
    #[test]
    fn after_a_refusal_others_are_waited_for_briefly() {
        let begin = Instant::now();
        let all = receive(LONG, &[(2, "no")], None, false, &|_| false).unwrap();
        assert_eq!(all, [None, None, Some("no"), None]);
        let all = receive(LONG, &[(0, "a")], None, true, &|_| false).unwrap();
        assert_eq!(all, [Some("a"), None, None, None]);
        assert!(begin.elapsed() >= 2 * SOON, "{:?}", begin.elapsed());
        assert!(begin.elapsed() < LONG / 10, "{:?}", begin.elapsed());
        let lost = || Silence { rank: 3, why: Why::Lost };
        let all = receive(LONG, &[(0, "a")], Some(lost), true, &|_| false).unwrap();
        assert_eq!(all, [Some("a"), None, None, None]);
    }

    /// A rank that has sent its message ends a build when it departs, but no other call: there it
    /// may have all messages.
    #[test]
    fn a_rank_that_departs_after_its_message_ends_a_build() {
        let receive = |phase, arriving: &[(usize, &'static str)], timeout| {
            let deadline = crate::deadline::after(timeout);
            let call = Call { rank: 1, size: 4, name: "test", phase, timeout, deadline };
            let arriving = RefCell::new(arriving.to_vec());
            let inbox = Fake { arriving, departed: Some(2), silence: None };
            call.receive(&inbox, false, &|_| false)
        };
        let lost = receive(Phase::Build, &ALL[..2], LONG);
        assert!(matches!(lost, Err(Silence { rank: 2, why: Why::Lost })), "{lost:?}");
        assert!(receive(Phase::Build, &ALL, LONG).is_ok(), "all had arrived");
        let late = receive(Phase::Exchange, &ALL[..2], 4 * Fake::UNDER_WAY);
        assert!(matches!(late, Err(Silence { rank: 3, why: Why::Late })), "{late:?}");
    }

    /// The last message of a rank may still arrive when the rank has left.
    #[test]
    fn a_rank_that_has_left_is_lost_when_no_message_can_be_under_way() {
        let begin = Instant::now();
        let lost = receive(LONG, &ALL[..2], None, false, &|rank| rank == 3);
        assert!(matches!(lost, Err(Silence { rank: 3, why: Why::Lost })), "{lost:?}");
        assert!(begin.elapsed() >= Fake::UNDER_WAY, "{:?}", begin.elapsed());
        assert!(begin.elapsed() < LONG / 10, "{:?}", begin.elapsed());
    }
}
