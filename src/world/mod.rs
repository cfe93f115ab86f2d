//! Who the peers are, and the memory they share.

mod control;
mod handshake;
mod in_process;
#[cfg(target_os = "linux")]
mod launched;
mod placement;
#[cfg(target_os = "linux")]
mod processes;
mod rebuild;
#[cfg(target_os = "linux")]
mod world_id;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

pub(crate) use control::{Control, Failure};
pub(crate) use handshake::{Admission, Agreement, Handshake};
#[cfg(target_os = "linux")]
pub use launched::CommunicatorBuilder;
#[cfg(all(fuzzing, target_os = "linux"))]
pub use processes::fuzz;
pub(crate) use rebuild::Rebuild;
#[cfg(target_os = "linux")]
pub use world_id::WorldId;

pub(crate) use placement::Placement;

use crate::abi::PA_MAX_WORLD;
use crate::backend::MemorySpace;
use crate::{Error, Result};
use in_process::ThreadBootstrap;

/// Where a rank's parameters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Cpu,
    Cuda(usize),
}

impl Device {
    /// This machine's memory and cores.
    pub const fn cpu() -> Self {
        Device(Kind::Cpu)
    }

    /// The CUDA device of this ordinal.
    pub const fn cuda(ordinal: usize) -> Self {
        Device(Kind::Cuda(ordinal))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Cpu => f.write_str("cpu"),
            Kind::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A rank's membership of a world. Send it to the thread that trains this rank.
///
/// A rank leaves when its last communicator, averager included, is dropped; peers that wait for it
/// get [`Error::PeerLost`]. Clones are the same rank: they serve to build more than one averager,
/// which all ranks then do in the same order.
#[derive(Clone, Debug)]
pub struct Communicator {
    membership: Arc<Membership>,
}

/// One rank's way to the others.
#[derive(Clone, Debug)]
enum Group {
    Threads(usize, Arc<ThreadBootstrap>),
    #[cfg(target_os = "linux")]
    Processes(Arc<processes::ProcessBootstrap>),
}

#[derive(Debug)]
struct Membership {
    rank: usize,
    group: Group,
    /// Averagers built or begun: the k-th of one rank belongs with the k-th of every other.
    builds: AtomicU64,
}

impl Communicator {
    /// The ranks of a world whose ranks are threads of this process, in order: one for each device
    /// given, 1 to 16.
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
    /// All on CPUs, or all on CUDA devices, in any order, of which several ranks may share one:
    /// `&[Device::cuda(0); 4]`. Between two devices parameters go straight to the other's memory if
    /// bytes that are moved there and back here and now are right, else through page-locked memory
    /// of the host; see [`Link`](crate::Link). Around the ring, ranks follow one another as their
    /// devices lie: joined by NVLink, on one PCIe switch, next to one NUMA node.
    ///
    /// A CUDA device that was once opened stays so for the life of the process, with this crate's
    /// kernels loaded, as frameworks keep its primary context; memory of averagers is freed when
    /// the last one in the process has gone.
    ///
    /// On CUDA devices, a rank's average waits for its peers on the device itself, so while one is
    /// under way, no peer may wait for every kernel of that device, as `cuMemFree`, `cudaFree` and
    /// `cuModuleLoad` do: that ends with the average's timeout. With many streams, set
    /// `CUDA_DEVICE_MAX_CONNECTIONS=32`: streams that share one of 8 hardware queues wait for one
    /// another. No GPU has shown yet how well this works.
    pub fn from_devices(devices: &[Device]) -> Result<Vec<Communicator>> {
        if devices.is_empty() || devices.len() > PA_MAX_WORLD as usize {
            return Err(Error::WorldSize { found: devices.len() });
        }
        let threads = Arc::new(ThreadBootstrap::new(Placement::find(devices)?));
        let communicators =
            (0..devices.len()).map(|rank| Communicator::new(Group::Threads(rank, threads.clone())));
        Ok(communicators.collect())
    }

    /// This rank's number, from 0.
    pub fn rank(&self) -> usize {
        self.membership.rank
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.placement().size()
    }

    /// Where this rank's parameters are.
    pub fn device(&self) -> Device {
        self.placement().device(self.rank())
    }

    pub(crate) fn space(&self) -> &MemorySpace {
        self.placement().space(self.rank())
    }

    pub(crate) fn placement(&self) -> &Placement {
        match &self.membership.group {
            Group::Threads(_, threads) => threads.placement(),
            #[cfg(target_os = "linux")]
            Group::Processes(processes) => processes.placement(),
        }
    }

    /// A handle that ends whatever this world waits for, from any thread.
    ///
    /// It holds nothing: it serves for as long as the rank is in its world, also after ranks were
    /// lost or let in.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle {
            of: match &self.membership.group {
                Group::Threads(rank, threads) => Handle::Threads(*rank, Arc::downgrade(threads)),
                #[cfg(target_os = "linux")]
                Group::Processes(processes) => Handle::Processes(processes.handle()),
            },
        }
    }

    /// Collective among the ranks that are left, after an error that [is fatal](Error::is_fatal):
    /// the same ranks without those that are gone and those that do not call it within `timeout`,
    /// renumbered from 0 in the order they had. The old communicator, and averagers built with it,
    /// are of no more use.
    ///
    /// For ranks that are processes; it needs no rank in particular.
    /// [`ParamAverager::recover`](crate::ParamAverager::recover) does the rest, too; every rank
    /// goes on in the same one of these two ways, since a rank that recovers an averager waits for
    /// that of every other. Of several that are cut off in time, all but one group are [left
    /// out](Error::Excluded).
    pub fn recover(&self, timeout: Duration) -> Result<Communicator> {
        match &self.membership.group {
            Group::Threads(rank, _) => Err(Error::RecoveryUnsupported { rank: *rank }),
            #[cfg(target_os = "linux")]
            Group::Processes(_) => self.next(timeout, false),
        }
    }

    /// The same, after an error or not, and with a process that waits to join, if all ranks `admit`
    /// it.
    pub(crate) fn next(&self, timeout: Duration, admits: bool) -> Result<Communicator> {
        match &self.membership.group {
            Group::Threads(rank, _) => Err(Error::RecoveryUnsupported { rank: *rank }),
            #[cfg(target_os = "linux")]
            Group::Processes(processes) => {
                let next = processes.next_view(timeout, admits)?;
                Ok(Communicator::new(Group::Processes(Arc::new(next))))
            }
        }
    }

    /// Collective: shows this rank's handshake to all others and returns all handshakes, if they
    /// agree. `number`: which of the averagers that are built [again](Rebuild); `None`: the next
    /// one of this view.
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
            #[cfg(target_os = "linux")]
            Group::Processes(processes) => processes.agree(handshake, number, timeout),
        }
    }

    fn new(group: Group) -> Self {
        let rank = match &group {
            Group::Threads(rank, _) => *rank,
            #[cfg(target_os = "linux")]
            Group::Processes(processes) => processes.rank(),
        };
        Communicator { membership: Arc::new(Membership { rank, group, builds: AtomicU64::new(0) }) }
    }
}

#[cfg(not(target_os = "linux"))]
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
            #[cfg(target_os = "linux")]
            Group::Processes(_) => {} // its sockets are closed
        }
    }
}

/// Ends the world from any thread: every rank that waits, or averages later, gets
/// [`Error::Aborted`].
#[derive(Clone, Debug)]
pub struct AbortHandle {
    of: Handle,
}

#[derive(Clone, Debug)]
enum Handle {
    Threads(usize, Weak<ThreadBootstrap>),
    #[cfg(target_os = "linux")]
    Processes(processes::Handle),
}

impl AbortHandle {
    /// Ends the world. Averages that have not begun to write leave every tensor as it was. Calling
    /// it again does nothing.
    pub fn abort(&self) {
        match &self.of {
            Handle::Threads(rank, threads) => {
                threads.upgrade().into_iter().for_each(|threads| threads.abort(*rank))
            }
            #[cfg(target_os = "linux")]
            Handle::Processes(processes) => processes.abort(),
        }
    }
}
