//! Ranks that are processes of one host: they meet over sockets, and their mailboxes are in memory that they share.

mod frame;
mod home;
mod launcher;
mod links;
mod reach;
mod rendezvous;
mod shown;

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Agreement, Card, Control, Device, Places};
use crate::backend::Memory;
use crate::error::Stage;
use crate::{Error, Result};
use frame::{Frame, Kind};
pub(super) use home::Home;
use home::{Homes, Own};
use links::{Fate, Generation, Links, Ring};
use rendezvous::Me;
use shown::{Reader, Shown};

/// One generation of a world, as one of its processes sees it.
#[derive(Debug)]
pub(super) struct Processes {
    links: Arc<Links>,
    generation: Generation,
    homes: Arc<Homes>,
    places: Places,
}

/// What a launcher, or the caller, says.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) name: String,
}

impl Setup {
    /// What the environment says.
    pub(super) fn of_the_environment() -> Result<Setup> {
        let found = launcher::Launched::find(|name| match name {
            launcher::PARENT => rustix::process::getppid().map(|parent| parent.as_raw_pid().to_string()),
            name => std::env::var(name).ok(),
        });
        let launcher::Launched { rank, world_size, name } =
            found.map_err(|problem| Error::Environment { problem })?;
        Ok(Setup { rank, world_size, name })
    }
}

impl Processes {
    /// Collective.
    pub(super) fn meet(setup: Setup, device: Device, timeout: Duration) -> Result<Processes> {
        let Setup { rank, world_size, name } = setup;
        let failed = |reason| Error::Rendezvous { rank, reason };
        let own = Own::find(device);
        let home = own.as_ref().map_or_else(|_| Home::unknown(device), |own| own.home.clone());
        let unavailable = |reason: &String| Error::DeviceUnavailable {
            rank,
            device: device.to_string(),
            reason: reason.clone(),
        };
        let refusal = own.as_ref().err().map(unavailable);
        let me = Me { name, rank, world_size, home, refusal: refusal.as_ref().map(Error::to_string) };
        let met = rendezvous::meet(&me, timeout);
        let own = own.map_err(|reason| unavailable(&reason))?; // the others know
        let mut crew = met.map_err(failed)?;
        let homes = std::mem::take(&mut crew.homes);
        let links =
            Links::new(rank, crew).map_err(|error| failed(format!("can't listen to peers: {error}")))?;
        let generation = links.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut homes = Homes::new(own, homes.into_iter().enumerate().collect());
        let deadline = Instant::now() + timeout;
        reach::find(&links, generation.number, &generation.members, &mut homes, deadline).map_err(failed)?;
        let places = homes.places(&generation.members);
        // All write the same, before anybody can be in another generation.
        let _ = links.membership().compare_exchange(
            0,
            links::word(0, generation.members.iter().copied()),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        Ok(Processes { links: Arc::new(links), generation, homes: Arc::new(homes), places })
    }

    pub(super) fn rank(&self) -> usize {
        self.members().iter().position(|&peer| peer == self.links.me).expect("it is a member")
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    fn members(&self) -> &[usize] {
        &self.generation.members
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        self.members().iter().copied().filter(|&peer| peer != self.links.me)
    }

    /// As `Hub::agree`: every rank sends its card to every other, and each sees for itself whether they go together.
    pub(super) fn agree(&self, card: Card, timeout: Duration) -> Result<Arc<Agreement>> {
        let number = self.generation.builds.fetch_add(1, Ordering::Relaxed);
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let deadline = Instant::now() + timeout;
        let key = (Kind::Card, self.generation.number, number);
        let (body, files) = Shown::of(&card);
        let (body, files) = (&body, &files);
        let sent = std::thread::scope(|scope| {
            // To all at once: one that does not listen keeps no other waiting. Who is gone is found out below.
            let send = |peer| scope.spawn(move || self.links.send(peer, key, body, files, deadline));
            let sends: Vec<_> = self.others().map(send).collect();
            sends.into_iter().try_for_each(|sent| match sent.join() {
                Ok(Err(error)) if error.kind() == std::io::ErrorKind::InvalidInput => Err(error.to_string()),
                _ => Ok(()),
            })
        });
        sent.map_err(|reason| self.fail(Error::SharedMemory { rank: self.rank(), reason }))?;
        let mut cards = vec![];
        for (rank, &peer) in self.members().iter().enumerate() {
            if peer == self.links.me {
                cards.push(card.clone());
                continue;
            }
            let came = self.links.wait(deadline, |state| self.card_of(rank, peer, key, state));
            let late = || Error::Timeout { rank, timeout, stage: Stage::Build, committed: false };
            let frame = came.unwrap_or_else(|| Err(late())).map_err(|error| self.fail(error))?;
            let reader =
                Reader { rank: self.rank(), site: self.places.site(self.rank()), wanted: self.wanted(rank) };
            cards.push(Shown::read(frame, rank, reader).map_err(|error| self.fail(error))?);
        }
        let agreement = Agreement::of(cards)?;
        for (rank, theirs) in agreement.cards.iter().enumerate() {
            let [inbox, credits, control] = self.wanted(rank);
            let bytes = |memory: &Option<Arc<Memory>>| memory.as_ref().map(|memory| memory.bytes());
            let right = (!inbox || bytes(&theirs.inbox) == bytes(&card.inbox))
                && (!credits || bytes(&theirs.credits) == bytes(&card.credits))
                && (!control
                    || theirs.control.as_ref().is_some_and(|c| c.memory().bytes() == Control::BYTES));
            if !right {
                let reason = "its memory is not of the size that its options make it".into();
                return Err(self.fail(Error::PeerRefused { rank, reason }));
            }
        }
        let agreement = Arc::new(agreement);
        self.links.watch(&agreement, self.ring());
        match self.failure() {
            Some(failure) => Err(failure), // aborted meanwhile
            None => Ok(agreement),
        }
    }

    /// Whether a peer's card has come, or why it does not.
    fn card_of(
        &self,
        rank: usize,
        peer: usize,
        key: (Kind, u32, u32),
        state: &mut links::State,
    ) -> Option<Result<Frame>> {
        let stage = Stage::Build;
        let aborts = |peer: &usize| state.has(*peer, (Kind::Abort, self.generation.number, 0));
        if let Some(rank) = self.members().iter().position(aborts) {
            return Some(Err(Error::Aborted { rank, stage, committed: false }));
        }
        if let Some(failure) = self.failure() {
            return Some(Err(failure));
        }
        if let Some(frame) = state.take(peer, key) {
            return Some(Ok(frame));
        }
        match state.trouble.get(&peer) {
            Some(reason) => {
                let reason = format!("what rank {rank} says can't be understood: {reason}");
                Some(Err(Error::SharedMemory { rank: self.rank(), reason }))
            }
            None if state.gone[peer] || state.is_past(peer, self.generation.number) => {
                Some(Err(Error::PeerLost { rank, stage, committed: false }))
            }
            None => None,
        }
    }

    pub(super) fn abort(&self) {
        let rank = self.rank();
        // Told once more, to what averages or builds in another thread.
        let failure = Error::Aborted { rank, stage: Stage::Build, committed: false };
        self.fate().failure.get_or_insert(failure);
        let built = self.links.lock().built();
        for (agreement, _) in built.into_iter().filter(|(_, ring)| ring.generation == self.generation.number)
        {
            agreement.control.abort(self.places.position(rank));
        }
        self.links.changed();
        self.others().for_each(|peer| self.links.try_send(peer, (Kind::Abort, self.generation.number, 0)));
    }

    /// Whether the inbox, the credits and the control of this rank are used here.
    fn wanted(&self, rank: usize) -> [bool; 3] {
        let (own, world) = (self.places.position(self.rank()), self.members().len());
        let position = self.places.position(rank);
        [position == (own + 1) % world, (position + 1) % world == own, rank == 0]
    }

    fn ring(&self) -> Ring {
        let peers = self.places.order().iter().map(|&rank| self.members()[rank]);
        Ring { generation: self.generation.number, peers: peers.collect() }
    }

    /// Collective among those that are left: the next generation, of all members that are there and say so within `timeout`.
    ///
    /// Each tells all others that it is ready, and waits until every other is ready or gone. Who comes first to such a list
    /// of members, or to the end of its patience, puts it into the word that all share, by compare-and-swap from the one of the
    /// generation before: the first list is everybody's. A process that dies on the way leaves nothing half done.
    pub(super) fn next_generation(&self, timeout: Duration) -> Result<Processes> {
        const READY: u32 = 0;
        const DECIDED: u32 = 1;
        let mut latest = self.links.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if latest.number > self.generation.number {
            return Ok(self.view(latest.clone())); // another communicator of this process has been through it
        }
        let (next, me) = (self.generation.number + 1, self.links.me);
        let deadline = Instant::now() + timeout;
        // Who can't hear the others is not the one to say who is there.
        if let Some((_, reason)) =
            self.links.lock().trouble.iter().find(|(peer, _)| self.members().contains(peer))
        {
            return Err(Error::SharedMemory { rank: self.rank(), reason: reason.clone() });
        }
        let tell = |number| {
            for peer in self.others().filter(|&peer| !self.links.lock().gone[peer]) {
                // One that does not listen is not ready, either.
                let _ = self.links.send(peer, (Kind::Ready, next, number), &(), &[], deadline);
            }
        };
        let word = self.links.membership();
        let is_decided = || links::read(word).0 >= next;
        if !is_decided() {
            tell(READY);
            let ready = |state: &links::State, peer: usize| state.has(peer, (Kind::Ready, next, READY));
            let _ = self.links.wait(deadline, |state| {
                let all = self.others().all(|peer| state.gone[peer] || ready(state, peer));
                (all || is_decided()).then_some(())
            });
            let state = self.links.lock();
            let there = |peer: &usize| *peer == me || (ready(&state, *peer) && !state.gone[*peer]);
            let proposed = links::word(next, self.members().iter().copied().filter(there));
            drop(state);
            let last = links::word(self.generation.number, self.members().iter().copied());
            let _ = word.compare_exchange(last, proposed, Ordering::AcqRel, Ordering::Acquire);
            tell(DECIDED); // wakes those that wait for somebody who is not coming
        }
        let (generation, members) = links::read(word);
        if generation != next || !members.contains(&me) {
            return Err(Error::LeftOut { rank: self.rank(), timeout });
        }
        self.links.lock().forget_before(next);
        *latest = Generation::new(next, members.into());
        Ok(self.view(latest.clone()))
    }

    fn view(&self, generation: Generation) -> Processes {
        let places = self.homes.places(&generation.members);
        Processes { links: self.links.clone(), generation, homes: self.homes.clone(), places }
    }

    /// What ended this generation, if something did: the failure itself the first time.
    fn failure(&self) -> Option<Error> {
        let mut fate = self.fate();
        let failure = fate.failure.clone()?;
        let told = std::mem::replace(&mut fate.told, true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }

    fn fail(&self, error: Error) -> Error {
        let mut fate = self.fate();
        fate.told = true;
        fate.failure.get_or_insert_with(|| error.clone());
        error
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.generation.fate.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }
}
