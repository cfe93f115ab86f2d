//! Bootstrap of ranks that are threads of one process. Ranks exchange handshakes under one lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::exchange::{in_exchange, ExchangeId, Shown, LOOK};
use super::{waits_for_call, Agreement, Handshake, Placement, BUILD};
use crate::error::Phase;
use crate::notice::Notice;
use crate::sync::{lock, wait_timeout};
use crate::{Error, Result};

#[derive(Debug)]
pub(super) struct ThreadBootstrap {
    placement: Placement,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Failure that ended the world.
    failure: Option<Error>,
    /// Ranks that have received the failure.
    told: Vec<bool>,
    /// Ranks that have departed.
    departed: Vec<bool>,
    /// Averagers being built, by build number.
    builds: BTreeMap<u64, Build>,
    /// Exchanges that not all ranks have completed.
    exchanges: BTreeMap<ExchangeId, Exchange>,
    /// Averagers built, for aborts.
    built: Vec<Weak<Agreement>>,
}

#[derive(Debug)]
struct Build {
    handshakes: Vec<Option<Handshake>>,
    result: Option<Result<Arc<Agreement>>>,
    /// Number of ranks that have taken the result.
    taken: usize,
}

#[derive(Debug)]
struct Exchange {
    shown: Vec<Option<Shown>>,
    /// Ranks that have taken the messages, or given up.
    ended: Vec<bool>,
}

impl ThreadBootstrap {
    pub(super) fn new(placement: Placement) -> Self {
        let size = placement.size();
        let state = State {
            failure: None,
            told: vec![false; size],
            departed: vec![false; size],
            builds: BTreeMap::new(),
            exchanges: BTreeMap::new(),
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
        let (start, mut notice) = (Instant::now(), Notice::new(Some(rank)));
        let mut state = self.lock();
        if let Some(failure) = state.failure_for(rank) {
            return Err(failure);
        }
        let build = state.builds.entry(number).or_insert_with(|| Build::new(self.placement.size()));
        build.handshakes[rank] = Some(handshake);
        build.complete(number);
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
            let absent = |rank: &usize| build.handshakes[*rank].is_none();
            let absent: Vec<usize> = (0..build.handshakes.len()).filter(absent).collect();
            let missing = *absent.first().expect("or it would be complete");
            if let Some(failure) = state.failure_for(rank) {
                return Err(failure);
            }
            let waited = start.elapsed();
            let lost = state.departed[missing];
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
            if notice.is_due() {
                drop(state); // a subscriber may do anything
                notice.look(|| waits_for_call(rank, &absent, BUILD, timeout));
                state = self.lock();
                continue;
            }
            let left = (timeout - waited).min(notice.left());
            // A spurious wake-up or a timeout only repeats the loop.
            state = wait_timeout(&self.changed, state, left);
        }
    }

    /// See `Communicator::all_gather`.
    pub(super) fn all_gather(
        &self,
        rank: usize,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        let (start, size) = (Instant::now(), self.placement.size());
        let (mut notice, call) = (Notice::new(Some(rank)), format!("call {}", shown.call));
        let mut state = self.lock();
        if let Some(failure) = state.failure_for(rank) {
            return Err(in_exchange(failure));
        }
        let none = || Exchange { shown: vec![None; size], ended: vec![false; size] };
        let exchange = state.exchanges.entry(id).or_insert_with(none);
        (exchange.shown[rank], exchange.ended[rank]) = (Some(shown), false);
        self.changed.notify_all();
        loop {
            let exchange = &state.exchanges[&id]; // kept until all have ended it
            let missing: Vec<usize> =
                (0..size).filter(|&rank| exchange.shown[rank].is_none()).collect();
            let (waited, phase, committed) = (start.elapsed(), Phase::Exchange, false);
            let lost = missing.iter().find(|&&rank| state.departed[rank] || has_left(rank));
            let ended = match (missing.first(), lost) {
                (None, _) => Some(Ok(exchange.shown.iter().flatten().cloned().collect())),
                _ if state.failure.is_some() => state.failure_for(rank).map(in_exchange).map(Err),
                (_, Some(&rank)) => Some(Err(Error::PeerLost { rank, phase, committed })),
                (Some(&rank), _) if waited >= timeout => {
                    Some(Err(Error::Timeout { rank, timeout, phase, committed }))
                }
                _ => None,
            };
            if let Some(ended) = ended {
                state.end_exchange(id, rank);
                return ended;
            }
            if notice.is_due() {
                drop(state); // a subscriber may do anything
                notice.look(|| waits_for_call(rank, &missing, &call, timeout));
                state = self.lock();
                continue;
            }
            state = wait_timeout(&self.changed, state, LOOK.min(timeout - waited));
        }
    }

    /// Ends the world. The rank that calls it knows the error.
    pub(super) fn fail(&self, rank: usize, error: &Error) {
        let mut state = self.lock();
        state.failure.get_or_insert_with(|| error.clone());
        state.told[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn leave(&self, rank: usize) {
        self.lock().departed[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn abort(&self, rank: usize) {
        let mut state = self.lock();
        let failure = Error::Aborted { rank, phase: Phase::Build, committed: false };
        state.failure.get_or_insert(failure);
        // Averagers that are built, and averagers that are complete and not taken by any rank yet.
        let taken = state.built.iter().filter_map(Weak::upgrade);
        let complete = state.builds.values().filter_map(|build| build.result.clone()?.ok());
        let all: Vec<Arc<Agreement>> = taken.chain(complete).collect();
        drop(state); // writing to a device may take long
        for agreement in all {
            agreement.control.abort(self.placement.position(rank));
        }
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Records that a rank takes no part in an exchange any more.
    fn end_exchange(&mut self, id: ExchangeId, rank: usize) {
        let Some(exchange) = self.exchanges.get_mut(&id) else { return };
        exchange.ended[rank] = true;
        if exchange.ended.iter().all(|&ended| ended) {
            self.exchanges.remove(&id);
        }
    }

    /// The failure that ended the world, if any. A rank gets the failure itself once and `Poisoned`
    /// afterwards.
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

    /// Compares the handshakes, once every rank has provided one.
    fn complete(&mut self, number: u64) {
        if self.handshakes.iter().any(Option::is_none) {
            return;
        }
        let handshakes = self.handshakes.iter_mut().filter_map(Option::take).collect();
        let agreement = Agreement::of(handshakes);
        // Averagers of one world whose numbers are 2^32 apart do not live at the same time.
        let numbered = agreement.map(|agreement| Agreement { number: number as u32, ..agreement });
        self.result = Some(numbered.map(Arc::new));
    }
}
