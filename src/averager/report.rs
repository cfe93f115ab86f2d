//! Report of an average.

use std::time::Duration;

use super::Algorithm;

/// Bytes, time and bandwidth of one average, on this rank.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes of this rank's tensors, S.
    pub bytes: u64,
    /// Time from the call to the return.
    pub elapsed: Duration,
    /// Part of `elapsed` spent waiting for peers, at the start or on the way. Maximum over
    /// channels.
    pub waited: Duration,
    /// Number of ranks that took part.
    pub world_size: usize,
    /// Algorithm in use.
    pub algorithm: Algorithm,
    /// True if a process waits to [join](crate::Communicator::join) this world; the same on every
    /// rank. [`LocalSgd`](crate::LocalSgd) or
    /// [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner) admits it.
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

    /// Bus bandwidth in GB/s: algbw · 2·(n − 1)/n, the load of a ring on each link. As in
    /// nccl-tests, it is computed so for all algorithms.
    pub fn busbw(&self) -> f64 {
        let n = self.world_size as f64;
        self.algbw() * 2.0 * (n - 1.0) / n
    }
}
