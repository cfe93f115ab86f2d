//! One rank on a device: its stream, its tables, and the states of its channels.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::memory::Pinned;
use super::running::{Busy, Running};
use super::tables::Tables;
use super::{Context, DeviceMemory};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment};
use crate::backend::Unstarted;

/// Threads of a block, the maximum that the kernels are compiled for. 4 packs in flight per thread
/// saturate a multiprocessor's memory bandwidth, and one block per multiprocessor has enough
/// registers to avoid spills (tests/kernels/sass.rs).
pub(crate) const THREADS: u32 = 512;

/// A rank's stream and tables.
#[derive(Debug)]
pub(crate) struct Rank {
    context: Arc<Context>,
    stream: sys::CUstream,
    /// Event on the null stream at the start of an average.
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
    ) -> Result<Rank, String> {
        let bytes: &[u8] = bytemuck::cast_slice(states);
        let mut rank = Rank {
            context: context.clone(),
            stream: null_mut(),
            before: null_mut(),
            done: null_mut(),
            channels: DeviceMemory::new(context, bytes.len())?,
            ended: Pinned::new(context, bytes.len())?,
            tables: Tables::new(context, buckets, segments)?,
            capturing: false,
            pending: None,
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

    /// Enqueues an average and returns at once. Without `stream`, the average goes to the rank's
    /// own stream, which waits for the null stream and so for all blocking streams. If `stream` is
    /// being captured, the average becomes a part of the graph, with its current tensors and
    /// arguments. All counters are in device memory, so a graph can be replayed.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it, in memory that the
    /// device addresses. No other code accesses the tensors until `finish` has returned, and
    /// earlier accesses have completed or are ordered before that stream. The stream belongs to
    /// this context and exists until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        stream: Option<sys::CUstream>,
    ) -> Result<(), Unstarted> {
        let _bound = self.context.bind()?;
        self.capturing = match stream {
            // SAFETY: guaranteed by the caller.
            Some(stream) => unsafe { is_capturing(stream) }?,
            None => {
                self.follow_the_null_stream()?;
                false
            }
        };
        let stream = stream.unwrap_or(self.stream);
        self.busy.get_or_insert_with(Busy::new);
        if self.capturing {
            let tables = self.tables.copy()?;
            let args = PaArgs { buckets: tables.address(), ..*args };
            // SAFETY: as below; the enqueued work does not run before the graph does.
            let captured = unsafe { self.enqueue(&args, kernels, stream) };
            return match captured {
                // The capture failed, so there will be no graph.
                Err(failed) if failed.is_of_capture() => {
                    self.tables.take_back(tables);
                    self.capturing = false;
                    Err(Unstarted::Refused {
                        found: format!("a stream whose capture has failed ({failed})"),
                        expected: "a stream whose capture can continue: end this capture, and \
                            capture again",
                    })
                }
                captured => {
                    self.tables.keep(tables);
                    Ok(captured?)
                }
            };
        }
        // SAFETY: source and destination of the copies have the same size, and no other code
        // accesses them until `finish`; the caller guarantees the rest. All enqueued work precedes
        // the event.
        unsafe {
            let enqueued =
                self.tables.update(stream).and_then(|()| self.enqueue(args, kernels, stream));
            let recorded = call!(cuEventRecord(self.done, stream));
            self.pending =
                Some(if recorded.is_ok() { Pending::Done } else { Pending::All(stream) });
            Ok(enqueued.and(recorded)?)
        }
    }

    /// Makes the rank's own stream wait for the null stream.
    fn follow_the_null_stream(&self) -> Result<(), Unstarted> {
        // SAFETY: this rank's event and stream.
        let follows = unsafe {
            call!(cuEventRecord(self.before, null_mut()))
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

    /// The reason why an average can't be enqueued on this stream, if there is one.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn refuses(
        &self,
        stream: sys::CUstream,
    ) -> Result<Option<&'static str>, Failed> {
        let _bound = self.context.bind()?;
        let mut flags = 0;
        // SAFETY: guaranteed by the caller.
        unsafe { call!(cuStreamGetFlags(stream, &mut flags)) }?;
        let blocking = flags & sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32 == 0;
        Ok(blocking.then_some("a blocking stream"))
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
                // SAFETY: the caller of `start` has guaranteed that the stream
                // exists until now.
                unsafe { self.synchronize(stream) }?;
            }
        }
        self.pending = None; // cleared last, so that a call after an error waits again
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
