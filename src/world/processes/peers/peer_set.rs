//! The peers and the current view of this process in one world.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::error::Phase;
use crate::sync::lock;
use crate::world::bootstrap::Rebuild;
use crate::world::placement::Placement;
use crate::world::processes::peers::connections::Connections;
use crate::world::processes::peers::host_info::{LocalDevice, P2pMatrix};
use crate::world::processes::view_board::{View, ViewBoard};
use crate::world::processes::wire::frame::Kind;
use crate::Error;

/// Sockets of one process in one world. Peers are identified by ids: the rank in the first view, or
/// the number that a joiner was given. Dropping the set leaves the world.
#[derive(Debug)]
pub(crate) struct PeerSet {
    pub(crate) me: usize,
    pub(crate) connections: Arc<Connections>,
    /// Current view, locked for the whole of a view change.
    pub(crate) latest: Mutex<CurrentView>,
    /// Copy of `latest`, locked only to read or replace it.
    current: Mutex<CurrentView>,
    /// Number of the current view.
    pub(crate) number: AtomicU32,
    host_infos: Mutex<P2pMatrix>,
    /// Averagers of this process, for a later view change.
    pub(crate) averagers: Averagers,
    /// True during a view change.
    pub(crate) is_changing: AtomicBool,
    /// True on a joiner until it has received the model.
    pub(crate) is_new: AtomicBool,
}

/// The averagers of one process.
#[derive(Debug, Default)]
pub(crate) struct Averagers {
    all: Mutex<Vec<Weak<dyn Rebuild>>>,
    /// The view in which all averagers have been built. Locked while a thread builds them.
    pub(crate) built_in: Mutex<Option<u32>>,
}

impl Averagers {
    /// See `Elastic::register`.
    pub(crate) fn register(&self, averager: Weak<dyn Rebuild>) {
        let mut all = lock(&self.all);
        all.retain(|averager| averager.strong_count() > 0);
        all.push(averager);
    }

    /// Averagers that have not been dropped, by ordinal.
    pub(crate) fn alive(&self) -> BTreeMap<String, Arc<dyn Rebuild>> {
        let mut all = lock(&self.all);
        all.retain(|averager| averager.strong_count() > 0);
        let alive = all.iter().filter_map(Weak::upgrade);
        alive.map(|averager| (averager.ordinal().to_owned(), averager)).collect()
    }
}

/// State that all communicators of one view of this process share.
#[derive(Clone, Debug)]
pub(crate) struct CurrentView {
    pub(crate) agreed: Arc<View>,
    status: Arc<Mutex<ViewStatus>>,
    /// Number of builds begun: the k-th build of one rank belongs with the k-th build of every
    /// other rank.
    pub(crate) builds: Arc<AtomicU32>,
    /// True once the joiner of this view has received the model, as far as this process knows.
    pub(crate) settled: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
pub(crate) struct ViewStatus {
    /// Failure that ended this view.
    pub(crate) failure: Option<Error>,
    pub(crate) told: bool,
    /// Aborts of this process: in this view, and during the view change after it.
    pub(crate) aborted: [bool; 2],
}

impl CurrentView {
    pub(crate) fn new(agreed: View) -> Self {
        let (status, builds, settled) = (Arc::default(), Arc::default(), Arc::default());
        CurrentView { agreed: Arc::new(agreed), status, builds, settled }
    }

    pub(crate) fn number(&self) -> u32 {
        self.agreed.number
    }

    /// Ids of the members, by rank.
    pub(crate) fn members(&self) -> &[usize] {
        &self.agreed.members
    }

    pub(crate) fn status(&self) -> MutexGuard<'_, ViewStatus> {
        lock(&self.status)
    }
}

impl PeerSet {
    /// State of a process in view `latest`, or of a joiner that is in no view yet.
    pub(crate) fn new(me: usize, own: LocalDevice, board: ViewBoard, latest: View) -> PeerSet {
        let connections = Connections::new(board, me, own.host_info.clone());
        let latest = CurrentView::new(latest);
        let number = AtomicU32::new(latest.number());
        let (current, latest) = (Mutex::new(latest.clone()), Mutex::new(latest));
        let host_infos = Mutex::new(P2pMatrix::new(own));
        let (is_changing, is_new) = (AtomicBool::new(false), AtomicBool::new(false));
        let averagers = Averagers::default();
        PeerSet {
            me,
            connections: Arc::new(connections),
            latest,
            current,
            number,
            host_infos,
            averagers,
            is_changing,
            is_new,
        }
    }

    /// A snapshot of the current view.
    pub(crate) fn current(&self) -> CurrentView {
        lock(&self.current).clone()
    }

    /// Makes `view`, which is `latest`, the current view, and ends the change to it: an abort from
    /// here on is one of the new view. One during the change aborts that, too; its peers know, but
    /// for a joiner.
    pub(crate) fn enter(&self, view: &CurrentView) {
        self.is_changing.store(false, Ordering::Relaxed);
        let last = std::mem::replace(&mut *lock(&self.current), view.clone());
        self.number.store(view.number(), Ordering::Relaxed);
        let was_aborted = last.status().aborted[1];
        if was_aborted {
            self.abort_view(view);
        }
        self.lock().forget_before(view.number());
    }

    /// The local device, and the peer access between ranks.
    pub(crate) fn host_infos(&self) -> MutexGuard<'_, P2pMatrix> {
        lock(&self.host_infos)
    }

    /// Placement of the members of a view. This process has connections to all of them.
    pub(crate) fn placement(&self, view: &CurrentView) -> Placement {
        let state = self.lock();
        let members: Vec<_> =
            view.members().iter().map(|id| (*id, &state.host_infos[id])).collect();
        self.host_infos().placement(&members)
    }

    /// Aborts the current view for all its members, and a view that this process enters meanwhile.
    pub(crate) fn abort(&self) {
        loop {
            let view = self.current();
            self.abort_view(&view);
            // Either this load or the one in `enter` sees the other's store.
            if self.current().number() == view.number() {
                return;
            }
        }
    }

    fn abort_view(&self, view: &CurrentView) {
        let mut status = view.status();
        let is_changing = self.is_changing.load(Ordering::Relaxed);
        if !self.mark_aborted(view, &mut status, is_changing) {
            return;
        }
        // Under the lock, so before a thread of this process reports the abort and ends the
        // process: the peers would know of its departure only.
        for &peer in view.members().iter().filter(|&&peer| peer != self.me) {
            self.send_briefly(peer, (Kind::Abort, view.number(), is_changing.into()));
        }
        drop(status);
        let built = self.lock().built();
        for (agreement, ring) in built.iter().filter(|(_, ring)| ring.view == view.number()) {
            let position = ring.peers.iter().position(|&peer| peer == self.me);
            position.into_iter().for_each(|position| agreement.control.abort(position));
        }
        self.wake();
    }

    /// Records an abort of this process. The failure is reported once more, to a thread that
    /// averages or builds at this moment. False if this process is no member.
    fn mark_aborted(&self, view: &CurrentView, status: &mut ViewStatus, is_changing: bool) -> bool {
        let rank = view.members().iter().position(|&peer| peer == self.me);
        let Some(rank) = rank else { return false };
        status.aborted[usize::from(is_changing)] = true;
        let failure = Error::Aborted { rank, phase: Phase::Build, committed: false };
        status.failure.get_or_insert(failure);
        true
    }
}

/// A peer set is used mostly for its connections.
impl Deref for PeerSet {
    type Target = Connections;
    fn deref(&self) -> &Connections {
        &self.connections
    }
}

impl Drop for PeerSet {
    fn drop(&mut self) {
        self.leave();
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::world::processes::peers::connections::Connection;
    use crate::world::processes::peers::host_info::HostInfo;
    use crate::world::processes::wire::frame;
    use crate::world::processes::wire::private::Private;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    const LONG: Duration = Duration::from_secs(60);

    /// Process 0 of a world of two, the end of its connection that process 1 has, and the views 0
    /// and 1.
    fn first_of_two() -> (PeerSet, UnixStream, [CurrentView; 2]) {
        let board = ViewBoard::new(2).unwrap();
        let first = board.agreed();
        board.propose(0, &first, &[0, 1], None);
        let views = [first.clone(), board.agreed()].map(CurrentView::new);
        let own = LocalDevice::find(Device::cpu()).unwrap();
        let peer_set = PeerSet::new(0, own, board, first);
        let (stream, other) = UnixStream::pair().unwrap();
        let met = Connection { stream: Private::new(stream), process: None };
        assert!(peer_set.connections.add(1, HostInfo::unknown(Device::cpu()), met).is_ok());
        (peer_set, other, views)
    }

    fn is_aborted(view: &CurrentView) -> bool {
        matches!(view.status().failure, Some(Error::Aborted { rank: 0, .. }))
    }

    /// A process that reports its abort may end at once: its peers must have the message by then.
    #[test]
    fn an_abort_is_sent_before_its_process_sees_it() {
        for _ in 0..100 {
            let (peer_set, mut other, _) = first_of_two();
            other.set_nonblocking(true).unwrap();
            let view = peer_set.current();
            std::thread::scope(|scope| {
                scope.spawn(|| peer_set.abort());
                let deadline = Instant::now() + LONG;
                while !is_aborted(&view) {
                    assert!(Instant::now() < deadline);
                }
                let mut first = [0];
                assert_eq!(other.read(&mut first).map_err(|error| error.kind()), Ok(1));
            });
        }
    }

    /// An abort during a view change counts in the next view, where another process has decided
    /// that view before it heard of the abort: on the process that aborts and on its peers.
    #[test]
    fn aborts_during_a_view_change_count_in_the_next_view() {
        let (peer_set, other, [_, next]) = first_of_two();
        peer_set.is_changing.store(true, Ordering::Relaxed);
        peer_set.abort();
        peer_set.enter(&next);
        assert!(is_aborted(&next), "the own abort");
        // A joiner of the next view knows nothing of the one before.
        for key in [(0, 1), (1, 0)] {
            let told = frame::receive(&other, &[Kind::Abort], 0, Instant::now() + LONG).unwrap();
            assert_eq!((told.view, told.number), key);
        }
        assert_eq!(next.status().aborted, [true, false], "no abort of the change after it");

        // An abort after the view was entered, while the change is not over, is of that view.
        let (peer_set, other, [_, next]) = first_of_two();
        peer_set.is_changing.store(true, Ordering::Relaxed);
        peer_set.enter(&next);
        peer_set.abort();
        assert_eq!(next.status().aborted, [true, false]);
        let told = frame::receive(&other, &[Kind::Abort], 0, Instant::now() + LONG).unwrap();
        assert_eq!((told.view, told.number), (1, 0));

        let (peer_set, other, [_, next]) = first_of_two();
        for (number, counts) in [(0, false), (1, true)] {
            let key = (Kind::Abort, 0, number);
            frame::send(&other, key, &(), &[], Instant::now() + LONG).unwrap();
            let came =
                peer_set.wait(Instant::now() + LONG, |state| state.has(1, key).then_some(()));
            came.unwrap();
            peer_set.enter(&next);
            assert_eq!(peer_set.lock().aborts(1, 1), counts, "a peer's abort, {number}");
        }
    }
}
