//! Ranks that are processes of one host: they meet over sockets, and their mailboxes are in memory that they share.

mod frame;
mod launcher;
mod links;
mod rendezvous;

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Agreement, Card, Control, Device, Places};
use crate::backend::{Memory, Shared};
use crate::error::Stage;
use crate::{Error, Result};
use frame::{Frame, Kind};
use links::{Links, Ring};
use rendezvous::Me;

/// One generation of a world, as one of its processes sees it.
#[derive(Debug)]
pub(super) struct Processes {
    links: Arc<Links>,
    generation: u32,
    /// By rank, what the peer is called in `links`.
    members: Arc<[usize]>,
    places: Places,
    fate: Mutex<Fate>,
}

#[derive(Debug, Default)]
struct Fate {
    /// What ended this generation.
    failure: Option<Error>,
    told: bool,
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
        if device != Device::cpu() {
            return Err(Error::DeviceUnavailable {
                rank,
                device: device.to_string(),
                reason: "ranks that are processes are on CPUs so far: use Device::cpu(), or threads of one process".into(),
            });
        }
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let me = Me { name, rank, world_size, device: device.to_string(), cores };
        let crew = rendezvous::meet(&me, timeout).map_err(failed)?;
        let places = Places::of_processes(world_size, device, crew.cores);
        let links =
            Links::new(rank, crew).map_err(|error| failed(format!("can't listen to peers: {error}")))?;
        let members: Arc<[usize]> = (0..world_size).collect();
        // All write the same, before anybody can be in another generation.
        let _ = links.membership().compare_exchange(
            0,
            links::word(0, members.iter().copied()),
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        Ok(Processes { links: Arc::new(links), generation: 0, members, places, fate: Mutex::default() })
    }

    pub(super) fn rank(&self) -> usize {
        self.members.iter().position(|&peer| peer == self.links.me).expect("it is a member")
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// As `Hub::agree`: every rank sends its card to every other, and each sees for itself whether they go together.
    pub(super) fn agree(&self, number: u64, card: Card, timeout: Duration) -> Result<Arc<Agreement>> {
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let deadline = Instant::now() + timeout;
        let key = (Kind::Card, self.generation, number as u32);
        let (body, memories) = Shown::of(&card);
        let files: Vec<_> = memories.iter().map(|memory| memory.file()).collect();
        let others: Vec<usize> = self.members.iter().copied().filter(|&peer| peer != self.links.me).collect();
        for &peer in &others {
            // One that can't be told is gone or stopped, which is found out below.
            let _ = self.links.send(peer, key, &body, &files, timeout);
        }
        let mut cards = vec![];
        for (rank, &peer) in self.members.iter().enumerate() {
            if peer == self.links.me {
                cards.push(card.clone());
                continue;
            }
            let came = self.links.wait(deadline, |state| {
                let aborts = |peer: &usize| state.has(*peer, (Kind::Abort, self.generation, 0));
                if let Some(rank) = self.members.iter().position(aborts) {
                    return Some(Err(Error::Aborted { rank, stage: Stage::Build, committed: false }));
                }
                if let Some(failure) = self.failure() {
                    return Some(Err(failure));
                }
                let gone = |trouble: &Option<String>| match trouble.clone() {
                    Some(reason) => Error::SharedMemory { rank: self.rank(), reason },
                    None => Error::PeerLost { rank, stage: Stage::Build, committed: false },
                };
                let came = state.take(peer, key).map(Ok);
                came.or_else(|| state.gone[peer].then(|| Err(gone(&state.trouble))))
            });
            let late = || Error::Timeout { rank, timeout, stage: Stage::Build, committed: false };
            let frame = came.unwrap_or_else(|| Err(late())).map_err(|error| self.fail(error))?;
            cards.push(Shown::read(frame, rank, self.wanted(rank)).map_err(|error| self.fail(error))?);
        }
        let agreement = Arc::new(Agreement::of(cards)?);
        self.links.watch(&agreement, self.ring());
        Ok(agreement)
    }

    pub(super) fn abort(&self) {
        let rank = self.rank();
        self.fail(Error::Aborted { rank, stage: Stage::Build, committed: false });
        self.fate().told = false; // it was this rank's handle, which may not be what averages
        for &peer in self.members.iter() {
            const SHORT: Duration = Duration::from_millis(100);
            let _ = self.links.send(peer, (Kind::Abort, self.generation, 0), &(), &[], SHORT);
        }
        let built = self.links.lock().built();
        for (agreement, _) in built.into_iter().filter(|(_, ring)| ring.generation == self.generation) {
            agreement.control.abort(rank);
        }
        self.links.changed();
    }

    /// Whether the inbox, the credits and the control of this rank are used here.
    fn wanted(&self, rank: usize) -> [bool; 3] {
        let (own, world) = (self.rank(), self.members.len());
        [rank == (own + 1) % world, (rank + 1) % world == own, rank == 0]
    }

    fn ring(&self) -> Ring {
        Ring { generation: self.generation, peers: self.members.clone() }
    }

    /// Collective among those that are left: the next generation, of all members that are there and say so within `timeout`.
    ///
    /// Each tells all others that it is ready, and waits until every other is ready or gone. Who comes first to such a list
    /// of members, or to the end of its patience, puts it into the word that all share, by compare-and-swap from the one of the
    /// generation before: the first list is everybody's. A process that dies on the way leaves nothing half done.
    pub(super) fn next_generation(&self, timeout: Duration) -> Result<Processes> {
        const READY: u32 = 0;
        const DECIDED: u32 = 1;
        let (next, me) = (self.generation + 1, self.links.me);
        let deadline = Instant::now() + timeout;
        let others: Vec<usize> = self.members.iter().copied().filter(|&peer| peer != me).collect();
        let tell = |number| {
            for &peer in others.iter().filter(|&&peer| !self.links.lock().gone[peer]) {
                // One that does not listen is not ready, either.
                let _ = self.links.send(peer, (Kind::Ready, next, number), &(), &[], timeout);
            }
        };
        let word = self.links.membership();
        let is_decided = || links::read(word).0 >= next;
        if !is_decided() {
            tell(READY);
            let ready = |state: &links::State, peer: usize| state.has(peer, (Kind::Ready, next, READY));
            let _ = self.links.wait(deadline, |state| {
                let all = others.iter().all(|&peer| state.gone[peer] || ready(state, peer));
                (all || is_decided()).then_some(())
            });
            let state = self.links.lock();
            let there = |peer: &usize| *peer == me || (ready(&state, *peer) && !state.gone[*peer]);
            let proposed = links::word(next, self.members.iter().copied().filter(there));
            drop(state);
            let last = links::word(self.generation, self.members.iter().copied());
            let _ = word.compare_exchange(last, proposed, Ordering::AcqRel, Ordering::Acquire);
            tell(DECIDED); // wakes those that wait for somebody who is not coming
        }
        let (generation, members) = links::read(word);
        if generation != next || !members.contains(&me) {
            return Err(Error::LeftOut { rank: self.rank(), timeout });
        }
        self.links.lock().forget_before(next);
        let places = Places::of_processes(members.len(), Device::cpu(), self.places.cores());
        let (links, members) = (self.links.clone(), members.into());
        Ok(Processes { links, generation, members, places, fate: Mutex::default() })
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

    fn fate(&self) -> std::sync::MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }
}

/// A card, as it is sent: its memories are files.
#[derive(Debug, Serialize, Deserialize)]
struct Shown {
    refusal: Option<String>,
    options: Vec<(String, String)>,
    tensors: Vec<String>,
    schedule_position: u64,
    /// Bytes of inbox, credits and control, if there is one.
    memories: [Option<usize>; 3],
}

impl Shown {
    fn of(card: &Card) -> (Shown, Vec<&Shared>) {
        let memories =
            [card.inbox.as_deref(), card.credits.as_deref(), card.control.as_ref().map(|c| c.memory())];
        let shared = memories.map(|memory| memory.and_then(Memory::shared));
        let shown = Shown {
            refusal: card.refusal.as_ref().map(Error::to_string),
            options: card.options.clone(),
            tensors: card.tensors.clone(),
            schedule_position: card.schedule_position,
            memories: shared.map(|memory| memory.map(Shared::bytes)),
        };
        (shown, shared.into_iter().flatten().collect())
    }

    fn read(frame: Frame, rank: usize, wanted: [bool; 3]) -> Result<Card> {
        let refuse = |reason: String| Error::PeerRefused { rank, reason };
        let shown: Shown =
            frame.parse().map_err(|error| refuse(format!("its message is not understood: {error}")))?;
        let mut files = frame.files.into_iter();
        let mut open = |index: usize| -> Result<Option<Memory>> {
            let Some(bytes) = shown.memories[index] else { return Ok(None) };
            let file: OwnedFd =
                files.next().ok_or_else(|| refuse("a file of its memory is missing".into()))?;
            if !wanted[index] {
                return Ok(None);
            }
            Shared::open(file, bytes).map(Memory::Shared).map(Some).map_err(refuse)
        };
        let (inbox, credits, control) = (open(0)?, open(1)?, open(2)?);
        Ok(Card {
            refusal: shown.refusal.map(refuse),
            options: shown.options,
            tensors: shown.tensors,
            schedule_position: shown.schedule_position,
            inbox: inbox.map(Arc::new),
            credits: credits.map(Arc::new),
            control: control.map(|memory| Arc::new(Control::of(memory))),
        })
    }
}
