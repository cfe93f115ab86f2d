//! Communicators: the membership of a rank in its world, by threads of one process or by processes
//! of one host.

mod control;
mod exchange;
mod handshake;
mod in_process;
#[cfg(processes)]
#[cfg_attr(docsrs, doc(cfg(all(target_os = "linux", feature = "processes"))))]
mod launched;
mod placement;
#[cfg(processes)]
mod processes;
mod rebuild;
mod run;
#[cfg(processes)]
#[cfg_attr(docsrs, doc(cfg(all(target_os = "linux", feature = "processes"))))]
mod world_id;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

pub(crate) use control::{Control, Failure};
pub(crate) use exchange::{ExchangeId, Shown, MOST_WORDS};
pub(crate) use handshake::{Admission, Agreement, Handshake};
#[cfg(processes)]
pub use launched::CommunicatorBuilder;
#[cfg(all(fuzzing, processes))]
pub use processes::fuzz;
pub(crate) use rebuild::Rebuild;
#[cfg(processes)]
pub use world_id::WorldId;

pub(crate) use placement::Placement;

use crate::abi::PA_MAX_WORLD;
use crate::backend::MemorySpace;
use crate::{Device, Error, Result};
use in_process::ThreadBootstrap;

/// Text of a notice: `rank` waits for these to make the same call.
fn waits_for_call(rank: usize, missing: &[usize], call: &str, timeout: Duration) -> String {
    let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
    let (several, missing) = (if missing.len() > 1 { "s" } else { "" }, missing.join(", "));
    format!(
        "rank {rank} waits for rank{several} {missing} to {call}, which every rank does at the \
            same time, on a thread or process of its own; the wait ends after {timeout:?}"
    )
}

const BUILD: &str = "build an averager";

/// The membership of one rank in a world. Send it to the thread that trains this rank.
///
/// A rank leaves its world when its last communicator is dropped; an averager holds one. Peers that
/// wait for a rank that has left get [`Error::PeerLost`]. A clone is the same rank and serves to
/// build a further averager. All ranks build their averagers in the same order.
#[derive(Clone, Debug)]
pub struct Communicator {
    membership: Arc<Membership>,
}

/// The connection of one rank to its peers.
#[derive(Clone, Debug)]
enum Group {
    Threads(usize, Arc<ThreadBootstrap>),
    #[cfg(processes)]
    Processes(Arc<processes::ProcessBootstrap>),
}

#[derive(Debug)]
struct Membership {
    rank: usize,
    group: Group,
    /// Number of builds begun: the k-th build of one rank belongs with the k-th build of every
    /// other rank.
    builds: AtomicU64,
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
    /// **Deadlocks.** On CUDA devices, the average of a rank waits for its peers on the device.
    /// While an average runs, no peer may wait for all kernels of that device, as `cuMemFree`,
    /// `cudaFree` and `cuModuleLoad` do: such a wait lasts until the average times out. With many
    /// streams, set `CUDA_DEVICE_MAX_CONNECTIONS=32`: streams that share one of the 8 hardware
    /// queues wait for one another. None of this has been measured on a GPU.
    pub fn from_devices(devices: &[Device]) -> Result<Vec<Communicator>> {
        if devices.is_empty() || devices.len() > PA_MAX_WORLD as usize {
            return Err(Error::WorldSize { found: devices.len() });
        }
        let threads = Arc::new(ThreadBootstrap::new(Placement::find(devices)?));
        let communicators =
            (0..devices.len()).map(|rank| Communicator::new(Group::Threads(rank, threads.clone())));
        Ok(communicators.collect())
    }

    /// The rank of this communicator, from 0 to `world_size() - 1`.
    pub fn rank(&self) -> usize {
        self.membership.rank
    }

    /// The number of ranks, 1 to 16.
    pub fn world_size(&self) -> usize {
        self.placement().size()
    }

    /// The device that this rank's parameters are on.
    pub fn device(&self) -> Device {
        self.placement().device(self.rank())
    }

    /// True if another rank of this process is on the same device.
    pub(crate) fn shares_device(&self) -> bool {
        let placement = self.placement();
        let is_on_it = |&rank: &usize| placement.device(rank) == self.device();
        let others = || (0..placement.size()).filter(|&rank| rank != self.rank());
        matches!(self.membership.group, Group::Threads(..)) && others().any(|rank| is_on_it(&rank))
    }

    pub(crate) fn space(&self) -> &MemorySpace {
        self.placement().space(self.rank())
    }

    pub(crate) fn placement(&self) -> &Placement {
        match &self.membership.group {
            Group::Threads(_, threads) => threads.placement(),
            #[cfg(processes)]
            Group::Processes(processes) => processes.placement(),
        }
    }

    /// Returns a handle that ends every wait of this world, from any thread.
    ///
    /// The handle does not keep the rank in its world. It stays valid across view changes, until
    /// the rank has left.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle {
            of: match &self.membership.group {
                Group::Threads(rank, threads) => Handle::Threads(*rank, Arc::downgrade(threads)),
                #[cfg(processes)]
                Group::Processes(processes) => Handle::Processes(processes.handle()),
            },
        }
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
        match &self.membership.group {
            Group::Threads(rank, _) => Err(Error::RecoveryUnsupported { rank: *rank }),
            #[cfg(processes)]
            Group::Processes(_) => self.next(timeout, false),
        }
    }

    /// Changes the view, with or without a preceding failure. Admits a joiner if all ranks pass
    /// `admits`.
    pub(crate) fn next(&self, timeout: Duration, admits: bool) -> Result<Communicator> {
        match &self.membership.group {
            Group::Threads(rank, _) => Err(Error::RecoveryUnsupported { rank: *rank }),
            #[cfg(processes)]
            Group::Processes(processes) => {
                let next = processes.next_view(timeout, admits)?;
                Ok(Communicator::new(Group::Processes(Arc::new(next))))
            }
        }
    }

    /// Exchanges handshakes with all ranks and returns them if they agree. Collective. `number`
    /// identifies an averager that is [built again](Rebuild); `None` stands for the next build of
    /// this view.
    pub(crate) fn agree(
        &self,
        handshake: Handshake,
        number: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        match &self.membership.group {
            Group::Threads(rank, threads) => {
                let number = self.membership.builds.fetch_add(1, Ordering::Relaxed);
                threads.agree(*rank, number, handshake, timeout)
            }
            #[cfg(processes)]
            Group::Processes(processes) => processes.agree(handshake, number, timeout),
        }
    }

    fn new(group: Group) -> Self {
        let rank = match &group {
            Group::Threads(rank, _) => *rank,
            #[cfg(processes)]
            Group::Processes(processes) => processes.rank(),
        };
        Communicator { membership: Arc::new(Membership { rank, group, builds: AtomicU64::new(0) }) }
    }
}

#[cfg(not(processes))]
impl Communicator {
    pub(crate) fn has_joiner(&self) -> bool {
        false
    }

    pub(crate) fn has_joined(&self) -> bool {
        false
    }

    pub(crate) fn is_superseded(&self) -> bool {
        false
    }

    pub(crate) fn has_lost_a_member(&self) -> bool {
        false
    }

    pub(crate) fn view(&self) -> u32 {
        0
    }

    pub(crate) fn register(&self, _: std::sync::Weak<dyn Rebuild>) {}

    pub(crate) fn rebuild(&self, _: Option<&str>, _: Duration) -> Result<()> {
        Err(Error::RecoveryUnsupported { rank: self.rank() })
    }

    pub(crate) fn is_new(&self) -> bool {
        false
    }

    pub(crate) fn lacks_model(&self) -> bool {
        false
    }

    pub(crate) fn not_admitted(&self) -> Error {
        Error::RecoveryUnsupported { rank: self.rank() }
    }

    pub(crate) fn has_model(&self) {}

    pub(crate) fn leave(&self) {}
}

impl Drop for Membership {
    fn drop(&mut self) {
        match &self.group {
            Group::Threads(rank, threads) => threads.leave(*rank),
            #[cfg(processes)]
            Group::Processes(_) => {} // its sockets close when the last communicator is dropped
        }
    }
}

/// Ends a world from any thread. Every rank that waits, or averages later, gets [`Error::Aborted`].
#[derive(Clone, Debug)]
pub struct AbortHandle {
    of: Handle,
}

#[derive(Clone, Debug)]
enum Handle {
    Threads(usize, Weak<ThreadBootstrap>),
    #[cfg(processes)]
    Processes(processes::Handle),
}

impl AbortHandle {
    /// Ends the world. Does not wait for the other ranks. An average that has not been committed
    /// leaves every tensor unchanged. Further calls have no effect.
    pub fn abort(&self) {
        match &self.of {
            Handle::Threads(rank, threads) => {
                threads.upgrade().into_iter().for_each(|threads| threads.abort(*rank))
            }
            #[cfg(processes)]
            Handle::Processes(processes) => processes.abort(),
        }
    }
}
