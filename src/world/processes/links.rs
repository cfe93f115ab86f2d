//! What this process has of a world: its peers, and the generation that it is in.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::frame::Kind;
use super::home::{Homes, Own};
use super::page::{Decision, Page};
use super::peers::Common;
use super::rebuild::Averagers;
use crate::error::Stage;
use crate::world::Places;
use crate::Error;

/// The sockets of one process in one world. Peers are named by their ids, which are their ranks in the first generation or were
/// given to those that came later. When it is dropped, this process has left the world.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) me: usize,
    pub(super) common: Arc<Common>,
    /// Locked for as long as this process goes from one generation to the next.
    pub(super) latest: Mutex<Generation>,
    /// The same, locked for a moment only.
    current: Mutex<Generation>,
    /// The number of it.
    pub(super) number: AtomicU32,
    homes: Mutex<Homes>,
    /// Of this process.
    pub(super) averagers: Averagers,
    /// It is on its way to the next one.
    pub(super) going: AtomicBool,
    /// This process came late, and has no model of its own until its first average.
    pub(super) is_new: AtomicBool,
}

/// What all communicators of one generation of this process have in common.
#[derive(Clone, Debug)]
pub(super) struct Generation {
    pub(super) decision: Arc<Decision>,
    fate: Arc<Mutex<Fate>>,
    /// Averagers built or begun: the k-th of one rank belongs with the k-th of every other.
    pub(super) builds: Arc<AtomicU32>,
    /// The process that joined with it, if one did, has the model, as far as this one knows.
    pub(super) settled: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
pub(super) struct Fate {
    /// What ended it.
    pub(super) failure: Option<Error>,
    pub(super) told: bool,
    /// By this process; and while it was on its way to the next one.
    pub(super) aborted: [bool; 2],
}

impl Generation {
    pub(super) fn new(decision: Decision) -> Self {
        let (fate, builds, settled) = (Arc::default(), Arc::default(), Arc::default());
        Generation { decision: Arc::new(decision), fate, builds, settled }
    }

    pub(super) fn number(&self) -> u32 {
        self.decision.generation
    }

    /// By rank.
    pub(super) fn members(&self) -> &[usize] {
        &self.decision.members
    }

    pub(super) fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner) // plain data
    }
}

impl Links {
    /// Of a process that is in no generation yet, or in the one that is `latest`.
    pub(super) fn new(me: usize, own: Own, page: Page, latest: Decision) -> Links {
        let common = Common::new(page, me, own.home.clone());
        let latest = Generation::new(latest);
        let number = AtomicU32::new(latest.number());
        let (current, latest) = (Mutex::new(latest.clone()), Mutex::new(latest));
        let homes = Mutex::new(Homes::new(own));
        let (going, is_new) = (AtomicBool::new(false), AtomicBool::new(false));
        let averagers = Averagers::default();
        Links { me, common: Arc::new(common), latest, current, number, homes, averagers, going, is_new }
    }

    /// The generation that this process is in.
    pub(super) fn current(&self) -> Generation {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// It is in this one from now on, which is `latest`, too.
    pub(super) fn enter(&self, generation: &Generation) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = generation.clone();
        self.number.store(generation.number(), Ordering::Relaxed);
        self.lock().forget_before(generation.number());
    }

    /// Where this process is, and which peers reach each other.
    pub(super) fn homes(&self) -> MutexGuard<'_, Homes> {
        self.homes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the members of a generation, all of which this process has met.
    pub(super) fn places(&self, generation: &Generation) -> Places {
        let state = self.lock();
        let members: Vec<_> = generation.members().iter().map(|id| (*id, &state.homes[id])).collect();
        self.homes().places(&members)
    }

    /// Ends the generation that this process is in, for all its members.
    pub(super) fn abort(&self) {
        let generation = self.current();
        let Some(rank) = generation.members().iter().position(|&peer| peer == self.me) else { return };
        // Told once more, to what averages or builds in another thread.
        let failure = Error::Aborted { rank, stage: Stage::Build, committed: false };
        let mut fate = generation.fate();
        let going = self.going.load(Ordering::Relaxed);
        fate.aborted[usize::from(going)] = true;
        fate.failure.get_or_insert(failure);
        drop(fate);
        let built = self.lock().built();
        for (agreement, ring) in built.iter().filter(|(_, ring)| ring.generation == generation.number()) {
            let position = ring.peers.iter().position(|&peer| peer == self.me);
            position.into_iter().for_each(|position| agreement.control.abort(position));
        }
        self.wake();
        let others = generation.members().iter().filter(|&&peer| peer != self.me);
        others.for_each(|&peer| self.try_send(peer, (Kind::Abort, generation.number(), going.into())));
    }
}

/// All that it does with its peers.
impl Deref for Links {
    type Target = Common;
    fn deref(&self) -> &Common {
        &self.common
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.leave();
        self.join();
    }
}
