//! Ranks that are processes of one host. They exchange messages over Unix sockets and share the
//! memory of their mailboxes.

mod agree;
mod ancestry;
mod confirm;
mod credentials;
mod exchange;
mod frame;
mod host_info;
mod job;
mod join_listener;
mod joiner;
mod launcher;
mod listener;
mod p2p_probe;
mod peer_set;
mod peer_state;
mod peers;
mod private;
mod rebuild;
mod rendezvous;
mod view_board;
mod view_change;
mod wire_handshake;

use std::sync::{Arc, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::{Placement, WorldId};
use crate::backend::limits;
use crate::sync::lock;
use crate::{Device, Error, Result};
pub(super) use host_info::HostInfo;
use host_info::LocalDevice;
use job::Job;
pub(super) use job::Known;
use join_listener::JoinListener;
use peer_set::{CurrentView, PeerSet, ViewStatus};
use peers::NoReceiver;
#[cfg(fuzzing)]
pub use rendezvous::fuzz;
use rendezvous::RankInfo;
use view_board::ViewBoard;

/// Longest time from `Communicator::join` to the averager of the joiner.
const JOINING: Duration = Duration::from_secs(60);

/// Membership of a process in one view of a world.
#[derive(Debug)]
pub(super) struct ProcessBootstrap {
    peer_set: Arc<PeerSet>,
    view: CurrentView,
    placement: Placement,
    /// Listener of this process for joiners.
    listener: Arc<JoinListener>,
}

/// Identity of a rank, from a launcher or from the caller.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) name: String,
    /// Source of the name, for messages.
    pub(super) source: String,
    pub(super) known: Known,
    /// The variable that gave the rank.
    pub(super) variable: Option<&'static str>,
}

impl Setup {
    /// Reads the environment. A `given` name takes precedence.
    pub(super) fn of_the_environment(given: Option<String>) -> Result<Setup> {
        let failed = |problem| Error::Environment { problem };
        launcher::variables().try_for_each(|name| text(name).map(drop))?;
        let launcher::Launched { rank, world_size, name, source, known, variable } =
            launcher::Launched::find(variable, given).map_err(failed)?;
        Ok(Setup { rank, world_size, name, source, known, variable: Some(variable) })
    }

    /// True if a launcher has set a rank.
    pub(super) fn is_in_the_environment() -> bool {
        launcher::Launched::is_there(variable)
    }

    /// The name from `PARAM_AVERAGER_RENDEZVOUS` alone.
    pub(super) fn name_of_the_environment() -> Result<Option<String>> {
        Ok(text(launcher::RENDEZVOUS)?.filter(|name| !name.is_empty()))
    }
}

/// Value of an environment variable, or of one of the two facts about this process that `launcher`
/// treats alike. Bytes that are not UTF-8 are replaced.
fn variable(name: &str) -> Option<String> {
    match name {
        launcher::PARENT => launcher::parent(),
        launcher::TERMINAL => launcher::has_terminal().then(String::new),
        name => std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()),
    }
}

fn text(name: &str) -> Result<Option<String>> {
    use std::env::VarError;
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => {
            let problem = format!(
                "{name} is {value:?}, which is not UTF-8: set it to the same UTF-8 text on every \
                    rank"
            );
            Err(Error::Environment { problem })
        }
    }
}

impl ProcessBootstrap {
    /// Meets the other ranks in a new world. Collective.
    pub(super) fn meet(
        setup: Setup,
        device: Device,
        timeout: Duration,
    ) -> Result<ProcessBootstrap> {
        let Setup { rank, world_size, name, source, known, variable } = setup;
        let failed = |reason| Error::Rendezvous { rank, reason };
        let own = LocalDevice::find(device);
        let host_info =
            own.as_ref().map_or_else(|_| HostInfo::unknown(device), |own| own.host_info.clone());
        let unavailable = |reason: &String| Error::DeviceUnavailable {
            rank,
            device: device.to_string(),
            reason: reason.clone(),
        };
        let refusal = own.as_ref().err().map(unavailable);
        let refusal = refusal.or(limits::spare_for_all(0).err().map(failed));
        let job = Job::own(&known, rank, variable);
        let told = refusal.as_ref().map(Error::to_string);
        let me = RankInfo { name, source, rank, world_size, host_info, job, refusal: told };
        let deadline = crate::deadline::after(timeout);
        let met = rendezvous::meet(&me, timeout);
        let own = own.map_err(|reason| unavailable(&reason))?; // the other ranks have been told
        refusal.map_or(Ok(()), Err)?;
        let peers = met.map_err(failed)?;
        let first = ViewBoard::first(world_size);
        let peer_set = PeerSet::new(rank, own, peers.board, first);
        let met = peers.peers.into_iter().enumerate().filter_map(|(peer, met)| Some((peer, met?)));
        let heard =
            met.map(|(peer, (host_info, met))| peer_set.connections.add(peer, host_info, met));
        let heard = heard.collect::<Result<(), NoReceiver>>().map_err(|failed| failed.reason);
        peers.confirmation.give(heard).map_err(failed)?;
        p2p_probe::find(&peer_set, &peer_set.current(), deadline).map_err(failed)?;
        let listener = JoinListener::open(
            &me.name,
            peers.origin,
            peer_set.me,
            &peer_set.connections,
            peers.held,
        );
        Ok(ProcessBootstrap::of(peer_set, listener))
    }

    /// Joins a running world; see `Communicator::join`.
    pub(super) fn join(name: &str, device: Device, timeout: Duration) -> Result<ProcessBootstrap> {
        let failed = |reason| Error::JoinRefused { rendezvous: name.to_owned(), reason };
        let own = LocalDevice::find(device)
            .map_err(|reason| failed(format!("{device} is not available: {reason}")))?;
        limits::spare_for_all(0).map_err(failed)?;
        let (peer_set, origin, others) = joiner::join(name, own, timeout).map_err(failed)?;
        p2p_probe::find(&peer_set, &peer_set.current(), Instant::now() + JOINING)
            .map_err(failed)?;
        let listener = JoinListener::open(name, origin, peer_set.me, &peer_set.connections, None)
            .with_others(others);
        Ok(ProcessBootstrap::of(peer_set, listener))
    }

    fn of(peer_set: PeerSet, listener: JoinListener) -> ProcessBootstrap {
        let view = lock(&peer_set.latest).clone();
        let placement = peer_set.placement(&view);
        ProcessBootstrap {
            peer_set: Arc::new(peer_set),
            view,
            placement,
            listener: Arc::new(listener),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.members().iter().position(|&peer| peer == self.peer_set.me).expect("it is a member")
    }

    pub(super) fn placement(&self) -> &Placement {
        &self.placement
    }

    fn members(&self) -> &[usize] {
        self.view.members()
    }

    pub(in crate::world) fn number(&self) -> u32 {
        self.view.number()
    }

    fn others(&self) -> impl Iterator<Item = usize> + '_ {
        self.members().iter().copied().filter(|&peer| peer != self.peer_set.me)
    }

    /// Handle that aborts the world from any thread, while this process is in it.
    pub(super) fn handle(&self) -> Handle {
        Handle(Arc::downgrade(&self.peer_set))
    }

    pub(super) fn name(&self) -> &str {
        self.listener.name()
    }

    pub(super) fn world(&self) -> &WorldId {
        self.listener.world()
    }

    /// The failure that ended this view, if any. Returns the failure itself once and `Poisoned`
    /// afterwards.
    fn failure(&self) -> Option<Error> {
        let mut status = self.status();
        let failure = status.failure.clone()?;
        let told = std::mem::replace(&mut status.told, true);
        Some(if told { Error::Poisoned { cause: Box::new(failure) } } else { failure })
    }

    pub(in crate::world) fn fail(&self, error: Error) -> Error {
        let mut status = self.status();
        status.told = true;
        status.failure.get_or_insert_with(|| error.clone());
        error
    }

    fn status(&self) -> MutexGuard<'_, ViewStatus> {
        self.view.status()
    }
}

/// See `ProcessBootstrap::handle`.
#[derive(Clone, Debug)]
pub(super) struct Handle(Weak<PeerSet>);

impl Handle {
    pub(super) fn abort(&self) {
        self.0.upgrade().into_iter().for_each(|peer_set| peer_set.abort());
    }
}
