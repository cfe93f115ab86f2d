//! Engine of one rank's part of an average: CPU threads, or a stream of a device.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::cpu::{Aside, Isa, Workers};
use super::{cuda, Failure, Gathering, HostBuffer, MemorySpace};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PaStatus, PA_FLAG_VETO};
use crate::plan::Launch;
use crate::{DeviceError, Error, Result};

/// Runs the kernels of one rank and keeps its channels' states.
#[derive(Debug)]
pub(crate) enum Engine {
    Cpu {
        workers: Arc<Workers>,
        /// Thread for averages that are made while the caller trains.
        aside: Option<Aside>,
        states: HostBuffer,
        statuses: HostBuffer,
    },
    Cuda(Box<cuda::Rank>),
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
    /// The world ended before all ranks had come, and nothing has been enqueued.
    Ended(Failure),
    /// The world ended between two launches, and all that was enqueued has ended.
    Halted(Failure),
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

/// The host's work between the reduce and the vote, with the stream of a device; on CPUs `None`.
/// Has the channels' statuses after the reduce, which may have failed; none on a device whose rank
/// exchanges nothing with other hosts, where the reduce was only enqueued. True: this rank votes
/// against the average.
pub(crate) type Refuses<'a> = dyn FnMut(Option<&mut cuda::StageStream>, &[PaStatus]) -> bool + 'a;

/// Memory of a rank on a device that its host has a copy of, to exchange it with other hosts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copied {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
    /// True for an anchor of the outer optimizer, which goes to the host alone, and not always.
    pub(crate) is_anchor: bool,
}

impl Engine {
    /// Creates the engine. `first` are the channels' states before the first average. `isa` is used
    /// for threads only, and `leads` for devices only: this rank is the first one of its process on
    /// its device.
    pub(crate) fn new(
        space: &MemorySpace,
        first: &[PaChannel],
        (buckets, segments): (usize, usize),
        isa: Isa,
        leads: bool,
        rank: usize,
    ) -> Result<Engine> {
        match space {
            MemorySpace::Host => {
                let no_memory = |reason| Error::Memory { rank, reason };
                let mut states = HostBuffer::new(size_of_val(first)).map_err(no_memory)?;
                states.bytes_mut().copy_from_slice(bytemuck::cast_slice(first));
                let bytes = size_of::<PaStatus>() * first.len();
                let mut statuses = HostBuffer::new(bytes).map_err(no_memory)?;
                let ended: Vec<PaStatus> = first.iter().map(|state| state.status).collect();
                statuses.bytes_mut().copy_from_slice(bytemuck::cast_slice(&ended));
                let workers = Workers::new(isa, first.len() as u32, &format!("rank-{rank}"))
                    .map_err(|reason| Error::Thread { rank, reason })?;
                Ok(Engine::Cpu { workers: Arc::new(workers), aside: None, states, statuses })
            }
            MemorySpace::Cuda(context) => cuda::Rank::new(context, first, buckets, segments, leads)
                .map(|rank| Engine::Cuda(Box::new(rank)))
                .map_err(|reason| Error::DeviceFailed { rank, source: DeviceError::from(reason) }),
        }
    }

    /// Makes `start_aside` possible.
    pub(crate) fn prepare_to_run_aside(&mut self, rank: usize) -> Result<()> {
        if let Engine::Cpu { workers, aside, .. } = self {
            let made = Aside::new(workers.clone(), &format!("rank-{rank}"));
            *aside = Some(made.map_err(|reason| Error::Thread { rank, reason })?);
        }
        Ok(())
    }

    /// Makes `start_around` possible. `copied`: the rank's shard, if it exchanges that with other
    /// hosts.
    pub(crate) fn prepare_for_stage(
        &mut self,
        rank: usize,
        copied: Option<&[Copied]>,
    ) -> Result<()> {
        match self {
            Engine::Cpu { .. } => Ok(()),
            Engine::Cuda(engine) => engine.prepare_for_stage(copied).map_err(|failed| {
                Error::DeviceFailed { rank, source: String::from(failed).into() }
            }),
        }
    }

    /// Address of the channels' states, for the kernels.
    pub(crate) fn channels(&self) -> u64 {
        match self {
            Engine::Cpu { states, .. } => states.address(),
            Engine::Cuda(rank) => rank.channels(),
        }
    }

    /// Address of the channels' status records, for the kernels.
    pub(crate) fn status(&self) -> u64 {
        match self {
            Engine::Cpu { statuses, .. } => statuses.address(),
            Engine::Cuda(rank) => rank.status(),
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
            Engine::Cpu { states, statuses, .. } => states.bytes() + statuses.bytes() + tables,
            Engine::Cuda(rank) => rank.bytes(),
        }
    }

    /// The channels' status records. Valid between averages only.
    pub(crate) fn ended(&self) -> &[PaStatus] {
        match self {
            Engine::Cpu { statuses, .. } => {
                let count = statuses.bytes() / size_of::<PaStatus>();
                // SAFETY: the buffer was made for this many records, is page-aligned, and is
                // borrowed for as long. Threads write it during launches only.
                unsafe { std::slice::from_raw_parts(statuses.as_ptr::<PaStatus>(), count) }
            }
            Engine::Cuda(rank) => rank.ended(),
        }
    }

    /// Starts the launches of an average. Threads run them before this function returns. A device
    /// gets them enqueued, when all ranks have come. `finish` must be called even after an error.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it. No other code accesses
    /// the tensors until `finish` has returned, and earlier accesses have completed or are ordered
    /// before the stream of `order`, which belongs to the device's primary context and exists until
    /// then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        launches: &[Launch],
        order: Order,
        peers: &Gathering<'_>,
    ) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { workers, .. } => {
                for launch in launches {
                    let (from_segment, to_segment) = launch.segments;
                    let args = PaArgs { from_segment, to_segment, ..*args };
                    // SAFETY: guaranteed by the caller.
                    unsafe { workers.launch(&args, launch.kernel) };
                }
                Ok(())
            }
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => unsafe { rank.start(args, launches, order, peers, None) },
        }
    }

    /// As `start`, with a call between the launches of the reduce and those from the vote on.
    /// `refuses` is true if this rank votes against the average. Its work on the stream that it
    /// gets on a device comes before the vote.
    ///
    /// # Safety
    /// As `start`.
    pub(crate) unsafe fn start_around(
        &mut self,
        args: &PaArgs,
        (reduce, rest): (&[Launch], &[Launch]),
        order: Order,
        peers: &Gathering<'_>,
        refuses: &mut Refuses<'_>,
    ) -> Result<(), Unstarted> {
        if let Engine::Cuda(rank) = self {
            let stage = Some((rest, refuses));
            // SAFETY: guaranteed by the caller.
            return unsafe { rank.start(args, reduce, order, peers, stage) };
        }
        // SAFETY: guaranteed by the caller, here and below.
        unsafe { self.start(args, reduce, order, peers) }?;
        let vetoes = if refuses(None, self.ended()) { PA_FLAG_VETO } else { 0 };
        let args = PaArgs { flags: args.flags | vetoes, ..*args };
        // SAFETY: as above.
        unsafe { self.start(&args, rest, order, peers) }
    }

    /// As `start`, but threads run the launches after this function has returned.
    ///
    /// # Safety
    /// As `start`.
    pub(crate) unsafe fn start_aside(
        &mut self,
        args: &PaArgs,
        launches: &[Launch],
        order: Order,
        peers: &Gathering<'_>,
    ) -> Result<(), Unstarted> {
        match self {
            Engine::Cpu { aside: Some(aside), .. } => {
                let with_args = |launch: &Launch| {
                    let (from_segment, to_segment) = launch.segments;
                    (PaArgs { from_segment, to_segment, ..*args }, launch.kernel)
                };
                // SAFETY: guaranteed by the caller.
                unsafe { aside.start(launches.iter().map(with_args).collect()) };
                Ok(())
            }
            Engine::Cpu { aside: None, .. } => Err("it was not prepared to run aside".into()),
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => unsafe { rank.start(args, launches, order, peers, None) },
        }
    }

    /// Runs a kernel that waits for no peer, between averages. Threads have run it when this
    /// returns; a device runs it on the stream of `order`, as a part of that stream's work.
    ///
    /// # Safety
    /// As `start`, until the stream has come to the end of the kernel.
    pub(crate) unsafe fn run_local(
        &mut self,
        args: &PaArgs,
        kernel: u32,
        order: Order,
    ) -> Result<(), Unstarted> {
        match self {
            // SAFETY: guaranteed by the caller.
            Engine::Cpu { workers, .. } => unsafe { workers.launch(args, kernel) },
            // SAFETY: guaranteed by the caller.
            Engine::Cuda(rank) => unsafe { rank.run_local(args, kernel, order) }?,
        }
        Ok(())
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

    /// True if the average that was started last was captured into a CUDA graph, and so has not
    /// run.
    pub(crate) fn was_captured(&self) -> bool {
        match self {
            Engine::Cpu { .. } => false,
            Engine::Cuda(rank) => rank.was_captured(),
        }
    }

    /// Longest wait for a peer in the kernels of the average that was started last, where ranks
    /// meet before. `None` on CPUs.
    pub(crate) fn longest_wait(&self) -> Option<Duration> {
        match self {
            Engine::Cpu { .. } => None,
            Engine::Cuda(rank) => Some(rank.longest_wait()),
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
            Engine::Cpu { aside, .. } => aside.as_ref().is_none_or(Aside::is_done),
            Engine::Cuda(rank) => rank.is_done(),
        }
    }

    /// Waits for the average that was started. `ended` then holds its states.
    pub(crate) fn finish(&mut self) -> Result<(), String> {
        match self {
            Engine::Cpu { aside, .. } => {
                aside.iter().for_each(Aside::wait);
                Ok(())
            }
            Engine::Cuda(rank) => Ok(rank.finish()?),
        }
    }
}
