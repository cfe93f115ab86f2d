//! Ranks that are processes of one host: they meet over sockets, and their mailboxes are in memory that they share.

mod agree;
mod ancestry;
mod confirm;
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
mod rebuild;
mod rendezvous;
mod shown;
mod strangers;

use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{Device, Places, WorldId};
use crate::backend::limits;
use crate::{Error, Result};
use door::Door;
pub(super) use home::Home;
use home::Own;
use job::Job;
pub(super) use job::Known;
use links::{Fate, Generation, Links};
use page::Page;
use peers::Unheard;
#[cfg(fuzzing)]
pub use rendezvous::fuzz;
use rendezvous::Me;

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
    /// Source of the name, in words.
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
        let refusal = own.as_ref().err().map(unavailable);
        let refusal = refusal.or(limits::spare_for_all(0).err().map(failed));
        let job = Job::own(&known, rank, variable);
        let told = refusal.as_ref().map(Error::to_string);
        let me = Me { name, source, rank, world_size, home, job, refusal: told };
        let deadline = crate::deadline::after(timeout);
        let met = rendezvous::meet(&me, timeout);
        let own = own.map_err(|reason| unavailable(&reason))?; // the others know
        refusal.map_or(Ok(()), Err)?;
        let crew = met.map_err(failed)?;
        let first = Page::first(world_size);
        let links = Links::new(rank, own, crew.page, first);
        let met = crew.peers.into_iter().enumerate().filter_map(|(peer, met)| Some((peer, met?)));
        let heard = met.map(|(peer, (home, met))| links.common.add(peer, home, met));
        let heard = heard.collect::<Result<(), Unheard>>().map_err(|unheard| unheard.reason);
        crew.confirmation.give(heard).map_err(failed)?;
        reach::find(&links, &links.current(), deadline).map_err(failed)?;
        let door = Door::open(&me.name, crew.origin, links.me, &links.common, crew.held);
        Ok(Processes::of(links, door))
    }

    /// Of a world that has begun, when that lets it in; see `World::join`.
    pub(super) fn join(name: &str, device: Device, timeout: Duration) -> Result<Processes> {
        let failed = |reason| Error::Join { rendezvous: name.to_owned(), reason };
        let own =
            Own::find(device).map_err(|reason| failed(format!("{device} is not available: {reason}")))?;
        limits::spare_for_all(0).map_err(failed)?;
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

    pub(in crate::world) fn number(&self) -> u32 {
        self.generation.number()
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        self.members().iter().copied().filter(|&peer| peer != self.links.me)
    }

    /// What ends this world from any thread, for as long as this process is in it.
    pub(super) fn handle(&self) -> Handle {
        Handle(Arc::downgrade(&self.links))
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
