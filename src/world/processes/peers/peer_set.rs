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

    /// Makes `view`, which is `latest`, the current view.
    pub(crate) fn enter(&self, view: &CurrentView) {
        *lock(&self.current) = view.clone();
        self.number.store(view.number(), Ordering::Relaxed);
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

    /// Aborts the current view for all its members.
    pub(crate) fn abort(&self) {
        let view = self.current();
        let Some(rank) = view.members().iter().position(|&peer| peer == self.me) else { return };
        // The failure is reported once more, to a thread that averages or builds at this moment.
        let failure = Error::Aborted { rank, phase: Phase::Build, committed: false };
        let mut status = view.status();
        let is_changing = self.is_changing.load(Ordering::Relaxed);
        status.aborted[usize::from(is_changing)] = true;
        status.failure.get_or_insert(failure);
        drop(status);
        let built = self.lock().built();
        for (agreement, ring) in built.iter().filter(|(_, ring)| ring.view == view.number()) {
            let position = ring.peers.iter().position(|&peer| peer == self.me);
            position.into_iter().for_each(|position| agreement.control.abort(position));
        }
        self.wake();
        let others = view.members().iter().filter(|&&peer| peer != self.me);
        others.for_each(|&peer| {
            self.try_send(peer, (Kind::Abort, view.number(), is_changing.into()))
        });
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
