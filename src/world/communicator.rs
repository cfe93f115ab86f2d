//! Communicators: the membership of a rank in its world.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::bootstrap::{AbortHandle, Bootstrap, Elastic, Rebuild};
use super::exchange::{ExchangeId, Shown};
use super::handshake::{Agreement, Handshake};
use super::host_place::HostPlace;
use super::in_process::ThreadBootstrap;
use super::placement::Placement;
use crate::abi::PA_MAX_WORLD;
use crate::backend::MemorySpace;
use crate::{Device, Error, Result};

/// Default of `CommunicatorBuilder::timeout`.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);

/// The membership of one rank in a world. Send it to the thread that trains this rank.
///
/// A rank leaves its world when its last communicator is dropped; an averager holds one. Peers that
/// wait for a rank that has left get [`Error::PeerLost`]. A clone is the same rank and serves to
/// build a further averager. All ranks build their averagers in the same order.
#[derive(Clone, Debug)]
pub struct Communicator {
    bootstrap: Arc<dyn Bootstrap>,
    place: HostPlace,
    /// Longest wait for the others as a world, or a link to other hosts, is made.
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    timeout: Duration,
}

impl Communicator {
    /// Creates a world whose ranks are threads of this process: one communicator for each device,
    /// in the order given. Does not wait for the ranks.
    ///
    /// ```
    /// use param_averager::{Communicator, Device};
    ///
    /// let world = Communicator::from_devices(&[Device::cpu(), Device::cpu()])?;
    /// let rank = |communicator: Communicator| std::thread::spawn(move || communicator.rank());
    /// let ranks: Vec<_> = world.into_iter().map(rank).collect();
    /// let numbers: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    /// assert_eq!(numbers, [0, 1]);
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// A world has 1 to 16 ranks ([`Error::WorldSize`]), all on CPUs or all on CUDA devices.
    /// Several ranks may share one device, as in `&[Device::cuda(0); 4]`. Ranks on two devices
    /// exchange parameters by peer access if a test transfer, made in this call, arrives intact in
    /// both directions. Otherwise they exchange them through page-locked host memory; see
    /// [`Link`](crate::Link). The ring visits devices in the order of their distance: NVLink first,
    /// then one PCIe switch, then one NUMA node.
    ///
    /// A CUDA device stays open for the life of the process, with its primary context retained and
    /// the kernels of this crate loaded. Memory of averagers is freed when the last averager of the
    /// process is dropped.
    ///
    /// [`Error::DeviceUnavailable`] names the rank whose device cannot be used, and the reason.
    ///
    /// Ranks on CUDA devices meet on the host before anything runs on a device:
    /// [`guide::streams`](crate::guide::streams). None of it has run on a GPU.
    pub fn from_devices(devices: &[Device]) -> Result<Vec<Communicator>> {
        if devices.is_empty() || devices.len() > PA_MAX_WORLD as usize {
            return Err(Error::WorldSize { found: devices.len() });
        }
        let ranks = ThreadBootstrap::all(Placement::find(devices)?);
        Ok(ranks.map(|rank| Communicator::of(Arc::new(rank))).collect())
    }

    pub(crate) fn of(bootstrap: Arc<dyn Bootstrap>) -> Communicator {
        Communicator { bootstrap, place: HostPlace::default(), timeout: TIMEOUT }
    }

    /// The same rank, as one of a single host.
    pub(crate) fn within_host(self) -> Communicator {
        Communicator { place: HostPlace::default(), ..self }
    }

    /// The same rank, at this place among hosts.
    #[cfg(processes)]
    pub(super) fn at(self, place: HostPlace, timeout: Duration) -> Communicator {
        Communicator { place, timeout, ..self }
    }

    /// The number of hosts that the launcher of this process has started ranks on, with the ranks
    /// of this communicator on each. 1 unless the communicator was made by `from_env`. More than 1
    /// need a link between them, [`Builder::hosts`](crate::Builder::hosts).
    pub fn hosts(&self) -> usize {
        self.place.hosts
    }

    /// The number of this host among [`hosts`](Self::hosts), from 0, the same for all its ranks:
    /// torchrun's `GROUP_RANK` where `PARAM_AVERAGER_HOSTS=agents` is set, or Slurm's
    /// `SLURM_NODEID`. `None` for Open MPI and MPICH, which do not number hosts, unless there is
    /// one host.
    pub fn host(&self) -> Option<usize> {
        self.place.host
    }

    #[cfg(feature = "nccl")]
    pub(crate) fn place(&self) -> &HostPlace {
        &self.place
    }

    #[cfg(feature = "nccl")]
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// The rank of this communicator, from 0 to `world_size() - 1`.
    pub fn rank(&self) -> usize {
        self.bootstrap.rank()
    }

    /// The number of ranks, 1 to 16.
    pub fn world_size(&self) -> usize {
        self.placement().size()
    }

    /// The device that this rank's parameters are on.
    pub fn device(&self) -> Device {
        self.placement().device(self.rank())
    }

    pub(crate) fn space(&self) -> &MemorySpace {
        self.placement().space(self.rank())
    }

    pub(crate) fn placement(&self) -> &Placement {
        self.bootstrap.placement()
    }

    /// Returns a handle that ends every wait of this world, from any thread.
    ///
    /// The handle does not keep the rank in its world. It stays valid across view changes, until
    /// the rank has left.
    pub fn abort_handle(&self) -> AbortHandle {
        self.bootstrap.abort_handle()
    }

    /// Forms the next view of the surviving ranks, after an error that [is fatal](Error::is_fatal),
    /// and returns its communicator.
    ///
    /// Collective: blocks until all of them have called it, or for `timeout`. Ranks that are lost
    /// or late are excluded, and the others are renumbered from 0 in their old order. The old
    /// communicator, and the averagers built with it, are not usable any more.
    ///
    /// Only processes can recover; ranks that are threads get [`Error::RecoveryUnsupported`]. Any
    /// rank may be lost. [`ParamAverager::recover`](crate::ParamAverager::recover) does the same
    /// and builds the averagers again. All ranks must use the same one of the two: a rank that
    /// recovers an averager waits for the averagers of all others. If ranks split into several
    /// groups, by the timeout, one group forms the view and every other rank gets
    /// [`Error::Excluded`].
    ///
    /// An averager that is built by hand in the new view gives all ranks rank 0's values, which may
    /// be half an average: use [`Start::Mean`](crate::Start::Mean).
    pub fn recover(&self, timeout: Duration) -> Result<Communicator> {
        self.next(timeout, false)
    }

    /// Changes the view, with or without a preceding failure. Admits a joiner if all ranks pass
    /// `admits`.
    pub(crate) fn next(&self, timeout: Duration, admits: bool) -> Result<Communicator> {
        let next = self.bootstrap.change_view(timeout, admits).map(Communicator::of)?;
        Ok(Communicator { bootstrap: next.bootstrap, ..self.clone() })
    }

    /// Exchanges handshakes with all ranks and returns them if they agree; see
    /// [`Bootstrap::agree`]. From then on, departures and aborts end the waits of this averager.
    pub(crate) fn agree(
        &self,
        handshake: Handshake,
        number: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        let agreement = self.bootstrap.agree(handshake, number, timeout)?;
        self.bootstrap.watch(&agreement)?;
        Ok(agreement)
    }

    /// Shows a message to all ranks; see [`Bootstrap::all_gather`].
    pub(crate) fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        self.bootstrap.all_gather(id, shown, timeout, has_left)
    }

    /// Ends the world for this rank; see [`Bootstrap::fail`].
    pub(crate) fn fail(&self, error: &Error) {
        self.bootstrap.fail(error);
    }
}

/// Worlds whose members change. In other worlds nobody joins or departs, and no view follows the
/// first.
impl Communicator {
    pub(super) fn elastic(&self) -> Option<&dyn Elastic> {
        self.bootstrap.elastic()
    }

    pub(crate) fn has_joiner(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_joiner)
    }

    pub(crate) fn has_joined(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_joined)
    }

    pub(crate) fn has_lost_a_member(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_lost_a_member)
    }

    pub(crate) fn view(&self) -> u32 {
        self.elastic().map_or(0, Elastic::view)
    }

    pub(crate) fn register(&self, averager: Weak<dyn Rebuild>) {
        self.elastic().into_iter().for_each(|elastic| elastic.register(averager.clone()));
    }

    pub(crate) fn rebuild(&self, averages: Option<&str>, timeout: Duration) -> Result<()> {
        match self.elastic() {
            Some(elastic) => elastic.rebuild(&self.bootstrap, averages, timeout),
            None => Err(Error::RecoveryUnsupported { rank: self.rank() }),
        }
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.elastic().is_some_and(Elastic::is_superseded)
    }

    pub(crate) fn is_new(&self) -> bool {
        self.elastic().is_some_and(Elastic::is_new)
    }

    pub(crate) fn lacks_model(&self) -> bool {
        self.elastic().is_some_and(Elastic::lacks_model)
    }

    pub(crate) fn has_model(&self) {
        self.elastic().into_iter().for_each(Elastic::has_model);
    }

    /// Leaves the world after a failure that this process cannot recover from.
    pub(crate) fn leave(&self) {
        self.elastic().into_iter().for_each(Elastic::leave);
    }

    pub(crate) fn not_admitted(&self) -> Error {
        let reason = "the members have built an averager without admitting this process: call \
            ParamAverager::admit_joiner on every member"
            .into();
        let rendezvous = self.elastic().map(|elastic| elastic.world().name().to_owned());
        Error::JoinRefused { rendezvous: rendezvous.unwrap_or_default(), reason }
    }
}
