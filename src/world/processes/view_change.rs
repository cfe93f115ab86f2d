//! View changes: removal of lost members and admission of a joiner.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::abi::PA_MAX_WORLD;
use crate::deadline;
use crate::error::Phase;
use crate::notice::{self, Notice};
use crate::sync::lock;
use crate::world::processes::member::{p2p_probe, Member, JOINING};
use crate::world::processes::peers::peer_set::{CurrentView, PeerSet};
use crate::world::processes::peers::state::State;
use crate::world::processes::wire::frame::Kind;
use crate::{Error, Result};

/// Number of a `Kind::Ready` from a process that will take part.
const READY: u32 = 0;
/// Number of a `Kind::Ready` from a process that has decided the view.
const DECIDED: u32 = 1;
/// Time for a message that was sent already to arrive.
const SOON: Duration = Duration::from_millis(100);

impl Member {
    /// Changes to the next view. Collective among the surviving members. The next view has all
    /// members that are connected and call this function within `timeout`, and one joiner if all
    /// members pass `admits`.
    ///
    /// Each process sends all others `Ready`, with the joiners it knows, and waits until every
    /// other process is ready or departed. The first process that has such a list, or runs out of
    /// time, decides the view by compare-and-swap from the view before. All members adopt the first
    /// list, so a process that dies during the change leaves no partial state.
    pub(crate) fn next_view(&self, name: &str, timeout: Duration, admits: bool) -> Result<Member> {
        let mut latest = lock(&self.peer_set.latest);
        if latest.number() > self.number() {
            // another communicator of this process has changed the view
            return Ok(self.entered(latest.clone()));
        }
        if self.peer_set.is_new.load(Ordering::Relaxed) {
            self.peer_set.leave();
            let reason = "it was admitted, but lost a peer before it received the model: call \
                    Communicator::join again";
            return Err(Error::JoinRefused { rendezvous: name.to_owned(), reason: reason.into() });
        }
        let (next, me) = (self.number() + 1, self.peer_set.me);
        let deadline = deadline::after(timeout);
        // A process that can't receive from its peers must not decide the list of members.
        let is_needed = |peer: &usize| self.ids().contains(peer) && Some(*peer) != self.unsettled();
        if let Some((_, reason)) =
            self.peer_set.lock().unreadable.iter().find(|(peer, _)| is_needed(peer))
        {
            return Err(Error::SharedMemory { rank: self.rank(), reason: reason.clone() });
        }
        let board = &self.peer_set.connections.board;
        let _guard = ViewChangeGuard::new(&self.peer_set);
        let joiners = if admits { self.joiners(deadline) } else { vec![] };
        let others = self.others().collect();
        let change = ViewChange { member: self, next, others, joiners, admits };
        if !change.is_decided() {
            change.collect_ready(deadline, timeout);
            change.decide()?;
        }
        let agreed = board.agreed();
        if agreed.number != next || !agreed.members.contains(&me) {
            return Err(Error::Excluded { rank: self.rank(), timeout });
        }
        *latest = CurrentView::new(agreed);
        self.peer_set.enter(&latest);
        self.tell_of_lost(latest.members());
        let entered = self.entered(latest.clone());
        if let Some(joined) = latest.agreed.joined {
            if p2p_probe::find(&entered, timeout.min(JOINING)).is_err() {
                // The average that transfers the model fails on all ranks then, and the next view
                // excludes the joiner.
                let rank = latest.members().iter().position(|&id| id == joined).unwrap_or(0);
                let lost = Error::PeerLost { rank, phase: Phase::Build, committed: false };
                latest.status().failure.get_or_insert(lost); // unless it was aborted
            }
        }
        Ok(entered)
    }

    /// Warns of members that the next view goes on without.
    fn tell_of_lost(&self, next: &[usize]) {
        let lost = self.ids().iter().filter(|peer| !next.contains(peer));
        let lost: Vec<String> = lost.map(|&peer| self.rank_of(peer).to_string()).collect();
        if !lost.is_empty() {
            let (lost, left) = (lost.join(", "), next.len());
            notice::warn(
                Some(self.rank()),
                &format!("the world goes on without rank {lost}: {left} ranks are left"),
            );
        }
    }

    /// The joiner of this view, until it is known to have a model.
    fn unsettled(&self) -> Option<usize> {
        self.view.agreed.joined.filter(|_| !self.view.settled.load(Ordering::Relaxed))
    }

    /// Joiners that are currently waiting. Some peer has already seen one; waits briefly for its
    /// `JoinPending` to reach this process.
    fn joiners(&self, deadline: Instant) -> Vec<usize> {
        let soon = deadline.min(Instant::now() + SOON);
        let found = self.peer_set.wait(soon, |state| {
            Some(state.joiners(self.number())).filter(|joiners| !joiners.is_empty())
        });
        found.unwrap_or_default()
    }

    /// Membership of this process in a later view.
    fn entered(&self, view: CurrentView) -> Member {
        Member { peer_set: self.peer_set.clone(), view }
    }
}

/// A change to view `next`, which no process has decided when it begins.
struct ViewChange<'a> {
    member: &'a Member,
    next: u32,
    /// All other members.
    others: Vec<usize>,
    /// Joiners that this process knows.
    joiners: Vec<usize>,
    admits: bool,
}

impl ViewChange<'_> {
    /// Tells all other members that this process is ready, and waits until each is ready or
    /// departed, or another process has decided the view.
    fn collect_ready(&self, deadline: Instant, timeout: Duration) {
        let peer_set = &self.member.peer_set;
        self.send_ready(READY, &self.others, deadline);
        let all = |state: &State, but: Option<usize>| {
            let settled = |&peer: &usize| {
                state.departed.contains(&peer) || self.is_ready(state, peer) || Some(peer) == but
            };
            let is_over = || self.is_decided() || self.aborted(state).is_some();
            self.others.iter().all(settled) || is_over()
        };
        // A joiner of this view that has no model yet is not waited for.
        let unsettled = self.member.unsettled();
        let mut notice = Notice::new(Some(self.member.rank()));
        let waiting = |state: &State| self.waiting(state, timeout);
        let _ = peer_set.wait_and_tell(deadline, &mut notice, waiting, |state| {
            all(state, unsettled).then_some(())
        });
        let soon = deadline.min(Instant::now() + SOON);
        let _ = peer_set.wait(soon, |state| all(state, None).then_some(()));
    }

    /// Decides the view, unless another process has: its members are those that are ready.
    fn decide(&self) -> Result<()> {
        let (peer_set, me) = (&self.member.peer_set, self.member.peer_set.me);
        let mut state = peer_set.lock();
        if let Some(rank) = self.aborted(&state) {
            let during = (Kind::Abort, self.next - 1, 1);
            self.others.iter().for_each(|&peer| drop(state.take(peer, during)));
            self.member.status().aborted[1] = false;
            return Err(Error::Aborted { rank, phase: Phase::Build, committed: false });
        }
        let there = |peer: &usize| {
            *peer == me || (self.is_ready(&state, *peer) && !state.departed.contains(peer))
        };
        let mut members: Vec<usize> = self.member.ids().iter().copied().filter(there).collect();
        let joined = self.joiner_of_all(&state, &members);
        members.extend(joined);
        let receivers = [&self.others[..], &state.outsiders(self.member.ids())].concat();
        drop(state);
        peer_set.connections.board.propose(me, &self.member.view.agreed, &members, joined);
        // Wakes members that wait for a process that will not arrive, and joiners.
        self.send_ready(DECIDED, &receivers, Instant::now() + SOON);
        Ok(())
    }

    /// A joiner that all of these members know. At most one: two joiners are not connected to each
    /// other.
    fn joiner_of_all(&self, state: &State, members: &[usize]) -> Option<usize> {
        let known = |peer: usize, joiner: usize| {
            let frame = state.get(peer, (Kind::Ready, self.next, READY));
            let said = frame.and_then(|frame| frame.parse().ok());
            peer == self.member.peer_set.me
                || said.is_some_and(|joiners: Vec<usize>| joiners.contains(&joiner))
        };
        let mut joiners =
            self.joiners.iter().copied().filter(|_| members.len() < PA_MAX_WORLD as usize);
        joiners.find(|&joiner| {
            !state.departed.contains(&joiner) && members.iter().all(|&peer| known(peer, joiner))
        })
    }

    /// The rank that has aborted. An abort sent before this view change cancels an admission. A
    /// recovery ignores it: it is the failure that is recovered from.
    fn aborted(&self, state: &State) -> Option<usize> {
        let counts = if self.admits { &[0, 1][..] } else { &[1] };
        let has = |peer: &usize| match self.admits {
            true => state.aborts(*peer, self.next - 1),
            false => state.has(*peer, (Kind::Abort, self.next - 1, 1)),
        };
        let own = counts.iter().any(|&during| self.member.status().aborted[during as usize]);
        let own = own.then_some(self.member.peer_set.me);
        let aborted = self.others.iter().copied().find(has).or(own);
        aborted.map(|peer| self.member.rank_of(peer))
    }

    fn send_ready(&self, number: u32, to: &[usize], deadline: Instant) {
        let (peer_set, key) = (&self.member.peer_set, (Kind::Ready, self.next, number));
        for &peer in to.iter().filter(|&&peer| !peer_set.lock().departed.contains(&peer)) {
            // A peer that does not read is not ready, either.
            let _ = peer_set.send(peer, key, &self.joiners, &[], deadline);
        }
    }

    fn is_ready(&self, state: &State, peer: usize) -> bool {
        state.has(peer, (Kind::Ready, self.next, READY))
    }

    fn is_decided(&self) -> bool {
        self.member.peer_set.connections.board.view() >= self.next
    }

    /// Text of a notice: the members that the next view waits for.
    fn waiting(&self, state: &State, timeout: Duration) -> String {
        let is_late =
            |peer: &&usize| !state.departed.contains(peer) && !self.is_ready(state, **peer);
        let late = self.others.iter().filter(is_late).map(|&peer| self.member.rank_of(peer));
        let late: Vec<String> = late.map(|rank| rank.to_string()).collect();
        format!(
            "rank {} waits for ranks {} to recover, too, or to admit a process; ranks that have \
                not called it after {timeout:?} are left out",
            self.member.rank(),
            late.join(", ")
        )
    }
}

/// Marks aborts as sent during a view change, while it exists.
struct ViewChangeGuard<'a>(&'a PeerSet);

impl<'a> ViewChangeGuard<'a> {
    fn new(peer_set: &'a PeerSet) -> Self {
        peer_set.is_changing.store(true, Ordering::Relaxed);
        ViewChangeGuard(peer_set)
    }
}

impl Drop for ViewChangeGuard<'_> {
    fn drop(&mut self) {
        self.0.is_changing.store(false, Ordering::Relaxed);
    }
}
