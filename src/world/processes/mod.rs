//! Ranks that are processes of one host. They exchange messages over Unix sockets and share the
//! memory of their mailboxes.

mod identity;
mod join;
mod member;
mod peers;
mod rendezvous;
mod view_board;
mod view_change;
mod wire;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use self::rendezvous::RankInfo;
use crate::abi::PA_MAX_WORLD;
use crate::backend::limits;
use crate::error::Phase;
use crate::world::bootstrap::{Abort, AbortHandle, Bootstrap, Elastic, Rebuild};
use crate::world::exchange::{in_exchange, missing, ExchangeId, Shown};
use crate::world::handshake::{Agreement, Handshake};
use crate::world::host_place::HostPlace;
use crate::world::placement::Placement;
use crate::world::world_id::WorldId;
use crate::{notice, Device, Error, Result};
use identity::job::Job;
pub(crate) use identity::job::Known;
use identity::launcher;
use join::joiner;
use join::listener::JoinListener;
use member::{p2p_probe, Member, JOINING};
use peers::connections::NoReceiver;
use peers::host_info::{HostInfo, LocalDevice};
use peers::peer_set::PeerSet;
#[cfg(feature = "__testing")]
pub use rendezvous::testing;
use view_board::ViewBoard;
use wire::exchange::key_of;
use wire::frame::Kind;

/// Membership of a process in one view of a world.
#[derive(Debug)]
pub(crate) struct ProcessBootstrap {
    member: Member,
    placement: Placement,
    /// Listener of this process for joiners.
    listener: Arc<JoinListener>,
}

/// Identity of a rank, from a launcher or from the caller.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) name: String,
    /// Source of the name, for messages.
    pub(crate) source: String,
    pub(crate) known: Known,
    /// The variable that gave the rank.
    pub(crate) variable: Option<&'static str>,
    pub(crate) place: HostPlace,
}

impl Setup {
    /// Reads the environment. A `given` name takes precedence.
    pub(crate) fn of_the_environment(given: Option<String>) -> Result<Setup> {
        let failed = |problem| Error::Environment { problem };
        launcher::variables().try_for_each(|name| text(name).map(drop))?;
        let launcher::Launched { rank, world_size, name, source, known, variable, place } =
            launcher::Launched::find(variable, given).map_err(failed)?;
        Ok(Setup { rank, world_size, name, source, known, variable: Some(variable), place })
    }

    /// True if a launcher has set a rank.
    pub(crate) fn is_in_the_environment() -> bool {
        launcher::Launched::is_there(variable)
    }

    /// The name from `PARAM_AVERAGER_RENDEZVOUS` alone.
    pub(crate) fn name_of_the_environment() -> Result<Option<String>> {
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
    pub(crate) fn meet(
        setup: Setup,
        device: Device,
        timeout: Duration,
    ) -> Result<ProcessBootstrap> {
        let Setup { rank, world_size, name, source, known, variable, .. } = setup;
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
        let member = Member::new(peer_set);
        let left = deadline.saturating_duration_since(Instant::now());
        p2p_probe::find(&member, left).map_err(failed)?;
        let (id, connections) = (member.peer_set.me, &member.peer_set.connections);
        let listener = JoinListener::open(&me.name, peers.origin, id, connections, peers.held);
        Ok(ProcessBootstrap::of(member, Arc::new(listener)))
    }

    /// Joins a running world; see `Communicator::join`.
    pub(crate) fn join(name: &str, device: Device, timeout: Duration) -> Result<ProcessBootstrap> {
        let failed = |reason| Error::JoinRefused { rendezvous: name.to_owned(), reason };
        let own = LocalDevice::find(device)
            .map_err(|reason| failed(format!("{device} is not available: {reason}")))?;
        limits::spare_for_all(0).map_err(failed)?;
        let (peer_set, origin, others) = joiner::join(name, own, timeout).map_err(failed)?;
        let member = Member::new(peer_set);
        p2p_probe::find(&member, JOINING).map_err(failed)?;
        let (id, connections) = (member.peer_set.me, &member.peer_set.connections);
        let listener = JoinListener::open(name, origin, id, connections, None).with_others(others);
        Ok(ProcessBootstrap::of(member, Arc::new(listener)))
    }

    fn of(member: Member, listener: Arc<JoinListener>) -> ProcessBootstrap {
        let placement = member.peer_set.placement(&member.view);
        ProcessBootstrap { member, placement, listener }
    }
}

impl Bootstrap for ProcessBootstrap {
    fn rank(&self) -> usize {
        self.member.rank()
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn agree(
        &self,
        handshake: Handshake,
        number: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        self.member.agree(&self.placement, handshake, number, timeout).map(Arc::new)
    }

    fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        let (member, phase) = (&self.member, Phase::Exchange);
        member.failure().map(in_exchange).map_or(Ok(()), Err)?;
        let name = format!("call {}", shown.call);
        let (call, kind) = (member.call(&name, phase, timeout), (Kind::Exchange, key_of(id)));
        let frames = member.all_gather_until(&call, kind, (&shown, &[]), false, has_left);
        let mut all = vec![];
        for (rank, frame) in frames.map_err(|e| missing(e, &call))?.into_iter().enumerate() {
            let theirs = frame.map_or_else(|| Ok(shown.clone()), |frame| frame.parse());
            all.push(theirs.map_err(|error| {
                let text = format!("the message of rank {rank} can't be parsed: {error}");
                notice::warn(Some(call.rank), &text);
                Error::PeerLost { rank, phase, committed: false }
            })?);
        }
        Ok(all)
    }

    fn fail(&self, error: &Error) {
        self.member.fail(error);
    }

    fn watch(&self, agreement: &Arc<Agreement>) -> Result<()> {
        self.member.watch(agreement, &self.placement)
    }

    fn abort_handle(&self) -> AbortHandle {
        AbortHandle { of: Arc::new(Handle(Arc::downgrade(&self.member.peer_set))) }
    }

    fn change_view(&self, timeout: Duration, admits: bool) -> Result<Arc<dyn Bootstrap>> {
        let member = self.member.next_view(self.world().name(), timeout, admits)?;
        Ok(Arc::new(ProcessBootstrap::of(member, self.listener.clone())))
    }

    fn elastic(&self) -> Option<&dyn Elastic> {
        Some(self)
    }
}

impl Elastic for ProcessBootstrap {
    fn world(&self) -> &WorldId {
        self.listener.world()
    }

    fn view(&self) -> u32 {
        self.member.number()
    }

    fn is_superseded(&self) -> bool {
        self.member.peer_set.number.load(Ordering::Relaxed) != self.view()
    }

    fn has_lost_a_member(&self) -> bool {
        self.member.has_lost_a_member()
    }

    fn has_joiner(&self) -> bool {
        self.member.ids().len() < PA_MAX_WORLD as usize
            && self.member.peer_set.connections.has_joiner(self.view())
    }

    fn has_joined(&self) -> bool {
        self.member.view.agreed.joined.is_some()
    }

    fn is_new(&self) -> bool {
        self.member.view.agreed.joined == Some(self.member.peer_set.me)
    }

    fn lacks_model(&self) -> bool {
        self.member.peer_set.is_new.load(Ordering::Relaxed)
    }

    fn has_model(&self) {
        self.member.view.settled.store(true, Ordering::Relaxed);
        self.member.peer_set.is_new.store(false, Ordering::Relaxed);
    }

    fn leave(&self) {
        self.member.peer_set.leave();
    }

    fn register(&self, averager: Weak<dyn Rebuild>) {
        self.member.peer_set.averagers.register(averager);
    }

    fn rebuild(
        &self,
        own: &Arc<dyn Bootstrap>,
        averages: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        self.member.rebuild(own, averages, timeout)
    }
}

/// See `Bootstrap::abort_handle`. Valid while this process is in the world, in every view.
#[derive(Debug)]
struct Handle(Weak<PeerSet>);

impl Abort for Handle {
    fn abort(&self) {
        self.0.upgrade().into_iter().for_each(|peer_set| peer_set.abort());
    }
}
