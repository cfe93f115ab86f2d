//! Waits of all ranks, which each of them tells the others one average later.

use std::fmt;
use std::time::Duration;

use super::super::ParamAverager;
use super::Telemetry;
use crate::abi::PA_MAX_WORLD;
use crate::backend::{Memory, MemorySpace};

/// Waits by rank. Of a fixed size, since averages on CPUs allocate nothing.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Waits {
    of: [Duration; PA_MAX_WORLD as usize],
    ranks: usize,
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.of[..self.ranks].fmt(f)
    }
}

impl Telemetry {
    /// Time that each rank has waited for its peers in this averager's average before this one, by
    /// rank; the same on every rank. All 0 in the first average since a build, a recovery or a
    /// join, which may make that one themselves. A rank that comes late lets the others wait, and
    /// waits least itself.
    ///
    /// Each is that rank's [`Report::waited`](crate::Report::waited) of the average before, also
    /// of one that has failed, without waits for other [hosts](crate::Builder::hosts): a rank
    /// knows its wait when an average has ended, and shows it with its record of the next one,
    /// which all ranks read anyway. So no message is sent for it. On CUDA devices that is the time
    /// in which kernels wait, and not that for a rank to come.
    pub fn waits(&self) -> &[Duration] {
        &self.waits.of[..self.waits.ranks]
    }

    /// The same in seconds.
    pub(super) fn waits_in_seconds(&self) -> Seconds<'_> {
        Seconds(self.waits())
    }
}

/// Durations whose texts are lists of seconds: with semicolons, for a column of CSV, or as `Debug`.
pub(super) struct Seconds<'a>(&'a [Duration]);

impl fmt::Display for Seconds<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (rank, wait) in self.0.iter().enumerate() {
            let separator = if rank == 0 { "" } else { ";" };
            write!(f, "{separator}{}", wait.as_secs_f64())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Seconds<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(Duration::as_secs_f64)).finish()
    }
}

/// Memory that the kernels write all ranks' waits to, by their position in the ring.
pub(in crate::averager) fn memory(space: &MemorySpace) -> Result<Memory, String> {
    Memory::of_the_host(space, size_of::<[u64; PA_MAX_WORLD as usize]>())
}

impl ParamAverager {
    /// Waits that the last average has gathered, if it was committed.
    pub(super) fn waits(&self) -> Waits {
        let mut found = [0u64; PA_MAX_WORLD as usize];
        if let Some(memory) = &self.own.waits {
            // SAFETY: no average is running.
            let read = unsafe { memory.read(bytemuck::cast_slice_mut(&mut found)) };
            read.expect("memory of the host");
        }
        let order = self.communicator.placement().order();
        let mut of = [Duration::ZERO; PA_MAX_WORLD as usize];
        for (&rank, wait_ns) in order.iter().zip(found) {
            of[rank] = Duration::from_nanos(wait_ns);
        }
        Waits { of, ranks: order.len() }
    }
}
