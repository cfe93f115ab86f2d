//! Engine of one rank's part of an average: CPU threads, or a stream of a device.

use std::ffi::c_void;

use super::cpu::{Isa, Workers};
use super::{cuda, HostBuffer, MemorySpace};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PA_COMMITTED, PA_RING_GATHER};
use crate::{DeviceError, Error, Result};

/// Runs the kernels of one rank and keeps its channels' states.
#[derive(Debug)]
pub(crate) enum Engine {
    Cpu { workers: Workers, states: HostBuffer },
    Cuda(cuda::Rank),
}

/// Place of an average in the order of a device's work. Threads ignore it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Behind the work of the null stream, and so of all blocking streams. The caller waits.
    NullStream,
    /// Behind the work of this stream. The caller waits.
    Behind(*mut c_void),
    /// Behind the earlier work of this stream, and before its later work.
    Within(*mut c_void),
}

/// The reason why an average was not started, or a replay not waited for.
#[derive(Debug)]
pub(crate) enum Unstarted {
    /// A stream capture prevents the call, and nothing has been enqueued. Holds the stream that was
    /// found, and the streams that are accepted.
    Refused { found: String, expected: &'static str },
    /// The device failed. A part of the average may have been enqueued.
    Failed(String),
}

impl Unstarted {
    /// The driver refuses the null stream while a blocking stream is being captured: waiting for
    /// the null stream would wait for the captured one.
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
    /// Creates the engine. `states` are the channels' states before the first average. `isa` is
    /// used for threads only.
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
                let mut buffer = HostBuffer::new(size_of_val(states))
                    .map_err(|reason| Error::Memory { rank, reason })?;
                buffer.bytes_mut().copy_from_slice(bytemuck::cast_slice(states));
                let workers = Workers::new(isa, states.len() as u32, &format!("rank-{rank}"))
                    .map_err(|reason| Error::Thread { rank, reason })?;
                Ok(Engine::Cpu { workers, states: buffer })
            }
            MemorySpace::Cuda(context) => cuda::Rank::new(context, states, buckets, segments, rank)
                .map(Engine::Cuda)
                .map_err(|reason| Error::DeviceFailed { rank, source: DeviceError::from(reason) }),
        }
    }

    /// Address of the channels' states, for the kernels.
    pub(crate) fn channels(&self) -> u64 {
        match self {
            Engine::Cpu { states, .. } => states.address(),
            Engine::Cuda(rank) => rank.channels(),
        }
    }

    /// Returns the address of the buckets, for the kernels, and sets the address of each bucket's
    /// segments.
    ///
    /// Threads read both tables in place, so this is called for every average: an address is
    /// invalid once the tables have been mutably borrowed or moved.
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

    /// Copies changed tables to the device. Threads read the tables in place.
    pub(crate) fn set_tables<'a>(
        &mut self,
        buckets: &'a [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        if let Engine::Cuda(rank) = self {
            rank.set_tables(buckets, segments);
        }
    }

    /// Memory of tables and states, in bytes.
    pub(crate) fn bytes(&self, tables: usize) -> usize {
        match self {
            Engine::Cpu { states, .. } => states.bytes() + tables,
            Engine::Cuda(rank) => rank.bytes(),
        }
    }

    /// The channels' states. Valid between averages only.
    pub(crate) fn ended(&self) -> &[PaChannel] {
        match self {
            Engine::Cpu { states, .. } => states_of(states),
            Engine::Cuda(rank) => rank.ended(),
        }
    }

    /// Starts the kernels of an average. Threads run them before this function returns. A device
    /// gets them enqueued. `finish` must be called even after an error.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it. No other code accesses
    /// the tensors until `finish` has returned, and earlier accesses have completed or are ordered
    /// before the stream of `order`, which belongs to the device's primary context and exists until
    /// then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        order: Order,
    ) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { workers, states } => {
                for kernel in kernels {
                    // The kernel checks this itself; the check here saves waking the threads.
                    let failed =
                        || states_of(states).iter().any(|state| state.outcome != PA_COMMITTED);
                    if kernel == PA_RING_GATHER && failed() {
                        break;
                    }
                    // SAFETY: guaranteed by the caller.
                    unsafe { workers.launch(args, kernel) };
                }
                Ok(())
            }
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => unsafe { rank.start(args, kernels, order) },
        }
    }

    /// True if the stream is being captured.
    ///
    /// # Safety
    /// `stream` belongs to the device's primary context.
    pub(crate) unsafe fn is_capturing(&self, stream: *mut c_void) -> Result<bool, Unstarted> {
        let Engine::Cuda(rank) = self else { return Ok(false) };
        // SAFETY: guaranteed by the caller.
        unsafe { rank.is_capturing(stream.cast()) }.map_err(|failed| {
            let is_of_capture = failed.is_of_capture();
            match (is_of_capture, String::from(failed)) {
                (true, failure) => Unstarted::beside_a_capture(&failure),
                (false, failure) => Unstarted::Failed(failure),
            }
        })
    }

    /// True if the stream waits for no other stream by itself. Threads have none.
    ///
    /// # Safety
    /// `stream` belongs to the device's primary context.
    pub(crate) unsafe fn is_non_blocking(
        &self,
        stream: *mut c_void,
    ) -> std::result::Result<bool, String> {
        match self {
            Engine::Cpu { .. } => Ok(true),
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => Ok(unsafe { rank.is_non_blocking(stream.cast()) }?),
        }
    }

    /// True if the average that was started last was captured into a CUDA graph, and so has not
    /// run.
    pub(crate) fn was_captured(&self) -> bool {
        match self {
            Engine::Cpu { .. } => false,
            Engine::Cuda(rank) => rank.was_captured(),
        }
    }

    /// Waits for all work on a stream. `ended` then holds the states after the last average on it.
    ///
    /// # Safety
    /// `stream` belongs to the device's primary context.
    pub(crate) unsafe fn wait_for(&self, stream: *mut c_void) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { .. } => Ok(()),
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => unsafe { rank.wait_for(stream.cast()) },
        }
    }

    /// True if `finish` would return at once.
    pub(crate) fn is_done(&self) -> bool {
        match self {
            Engine::Cpu { .. } => true,
            Engine::Cuda(rank) => rank.is_done(),
        }
    }

    /// Waits for the average that was started. `ended` then holds its states.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        match self {
            Engine::Cpu { .. } => Ok(()),
            Engine::Cuda(rank) => Ok(rank.finish()?),
        }
    }
}

/// The channels' states of a CPU rank. Threads write them during launches only.
fn states_of(buffer: &HostBuffer) -> &[PaChannel] {
    let count = buffer.bytes() / size_of::<PaChannel>();
    // SAFETY: the buffer was made for this many states, is page-aligned, and is borrowed for as
    // long.
    unsafe { std::slice::from_raw_parts(buffer.as_ptr::<PaChannel>(), count) }
}
