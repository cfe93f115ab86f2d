//! Report of an average.

use std::time::Duration;

use super::{Algorithm, Telemetry};
use crate::Compression;

/// Bytes, time and bandwidth of one average, on this rank.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes of this rank's tensors, S.
    pub bytes: u64,
    /// Time from the call to the return.
    pub elapsed: Duration,
    /// Part of `elapsed` spent waiting for peers, at the start or on the way. Maximum over
    /// channels. On CUDA devices ranks meet before their kernels begin, and the wait for that is
    /// not in it, except in a replay of a graph.
    pub waited: Duration,
    /// Part of `elapsed` since all ranks had come: the time of the average itself. Maximum over
    /// channels. `None`: not measured, since the schedule needs no measurements.
    pub active: Option<Duration>,
    /// Largest value of all ranks' measurements, the same on every rank. 0: none.
    pub(crate) measured: [f64; 2],
    /// Number of ranks of this host that took part.
    pub world_size: usize,
    /// Number of hosts that took part. 1 without [`Builder::hosts`](crate::Builder::hosts), and for
    /// an average of one host between those of all.
    pub hosts: usize,
    /// Algorithm in use. With the next two it decides the bits of three ranks and more; see
    /// [`Builder::reproducible`](crate::Builder::reproducible).
    pub algorithm: Algorithm,
    /// Channels in use, on each rank.
    pub channels: u32,
    /// Bytes of parameters in one slot of the ring. 0 for the direct average, which has no slots.
    pub chunk_bytes: u64,
    /// Code in which differences travelled. [`Compression::None`] without compression, and with it
    /// for an average that was made in full, as the first one is.
    pub compression: Compression,
    /// True if a process waits to [join](crate::Communicator::join) this world; the same on every
    /// rank. [`LocalSgd`](crate::LocalSgd) or
    /// [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner) admits it.
    pub join_pending: bool,
    /// Share of the [outer optimizer](crate::Outer)'s velocity that was lost with ranks before this
    /// view of the world, and began at 0 in its first average; the same on every rank. With
    /// [`share_outer_state`](crate::Builder::share_outer_state) mostly 0.
    pub lost_state: f64,
    /// Steps of [`LocalSgd`](crate::LocalSgd) on this rank since the average before: H, for an
    /// average that was due. 0 for averages by hand.
    pub local_steps: u64,
    /// Change that the average made to this rank's parameters, and waits of all ranks. `None`
    /// without [`Builder::telemetry`](crate::Builder::telemetry), and for a rank alone that has
    /// neither an outer optimizer nor a stage.
    pub telemetry: Option<Telemetry>,
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

    /// Smallest H, the number of local steps between averages, with which averages like this one
    /// take no more than `overhead` of the time of the steps, each of which takes `step`:
    /// elapsed / (overhead · step), at least 1.
    ///
    /// 0.05 is flodl's default overhead. A larger H costs accuracy at some point; see
    /// [`guide::practice`](crate::guide::practice).
    pub fn suggested_local_steps(&self, step: Duration, overhead: f64) -> u64 {
        (self.elapsed.as_secs_f64() / (overhead * step.as_secs_f64())).ceil().max(1.0) as u64
    }

    /// Bus bandwidth in GB/s: algbw · 2·(n − 1)/n, the load of a ring on each link. As in
    /// nccl-tests, it is computed so for all algorithms.
    pub fn busbw(&self) -> f64 {
        let n = self.world_size as f64;
        self.algbw() * 2.0 * (n - 1.0) / n
    }
}
