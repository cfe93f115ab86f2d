//! One rank on a device: its stream, and what the kernels read and write besides tensors and
//! mailboxes.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::memory::Pinned;
use super::running::{Busy, Running};
use super::{Context, DeviceMemory};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment};
use crate::backend::Unstarted;

/// Threads of a block: what the kernels are compiled for at most. 4 packs in flight for each fill a
/// processor's memory pipe, and the registers of one block a processor suffice without spills
/// (tests/sass.rs).
pub(crate) const THREADS: u32 = 512;

/// A rank's stream and tables.
#[derive(Debug)]
pub(crate) struct Rank {
    context: Arc<Context>,
    stream: sys::CUstream,
    /// What the null stream had been given when the average was called.
    before: sys::CUevent,
    /// The end of the average.
    done: sys::CUevent,
    channels: DeviceMemory,
    /// The channels' states after the last average.
    ended: Pinned,
    /// `buckets` of them, then all segments.
    tables: DeviceMemory,
    buckets: usize,
    next_tables: Pinned,
    stale: bool,
    /// Tables of averages that are part of a CUDA graph: as they were when it was captured,
    /// whatever comes after.
    captured: Vec<DeviceMemory>,
    /// Memory for the first of them: where somebody captures, a driver may forbid to allocate.
    to_capture: Option<DeviceMemory>,
    /// What was started last was captured: it has not run.
    capturing: bool,
    /// What was started and nobody has waited for.
    pending: Option<Pending>,
    /// While something is pending, and for good once an average is part of a graph: nobody here
    /// sees it replayed.
    busy: Option<Busy>,
    /// The last field: memory above is nobody's before it goes.
    _running: Running,
}

/// What tells the end of what was started.
#[derive(Clone, Copy, Debug)]
enum Pending {
    /// `Rank::done`.
    Done,
    /// All that this stream was given, since `done` could not be recorded.
    All(sys::CUstream),
}

// SAFETY: handles, which the driver lets every thread use, and memory that only `self` refers to.
unsafe impl Send for Rank {}

impl Rank {
    /// `buckets` and `segments`: how many the tables hold.
    pub(crate) fn new(
        context: &Arc<Context>,
        states: &[PaChannel],
        buckets: usize,
        segments: usize,
    ) -> Result<Rank, String> {
        let bytes: &[u8] = bytemuck::cast_slice(states);
        let tables = buckets * size_of::<PaBucket>() + segments * size_of::<PaSegment>();
        let mut rank = Rank {
            context: context.clone(),
            stream: null_mut(),
            before: null_mut(),
            done: null_mut(),
            channels: DeviceMemory::new(context, bytes.len())?,
            ended: Pinned::new(context, bytes.len())?,
            tables: DeviceMemory::new(context, tables)?,
            buckets,
            next_tables: Pinned::new(context, tables)?,
            stale: true,
            captured: vec![],
            to_capture: Some(DeviceMemory::new(context, tables)?),
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

    /// Memory that it takes on the device.
    pub(crate) fn bytes(&self) -> usize {
        let captured: usize =
            self.captured.iter().chain(&self.to_capture).map(DeviceMemory::bytes).sum();
        self.channels.bytes() + self.tables.bytes() + captured
    }

    pub(crate) fn channels(&self) -> u64 {
        self.channels.address()
    }

    pub(crate) fn buckets(&self) -> u64 {
        self.tables.address()
    }

    /// Where the segments of the bucket after `before` others lie.
    pub(crate) fn segments(&self, buckets: usize, before: usize) -> u64 {
        let at = buckets * size_of::<PaBucket>() + before * size_of::<PaSegment>();
        self.tables.address() + at as u64
    }

    /// Takes over new tables, for the next average. None is under way.
    pub(crate) fn set_tables<'a>(
        &mut self,
        buckets: &'a [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        let parts = std::iter::once(bytemuck::cast_slice(buckets))
            .chain(segments.map(bytemuck::cast_slice));
        let mut rest = self.next_tables.bytes_mut();
        for part in parts {
            let (to, others) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = others;
        }
        self.stale = true;
    }

    pub(crate) fn ended(&self) -> &[PaChannel] {
        bytemuck::cast_slice(self.ended.bytes())
    }

    /// Enqueues an average: on `stream`, or on the rank's own behind the null stream and with it
    /// all streams that are not of the non-blocking kind. Returns at once. If `stream` is being
    /// captured, the average becomes a part of the graph, with the tensors and arguments of now;
    /// all that it counts is in memory of the device, so it can be replayed.
    ///
    /// # Safety
    /// What `args` points at is as `kernels/abi.h` describes it, in memory of the device. The
    /// tensors are nobody else's until `finish` has returned, and what was done to them before is
    /// done or ordered before that stream, which is of the same context and lives until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        kernels: impl Iterator<Item = u32>,
        stream: Option<sys::CUstream>,
    ) -> Result<(), Unstarted> {
        let _bound = self.context.bind()?;
        self.capturing = match stream {
            // SAFETY: the caller's promise.
            Some(stream) => unsafe { is_capturing(stream) }?,
            None => {
                self.follow_the_null_stream()?;
                false
            }
        };
        let stream = stream.unwrap_or(self.stream);
        self.busy.get_or_insert_with(Busy::new);
        if self.capturing {
            let tables = self.tables_of_now()?;
            let args = PaArgs { buckets: tables.address(), ..*args };
            // SAFETY: as below; nothing of it runs before the graph does.
            let captured = unsafe { self.enqueue(&args, kernels, stream) };
            return match captured {
                // There will be no graph.
                Err(failed) if failed.is_of_capture() => {
                    self.to_capture = Some(tables);
                    self.capturing = false;
                    Err(Unstarted::Refused {
                        found: format!("one whose capture has failed ({failed})"),
                        expected: "one whose capture can go on: end it, and capture again",
                    })
                }
                captured => {
                    self.captured.push(tables);
                    Ok(captured?)
                }
            };
        }
        // SAFETY: the copies are as large as what they go from and to, which nobody else touches
        // until `finish`; the kernels are the caller's promise. Whatever is enqueued comes before
        // the event.
        unsafe {
            let enqueued =
                self.update_tables(stream).and_then(|()| self.enqueue(args, kernels, stream));
            let recorded = call!(cuEventRecord(self.done, stream));
            self.pending =
                Some(if recorded.is_ok() { Pending::Done } else { Pending::All(stream) });
            Ok(enqueued.and(recorded)?)
        }
    }

    /// Orders the rank's own stream behind the null stream.
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

    /// A copy of the tables, which later averages leave alone.
    fn tables_of_now(&mut self) -> Result<DeviceMemory, Failed> {
        let copy = match self.to_capture.take() {
            Some(memory) => memory,
            None => DeviceMemory::new(&self.context, self.tables.bytes())?,
        };
        let mut bytes = self.next_tables.bytes().to_vec();
        let (buckets, _) = bytes.split_at_mut(self.buckets * size_of::<PaBucket>());
        for bucket in buckets.chunks_exact_mut(size_of::<PaBucket>()) {
            let mut own: PaBucket = bytemuck::pod_read_unaligned(bucket);
            own.segments = own.segments - self.tables.address() + copy.address();
            bucket.copy_from_slice(bytemuck::bytes_of(&own));
        }
        copy.write(0, &bytes)?;
        Ok(copy)
    }

    unsafe fn update_tables(&mut self, stream: sys::CUstream) -> Result<(), Failed> {
        if std::mem::take(&mut self.stale) {
            let (to, from) = (self.tables.address(), self.next_tables.bytes());
            // SAFETY: see `start`.
            unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream)) }
                .inspect_err(|_| self.stale = true)?;
        }
        Ok(())
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

    /// Whether what was started last was captured, and so has not run.
    pub(crate) fn was_captured(&self) -> bool {
        self.capturing
    }

    /// Waits for a stream that a graph was replayed on.
    ///
    /// # Safety
    /// It is one.
    pub(crate) unsafe fn wait_for(&self, stream: sys::CUstream) -> Result<(), Unstarted> {
        // SAFETY: the caller's promise.
        match unsafe { self.is_capturing(stream) } {
            // To wait for it would end the capture.
            Ok(true) => Err(Unstarted::Refused {
                found: "one that is being captured".into(),
                expected: "one that a graph with this averager's average was launched on",
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
    /// It is a stream of the context.
    unsafe fn synchronize(&self, stream: sys::CUstream) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe { call!(cuStreamSynchronize(stream)) }
    }

    /// Whether the stream is being captured.
    ///
    /// # Safety
    /// It is one.
    pub(crate) unsafe fn is_capturing(&self, stream: sys::CUstream) -> Result<bool, Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe { is_capturing(stream) }
    }

    /// Why an average can't be enqueued on this stream.
    ///
    /// # Safety
    /// It is one.
    pub(crate) unsafe fn refuses(
        &self,
        stream: sys::CUstream,
    ) -> Result<Option<&'static str>, Failed> {
        let _bound = self.context.bind()?;
        let mut flags = 0;
        // SAFETY: the caller's promise.
        unsafe { call!(cuStreamGetFlags(stream, &mut flags)) }?;
        let blocking = flags & sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32 == 0;
        Ok(blocking.then_some("a blocking stream"))
    }

    /// Whether what was started is done.
    pub(crate) fn is_done(&self) -> bool {
        let Some(Pending::Done) = self.pending else { return true };
        // SAFETY: this rank's event.
        let ready =
            self.context.bind().and_then(|_bound| unsafe { call!(cuEventQuery(self.done)) });
        // Any other error comes back from `finish`, which does not wait for it.
        !matches!(ready, Err(Failed { result: sys::CUresult::CUDA_ERROR_NOT_READY, .. }))
    }

    /// Waits for what was started, if something was: a thread that captures must not even ask.
    pub(crate) fn finish(&mut self) -> Result<(), Failed> {
        match self.pending {
            None => {}
            Some(Pending::Done) => {
                let _bound = self.context.bind()?;
                // SAFETY: this rank's event.
                unsafe { call!(cuEventSynchronize(self.done)) }?;
            }
            Some(Pending::All(stream)) => {
                self.pending = None; // the stream may not live longer
                                     // SAFETY: one that was promised to live until now.
                unsafe { self.synchronize(stream) }?;
            }
        }
        self.pending = None; // not before: whoever asks again waits again
        if self.captured.is_empty() {
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
        // SAFETY: the kernel takes one PaArgs, which the driver copies now.
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
/// It is a stream of the context that is bound.
unsafe fn is_capturing(stream: sys::CUstream) -> Result<bool, Failed> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: the caller's promise.
    unsafe { call!(cuStreamIsCapturing(stream, &mut status)) }?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

impl Drop for Rank {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        // SAFETY: made by `new`, if they are not null; the driver destroys them when their work is
        // done.
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
