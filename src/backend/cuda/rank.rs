//! One rank on a device: its stream, its tables, and the states of its channels.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::memory::Pinned;
use super::running::{Busy, Running};
use super::streams::{Begun, Held, Stream};
use super::tables::Tables;
use super::{Context, DeviceMemory};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment};
use crate::backend::{Order, Unstarted};

/// Threads of a block, the maximum that the kernels are compiled for. 4 packs in flight per thread
/// saturate a multiprocessor's memory bandwidth, and one block per multiprocessor has enough
/// registers to avoid spills (tests/kernels/sass.rs).
pub(crate) const THREADS: u32 = 512;

/// A rank's stream and tables.
#[derive(Debug)]
pub(crate) struct Rank {
    context: Arc<Context>,
    /// Number of the rank, for messages.
    number: usize,
    /// Non-blocking stream of the rank's own.
    stream: sys::CUstream,
    /// Event on the application's stream before an average on the rank's own.
    before: sys::CUevent,
    /// Event at the end of an average.
    done: sys::CUevent,
    channels: DeviceMemory,
    /// The channels' states after the last average.
    ended: Pinned,
    tables: Tables,
    /// True if the average that was started last was captured and so has not run.
    capturing: bool,
    /// The end of the average that was started and not waited for.
    pending: Option<Pending>,
    /// Present while later work of the application's stream waits for the pending average.
    held: Option<Held>,
    /// Present while an average is pending. Present for good after a capture, since replays of the
    /// graph are not observed here.
    busy: Option<Busy>,
    /// The last field, so that the memory above is returned before it is dropped.
    _running: Running,
}

/// The event or stream to wait on for the end of an average.
#[derive(Clone, Copy, Debug)]
enum Pending {
    /// Wait on `Rank::done`.
    Done,
    /// Wait for the whole stream, since `done` could not be recorded.
    All(sys::CUstream),
}

// SAFETY: handles, which the driver allows on every thread, and memory that only `self` refers to.
unsafe impl Send for Rank {}

impl Rank {
    /// `buckets` and `segments` are the capacities of the tables.
    pub(crate) fn new(
        context: &Arc<Context>,
        states: &[PaChannel],
        buckets: usize,
        segments: usize,
        number: usize,
    ) -> Result<Rank, String> {
        let bytes: &[u8] = bytemuck::cast_slice(states);
        let mut rank = Rank {
            context: context.clone(),
            number,
            stream: null_mut(),
            before: null_mut(),
            done: null_mut(),
            channels: DeviceMemory::new(context, bytes.len())?,
            ended: Pinned::new(context, bytes.len())?,
            tables: Tables::new(context, buckets, segments)?,
            capturing: false,
            pending: None,
            held: None,
            busy: None,
            _running: Running::new(),
        };
        rank.channels.write(0, bytes)?;
        rank.ended.bytes_mut().copy_from_slice(bytes);
        let _bound = context.bind()?;
        let kind = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the context is bound.
        unsafe {
            call!(cuStreamCreate(&mut rank.stream, kind))?;
            call!(cuEventCreate(&mut rank.before, untimed))?;
            call!(cuEventCreate(&mut rank.done, untimed))?;
        }
        Ok(rank)
    }

    /// Device memory of this rank in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.channels.bytes() + self.tables.bytes()
    }

    pub(crate) fn channels(&self) -> u64 {
        self.channels.address()
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

    pub(crate) fn ended(&self) -> &[PaChannel] {
        bytemuck::cast_slice(self.ended.bytes())
    }

    /// Enqueues an average and returns at once.
    ///
    /// An average that later work of its stream waits for is enqueued on that stream, if that is
    /// non-blocking. Any other runs on the rank's own stream, between two events: work of another
    /// kind of stream can wait for a peer's, and so could the average. If the stream is being
    /// captured, the average becomes a part of the graph, with its current tensors and arguments.
    /// All counters are in device memory, so a graph can be replayed.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it, in memory that the
    /// device addresses. No other code accesses the tensors until `finish` has returned, and
    /// earlier accesses have completed or are ordered before the stream of `order`. The stream
    /// belongs to this context and exists until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        order: Order,
    ) -> Result<(), Unstarted> {
        let _bound = self.context.bind()?;
        let (behind, is_awaited) = match order {
            Order::NullStream => (null_mut(), false),
            Order::Behind(stream) => (stream.cast(), false),
            Order::Within(stream) => (stream.cast(), true),
        };
        self.capturing = match order {
            Order::NullStream => false,
            // SAFETY: guaranteed by the caller.
            Order::Behind(_) | Order::Within(_) => unsafe { is_capturing(behind) }?,
        };
        self.busy.get_or_insert_with(Busy::new);
        if self.capturing {
            // SAFETY: guaranteed by the caller.
            return unsafe { self.capture(args, kernels, behind) };
        }
        // SAFETY: guaranteed by the caller.
        let stream = unsafe { Stream::of(behind) }?;
        let context = self.context.raw() as usize;
        let begun = Begun { context, control: args.control, rank: self.number, stream };
        let held = begun.enter(is_awaited)?;
        let is_within = is_awaited && stream.is_non_blocking();
        let on = if is_within { behind } else { self.stream };
        if !is_within {
            // SAFETY: guaranteed by the caller.
            unsafe { self.follow(behind) }?;
        }
        self.held = held;
        // SAFETY: source and destination of the copies have the same size, and no other code
        // accesses them until `finish`; the caller guarantees the rest. All enqueued work precedes
        // the event.
        unsafe {
            let enqueued = self.tables.update(on).and_then(|()| self.enqueue(args, kernels, on));
            let recorded = call!(cuEventRecord(self.done, on));
            self.pending = Some(if recorded.is_ok() { Pending::Done } else { Pending::All(on) });
            let followed = match recorded {
                Ok(()) if is_awaited && !is_within => {
                    call!(cuStreamWaitEvent(behind, self.done, 0))
                }
                recorded => recorded,
            };
            Ok(enqueued.and(followed)?)
        }
    }

    /// Makes an average a part of the graph that is captured on the stream.
    ///
    /// # Safety
    /// As `start`; the work does not run before the graph does.
    unsafe fn capture(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        stream: sys::CUstream,
    ) -> Result<(), Unstarted> {
        let tables = self.tables.copy()?;
        let args = PaArgs { buckets: tables.address(), ..*args };
        // SAFETY: guaranteed by the caller.
        match unsafe { self.enqueue(&args, kernels, stream) } {
            // The capture failed, so there will be no graph.
            Err(failed) if failed.is_of_capture() => {
                self.tables.take_back(tables);
                self.capturing = false;
                Err(Unstarted::Refused {
                    found: format!("a stream whose capture has failed ({failed})"),
                    expected: "a stream whose capture can continue: end this capture, and capture \
                        again",
                })
            }
            captured => {
                self.tables.keep(tables);
                Ok(captured?)
            }
        }
    }

    /// Makes the rank's own stream wait for the work of another stream so far.
    ///
    /// # Safety
    /// `stream` belongs to this context, which is bound.
    unsafe fn follow(&self, stream: sys::CUstream) -> Result<(), Unstarted> {
        // SAFETY: this rank's event and stream; the caller guarantees the rest.
        let follows = unsafe {
            call!(cuEventRecord(self.before, stream))
                .and_then(|()| call!(cuStreamWaitEvent(self.stream, self.before, 0)))
        };
        match follows {
            Err(failed) if failed.is_of_capture() => {
                Err(Unstarted::beside_a_capture(&failed.to_string()))
            }
            follows => Ok(follows?),
        }
    }

    unsafe fn enqueue(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        stream: sys::CUstream,
    ) -> Result<(), Failed> {
        for kernel in kernels {
            // SAFETY: see `start`.
            unsafe { self.launch(args, kernel, stream) }?;
        }
        let (to, from) = (self.ended.bytes_mut(), self.channels.address());
        // SAFETY: see `start`.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream)) }
    }

    /// True if the average that was started last was captured and so has not run.
    pub(crate) fn was_captured(&self) -> bool {
        self.capturing
    }

    /// Waits for a stream on which a graph was replayed.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn wait_for(&self, stream: sys::CUstream) -> Result<(), Unstarted> {
        // SAFETY: guaranteed by the caller.
        match unsafe { self.is_capturing(stream) } {
            // Waiting would invalidate the capture.
            Ok(true) => Err(Unstarted::Refused {
                found: "a stream that is being captured".into(),
                expected: "a stream on which a graph with this averager's average was launched",
            }),
            // SAFETY: as above.
            Ok(false) => Ok(unsafe { self.synchronize(stream) }?),
            Err(failed) if failed.is_of_capture() => {
                Err(Unstarted::beside_a_capture(&failed.to_string()))
            }
            Err(failed) => Err(failed.into()),
        }
    }

    /// # Safety
    /// `stream` belongs to this context.
    unsafe fn synchronize(&self, stream: sys::CUstream) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { call!(cuStreamSynchronize(stream)) }
    }

    /// True if the stream is being captured.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn is_capturing(&self, stream: sys::CUstream) -> Result<bool, Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { is_capturing(stream) }
    }

    /// True if the stream waits for no other stream by itself.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn is_non_blocking(&self, stream: sys::CUstream) -> Result<bool, Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { Stream::of(stream) }.map(Stream::is_non_blocking)
    }

    /// True if the pending average has ended.
    pub(crate) fn is_done(&self) -> bool {
        let Some(Pending::Done) = self.pending else { return true };
        // SAFETY: this rank's event.
        let ready =
            self.context.bind().and_then(|_bound| unsafe { call!(cuEventQuery(self.done)) });
        // `finish` returns any other error, and does not wait for it.
        !matches!(ready, Err(Failed { result: sys::CUresult::CUDA_ERROR_NOT_READY, .. }))
    }

    /// Waits for the pending average, if any. Without one it makes no driver call, which a thread
    /// that captures must not make.
    pub(crate) fn finish(&mut self) -> Result<(), Failed> {
        match self.pending {
            None => {}
            Some(Pending::Done) => {
                let _bound = self.context.bind()?;
                // SAFETY: this rank's event.
                unsafe { call!(cuEventSynchronize(self.done)) }?;
            }
            Some(Pending::All(stream)) => {
                // cleared first, since the stream may be destroyed after this call
                self.pending = None;
                self.held = None;
                // SAFETY: the caller of `start` has guaranteed that the stream
                // exists until now.
                unsafe { self.synchronize(stream) }?;
            }
        }
        self.pending = None; // cleared last, so that a call after an error waits again
        self.held = None;
        if !self.tables.is_captured() {
            self.busy = None;
        }
        Ok(())
    }

    unsafe fn launch(
        &self,
        args: &PaArgs,
        kernel: u32,
        stream: sys::CUstream,
    ) -> Result<(), Failed> {
        let mut parameters: [*mut c_void; 1] = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: the kernel takes one PaArgs, which the driver copies during the call.
        unsafe {
            call!(cuLaunchCooperativeKernel(
                self.context.kernel(kernel),
                args.channels,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr()
            ))
        }
    }
}

/// # Safety
/// `stream` belongs to the current context.
unsafe fn is_capturing(stream: sys::CUstream) -> Result<bool, Failed> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: guaranteed by the caller.
    unsafe { call!(cuStreamIsCapturing(stream, &mut status)) }?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

impl Drop for Rank {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        // SAFETY: created by `new` unless null; the driver destroys them when their work has ended.
        unsafe {
            if !self.stream.is_null() {
                let _ = call!(cuStreamDestroy_v2(self.stream));
            }
            for event in [self.before, self.done].into_iter().filter(|event| !event.is_null()) {
                let _ = call!(cuEventDestroy_v2(event));
            }
        }
    }
}
