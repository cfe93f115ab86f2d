//! Ranks that are threads of one process: they meet under one lock to build an averager.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{Agreement, Handshake, Placement};
use crate::error::Phase;
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct ThreadBootstrap {
    placement: Placement,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What ended the world.
    failure: Option<Error>,
    /// Ranks that know.
    told: Vec<bool>,
    /// Ranks that have left.
    gone: Vec<bool>,
    /// Averagers being built, by their number.
    builds: BTreeMap<u64, Build>,
    /// Averagers built, for aborts.
    built: Vec<Weak<Agreement>>,
}

#[derive(Debug)]
struct Build {
    handshakes: Vec<Option<Handshake>>,
    result: Option<Result<Arc<Agreement>>>,
    /// Ranks that have taken the result.
    taken: usize,
}

impl ThreadBootstrap {
    pub(super) fn new(placement: Placement) -> Self {
        let size = placement.size();
        let state = State {
            failure: None,
            told: vec![false; size],
            gone: vec![false; size],
            builds: BTreeMap::new(),
            built: vec![],
        };
        ThreadBootstrap { placement, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    pub(super) fn agree(
        &self,
        rank: usize,
        number: u64,
        handshake: Handshake,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        let start = Instant::now();
        let mut state = self.lock();
        if let Some(failure) = state.failure_for(rank) {
            return Err(failure);
        }
        let build = state.builds.entry(number).or_insert_with(|| Build::new(self.placement.size()));
        build.handshakes[rank] = Some(handshake);
        build.complete();
        self.changed.notify_all();
        loop {
            let build =
                state.builds.get_mut(&number).expect("kept until all have taken the result");
            if let Some(result) = build.result.clone() {
                build.taken += 1;
                if build.taken == self.placement.size() {
                    state.builds.remove(&number);
                }
                if let Ok(agreement) = &result {
                    state.built.retain(|other| other.strong_count() > 0);
                    state.built.push(Arc::downgrade(agreement));
                }
                return result;
            }
            let missing =
                build.handshakes.iter().position(Option::is_none).expect("or it would be complete");
            if let Some(failure) = state.failure_for(rank) {
                return Err(failure);
            }
            let waited = start.elapsed();
            let lost = state.gone[missing];
            if lost || waited >= timeout {
                let phase = Phase::Build;
                let failure = if lost {
                    Error::PeerLost { rank: missing, phase, committed: false }
                } else {
                    Error::Timeout { rank: missing, timeout, phase, committed: false }
                };
                state.failure = Some(failure);
                self.changed.notify_all();
                continue;
            }
            // Spurious wake-ups and time-outs only mean another look.
            state = self
                .changed
                .wait_timeout(state, timeout - waited)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(super) fn leave(&self, rank: usize) {
        self.lock().gone[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn abort(&self, rank: usize) {
        let mut state = self.lock();
        let failure = Error::Aborted { rank, phase: Phase::Build, committed: false };
        state.failure.get_or_insert(failure);
        // Those that are built, and those that are complete but not yet taken by anybody.
        let taken = state.built.iter().filter_map(Weak::upgrade);
        let complete = state.builds.values().filter_map(|build| build.result.clone()?.ok());
        let all: Vec<Arc<Agreement>> = taken.chain(complete).collect();
        drop(state); // a device may take its time
        for agreement in all {
            agreement.control.abort(self.placement.position(rank));
        }
        self.changed.notify_all();
    }

    // No code that can panic holds the lock with the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What ended the world, if something did: the failure itself the first time that this rank
    /// hears of it.
    fn failure_for(&mut self, rank: usize) -> Option<Error> {
        let failure = self.failure.clone()?;
        let told = std::mem::replace(&mut self.told[rank], true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }
}

impl Build {
    fn new(size: usize) -> Self {
        Build { handshakes: vec![None; size], result: None, taken: 0 }
    }

    /// Outcome of comparing the handshakes, once every rank has shown its own.
    fn complete(&mut self) {
        if self.handshakes.iter().any(Option::is_none) {
            return;
        }
        let handshakes = self.handshakes.iter_mut().filter_map(Option::take).collect();
        self.result = Some(Agreement::of(handshakes).map(Arc::new));
    }
}
