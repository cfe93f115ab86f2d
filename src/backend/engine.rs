//! What runs one rank's part of an average: threads, or a stream of a device.

use std::ffi::c_void;

use super::cpu::{Isa, Workers};
use super::{cuda, HostBuffer, MemorySpace};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PA_COMMITTED, PA_RING_GATHER};
use crate::{Error, Result};

/// Runs the kernels of one rank and keeps its channels' states.
#[derive(Debug)]
pub(crate) enum Engine {
    Cpu { workers: Workers, states: HostBuffer },
    Cuda(cuda::Rank),
}

/// Why an average was not started, or a replay of one not waited for.
#[derive(Debug)]
pub(crate) enum Unstarted {
    /// A capture is in its way, and nothing has been enqueued: what was found of the stream, and
    /// what it can be.
    Refused { found: String, expected: &'static str },
    /// The device failed. A part may have been enqueued.
    Failed(String),
}

impl Unstarted {
    /// Who waits for the null stream would wait for a stream that is being captured, so the driver
    /// refuses with this.
    pub(crate) fn beside_a_capture(failure: &str) -> Unstarted {
        Unstarted::Refused {
            found: format!("the null stream while a blocking stream is being captured ({failure})"),
            expected: "it when the capture has ended, or a non-blocking stream of its own",
        }
    }
}

impl<E: Into<String>> From<E> for Unstarted {
    fn from(failure: E) -> Self {
        Unstarted::Failed(failure.into())
    }
}

impl Engine {
    /// `states`: of each channel, before the first average. `isa` is for threads.
    pub(crate) fn new(
        space: &MemorySpace,
        states: &[PaChannel],
        buckets: usize,
        segments: usize,
        isa: Isa,
        rank: usize,
    ) -> Result<Engine> {
        match space {
            MemorySpace::Host => {
                let mut region = HostBuffer::new(size_of_val(states))
                    .map_err(|reason| Error::Memory { rank, reason })?;
                region.bytes_mut().copy_from_slice(bytemuck::cast_slice(states));
                let workers = Workers::new(isa, states.len() as u32, &format!("rank-{rank}"))
                    .map_err(|reason| Error::Thread { rank, reason })?;
                Ok(Engine::Cpu { workers, states: region })
            }
            MemorySpace::Cuda(context) => cuda::Rank::new(context, states, buckets, segments)
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

    /// Address of the buckets, as the kernels see them; sets the address of each bucket's segments.
    ///
    /// Threads read both tables where they are, so this is called for every average: a pointer that
    /// was taken before the tables were last borrowed mutably, or moved, is no longer valid.
    pub(crate) fn place<'a>(
        &self,
        buckets: &mut [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) -> u64 {
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

    /// Starts the phases of an average: threads run them, a device has them enqueued, on `stream`
    /// or on the rank's own, which is ordered behind the null stream. If the machine fails,
    /// `finish` is called all the same.
    ///
    /// # Safety
    /// What `args` points at is as `kernels/abi.h` describes it. The tensors are nobody else's
    /// until `finish` has returned, and what was done to them before is done, or ordered before
    /// that stream. `stream` is one of the device's primary context, and lives until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        stream: Option<*mut c_void>,
    ) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { workers, states } => {
                for kernel in kernels {
                    // The kernel sees for itself; this saves waking threads.
                    let failed =
                        || states_of(states).iter().any(|state| state.outcome != PA_COMMITTED);
                    if kernel == PA_RING_GATHER && failed() {
                        break;
                    }
                    // SAFETY: the caller's promise.
                    unsafe { workers.launch(args, kernel) };
                }
                Ok(())
            }
            // SAFETY: the caller's promise.
            Engine::Cuda(rank) => unsafe {
                rank.start(args, kernels, stream.map(<*mut c_void>::cast))
            },
        }
    }

    /// Whether the stream is being captured.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn is_capturing(&self, stream: *mut c_void) -> Result<bool, String> {
        match self {
            Engine::Cpu { .. } => Ok(false),
            // SAFETY: the caller's promise.
            Engine::Cuda(rank) => Ok(unsafe { rank.is_capturing(stream.cast()) }?),
        }
    }

    /// Why an average can't be enqueued on this stream.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn refuses(
        &self,
        stream: *mut c_void,
    ) -> std::result::Result<Option<&'static str>, String> {
        match self {
            Engine::Cpu { .. } => Ok(None),
            // SAFETY: the caller's promise.
            Engine::Cuda(rank) => Ok(unsafe { rank.refuses(stream.cast()) }?),
        }
    }

    /// Whether what was started last was captured for a CUDA graph, and so has not run.
    pub(crate) fn was_captured(&self) -> bool {
        match self {
            Engine::Cpu { .. } => false,
            Engine::Cuda(rank) => rank.was_captured(),
        }
    }

    /// Waits for all that a stream was given. What came of the last average there is in `ended`.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn wait_for(&self, stream: *mut c_void) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { .. } => Ok(()),
            // SAFETY: the caller's promise.
            Engine::Cuda(rank) => unsafe { rank.wait_for(stream.cast()) },
        }
    }

    /// Whether `finish` would not wait.
    pub(crate) fn is_done(&self) -> bool {
        match self {
            Engine::Cpu { .. } => true,
            Engine::Cuda(rank) => rank.is_done(),
        }
    }

    /// Waits for what was started. What came of it is in `ended`.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        match self {
            Engine::Cpu { .. } => Ok(()),
            Engine::Cuda(rank) => Ok(rank.finish()?),
        }
    }
}

/// They are not written between launches.
fn states_of(region: &HostBuffer) -> &[PaChannel] {
    let count = region.bytes() / size_of::<PaChannel>();
    // SAFETY: made of so many, aligned to a page, and borrowed for as long.
    unsafe { std::slice::from_raw_parts(region.as_ptr::<PaChannel>(), count) }
}
