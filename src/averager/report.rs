//! What an average did.

use std::time::Duration;

use super::Algorithm;

/// What one average moved, and how long it took on this rank.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes of this rank's tensors: S.
    pub bytes: u64,
    /// From the call to the return.
    pub elapsed: Duration,
    /// Of it, time spent waiting for peers: for late ones at the start, for slow ones on the way.
    /// The longest of all channels.
    pub waited: Duration,
    /// Ranks that took part.
    pub world_size: usize,
    /// How it was done.
    pub algorithm: Algorithm,
    /// A process waits to [join](crate::Communicator::join) this world; the same on every rank.
    /// [`LocalSgd`](crate::LocalSgd) lets it in, or
    /// [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner).
    pub join_pending: bool,
}

impl Report {
    /// Algorithm bandwidth in GB/s: S / elapsed. As in nccl-tests, 1 GB is 10⁹ bytes.
    pub fn algbw(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 {
            self.bytes as f64 / seconds / 1e9
        } else {
            0.0
        }
    }

    /// Bus bandwidth in GB/s: algbw · 2·(n − 1)/n, what a ring puts on each link. As in nccl-tests,
    /// for all algorithms.
    pub fn busbw(&self) -> f64 {
        let n = self.world_size as f64;
        self.algbw() * 2.0 * (n - 1.0) / n
    }
}
