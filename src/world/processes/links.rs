//! This process's sockets to its peers: a thread for each listens to what the peer says, and sees when it is gone.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};
use serde::Serialize;

use super::frame::{self, Frame, Kind};
use super::rendezvous::{Crew, Met};
use crate::backend::Shared;
use crate::world::Agreement;
use crate::Error;

/// A message that has begun is there within this time, or its sender is taken for gone.
const WHOLE_MESSAGE: Duration = Duration::from_secs(60);
/// Messages of one peer that nobody has asked for yet.
const MOST_WAITING: usize = 256;

/// The sockets of one process in one world. Peers are named by the ranks that they had in the first generation. When it is
/// dropped, this process has left the world.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) me: usize,
    page: Shared,
    peers: Vec<Option<Peer>>,
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
    /// Locked for as long as this process goes from one generation to the next.
    pub(super) latest: Mutex<Generation>,
}

/// What all communicators of one generation of this process have in common.
#[derive(Clone, Debug)]
pub(super) struct Generation {
    pub(super) number: u32,
    /// By rank.
    pub(super) members: Arc<[usize]>,
    pub(super) fate: Arc<Mutex<Fate>>,
    /// Averagers built or begun: the k-th of one rank belongs with the k-th of every other.
    pub(super) builds: Arc<AtomicU32>,
}

#[derive(Debug, Default)]
pub(super) struct Fate {
    /// What ended it.
    pub(super) failure: Option<Error>,
    pub(super) told: bool,
}

impl Generation {
    pub(super) fn new(number: u32, members: Arc<[usize]>) -> Self {
        Generation { number, members, fate: Arc::default(), builds: Arc::default() }
    }
}

#[derive(Debug)]
struct Peer {
    stream: UnixStream,
    /// One message at a time.
    sending: Mutex<()>,
}

/// What the listening threads have a part in.
#[derive(Debug)]
struct Common {
    state: Mutex<State>,
    changed: Condvar,
}

/// What is known of the peers.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) gone: Vec<bool>,
    /// Why one of them, which may still be there, can't be heard any more.
    pub(super) trouble: BTreeMap<usize, String>,
    /// By peer: what it said first, among all that nobody has asked for.
    messages: Vec<BTreeMap<(Kind, u32, u32), Frame>>,
    /// Averagers built: peers that are gone are marked on their boards.
    built: Vec<(Weak<Agreement>, Ring)>,
}

/// The generation of an averager, and the peers by their position in it.
#[derive(Clone, Debug)]
pub(super) struct Ring {
    pub(super) generation: u32,
    pub(super) peers: Arc<[usize]>,
}

/// Says on an averager's board that a peer does not come again.
fn leave(agreement: &Agreement, ring: &Ring, peer: usize) {
    if let Some(position) = ring.peers.iter().position(|&other| other == peer) {
        agreement.control.leave(position);
    }
}

impl Links {
    pub(super) fn new(me: usize, crew: Crew) -> io::Result<Links> {
        let size = crew.peers.len();
        let messages = (0..size).map(|_| BTreeMap::new()).collect();
        let state = State { gone: vec![false; size], trouble: BTreeMap::new(), messages, built: vec![] };
        let common = Arc::new(Common { state: Mutex::new(state), changed: Condvar::new() });
        let latest = Mutex::new(Generation::new(0, (0..size).collect()));
        let mut links = Links { me, page: crew.page, peers: vec![], common, threads: vec![], latest };
        for (peer, met) in crew.peers.into_iter().enumerate() {
            let Some(Met { stream, process }) = met else {
                links.peers.push(None);
                continue;
            };
            let (listens, common) = (stream.try_clone()?, links.common.clone());
            // On an error the drop of `links` ends the threads that did start.
            links.peers.push(Some(Peer { stream, sending: Mutex::new(()) }));
            let thread = std::thread::Builder::new().name(format!("peer-{peer}")).stack_size(256 << 10);
            links.threads.push(thread.spawn(move || listen(peer, &listens, process.as_ref(), &common))?);
        }
        Ok(links)
    }

    /// Sends a message, which waits for a peer that does not listen, but not for longer than `deadline`.
    pub(super) fn send(
        &self,
        peer: usize,
        key: (Kind, u32, u32),
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        let Some(Peer { stream, sending }) = &self.peers[peer] else { return Ok(()) };
        let _one = sending.lock().unwrap_or_else(PoisonError::into_inner);
        frame::send(stream, key, body, files, deadline).inspect_err(|error| {
            if error.kind() != io::ErrorKind::InvalidInput {
                // It may be half sent: nothing that follows would be understood.
                let _ = stream.shutdown(Shutdown::Both);
            }
        })
    }

    /// The same, at once or not at all.
    pub(super) fn try_send(&self, peer: usize, key: (Kind, u32, u32)) {
        const SHORT: Duration = Duration::from_millis(100);
        let Some(Peer { sending, .. }) = &self.peers[peer] else { return };
        if sending.try_lock().is_ok() {
            let _ = self.send(peer, key, &(), &[], Instant::now() + SHORT); // it may be gone
        }
    }

    /// Waits until `done` gives something, looking again whenever a message came or a peer went. `None`: it is too late.
    pub(super) fn wait<T>(
        &self,
        deadline: Instant,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(result) = done(&mut state) {
                return Some(result);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let changed = self.common.changed.wait_timeout(state, left);
            state = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.common.lock()
    }

    /// Wakes whoever waits.
    pub(super) fn changed(&self) {
        self.common.changed.notify_all();
    }

    /// Which generation of the world is the last, and which of its first ranks are in it: (generation << 32) | bits. The one
    /// word that all processes share, and in which a generation is decided.
    pub(super) fn membership(&self) -> &AtomicU64 {
        // SAFETY: in bounds and aligned, borrowed with the page, and accessed by atomics only.
        unsafe { AtomicU64::from_ptr(self.page.address() as *mut u64) }
    }

    /// Remembers an averager, so that the death of a peer ends its waits.
    pub(super) fn watch(&self, agreement: &Arc<Agreement>, ring: Ring) {
        let mut state = self.lock();
        state.built.retain(|(other, _)| other.strong_count() > 0);
        for &peer in
            ring.peers.iter().filter(|&&peer| state.gone[peer] || state.is_past(peer, ring.generation))
        {
            leave(agreement, &ring, peer);
        }
        for (position, &peer) in ring.peers.iter().enumerate() {
            if state.has(peer, (Kind::Abort, ring.generation, 0)) {
                agreement.control.abort(position);
            }
        }
        state.built.push((Arc::downgrade(agreement), ring));
    }
}

impl State {
    pub(super) fn take(&mut self, peer: usize, key: (Kind, u32, u32)) -> Option<Frame> {
        self.messages[peer].remove(&key)
    }

    pub(super) fn has(&self, peer: usize, key: (Kind, u32, u32)) -> bool {
        self.messages[peer].contains_key(&key)
    }

    /// Whether the peer has given this generation up.
    pub(super) fn is_past(&self, peer: usize, generation: u32) -> bool {
        self.messages[peer].keys().any(|&(kind, of, _)| kind == Kind::Ready && of > generation)
    }

    /// Forgets what was said in generations before this one.
    pub(super) fn forget_before(&mut self, generation: u32) {
        for messages in &mut self.messages {
            messages.retain(|&(_, of, _), _| of >= generation);
        }
    }

    /// The averagers of all generations that are still there.
    pub(super) fn built(&self) -> Vec<(Arc<Agreement>, Ring)> {
        self.built.iter().filter_map(|(built, ring)| Some((built.upgrade()?, ring.clone()))).collect()
    }
}

impl Common {
    // No code that can panic holds the lock with the state half changed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_gone(&self, peer: usize) {
        let mut state = self.lock();
        state.gone[peer] = true;
        // Under the lock, so that `watch` misses nobody. The memory is the host's.
        for (agreement, ring) in state.built() {
            leave(&agreement, &ring, peer);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Until the peer is gone, or this process leaves.
fn listen(peer: usize, stream: &UnixStream, process: Option<&OwnedFd>, common: &Common) {
    loop {
        let mut watched = vec![PollFd::new(stream, PollFlags::IN)];
        // Children of the peer may hold its socket open when it has ended. What it said is heard all the same.
        watched.extend(process.map(|process| PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)));
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
            Ok(_) if watched[0].revents().is_empty() => break, // its process has ended
            Ok(_) => {}
        }
        let frame = match frame::receive(stream, &KINDS, MOST_FILES, Instant::now() + WHOLE_MESSAGE) {
            Ok(frame) => frame,
            Err(error) if [io::ErrorKind::InvalidData, frame::SHORT].contains(&error.kind()) => {
                common.lock().trouble.insert(peer, error.to_string());
                break;
            }
            Err(_) => break, // it is gone
        };
        let (kind, generation) = (frame.kind, frame.generation);
        let mut state = common.lock();
        let messages = &mut state.messages[peer];
        messages.entry((kind, generation, frame.number)).or_insert(frame);
        if messages.len() > MOST_WAITING {
            state.trouble.insert(peer, format!("rank {peer} builds averagers that this one does not build"));
            break;
        }
        for (agreement, ring) in state.built() {
            match kind {
                Kind::Abort if generation == ring.generation => {
                    let position = ring.peers.iter().position(|&other| other == peer);
                    position.into_iter().for_each(|position| agreement.control.abort(position));
                }
                Kind::Ready if generation > ring.generation => leave(&agreement, &ring, peer),
                _ => {}
            }
        }
        drop(state);
        common.changed.notify_all();
    }
    let _ = stream.shutdown(Shutdown::Both); // the peer is to know that it is not heard any more
    common.is_gone(peer);
}

/// All that peers say to each other once they have met.
const KINDS: [Kind; 4] = [Kind::Card, Kind::Abort, Kind::Ready, Kind::Reach];
/// Those of a card.
const MOST_FILES: usize = 3;

impl Drop for Links {
    fn drop(&mut self) {
        for Peer { stream, .. } in self.peers.iter().flatten() {
            let _ = stream.shutdown(Shutdown::Both); // both ends see it, if the other is still there
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A membership word.
pub(super) fn word(generation: u32, members: impl IntoIterator<Item = usize>) -> u64 {
    u64::from(generation) << 32 | members.into_iter().fold(0, |bits, peer| bits | 1 << peer)
}

/// The generation and the peers in it.
pub(super) fn read(word: &AtomicU64) -> (u32, Vec<usize>) {
    let word = word.load(Ordering::Acquire);
    ((word >> 32) as u32, (0..32).filter(|bit| word >> bit & 1 != 0).collect())
}
