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
        // An abort sent before this view change cancels an admission. A recovery ignores it: it is
        // the failure that is recovered from.
        let counts = if admits { &[0, 1][..] } else { &[1] };
        let aborted = |state: &State| {
            let has = |peer: &usize| {
                counts.iter().any(|&during| state.has(*peer, (Kind::Abort, next - 1, during)))
            };
            let own = counts.iter().any(|&during| self.status().aborted[during as usize]);
            self.others().find(has).or(own.then_some(me)).map(|peer| self.rank_of(peer))
        };
        let _guard = ViewChangeGuard::new(&self.peer_set);
        let joiners = if admits { self.joiners(deadline) } else { vec![] };
        let send_ready = |number, to: &[usize], deadline| {
            for &peer in to.iter().filter(|&&peer| !self.peer_set.lock().departed.contains(&peer)) {
                // A peer that does not read is not ready, either.
                let _ =
                    self.peer_set.send(peer, (Kind::Ready, next, number), &joiners, &[], deadline);
            }
        };
        let board = &self.peer_set.connections.board;
        let is_decided = || board.view() >= next;
        if !is_decided() {
            let others: Vec<usize> = self.others().collect();
            send_ready(READY, &others, deadline);
            let ready = |state: &State, peer: usize| state.has(peer, (Kind::Ready, next, READY));
            let all = |state: &State, but: Option<usize>| {
                let settled = |&peer: &usize| {
                    state.departed.contains(&peer) || ready(state, peer) || Some(peer) == but
                };
                others.iter().all(settled) || is_decided() || aborted(state).is_some()
            };
            // A joiner of this view that has no model yet is not waited for.
            let unsettled = self.unsettled();
            let mut notice = Notice::new(Some(self.rank()));
            let waiting = |state: &State| self.waits_for_view(state, next, timeout);
            let _ = self.peer_set.wait_and_tell(deadline, &mut notice, waiting, |state| {
                all(state, unsettled).then_some(())
            });
            let _ = self
                .peer_set
                .wait(deadline.min(Instant::now() + SOON), |state| all(state, None).then_some(()));
            let mut state = self.peer_set.lock();
            if let Some(rank) = aborted(&state) {
                self.others().for_each(|peer| drop(state.take(peer, (Kind::Abort, next - 1, 1))));
                self.status().aborted[1] = false;
                return Err(Error::Aborted { rank, phase: Phase::Build, committed: false });
            }
            let there = |peer: usize| {
                peer == me || (ready(&state, peer) && !state.departed.contains(&peer))
            };
            let mut members: Vec<usize> =
                self.ids().iter().copied().filter(|&peer| there(peer)).collect();
            let known = |peer: usize, joiner: usize| {
                let said = state
                    .get(peer, (Kind::Ready, next, READY))
                    .and_then(|frame| frame.parse().ok());
                peer == me || said.is_some_and(|joiners: Vec<usize>| joiners.contains(&joiner))
            };
            // At most one joiner: two joiners are not connected to each other.
            let mut joiners =
                joiners.iter().copied().filter(|_| members.len() < PA_MAX_WORLD as usize);
            let joined = joiners.find(|&joiner| {
                !state.departed.contains(&joiner) && members.iter().all(|&peer| known(peer, joiner))
            });
            members.extend(joined);
            let receivers = [others, state.outsiders(self.ids())].concat();
            drop(state);
            board.propose(me, &self.view.agreed, &members, joined);
            // Wakes members that wait for a process that will not arrive, and joiners.
            send_ready(DECIDED, &receivers, Instant::now() + SOON);
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
                let mut status = latest.status();
                (status.failure, status.told) = (Some(lost), false);
            }
        }
        Ok(entered)
    }

    /// Text of a notice: the members that the next view waits for.
    fn waits_for_view(&self, state: &State, next: u32, timeout: Duration) -> String {
        let is_ready = |peer: &usize| {
            state.departed.contains(peer) || state.has(*peer, (Kind::Ready, next, READY))
        };
        let late = self.others().filter(|peer| !is_ready(peer)).map(|peer| self.rank_of(peer));
        let late: Vec<String> = late.map(|rank| rank.to_string()).collect();
        format!(
            "rank {} waits for ranks {} to recover, too, or to admit a process; ranks that have \
                not called it after {timeout:?} are left out",
            self.rank(),
            late.join(", ")
        )
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
