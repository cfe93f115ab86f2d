//! Membership of a process in one view, and the exchange of messages with all other members.

mod handshake;
pub(crate) mod p2p_probe;
pub(crate) mod rebuild;
pub(crate) mod wire_handshake;

use std::os::fd::BorrowedFd;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::error::Phase;
use crate::world::gather::{Call, Inbox, Silence, Why};
use crate::world::handshake::Agreement;
use crate::world::placement::Placement;
use crate::world::processes::peers::peer_set::{CurrentView, PeerSet, ViewStatus};
use crate::world::processes::peers::state::{Ring, State};
use crate::world::processes::wire::frame::{Frame, Kind};
use crate::{deadline, Error, Result};

/// Longest time from `Communicator::join` to the averager of the joiner.
pub(crate) const JOINING: Duration = Duration::from_secs(60);

/// Membership of this process in one view.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) peer_set: Arc<PeerSet>,
    pub(crate) view: CurrentView,
}

impl Member {
    /// Membership in the current view.
    pub(crate) fn new(peer_set: PeerSet) -> Member {
        let view = peer_set.current();
        Member { peer_set: Arc::new(peer_set), view }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank_of(self.peer_set.me)
    }

    pub(crate) fn rank_of(&self, peer: usize) -> usize {
        self.ids().iter().position(|&other| other == peer).expect("a member")
    }

    /// Ids of all members, by rank.
    pub(crate) fn ids(&self) -> &[usize] {
        self.view.members()
    }

    /// Number of the view.
    pub(crate) fn number(&self) -> u32 {
        self.view.number()
    }

    /// Ids of all other members.
    pub(crate) fn others(&self) -> impl Iterator<Item = usize> + '_ {
        self.ids().iter().copied().filter(|&peer| peer != self.peer_set.me)
    }

    pub(crate) fn status(&self) -> MutexGuard<'_, ViewStatus> {
        self.view.status()
    }

    /// The failure that ended this view, if any. Returns the failure itself once and `Poisoned`
    /// afterwards.
    pub(crate) fn failure(&self) -> Option<Error> {
        let mut status = self.status();
        let failure = status.failure.clone()?;
        let told = std::mem::replace(&mut status.told, true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }

    /// Records that this view has failed.
    pub(crate) fn fail(&self, error: &Error) {
        let mut status = self.status();
        status.told = true;
        status.failure.get_or_insert_with(|| error.clone());
    }

    /// See `Elastic::has_lost_a_member`. A peer may report a failure before this process detects
    /// the departure.
    pub(crate) fn has_lost_a_member(&self) -> bool {
        let view = self.number();
        if self.status().failure.is_some() {
            return true;
        }
        let state = self.peer_set.lock();
        let has_failed = |(averager, ring): (Arc<Agreement>, Ring)| {
            ring.view == view && averager.control.failure().is_some()
        };
        let lost = self.others().any(|peer| state.is_lost(peer, view));
        lost || state.built().into_iter().any(has_failed)
    }

    pub(crate) fn watch(&self, agreement: &Arc<Agreement>, placement: &Placement) -> Result<()> {
        let peers = placement.order().iter().map(|&rank| self.ids()[rank]).collect();
        self.peer_set.watch(agreement, Ring { view: self.number(), peers });
        self.failure().map_or(Ok(()), Err) // aborted meanwhile
    }

    /// A call that all members make, from now on.
    pub(crate) fn call<'a>(&self, name: &'a str, phase: Phase, timeout: Duration) -> Call<'a> {
        let (rank, size, deadline) = (self.rank(), self.ids().len(), deadline::after(timeout));
        Call { rank, size, name, phase, timeout, deadline }
    }

    /// Sends a message to every other member and waits for theirs, which are returned by rank;
    /// `None` for this rank. Collective. `kind` and `number` tell the messages of this call from
    /// all others of the view.
    pub(crate) fn all_gather(
        &self,
        call: &Call<'_>,
        kind: (Kind, u32),
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<Option<Frame>>, Silence> {
        self.all_gather_until(call, kind, (body, files), false, &|_| false)
    }

    /// As `all_gather`. `refuses` and `has_left` are those of [`Call::receive`].
    pub(crate) fn all_gather_until(
        &self,
        call: &Call<'_>,
        (kind, number): (Kind, u32),
        (body, files): (&impl Serialize, &[BorrowedFd<'_>]),
        refuses: bool,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Option<Frame>>, Silence> {
        let key = (kind, self.number(), number);
        let sent = self.peer_set.send_to_all(self.others(), key, body, files, call.deadline);
        sent.map_err(|error| {
            let error = Error::SharedMemory { rank: call.rank, reason: error.to_string() };
            Silence { rank: call.rank, why: Why::Failed(error) }
        })?;
        call.receive(&Received { member: self, key }, refuses, has_left)
    }

    /// The reason why no message will come from a peer, if there is one.
    fn silence(&self, rank: usize, state: &State) -> Option<Silence> {
        let (peer, view) = (self.ids()[rank], self.number());
        let aborts = |peer: &usize| state.aborts(*peer, view);
        if let Some(rank) = self.ids().iter().position(aborts) {
            return Some(Silence { rank, why: Why::Aborted });
        }
        let why = match (self.failure(), state.unreadable.get(&peer)) {
            (Some(error), _) => Why::Failed(error),
            (None, Some(reason)) => Why::Unreadable(reason.clone()),
            (None, None) if state.is_lost(peer, view) => Why::Lost,
            (None, None) => return None,
        };
        Some(Silence { rank, why })
    }
}

/// The messages of one call, as this process receives them.
struct Received<'a> {
    member: &'a Member,
    key: (Kind, u32, u32),
}

impl Inbox for Received<'_> {
    type Message = Frame;
    /// One of the two processes may be stopped for a while.
    const UNDER_WAY: Duration = Duration::from_secs(2);

    fn take(&self, missing: &[usize], until: Instant) -> Result<Vec<(usize, Frame)>, Silence> {
        let Received { member, key } = *self;
        let came = member.peer_set.wait(until, |state| {
            let new = |&rank: &usize| Some((rank, state.take(member.ids()[rank], key)?));
            let new: Vec<(usize, Frame)> = missing.iter().filter_map(new).collect();
            if !new.is_empty() {
                return Some(Ok(new));
            }
            missing.iter().find_map(|&rank| member.silence(rank, state)).map(Err)
        });
        came.unwrap_or_else(|| Ok(vec![]))
    }

    fn has_departed(&self, rank: usize) -> bool {
        let Received { member, .. } = *self;
        member.peer_set.lock().is_lost(member.ids()[rank], member.number())
    }

    fn is_refusal(&self, frame: &Frame) -> bool {
        frame.kind == Kind::Verdict && frame.body != b"null"
    }
}
