//! Ranks that meet before an average, on devices.

use std::sync::Arc;
use std::time::Duration;

use super::{cuda, Arrivals, Meeting, World};

/// The ranks that meet before an average, on devices. Threads on CPUs meet in the kernels: a block
/// that waits there keeps nobody else from running.
pub(crate) struct Gathering<'a> {
    /// Ring position of this rank.
    pub(crate) position: usize,
    /// Number of ranks.
    pub(crate) ranks: usize,
    pub(crate) world: &'a dyn World,
    /// Longest wait for a rank that has not come.
    pub(crate) timeout: Duration,
    /// True if any two ranks of the world share a device.
    pub(crate) shares_device: bool,
    pub(crate) way: Way<'a>,
}

/// Way in which ranks on devices meet.
pub(crate) enum Way<'a> {
    /// Ranks that are threads of one process: all calls first, then all launches.
    Threads {
        calls: &'a Meeting<cuda::Part>,
        launches: &'a Meeting<cuda::Launched>,
        world: Arc<dyn Arrivals>,
    },
    /// Ranks that are processes.
    Processes(ProcessWay, Arc<dyn Arrivals>),
}

/// Way in which ranks on devices meet if they are processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessWay {
    /// In their streams, which wait for words in memory.
    InStreams,
    /// On their hosts.
    OnHosts,
    /// On their hosts, before each segment of an average: kernels of processes that share a device
    /// take turns, so none may wait for another.
    Sequenced,
}
