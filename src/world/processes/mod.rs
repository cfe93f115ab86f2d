//! Ranks that are processes of one host: they meet over sockets, and their mailboxes are in memory that they share.

mod ancestry;
mod credentials;
mod door;
mod frame;
mod generation;
mod guest;
mod home;
mod job;
mod launcher;
mod links;
mod page;
mod peers;
mod private;
mod reach;
mod rendezvous;
mod shown;
mod strangers;

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{Agreement, Card, Control, Device, Places, WorldId};
use crate::backend::Memory;
use crate::error::Stage;
use crate::{Error, Result};
use door::Door;
use frame::{Frame, Kind};
pub(super) use home::Home;
use home::Own;
use job::Job;
pub(super) use job::Known;
use links::{Fate, Generation, Links};
use page::Page;
use peers::{Ring, State};
#[cfg(fuzzing)]
pub use rendezvous::fuzz;
use rendezvous::Me;
use shown::{Reader, Shown};

/// How long a process may take from `World::join` to its averager.
const JOINING: Duration = Duration::from_secs(60);

/// One generation of a world, as one of its processes sees it.
#[derive(Debug)]
pub(super) struct Processes {
    links: Arc<Links>,
    generation: Generation,
    places: Places,
    /// What late processes find this world by.
    door: Arc<Door>,
}

/// What a launcher, or the caller, says.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) name: String,
    /// What the name was taken from, in words.
    pub(super) source: String,
    pub(super) known: Known,
    /// The variable that the rank was taken from.
    pub(super) variable: Option<&'static str>,
}

impl Setup {
    /// What the environment says, but for the name if one is `given`.
    pub(super) fn of_the_environment(given: Option<String>) -> Result<Setup> {
        let failed = |problem| Error::Environment { problem };
        launcher::variables().try_for_each(|name| text(name).map(drop))?;
        let launcher::Launched { rank, world_size, name, source, known, variable } =
            launcher::Launched::find(variable, given).map_err(failed)?;
        Ok(Setup { rank, world_size, name, source, known, variable: Some(variable) })
    }

    /// Whether there is a launcher to say it.
    pub(super) fn is_in_the_environment() -> bool {
        launcher::Launched::is_there(variable)
    }

    /// Only the name, where it is said by itself.
    pub(super) fn name_of_the_environment() -> Result<Option<String>> {
        Ok(text(launcher::RENDEZVOUS)?.filter(|name| !name.is_empty()))
    }
}

/// Of the environment, as far as it is text.
fn variable(name: &str) -> Option<String> {
    match name {
        launcher::PARENT => launcher::parent(),
        launcher::TERMINAL => launcher::has_terminal().then(String::new),
        name => std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()),
    }
}

fn text(name: &str) -> Result<Option<String>> {
    use std::env::VarError;
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => {
            let problem =
                format!("{name} is {value:?}, which is not UTF-8: set it to a text, the same on every rank");
            Err(Error::Environment { problem })
        }
    }
}

impl Processes {
    /// Collective.
    pub(super) fn meet(setup: Setup, device: Device, timeout: Duration) -> Result<Processes> {
        let Setup { rank, world_size, name, source, known, variable } = setup;
        let failed = |reason| Error::Rendezvous { rank, reason };
        let own = Own::find(device);
        let home = own.as_ref().map_or_else(|_| Home::unknown(device), |own| own.home.clone());
        let unavailable = |reason: &String| Error::DeviceUnavailable {
            rank,
            device: device.to_string(),
            reason: reason.clone(),
        };
        let refusal = own.as_ref().err().map(unavailable).as_ref().map(Error::to_string);
        let job = Job::own(&known, rank, variable);
        let me = Me { name, source, rank, world_size, home, job, refusal };
        let deadline = crate::deadline::after(timeout);
        let met = rendezvous::meet(&me, timeout);
        let own = own.map_err(|reason| unavailable(&reason))?; // the others know
        let crew = met.map_err(failed)?;
        let first = Page::first(world_size);
        let links = Links::new(rank, own, crew.page, first);
        for (peer, met) in crew.peers.into_iter().enumerate() {
            let Some((home, met)) = met else { continue };
            let added = links.common.add(peer, home, met);
            added.map_err(|error| failed(format!("can't listen to peers: {error}")))?;
        }
        reach::find(&links, &links.current(), deadline).map_err(failed)?;
        let door = Door::open(&me.name, crew.origin, links.me, &links.common, crew.held);
        Ok(Processes::of(links, door))
    }

    /// Of a world that has begun, when that lets it in; see `World::join`.
    pub(super) fn join(name: &str, device: Device, timeout: Duration) -> Result<Processes> {
        let failed = |reason| Error::Join { rendezvous: name.to_owned(), reason };
        let own =
            Own::find(device).map_err(|reason| failed(format!("{device} is not available: {reason}")))?;
        let (links, origin, others) = guest::join(name, own, timeout).map_err(failed)?;
        reach::find(&links, &links.current(), Instant::now() + JOINING).map_err(failed)?;
        let door = Door::open(name, origin, links.me, &links.common, None).beside(others);
        Ok(Processes::of(links, door))
    }

    fn of(links: Links, door: Door) -> Processes {
        let generation = links.latest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let places = links.places(&generation);
        Processes { links: Arc::new(links), generation, places, door: Arc::new(door) }
    }

    pub(super) fn rank(&self) -> usize {
        self.members().iter().position(|&peer| peer == self.links.me).expect("it is a member")
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    fn members(&self) -> &[usize] {
        self.generation.members()
    }

    fn number(&self) -> u32 {
        self.generation.number()
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
        // Who joined is to be here soon: the others have a model to train.
        let timeout = if self.has_joined() { timeout.min(JOINING) } else { timeout };
        let deadline = Instant::now() + timeout;
        let key = (Kind::Card, self.number(), number);
        let (body, files) = Shown::of(&card);
        let (body, files) = (&body, &files);
        let sent = std::thread::scope(|scope| {
            // To all at once: one that does not listen keeps no other waiting. Who is gone is found out below.
            let send = |peer| {
                let send = move || self.links.send(peer, key, body, files, deadline);
                std::thread::Builder::new().spawn_scoped(scope, send)
            };
            let sends: Vec<_> = self.others().map(send).collect();
            let sends: std::io::Result<Vec<_>> = sends.into_iter().collect();
            let sends = sends.map_err(|error| format!("can't start a thread to send its card: {error}"))?;
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
        let mut agreement = Agreement::of(cards)?;
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
        agreement.ordinal.get_or_insert_with(|| format!("{number} of generation {}", self.number()));
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
        state: &mut State,
    ) -> Option<Result<Frame>> {
        let stage = Stage::Build;
        let aborts = |peer: &usize| state.aborts(*peer, self.number());
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
            None if state.is_lost(peer, self.number()) => {
                Some(Err(Error::PeerLost { rank, stage, committed: false }))
            }
            None => None,
        }
    }

    /// What ends this world from any thread, for as long as this process is in it.
    pub(super) fn handle(&self) -> Handle {
        Handle(Arc::downgrade(&self.links))
    }

    /// Whether the inbox, the credits and the control of this rank are used here.
    fn wanted(&self, rank: usize) -> [bool; 3] {
        let (own, world) = (self.places.position(self.rank()), self.members().len());
        let position = self.places.position(rank);
        [position == (own + 1) % world, (position + 1) % world == own, rank == 0]
    }

    fn ring(&self) -> Ring {
        let peers = self.places.order().iter().map(|&rank| self.members()[rank]);
        Ring { generation: self.number(), peers: peers.collect() }
    }

    pub(super) fn name(&self) -> &str {
        self.door.name()
    }

    pub(super) fn world(&self) -> &WorldId {
        self.door.world()
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
        self.generation.fate()
    }
}

/// See `Processes::handle`.
#[derive(Clone, Debug)]
pub(super) struct Handle(Weak<Links>);

impl Handle {
    pub(super) fn abort(&self) {
        self.0.upgrade().into_iter().for_each(|links| links.abort());
    }
}
