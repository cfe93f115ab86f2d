//! Links between hosts: each rank's part of the mean is averaged with the parts of the ranks of the
//! same number on all other hosts.

#[cfg(any(feature = "mpi", feature = "nccl"))]
mod looks;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod threads;

use std::fmt;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[cfg(feature = "mpi")]
pub use self::mpi::MpiHosts;
#[cfg(feature = "nccl")]
pub use nccl::{NcclHosts, NcclId};
pub use threads::ThreadHosts;

/// Link of one rank to the ranks of the same number on all other hosts, for
/// [`Builder::hosts`](crate::Builder::hosts).
///
/// The calls are collective: the ranks of one number on all hosts make the same calls in the same
/// order, with buffers of the same length. An error ends the link: no further call follows.
/// [`ThreadHosts`] is a link within a process, for tests.
#[cfg_attr(feature = "mpi", doc = "[`MpiHosts`] is one over MPI.")]
#[cfg_attr(feature = "nccl", doc = "[`NcclHosts`] is one over NCCL.")]
pub trait Hosts: Send {
    /// The number of hosts.
    fn hosts(&self) -> usize;

    /// The number of this host, from 0, the same for all of its ranks.
    fn host(&self) -> usize;

    /// Sends part h of `send` to host h, and receives this host's part of what host h sends as part
    /// h of `receive`. Both buffers have a part of equal length for each host. Waits while
    /// [`HostsLimit::check`] is `Ok`.
    fn all_to_all(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError>;

    /// Sends `send` to all hosts, and receives what host h sends as part h of `receive`. Waits
    /// while [`HostsLimit::check`] is `Ok`.
    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError>;

    /// Tells the other hosts, if the link can, that this rank makes no further call. Does not wait.
    /// Follows an error, too.
    fn abort(&mut self);
}

/// End of the waits of a link, to be looked at every few milliseconds.
#[derive(Clone, Copy)]
pub struct HostsLimit<'a> {
    deadline: Option<Instant>,
    /// True if this host's own ranks have failed.
    is_over: &'a dyn Fn() -> bool,
}

impl<'a> HostsLimit<'a> {
    /// HostsLimit `patience` from now, or when `is_over` returns true: for tests of a link.
    pub fn new(patience: Duration, is_over: &'a dyn Fn() -> bool) -> HostsLimit<'a> {
        HostsLimit { deadline: Instant::now().checked_add(patience), is_over }
    }

    /// Error if the wait has to end: time is up, the averaging was aborted, or a rank of this host
    /// is lost.
    pub fn check(&self) -> Result<(), HostsError> {
        if (self.is_over)() {
            return Err(HostsError::new(None, "the ranks of this host can't go on"));
        }
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let reason = "another host is late: see what it does, or raise the `timeout` of the \
                          builder, or of the communicator if the link is being made";
            return Err(HostsError::new(None, reason));
        }
        Ok(())
    }

    /// Time that is left, and `most` at most.
    #[cfg(feature = "nccl")]
    pub(crate) fn rest(&self, most: Duration) -> Duration {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        self.deadline.map_or(most, |deadline| left(deadline).min(most))
    }
}

impl fmt::Debug for HostsLimit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostsLimit({:?})", self.deadline)
    }
}

/// Failure of a link between hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostsError {
    /// Host that is late or gone, if the link knows.
    pub host: Option<usize>,
    /// Reason: the call that failed, and what it waited for.
    pub reason: String,
}

impl HostsError {
    /// Failure with this reason.
    pub fn new(host: Option<usize>, reason: impl Into<String>) -> Self {
        HostsError { host, reason: reason.into() }
    }
}

impl fmt::Display for HostsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for HostsError {}

/// Error of buffers that do not have a part for each host.
#[cfg(any(feature = "mpi", feature = "nccl"))]
fn has_parts(fits: bool) -> Result<(), HostsError> {
    let wrong = || HostsError::new(None, "the buffers do not have a part for each host");
    fits.then_some(()).ok_or_else(wrong)
}

/// Averages that all hosts take part in; the same on every rank of every host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Hierarchy {
    /// Every average.
    Every,
    /// Every `every`-th average. The averages between are of the ranks of one host.
    Outer {
        /// Number of averages from one of all hosts to the next, from 1.
        every: u32,
    },
}

impl Hierarchy {
    pub(crate) fn every(self) -> u32 {
        match self {
            Hierarchy::Every => 1,
            Hierarchy::Outer { every } => every,
        }
    }
}

/// A rank's link, which its averagers and their successors in later views share.
#[derive(Clone)]
pub(crate) struct HostLink {
    pub(crate) hosts: usize,
    pub(crate) host: usize,
    shared: Arc<Mutex<Shared>>,
}

struct Shared {
    link: Box<dyn Hosts>,
    broken: Option<HostsError>,
}

impl HostLink {
    pub(crate) fn new(link: impl Hosts + 'static) -> HostLink {
        let (hosts, host) = (link.hosts(), link.host());
        let shared = Shared { link: Box::new(link), broken: None };
        HostLink { hosts, host, shared: Arc::new(Mutex::new(shared)) }
    }

    /// Makes a call, unless an earlier one has failed, whose error stays.
    pub(crate) fn call(
        &self,
        call: impl FnOnce(&mut dyn Hosts) -> Result<(), HostsError>,
    ) -> Result<(), HostsError> {
        let shared = &mut *crate::sync::lock(&self.shared);
        if let Some(broken) = &shared.broken {
            return Err(broken.clone());
        }
        let link = &mut *shared.link;
        let made = catch_unwind(AssertUnwindSafe(|| call(link)));
        let made = made.unwrap_or_else(|_| Err(HostsError::new(None, "the link has panicked")));
        made.inspect_err(|error| {
            shared.link.abort();
            shared.broken = Some(error.clone());
        })
    }

    /// Tells the other hosts that this rank makes no further call.
    pub(crate) fn abort(&self, reason: &str) {
        let shared = &mut *crate::sync::lock(&self.shared);
        if shared.broken.is_none() {
            shared.link.abort();
            shared.broken = Some(HostsError::new(Some(self.host), reason));
        }
    }
}

impl fmt::Debug for HostLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {} of {}", self.host, self.hosts)
    }
}
