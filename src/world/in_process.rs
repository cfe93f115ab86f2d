//! Bootstrap of ranks that are threads of one process. Ranks exchange messages under one lock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::bootstrap::{Abort, AbortHandle, Bootstrap, BUILD};
use super::exchange::{in_exchange, missing, ExchangeId, Shown};
use super::gather::{Call, Inbox, Silence, Why};
use super::handshake::{Agreement, Handshake};
use super::placement::Placement;
use crate::deadline;
use crate::error::Phase;
use crate::sync::{lock, wait_timeout};
use crate::{Error, Result};

/// Membership of one rank.
#[derive(Debug)]
pub(super) struct ThreadBootstrap {
    rank: usize,
    world: Arc<Threads>,
    /// Number of builds begun: the k-th build of one rank belongs with the k-th build of every
    /// other rank.
    builds: AtomicU32,
}

/// A world of threads.
#[derive(Debug)]
struct Threads {
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
    /// Calls that not all ranks have ended.
    calls: BTreeMap<Tag, Messages>,
    /// Averagers built, for aborts.
    built: Vec<Weak<Agreement>>,
}

/// Identity of a call that all ranks make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Build(u32),
    Exchange(ExchangeId),
}

#[derive(Clone, Debug)]
enum Message {
    Handshake(Arc<Handshake>),
    Shown(Shown),
}

/// The messages of one call, by rank.
#[derive(Debug)]
struct Messages {
    shown: Vec<Option<Message>>,
    /// Ranks that have taken the messages, or given up.
    ended: Vec<bool>,
    /// Agreement of a build, made by the first rank that has all handshakes.
    agreement: Option<Result<Arc<Agreement>>>,
}

impl ThreadBootstrap {
    /// The memberships of all ranks of a new world, by rank.
    pub(super) fn all(placement: Placement) -> impl Iterator<Item = ThreadBootstrap> {
        let size = placement.size();
        let state = State {
            failure: None,
            told: vec![false; size],
            departed: vec![false; size],
            calls: BTreeMap::new(),
            built: vec![],
        };
        let world = Threads { placement, state: Mutex::new(state), changed: Condvar::new() };
        let world = Arc::new(world);
        let rank =
            move |rank| ThreadBootstrap { rank, world: world.clone(), builds: AtomicU32::new(0) };
        (0..size).map(rank)
    }

    fn call<'a>(&self, name: &'a str, phase: Phase, timeout: Duration) -> Call<'a> {
        let (rank, size) = (self.rank, self.world.placement.size());
        Call { rank, size, name, phase, timeout, deadline: deadline::after(timeout) }
    }

    /// Shows a message to all ranks, and returns those of all. This rank takes part in the call
    /// until the second part of the result is dropped.
    fn gather(
        &self,
        call: &Call<'_>,
        tag: Tag,
        message: Message,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<(Vec<Message>, Received<'_>), Silence> {
        self.world.show(tag, self.rank, message.clone());
        let received = Received { world: &self.world, rank: self.rank, tag };
        let mut all = call.receive(&received, false, has_left)?;
        all[self.rank] = Some(message);
        Ok((all.into_iter().flatten().collect(), received))
    }

    fn failure(&self) -> Option<Error> {
        self.world.lock().failure_for(self.rank)
    }
}

impl Bootstrap for ThreadBootstrap {
    fn rank(&self) -> usize {
        self.rank
    }

    fn placement(&self) -> &Placement {
        &self.world.placement
    }

    fn agree(
        &self,
        handshake: Handshake,
        _: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        // Averagers of one world whose numbers are 2^32 apart do not live at the same time.
        let number = self.builds.fetch_add(1, Ordering::Relaxed);
        self.failure().map_or(Ok(()), Err)?;
        let (call, handshake) = (self.call(BUILD, Phase::Build, timeout), Arc::new(handshake));
        let all = self.gather(&call, Tag::Build(number), Message::Handshake(handshake), &|_| false);
        let all = all.map_err(|silence| silence.error(&call));
        let (all, received) = all.inspect_err(|error| self.fail(error))?;
        let handshake = |message| match message {
            Message::Handshake(handshake) => Some(handshake),
            Message::Shown(_) => None,
        };
        let handshakes = all.into_iter().filter_map(handshake).collect();
        received.agreement(|| Ok(Agreement { number, ..Agreement::of(handshakes)? }))
    }

    fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        self.failure().map(in_exchange).map_or(Ok(()), Err)?;
        let name = format!("call {}", shown.call);
        let call = self.call(&name, Phase::Exchange, timeout);
        let all = self.gather(&call, Tag::Exchange(id), Message::Shown(shown), has_left);
        let shown = |message| match message {
            Message::Shown(shown) => Some(shown),
            Message::Handshake(_) => None,
        };
        let (all, _) = all.map_err(|silence| missing(silence, &call))?;
        Ok(all.into_iter().filter_map(shown).collect())
    }

    fn fail(&self, error: &Error) {
        let mut state = self.world.lock();
        state.failure.get_or_insert_with(|| error.clone());
        state.told[self.rank] = true;
        self.world.changed.notify_all();
    }

    fn watch(&self, agreement: &Arc<Agreement>) -> Result<()> {
        let mut state = self.world.lock();
        state.built.retain(|other| other.strong_count() > 0);
        state.built.push(Arc::downgrade(agreement));
        let aborted = match state.failure {
            Some(Error::Aborted { rank, .. }) => Some(rank),
            _ => None,
        };
        drop(state); // writing to a device may take long
        aborted.into_iter().for_each(|rank| self.world.abort_averager(rank, agreement));
        Ok(())
    }

    fn abort_handle(&self) -> AbortHandle {
        let handle = Handle { rank: self.rank, world: Arc::downgrade(&self.world) };
        AbortHandle { of: Arc::new(handle) }
    }
}

impl Drop for ThreadBootstrap {
    fn drop(&mut self) {
        self.world.lock().departed[self.rank] = true;
        self.world.changed.notify_all();
    }
}

/// See `Bootstrap::abort_handle`. Valid while any rank is in the world.
#[derive(Debug)]
struct Handle {
    rank: usize,
    world: Weak<Threads>,
}

impl Abort for Handle {
    fn abort(&self) {
        let Some(world) = self.world.upgrade() else { return };
        let (rank, mut state) = (self.rank, world.lock());
        let failure = Error::Aborted { rank, phase: Phase::Build, committed: false };
        state.failure.get_or_insert(failure);
        let built: Vec<Arc<Agreement>> = state.built.iter().filter_map(Weak::upgrade).collect();
        drop(state); // writing to a device may take long
        built.iter().for_each(|agreement| world.abort_averager(rank, agreement));
        world.changed.notify_all();
    }
}

/// The messages of one call, as one rank receives them.
struct Received<'a> {
    world: &'a Threads,
    rank: usize,
    tag: Tag,
}

impl Inbox for Received<'_> {
    type Message = Message;
    const UNDER_WAY: Duration = Duration::ZERO;

    fn take(&self, missing: &[usize], until: Instant) -> Result<Vec<(usize, Message)>, Silence> {
        let mut state = self.world.lock();
        loop {
            let shown = &state.calls[&self.tag].shown; // kept until all have ended the call
            let new = |&rank: &usize| Some((rank, shown[rank].clone()?));
            let new: Vec<(usize, Message)> = missing.iter().filter_map(new).collect();
            let left = until.saturating_duration_since(Instant::now());
            if !new.is_empty() {
                return Ok(new);
            }
            if let Some(error) = state.failure_for(self.rank) {
                return Err(Silence { rank: missing[0], why: Why::Failed(error) });
            }
            if let Some(&rank) = missing.iter().find(|&&rank| state.departed[rank]) {
                return Err(Silence { rank, why: Why::Lost });
            }
            if left.is_zero() {
                return Ok(new);
            }
            // A spurious wake-up or a timeout only repeats the loop.
            state = wait_timeout(&self.world.changed, state, left);
        }
    }
}

impl Received<'_> {
    /// The agreement of a build, the same for all ranks. `make` makes it of the handshakes.
    fn agreement(&self, make: impl FnOnce() -> Result<Agreement>) -> Result<Arc<Agreement>> {
        let mut state = self.world.lock();
        let messages = state.calls.get_mut(&self.tag).expect("kept until all have ended the call");
        messages.agreement.get_or_insert_with(|| make().map(Arc::new)).clone()
    }
}

impl Drop for Received<'_> {
    /// This rank takes no part in the call any more.
    fn drop(&mut self) {
        let mut state = self.world.lock();
        let Some(messages) = state.calls.get_mut(&self.tag) else { return };
        messages.ended[self.rank] = true;
        if messages.ended.iter().all(|&ended| ended) {
            state.calls.remove(&self.tag);
        }
    }
}

impl Threads {
    /// Stores the message of a rank that begins a call.
    fn show(&self, tag: Tag, rank: usize, message: Message) {
        let mut state = self.lock();
        let size = self.placement.size();
        let none =
            || Messages { shown: vec![None; size], ended: vec![false; size], agreement: None };
        let messages = state.calls.entry(tag).or_insert_with(none);
        (messages.shown[rank], messages.ended[rank]) = (Some(message), false);
        self.changed.notify_all();
    }

    fn abort_averager(&self, rank: usize, agreement: &Agreement) {
        agreement.control.abort(self.placement.position(rank));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// The failure that ended the world, if any. A rank gets the failure itself once and `Poisoned`
    /// afterwards.
    fn failure_for(&mut self, rank: usize) -> Option<Error> {
        let failure = self.failure.clone()?;
        let told = std::mem::replace(&mut self.told[rank], true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }
}
