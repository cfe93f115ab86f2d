//! Ranks that are threads of one process: they meet under one lock to build an averager.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::{Control, Places};
use crate::backend::Memory;
use crate::error::Stage;
use crate::{Error, Result};

/// What a rank shows the others when it builds an averager.
#[derive(Clone, Debug)]
pub(crate) struct Card {
    /// What is wrong with it by itself: then nobody builds.
    pub(crate) refusal: Option<Error>,
    /// What must be the same on every rank, by the builder's name for it.
    pub(crate) options: Vec<(&'static str, String)>,
    /// A line for each tensor: name, dtype and size.
    pub(crate) tensors: Vec<String>,
    /// What the previous rank of the ring writes: the inbox, after its `filled` counters.
    pub(crate) inbox: Option<Arc<Memory>>,
    /// What the next one writes: `drained` counters.
    pub(crate) credits: Option<Arc<Memory>>,
    /// Rank 0's: everybody's notice boards.
    pub(crate) control: Option<Arc<Control>>,
}

/// What the ranks of one averager have in common.
#[derive(Debug)]
pub(crate) struct Agreement {
    pub(crate) control: Arc<Control>,
    /// Every rank's.
    pub(crate) cards: Vec<Card>,
}

#[derive(Debug)]
pub(super) struct Hub {
    places: Places,
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
    cards: Vec<Option<Card>>,
    result: Option<Result<Arc<Agreement>>>,
    /// Ranks that have taken the result.
    taken: usize,
}

impl Hub {
    pub(super) fn new(places: Places) -> Self {
        let size = places.size();
        let state = State {
            failure: None,
            told: vec![false; size],
            gone: vec![false; size],
            builds: BTreeMap::new(),
            built: vec![],
        };
        Hub { places, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    pub(super) fn agree(
        &self,
        rank: usize,
        number: u64,
        card: Card,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        let start = Instant::now();
        let mut state = self.lock();
        if let Some(failure) = state.failure_for(rank) {
            return Err(failure);
        }
        let build = state.builds.entry(number).or_insert_with(|| Build::new(self.places.size()));
        build.cards[rank] = Some(card);
        build.complete();
        self.changed.notify_all();
        loop {
            let build = state.builds.get_mut(&number).expect("kept until all have taken the result");
            if let Some(result) = build.result.clone() {
                build.taken += 1;
                if build.taken == self.places.size() {
                    state.builds.remove(&number);
                }
                if let Ok(agreement) = &result {
                    state.built.retain(|other| other.strong_count() > 0);
                    state.built.push(Arc::downgrade(agreement));
                }
                return result;
            }
            let missing = build.cards.iter().position(Option::is_none).expect("or it would be complete");
            if let Some(failure) = state.failure_for(rank) {
                return Err(failure);
            }
            let waited = start.elapsed();
            let lost = state.gone[missing];
            if lost || waited >= timeout {
                let stage = Stage::Build;
                let failure = if lost {
                    Error::PeerLost { rank: missing, stage, committed: false }
                } else {
                    Error::Timeout { rank: missing, timeout, stage, committed: false }
                };
                state.failure = Some(failure);
                self.changed.notify_all();
                continue;
            }
            // Spurious wake-ups and time-outs only mean another look.
            state =
                self.changed.wait_timeout(state, timeout - waited).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn leave(&self, rank: usize) {
        self.lock().gone[rank] = true;
        self.changed.notify_all();
    }

    pub(super) fn abort(&self, rank: usize) {
        let mut state = self.lock();
        let failure = Error::Aborted { rank, stage: Stage::Build, committed: false };
        state.failure.get_or_insert(failure);
        // Those that are built, and those that are complete but not yet taken by anybody.
        let taken = state.built.iter().filter_map(Weak::upgrade);
        let complete = state.builds.values().filter_map(|build| build.result.clone()?.ok());
        let all: Vec<Arc<Agreement>> = taken.chain(complete).collect();
        drop(state); // a device may take its time
        for agreement in all {
            agreement.control.abort(self.places.position(rank));
        }
        self.changed.notify_all();
    }

    // No code that can panic holds the lock with the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What ended the world, if something did: the failure itself the first time that this rank hears of it.
    fn failure_for(&mut self, rank: usize) -> Option<Error> {
        let failure = self.failure.clone()?;
        let told = std::mem::replace(&mut self.told[rank], true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }
}

impl Build {
    fn new(size: usize) -> Self {
        Build { cards: vec![None; size], result: None, taken: 0 }
    }

    /// If all ranks have shown their cards: whether they agree.
    fn complete(&mut self) {
        if self.cards.iter().any(Option::is_none) {
            return;
        }
        let cards: Vec<Card> = self.cards.iter_mut().filter_map(Option::take).collect();
        let refusal = cards.iter().find_map(|card| card.refusal.clone());
        let disagreement = || (1..cards.len()).find_map(|rank| disagreement(rank, &cards[0], &cards[rank]));
        self.result = Some(match refusal.or_else(disagreement) {
            Some(error) => Err(error),
            None => {
                let control = cards[0].control.clone().expect("rank 0 shows one, or a refusal");
                Ok(Arc::new(Agreement { control, cards }))
            }
        });
    }
}

fn disagreement(rank: usize, first: &Card, card: &Card) -> Option<Error> {
    let show = |(name, value): &(&str, String)| format!("{name} = {value}");
    if let Some((ours, theirs)) = first.options.iter().zip(&card.options).find(|(a, b)| a != b) {
        return Some(Error::OptionsDiffer { rank, found: show(theirs), expected: show(ours) });
    }
    if let Some((ours, theirs)) = first.tensors.iter().zip(&card.tensors).find(|(a, b)| a != b) {
        return Some(Error::LayoutsDiffer { rank, found: theirs.clone(), expected: ours.clone() });
    }
    let count = |card: &Card| format!("{} tensors", card.tensors.len());
    (first.tensors.len() != card.tensors.len()).then(|| Error::LayoutsDiffer {
        rank,
        found: count(card),
        expected: count(first),
    })
}
