//! Connections to the peers of this process. One thread per peer receives its messages and detects
//! its departure.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};
use serde::Serialize;

use crate::backend::limits::thread;
use crate::notice::Notice;
use crate::sync::{lock, wait_timeout};
use crate::world::handshake::Agreement;
use crate::world::processes::peers::host_info::HostInfo;
use crate::world::processes::peers::state::{leave, Ring, State};
use crate::world::processes::view_board::ViewBoard;
use crate::world::processes::wire::frame::{self, Kind};
use crate::world::processes::wire::private::Private;

/// Longest time from the first byte of a message to its last. A slower sender is treated as
/// departed.
const WHOLE_MESSAGE: Duration = Duration::from_secs(60);
/// Bytes of the stack of a listening thread.
const STACK: usize = 256 << 10;
#[derive(Debug)]
struct Peer {
    stream: Private<UnixStream>,
    /// Locked while a message is sent.
    sending: Mutex<()>,
}

impl Peer {
    /// Sends a message, while `sending` is locked.
    fn send(
        &self,
        key: (Kind, u32, u32),
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        frame::send(&self.stream, key, body, files, deadline).inspect_err(|error| {
            if error.kind() != io::ErrorKind::InvalidInput {
                // The message may be half sent, and no later one would be understood.
                let _ = self.stream.shutdown(Shutdown::Both);
            }
        })
    }
}

/// Connection to a peer: a socket, and a pidfd, if available, which shows the end of its process.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: Private<UnixStream>,
    pub(crate) process: Option<OwnedFd>,
}

/// A peer for which no receiving thread could be started.
#[derive(Debug)]
pub(crate) struct NoReceiver {
    pub(crate) reason: String,
    peer: Arc<Peer>,
}

impl NoReceiver {
    /// Stream on which the peer can be told the reason.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.peer.stream
    }
}

/// State that the receiving threads share.
#[derive(Debug)]
pub(crate) struct Connections {
    pub(crate) board: ViewBoard,
    /// `None` once this process has left.
    peers: Mutex<Option<BTreeMap<usize, Arc<Peer>>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    state: Mutex<State>,
    changed: Condvar,
    /// Number of the view after which a joiner waits to be admitted, plus 1; 0: none waits.
    joiner: AtomicU32,
}

impl Connections {
    /// Connections of a process without peers.
    pub(crate) fn new(board: ViewBoard, me: usize, host_info: HostInfo) -> Connections {
        let state = State::new(me, host_info);
        Connections {
            board,
            peers: Mutex::new(Some(BTreeMap::new())),
            threads: Mutex::default(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            joiner: AtomicU32::new(0),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(crate) fn has_left(&self) -> bool {
        self.peers().is_none()
    }

    fn peers(&self) -> MutexGuard<'_, Option<BTreeMap<usize, Arc<Peer>>>> {
        lock(&self.peers)
    }

    fn peer(&self, peer: usize) -> Option<Arc<Peer>> {
        self.peers().as_ref()?.get(&peer).cloned()
    }

    /// Sends a message. Blocks while the peer does not read, until `deadline` at most.
    pub(crate) fn send(
        &self,
        peer: usize,
        key: (Kind, u32, u32),
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        let Some(peer) = self.peer(peer) else { return Ok(()) }; // departed
        let _one = lock(&peer.sending);
        peer.send(key, body, files, deadline)
    }

    /// Sends a message to several peers at once, on this thread. A peer that has departed, or does
    /// not read before `deadline`, gets no message; its missing answer shows that later. On an
    /// error the message is too large, and nothing was sent.
    pub(crate) fn send_to_all(
        &self,
        peers: impl Iterator<Item = usize>,
        key: (Kind, u32, u32),
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> io::Result<()> {
        let peers: Vec<Arc<Peer>> = peers.filter_map(|peer| self.peer(peer)).collect();
        // Each lock is held until its peer has the message.
        let locks = peers.iter().map(|peer| lock(&peer.sending));
        let mut sending: Vec<_> = locks.map(Some).collect();
        let streams: Vec<&UnixStream> = peers.iter().map(|peer| &*peer.stream).collect();
        frame::send_to_all(&streams, key, body, files, deadline, |index, result| {
            if result.is_err() {
                let _ = streams[index].shutdown(Shutdown::Both); // as in `send`
            }
            sending[index] = None;
        })
    }

    /// Sends a message without a body, unless the peer has departed, or another thread has been
    /// sending to it for 100 ms. A peer that then reads nothing for as long is disconnected.
    pub(crate) fn send_briefly(&self, peer: usize, key: (Kind, u32, u32)) {
        const SHORT: Duration = Duration::from_millis(100);
        const AGAIN: Duration = Duration::from_micros(100);
        let deadline = Instant::now() + SHORT;
        let Some(peer) = self.peer(peer) else { return };
        let _one = loop {
            match peer.sending.try_lock() {
                Ok(one) => break one,
                Err(TryLockError::Poisoned(one)) => break one.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return,
                Err(TryLockError::WouldBlock) => std::thread::sleep(AGAIN),
            }
        };
        let _ = peer.send(key, &(), &[], Instant::now() + SHORT);
    }

    /// Waits until `done` returns a value, and calls it again after each message and departure.
    /// `None` after `deadline`.
    pub(crate) fn wait<T>(
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
            state = wait_timeout(&self.changed, state, left);
        }
    }

    /// As `wait`. Once the notice is due, tells what is waited for, which `text` says.
    pub(crate) fn wait_and_tell<T>(
        &self,
        deadline: Instant,
        notice: &mut Notice,
        text: impl FnOnce(&State) -> String,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        if !notice.is_told() && notice.at() < deadline {
            let came = self.wait(notice.at(), &mut done);
            if came.is_some() {
                return came;
            }
            let text = text(&self.lock()); // a subscriber is not called under the lock
            notice.look(|| text);
        }
        self.wait(deadline, done)
    }

    /// Shuts down all sockets. Both ends of each see it.
    pub(crate) fn leave(&self) {
        for peer in self.peers().take().into_iter().flatten() {
            let _ = peer.1.stream.shutdown(Shutdown::Both);
        }
    }

    /// Wakes all waiting threads.
    pub(crate) fn wake(&self) {
        self.changed.notify_all();
    }

    /// Registers an averager, so that departures and aborts end its waits.
    pub(crate) fn watch(&self, agreement: &Arc<Agreement>, ring: Ring) {
        let mut state = self.lock();
        for &peer in ring.peers.iter().filter(|&&peer| state.is_lost(peer, ring.view)) {
            leave(agreement, &ring, peer);
        }
        for (position, &peer) in ring.peers.iter().enumerate() {
            if state.aborts(peer, ring.view) {
                agreement.control.abort(position);
            }
        }
        state.watch(agreement, ring);
    }

    /// Waits for the threads, after `leave`.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Starts to receive from a peer.
    pub(crate) fn add(
        self: &Arc<Self>,
        peer: usize,
        host_info: HostInfo,
        met: Connection,
    ) -> Result<(), NoReceiver> {
        let Connection { stream, process } = met;
        let one = Arc::new(Peer { stream, sending: Mutex::new(()) });
        self.lock().host_infos.insert(peer, host_info);
        let mut guard = self.peers();
        let Some(peers) = &mut *guard else { return Ok(()) };
        peers.insert(peer, one.clone());
        let (heard, connections) = (one.clone(), self.clone());
        let listens = move || listen(peer, &heard.stream, process.as_ref(), &connections);
        let thread = thread(format!("peer-{peer}"), STACK, listens).map_err(|reason| {
            drop(peers.remove(&peer));
            NoReceiver { reason: format!("can't receive from peers: {reason}"), peer: one }
        });
        drop(guard); // never held while the state is locked
        let thread = thread.inspect_err(|_| drop(self.lock().host_infos.remove(&peer)))?;
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// True if a joiner waits to be admitted after this view. One relaxed load.
    pub(crate) fn has_joiner(&self, view: u32) -> bool {
        self.joiner.load(Ordering::Relaxed) == view + 1
    }

    fn count_joiners(&self, state: &State) {
        let view = self.board.view();
        let joiner = if state.joiners(view).is_empty() { 0 } else { view + 1 };
        self.joiner.store(joiner, Ordering::Relaxed);
    }

    fn mark_departed(&self, peer: usize) {
        // Then all its connections end, and its peers, which share the control blocks, live on.
        let has_left = self.has_left();
        let mut state = self.lock();
        state.departed.insert(peer);
        // Under the lock, so that `watch` sees every departure. The host can write the memory
        // without a device.
        let built = if has_left { vec![] } else { state.built() };
        for (agreement, ring) in built {
            leave(&agreement, &ring, peer);
        }
        self.count_joiners(&state);
        drop(state);
        self.peers().as_mut().and_then(|peers| peers.remove(&peer));
        self.changed.notify_all();
    }
}

/// Receives messages until the peer departs or this process leaves.
fn listen(peer: usize, stream: &UnixStream, process: Option<&OwnedFd>, connections: &Connections) {
    loop {
        let mut watched = vec![PollFd::new(stream, PollFlags::IN)];
        // Children of the peer may keep its socket open after it has ended. Messages that it sent
        // before are still received.
        watched.extend(
            process.map(|process| PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)),
        );
        match poll(&mut watched, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
            Ok(_) if watched[0].revents().is_empty() => break, // the process has ended
            Ok(_) => {}
        }
        let frame = match frame::receive(stream, &KINDS, MOST_FILES, Instant::now() + WHOLE_MESSAGE)
        {
            Ok(frame) => frame,
            Err(error)
                if [io::ErrorKind::InvalidData, frame::OTHER_VERSION, frame::SHORT]
                    .contains(&error.kind()) =>
            {
                connections.lock().unreadable.insert(peer, error.to_string());
                break;
            }
            Err(_) => break, // departed
        };
        let (kind, view, number) = (frame.kind, frame.view, frame.number);
        let mut state = connections.lock();
        if let Err(reason) = state.store(peer, frame) {
            state.unreadable.insert(peer, reason);
            break;
        }
        for (agreement, ring) in state.built() {
            match kind {
                Kind::Abort if view == ring.view || number == 1 && view + 1 == ring.view => {
                    let position = ring.peers.iter().position(|&other| other == peer);
                    position.into_iter().for_each(|position| agreement.control.abort(position));
                }
                Kind::Ready if view > ring.view => leave(&agreement, &ring, peer),
                _ => {}
            }
        }
        if kind == Kind::JoinPending {
            connections.count_joiners(&state);
        }
        drop(state);
        connections.changed.notify_all();
    }
    let _ = stream.shutdown(Shutdown::Both); // tells the peer that it is not received from any more
    connections.mark_departed(peer);
}

/// Kinds of messages between peers.
const KINDS: [Kind; 9] = [
    Kind::Handshake,
    Kind::Verdict,
    Kind::Averagers,
    Kind::Exchange,
    Kind::Abort,
    Kind::Ready,
    Kind::Connected,
    Kind::JoinPending,
    Kind::Reach,
];
/// Files of the largest message, a handshake.
const MOST_FILES: usize = 4;

#[cfg(test)]
mod tests;
