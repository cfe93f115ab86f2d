//! What runs one rank's part of an average: threads, or a stream of a device.

use super::cpu::{Isa, Workers};
use super::{cuda, Region, Site};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PA_COMMITTED, PA_RING_GATHER};
use crate::{Error, Result};

/// Runs the kernels of one rank and keeps its channels' states.
#[derive(Debug)]
pub(crate) enum Engine {
    Cpu { workers: Workers, states: Region },
    Cuda(cuda::Rank),
}

impl Engine {
    /// `states`: of each channel, before the first average. `isa` is for threads.
    pub(crate) fn new(
        site: &Site,
        states: &[PaChannel],
        buckets: usize,
        segments: usize,
        isa: Isa,
        rank: usize,
    ) -> Result<Engine> {
        match site {
            Site::Host => {
                let mut region = Region::new(size_of_val(states));
                region.bytes_mut().copy_from_slice(bytemuck::cast_slice(states));
                let workers = Workers::new(isa, states.len() as u32, &format!("rank-{rank}"))
                    .map_err(|e| Error::Thread { rank, reason: e.to_string() })?;
                Ok(Engine::Cpu { workers, states: region })
            }
            Site::Cuda(context) => cuda::Rank::new(context, states, buckets, segments)
                .map(Engine::Cuda)
                .map_err(|reason| Error::DeviceFailed { rank, reason }),
        }
    }

    /// Where the kernels find the channels' states.
    pub(crate) fn channels(&self) -> u64 {
        match self {
            Engine::Cpu { states, .. } => states.address(),
            Engine::Cuda(rank) => rank.channels(),
        }
    }

    /// Where they find the buckets, whose `segments` become those that they find.
    pub(crate) fn place(&self, buckets: &mut [PaBucket], segments: &[&[PaSegment]]) -> u64 {
        let (count, mut before) = (buckets.len(), 0);
        for (bucket, segments) in buckets.iter_mut().zip(segments) {
            bucket.segments = match self {
                Engine::Cpu { .. } => segments.as_ptr() as u64,
                Engine::Cuda(rank) => rank.segments(count, before),
            };
            before += segments.len();
        }
        match self {
            Engine::Cpu { .. } => buckets.as_ptr() as u64,
            Engine::Cuda(rank) => rank.buckets(),
        }
    }

    /// Takes over tables that have changed. Threads read them where they are.
    pub(crate) fn set_tables<'a>(
        &mut self,
        buckets: &'a [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        if let Engine::Cuda(rank) = self {
            rank.set_tables(buckets, segments);
        }
    }

    /// Memory for tables and states, in bytes.
    pub(crate) fn bytes(&self, tables: usize) -> usize {
        match self {
            Engine::Cpu { states, .. } => states.bytes() + tables,
            Engine::Cuda(rank) => rank.bytes(),
        }
    }

    /// The channels' states. Between averages only.
    pub(crate) fn ended(&self) -> &[PaChannel] {
        match self {
            Engine::Cpu { states, .. } => states_of(states),
            Engine::Cuda(rank) => rank.ended(),
        }
    }

    /// Runs the phases of an average, and returns when they are done; what came of it is in `ended`. An error means that
    /// the machine failed.
    ///
    /// # Safety
    /// What `args` points at is as `kernels/abi.h` describes it. The tensors are nobody else's until this returns, and
    /// what was done to them before is done, or ordered before the null stream.
    pub(crate) unsafe fn run(
        &mut self,
        args: &PaArgs,
        phases: impl Iterator<Item = u32>,
    ) -> Result<(), String> {
        match self {
            Engine::Cpu { workers, states } => {
                for phase in phases {
                    // The kernel sees for itself; this saves waking threads.
                    let failed = || states_of(states).iter().any(|state| state.outcome != PA_COMMITTED);
                    if phase == PA_RING_GATHER && failed() {
                        break;
                    }
                    // SAFETY: the caller's promise.
                    unsafe { workers.launch(args, phase) };
                }
                Ok(())
            }
            // SAFETY: the caller's promise.
            Engine::Cuda(rank) => unsafe { rank.run(args, phases) },
        }
    }
}

/// Between launches nobody writes them.
fn states_of(region: &Region) -> &[PaChannel] {
    let count = region.bytes() / size_of::<PaChannel>();
    // SAFETY: made of so many, aligned to a page, and borrowed for as long.
    unsafe { std::slice::from_raw_parts(region.as_ptr::<PaChannel>(), count) }
}
