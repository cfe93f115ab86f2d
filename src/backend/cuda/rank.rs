//! One rank on a device: its tables, the states of its channels, and its part of an average.

mod beside;
mod capture;
mod meet;
mod stage;

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::launch::{launch, Part};
use super::memory::Pinned;
use super::streams::{is_capturing, Event, LaunchStream};
use super::tables::Tables;
use super::{Context, DeviceMemory};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment, PaStatus, PA_OPEN};
use crate::backend::reclaim::{Busy, Running};
#[cfg(processes)]
use crate::backend::Attendance;
use crate::backend::{Gathering, Order, Refuses, Unstarted, Way};
use crate::plan::Launch;
use beside::Beside;
pub(crate) use stage::StageStream;

/// A rank's tables and states.
#[derive(Debug)]
pub(crate) struct Rank {
    context: Arc<Context>,
    /// Stream of the launches, if this rank is the first on its device.
    stream: Option<LaunchStream>,
    /// Stream of the work between the halves of an average, if there is any.
    stage: Option<StageStream>,
    /// Recorded behind the work that an average follows, and again behind its stage.
    ready: Arc<Event>,
    /// Recorded behind this rank's launches.
    done: Arc<Event>,
    /// Recorded behind the last work of `run_local`, until it was waited for.
    local: Option<Event>,
    channels: DeviceMemory,
    /// The status records after the last average, which the kernels write.
    ended: Pinned,
    tables: Tables,
    /// True if the average that was started last was captured and so has not run.
    capturing: bool,
    /// Longest wait for a peer in the kernels of that average.
    longest_wait: Duration,
    /// Number of the latest meeting of processes that this rank has come to.
    #[cfg(processes)]
    meetings: u32,
    /// Meetings of the pending average that a stream waits for.
    #[cfg(processes)]
    watched: Vec<Attendance>,
    /// The event behind the average that was started and not waited for.
    pending: Option<Arc<Event>>,
    /// Launches of that average on other devices, where its kernels wait for these without limit.
    beside: Vec<Beside>,
    /// Present while an average is pending. Present for good after a capture, since replays of the
    /// graph are not observed here.
    busy: Option<Busy>,
    /// The last field, so that the memory above is returned before it is dropped.
    _running: Running,
}

impl Rank {
    /// `buckets` and `segments` are the capacities of the tables. `leads`: this rank is the first
    /// one of this process on its device.
    pub(crate) fn new(
        context: &Arc<Context>,
        states: &[PaChannel],
        buckets: usize,
        segments: usize,
        leads: bool,
    ) -> Result<Rank, String> {
        #[cfg(processes)]
        super::arrivals::start_watcher()?;
        let bytes: &[u8] = bytemuck::cast_slice(states);
        #[cfg(feature = "__testing")]
        let leads = leads || super::former::is_asked_for();
        let mut rank = Rank {
            context: context.clone(),
            stream: leads.then(|| LaunchStream::new(context)).transpose()?,
            stage: None,
            ready: Arc::new(Event::new(context)?),
            done: Arc::new(Event::new(context)?),
            local: None,
            channels: DeviceMemory::new(context, bytes.len())?,
            ended: Pinned::new(context, size_of::<PaStatus>() * states.len())?,
            tables: Tables::new(context, buckets, segments)?,
            capturing: false,
            longest_wait: Duration::ZERO,
            #[cfg(processes)]
            meetings: 0,
            #[cfg(processes)]
            watched: vec![],
            pending: None,
            beside: vec![],
            busy: None,
            _running: Running::new(),
        };
        rank.channels.write(0, bytes)?;
        let first: Vec<PaStatus> = states.iter().map(|state| state.status).collect();
        rank.ended.bytes_mut().copy_from_slice(bytemuck::cast_slice(&first));
        Ok(rank)
    }

    /// Memory of this rank in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.channels.bytes() + self.tables.bytes() + self.copied_bytes()
    }

    pub(crate) fn channels(&self) -> u64 {
        self.channels.address()
    }

    /// Address of the status records, for the kernels.
    pub(crate) fn status(&self) -> u64 {
        self.ended.address()
    }

    pub(crate) fn buckets(&self) -> u64 {
        self.tables.buckets()
    }

    /// Address of the segments of a bucket, after `before` segments of other buckets.
    pub(crate) fn segments(&self, buckets: usize, before: usize) -> u64 {
        self.tables.segments(buckets, before)
    }

    /// Sets the tables of the next average. No average may be running.
    pub(crate) fn set_tables<'a>(
        &mut self,
        buckets: &'a [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        self.tables.set(buckets, segments);
    }

    pub(crate) fn ended(&self) -> &[PaStatus] {
        bytemuck::cast_slice(self.ended.bytes())
    }

    /// Meets the peers and launches an average. Returns when all ranks of this process have
    /// launched: no call of the driver that a trainer makes afterwards can delay a launch that a
    /// kernel waits for.
    ///
    /// The launches run on a stream of this crate's own, behind the work of every rank's stream so
    /// far. Work is submitted in an order in which each piece waits for earlier ones only, so
    /// streams that share a hardware queue do not block one another. If the stream is being
    /// captured, the average becomes a part of the graph, with its current tensors and arguments.
    /// All counters are in device memory, so a graph can be replayed.
    ///
    /// `stage` has the launches that follow the call of a user's stage, and that call. Ranks meet
    /// once more before these: no kernel waits for a stage.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it, in memory that the
    /// device addresses. No other code accesses the tensors until `finish` has returned, and
    /// earlier accesses have completed or are ordered before the stream of `order`. The stream
    /// belongs to this context and exists until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        launches: &[Launch],
        order: Order,
        peers: &Gathering<'_>,
        stage: Option<(&[Launch], &mut Refuses<'_>)>,
    ) -> Result<(), Unstarted> {
        let _bound = self.context.bind()?;
        let (behind, is_awaited) = match order {
            Order::NullStream => (std::ptr::null_mut(), false),
            Order::Behind(stream) => (stream.cast(), false),
            Order::Within(stream) => (stream.cast(), true),
        };
        self.capturing = match order {
            Order::NullStream => false,
            // SAFETY: guaranteed by the caller.
            Order::Behind(_) | Order::Within(_) => unsafe { is_capturing(behind) }?,
        };
        self.busy.get_or_insert_with(Busy::new);
        self.longest_wait = Duration::from_nanos(args.timeout_ns);
        if self.capturing {
            // SAFETY: guaranteed by the caller.
            return unsafe { self.capture(args, launches, behind, peers) };
        }
        // SAFETY: guaranteed by the caller.
        match unsafe { self.ready.record(behind) } {
            Err(failed) if failed.is_of_capture() => {
                return Err(Unstarted::beside_a_capture(&failed.to_string()));
            }
            recorded => recorded?,
        }
        // The records of the last average must not be taken for those of one that fails to begin.
        for status in bytemuck::cast_slice_mut::<_, PaStatus>(self.ended.bytes_mut()) {
            (status.outcome, status.committed) = (PA_OPEN, 0);
        }
        peers.world.count_call(peers.position);
        let part = Part {
            device: self.context.ordinal(),
            ready: self.ready.clone(),
            tables: self.tables.take_stale(),
            args: *args,
            launches: launches.to_vec(),
        };
        let mut done = self.meet_and_launch(part.clone(), peers, false)?;
        self.pending = Some(done.clone());
        if let Some((launches, refuses)) = stage {
            let rest = Part { tables: None, launches: launches.to_vec(), ..part };
            // SAFETY: guaranteed by the caller.
            done = unsafe { self.launch_behind_stage(&done, rest, refuses, peers) }?;
            self.pending = Some(done.clone());
        }
        if is_awaited {
            // SAFETY: guaranteed by the caller.
            unsafe { done.hold(behind) }?;
        }
        Ok(())
    }

    /// Meets the peers, and launches. `goes_on`: these launches go on with an average, so that a
    /// peer may end it without this rank's meeting.
    fn meet_and_launch(
        &mut self,
        part: Part,
        peers: &Gathering<'_>,
        goes_on: bool,
    ) -> Result<Arc<Event>, Unstarted> {
        match peers.way {
            #[cfg(feature = "__testing")]
            _ if super::former::is_asked_for() => Ok(self.launch_formerly(&part, peers)?),
            Way::Threads { calls, launches, ref world } => {
                self.launch_together(part, calls, launches, (peers, world))
            }
            #[cfg(processes)]
            Way::Processes(way, ref arrivals) => {
                self.launch_alone(part, way, arrivals, peers, goes_on)
            }
            #[cfg(not(processes))]
            Way::Processes { .. } => unreachable!("this build has threads only"),
        }
    }

    /// Enqueues a kernel that waits for no peer on a stream of the caller, which is not captured.
    /// Waits for it unless it is a part of the stream's work.
    ///
    /// # Safety
    /// As `start`, until the stream has come to the end of the kernel.
    pub(crate) unsafe fn run_local(
        &mut self,
        args: &PaArgs,
        kernel: u32,
        order: Order,
    ) -> Result<(), Unstarted> {
        let _bound = self.context.bind()?;
        let on: sys::CUstream = match order {
            Order::NullStream => std::ptr::null_mut(),
            Order::Behind(stream) | Order::Within(stream) => stream.cast(),
        };
        let refused = |failed: Failed| match failed.is_of_capture() {
            true => Unstarted::beside_a_capture(&failed.to_string()),
            false => failed.into(),
        };
        let done = Event::new(&self.context)?;
        if let Some((to, from, bytes)) = self.tables.take_stale() {
            // SAFETY: both have this size, and keep it. They are not written until `finish`; what
            // reads the destination is on this stream, or behind it.
            let copied =
                unsafe { call!(cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, on)) };
            copied.inspect_err(|_| self.tables.set_stale()).map_err(refused)?;
        }
        // SAFETY: guaranteed by the caller.
        unsafe { launch(&self.context, Launch::all_of(kernel), &[*args], on) }.map_err(refused)?;
        // SAFETY: as above.
        unsafe { done.record(on) }.map_err(refused)?;
        match order {
            Order::Within(_) => self.local = Some(done),
            Order::NullStream | Order::Behind(_) => done.synchronize()?,
        }
        Ok(())
    }

    /// Longest wait for a peer in the kernels of the average that was started last.
    pub(crate) fn longest_wait(&self) -> Duration {
        self.longest_wait
    }

    /// True if the pending average has ended, or there is none.
    pub(crate) fn is_done(&self) -> bool {
        let Some(done) = &self.pending else { return true };
        beside::look(&self.beside);
        done.is_over() // `finish` returns any error
    }

    /// Waits for the pending average, if any. Without one it makes no driver call, which a thread
    /// that captures must not make.
    pub(crate) fn finish(&mut self) -> Result<(), Failed> {
        if let Some(done) = &self.pending {
            beside::wait(done, &mut self.beside)?;
        }
        // The tables, and the memory of this rank, are in use until then.
        if let Some(local) = &self.local {
            local.synchronize()?;
            self.local = None;
        }
        #[cfg(processes)]
        self.watched.drain(..).for_each(|meeting| super::arrivals::forget(&meeting));
        self.pending = None; // cleared last, so that a call after an error waits again
        if !self.tables.is_captured() {
            self.busy = None;
        }
        Ok(())
    }
}
