//! From one generation of a world to the next: without members that were lost, or with one that joins.

use std::sync::atomic::Ordering;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::frame::Kind;
use super::links::{Generation, State};
use super::{places, Processes};
use crate::abi::PA_MAX_WORLD;
use crate::{Error, Result};

/// What a `Kind::Ready` says: the sender will take part.
const READY: u32 = 0;
/// It has been decided who does.
const DECIDED: u32 = 1;
/// How long a message takes that was sent already.
const SOON: Duration = Duration::from_millis(100);

impl Processes {
    /// Whether a process waits to be let in. Costs next to nothing.
    pub(in crate::world) fn has_guest(&self) -> bool {
        self.members().len() < PA_MAX_WORLD as usize && self.links.common.has_guest(self.number())
    }

    /// Whether a process was let in with this generation.
    pub(in crate::world) fn has_joined(&self) -> bool {
        self.generation.decision.joined.is_some()
    }

    /// This process has the model of the others, if it came late.
    pub(in crate::world) fn has_model(&self) {
        self.links.is_new.store(false, Ordering::Relaxed);
    }

    /// Leaves the world, if this process came late and has no model yet: others are not to wait for what it can't do.
    pub(in crate::world) fn leave_if_new(&self) {
        if self.links.is_new.load(Ordering::Relaxed) {
            self.links.leave();
        }
    }

    /// Collective among those that are left: the next generation, of all members that are there and say so within `timeout`, and
    /// of one more if all of them `admit` it.
    ///
    /// Each tells all others that it is ready, and which guests it knows, and waits until every other is ready or gone. Who comes
    /// first to such a list of members, or to the end of its patience, has it decided, by compare-and-swap from the generation
    /// before: the first list is everybody's. A process that dies on the way leaves nothing half done.
    pub(in crate::world) fn next_generation(&self, timeout: Duration, admits: bool) -> Result<Processes> {
        let mut latest = self.links.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.number() > self.number() {
            return Ok(self.view(latest.clone())); // another communicator of this process has been through it
        }
        if self.links.is_new.load(Ordering::Relaxed) {
            let reason = "it was let in, but lost a peer before it had the model: call World::join again";
            return Err(Error::Join { rendezvous: self.door.name().to_owned(), reason: reason.into() });
        }
        let (next, me) = (self.number() + 1, self.links.me);
        let deadline = Instant::now() + timeout;
        // Who can't hear the others is not the one to say who is there.
        if let Some((_, reason)) =
            self.links.lock().trouble.iter().find(|(peer, _)| self.members().contains(peer))
        {
            return Err(Error::SharedMemory { rank: self.rank(), reason: reason.clone() });
        }
        let guests = if admits { self.guests(deadline) } else { vec![] };
        let tell = |number, to: &[usize]| {
            for &peer in to.iter().filter(|&&peer| !self.links.lock().gone.contains(&peer)) {
                // One that does not listen is not ready, either.
                let _ = self.links.send(peer, (Kind::Ready, next, number), &guests, &[], deadline);
            }
        };
        let page = &self.links.common.page;
        let is_decided = || page.generation() >= next;
        if !is_decided() {
            let others: Vec<usize> = self.others().collect();
            tell(READY, &others);
            let ready = |state: &State, peer: usize| state.has(peer, (Kind::Ready, next, READY));
            let _ = self.links.wait(deadline, |state| {
                let all = others.iter().all(|&peer| state.gone.contains(&peer) || ready(state, peer));
                (all || is_decided()).then_some(())
            });
            let state = self.links.lock();
            let there = |peer: usize| peer == me || (ready(&state, peer) && !state.gone.contains(&peer));
            let mut members: Vec<usize> =
                self.members().iter().copied().filter(|&peer| there(peer)).collect();
            let known = |peer: usize, guest: usize| {
                let said = state.get(peer, (Kind::Ready, next, READY)).and_then(|frame| frame.parse().ok());
                peer == me || said.is_some_and(|guests: Vec<usize>| guests.contains(&guest))
            };
            // One at a time: two guests don't know each other.
            let joined = guests.iter().copied().find(|&guest| {
                !state.gone.contains(&guest) && members.iter().all(|&peer| known(peer, guest))
            });
            members.extend(joined.filter(|_| members.len() < PA_MAX_WORLD as usize));
            let told = [others, state.outsiders(self.members())].concat();
            drop(state);
            page.propose(me, &self.generation.decision, &members, joined);
            tell(DECIDED, &told); // wakes those that wait for somebody who is not coming, and guests
        }
        let decision = page.decision();
        if decision.generation != next || !decision.members.contains(&me) {
            return Err(Error::LeftOut { rank: self.rank(), timeout });
        }
        self.links.lock().forget_before(next);
        *latest = Generation::new(decision);
        Ok(self.view(latest.clone()))
    }

    /// Those that wait. Somebody has heard of one, so this process soon will, too, if it is still there.
    fn guests(&self, deadline: Instant) -> Vec<usize> {
        let soon = deadline.min(Instant::now() + SOON);
        let found = self
            .links
            .wait(soon, |state| Some(state.guests(self.number())).filter(|guests| !guests.is_empty()));
        found.unwrap_or_default()
    }

    fn view(&self, generation: Generation) -> Processes {
        let places = places(&self.links, &generation);
        Processes { links: self.links.clone(), generation, places, door: self.door.clone() }
    }
}
