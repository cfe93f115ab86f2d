//! State of the peers as this process has received it: messages, departures, and the averagers that
//! are told of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use crate::world::handshake::Agreement;
use crate::world::processes::peers::host_info::HostInfo;
use crate::world::processes::wire::exchange::is_over;
use crate::world::processes::wire::frame::{Frame, Kind};

/// Messages of one peer that may wait to be taken.
const MOST_WAITING: usize = 256;

/// Received state of the peers.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) departed: BTreeSet<usize>,
    /// Peers that may live but whose messages can't be received any more, with the reason.
    pub(crate) unreadable: BTreeMap<usize, String>,
    /// Host information of each peer, and of this process.
    pub(crate) host_infos: BTreeMap<usize, HostInfo>,
    /// Messages that were not taken yet, by peer. The oldest of equal keys is kept.
    messages: BTreeMap<usize, BTreeMap<(Kind, u32, u32), Frame>>,
    /// Averagers whose control blocks are told of departures and aborts.
    built: Vec<(Weak<Agreement>, Ring)>,
}

/// The view of an averager, and its peers by ring position.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    pub(crate) view: u32,
    pub(crate) peers: Arc<[usize]>,
}

/// Records in an averager's control block that a peer has departed.
pub(crate) fn leave(agreement: &Agreement, ring: &Ring, peer: usize) {
    if let Some(position) = ring.peers.iter().position(|&other| other == peer) {
        agreement.control.leave(position);
    }
}

impl State {
    /// State of a process without peers.
    pub(crate) fn new(me: usize, host_info: HostInfo) -> State {
        State { host_infos: [(me, host_info)].into(), ..State::default() }
    }

    /// Stores a message, unless an equal one is stored. An error if too many wait to be taken.
    pub(crate) fn store(&mut self, peer: usize, frame: Frame) -> Result<(), String> {
        let messages = self.messages.entry(peer).or_default();
        if frame.kind == Kind::Exchange {
            // Left over where this rank had given up an exchange of descriptions.
            messages.retain(|&(kind, view, number), _| {
                kind != Kind::Exchange || view != frame.view || !is_over(number, frame.number)
            });
        }
        messages.entry((frame.kind, frame.view, frame.number)).or_insert(frame);
        if messages.len() > MOST_WAITING {
            return Err(format!("peer {peer} builds averagers that this rank does not build"));
        }
        Ok(())
    }

    /// Registers an averager.
    pub(crate) fn watch(&mut self, agreement: &Arc<Agreement>, ring: Ring) {
        self.built.retain(|(other, _)| other.strong_count() > 0);
        self.built.push((Arc::downgrade(agreement), ring));
    }

    pub(crate) fn take(&mut self, peer: usize, key: (Kind, u32, u32)) -> Option<Frame> {
        self.messages.get_mut(&peer)?.remove(&key)
    }

    pub(crate) fn get(&self, peer: usize, key: (Kind, u32, u32)) -> Option<&Frame> {
        self.messages.get(&peer)?.get(&key)
    }

    pub(crate) fn has(&self, peer: usize, key: (Kind, u32, u32)) -> bool {
        self.get(peer, key).is_some()
    }

    /// True if the peer has departed or has abandoned this view.
    pub(crate) fn is_lost(&self, peer: usize, view: u32) -> bool {
        let is_past = |&(kind, of, _): &(Kind, u32, u32)| kind == Kind::Ready && of > view;
        self.departed.contains(&peer)
            || self.messages.get(&peer).is_some_and(|said| said.keys().any(is_past))
    }

    /// True if the peer has aborted this view, or the view before it during the change to this
    /// view.
    pub(crate) fn aborts(&self, peer: usize, view: u32) -> bool {
        let before = view.checked_sub(1).is_some_and(|last| self.has(peer, (Kind::Abort, last, 1)));
        before || [0, 1].into_iter().any(|during| self.has(peer, (Kind::Abort, view, during)))
    }

    /// Forgets a peer whose connection was not completed.
    pub(crate) fn forget(&mut self, peer: usize) {
        self.departed.remove(&peer);
        self.host_infos.remove(&peer);
    }

    /// Forgets departed peers that are no members, except the last `most`.
    pub(crate) fn forget_departed(&mut self, members: &[usize], most: usize) {
        // Ids grow with time.
        let outside = self.departed.iter().filter(|&peer| !members.contains(peer)).rev().skip(most);
        for peer in outside.copied().collect::<Vec<_>>() {
            self.forget(peer);
            self.messages.remove(&peer);
            self.unreadable.remove(&peer);
        }
    }

    /// Joiners that are connected and wait to be admitted after this view.
    pub(crate) fn joiners(&self, view: u32) -> Vec<usize> {
        let waits = |peer: &usize| {
            self.has(*peer, (Kind::JoinPending, view, 0)) && !self.departed.contains(peer)
        };
        self.messages.keys().copied().filter(waits).collect()
    }

    /// Connected peers that are no members.
    pub(crate) fn outsiders(&self, members: &[usize]) -> Vec<usize> {
        let is_one = |peer: &&usize| !members.contains(peer) && !self.departed.contains(peer);
        self.host_infos.keys().filter(is_one).copied().collect()
    }

    /// Drops messages of earlier views, except aborts during the change to this view.
    pub(crate) fn forget_before(&mut self, view: u32) {
        self.messages.retain(|_, messages| {
            messages.retain(|&(kind, of, during), _| {
                of >= view || (kind, of + 1, during) == (Kind::Abort, view, 1)
            });
            !messages.is_empty()
        });
    }

    /// Averagers of all views that have not been dropped.
    pub(crate) fn built(&self) -> Vec<(Arc<Agreement>, Ring)> {
        self.built
            .iter()
            .filter_map(|(built, ring)| Some((built.upgrade()?, ring.clone())))
            .collect()
    }
}
