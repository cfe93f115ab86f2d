//! One rank on a device: its stream, and what the kernels read and write besides tensors and mailboxes.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::memory::Pinned;
use super::{Context, DeviceMemory};
use crate::abi::{PaArgs, PaBucket, PaChannel, PaSegment};

/// Threads of a block: what the kernels are compiled for at most. 4 packs in flight for each fill a processor's memory
/// pipe, and the registers of one block a processor suffice without spills (tests/sass.rs).
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
    /// Buckets, then all segments.
    tables: DeviceMemory,
    next_tables: Pinned,
    stale: bool,
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
            next_tables: Pinned::new(context, tables)?,
            stale: true,
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
        self.channels.bytes() + self.tables.bytes()
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
        let parts = std::iter::once(bytemuck::cast_slice(buckets)).chain(segments.map(bytemuck::cast_slice));
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

    /// Enqueues an average: on `stream`, or on the rank's own behind the null stream and with it all streams that are not
    /// of the non-blocking kind. Returns at once.
    ///
    /// # Safety
    /// What `args` points at is as `kernels/abi.h` describes it, in memory of the device. The tensors are nobody else's
    /// until `finish` has returned, and what was done to them before is done or ordered before that stream, which is of the
    /// same context and lives until then.
    pub(crate) unsafe fn start(
        &mut self,
        args: &PaArgs,
        phases: impl Iterator<Item = u32>,
        stream: Option<sys::CUstream>,
    ) -> Result<(), String> {
        let _bound = self.context.bind()?;
        if stream.is_none() {
            // SAFETY: this rank's event and stream.
            unsafe {
                call!(cuEventRecord(self.before, null_mut()))?;
                call!(cuStreamWaitEvent(self.stream, self.before, 0))?;
            }
        }
        let stream = stream.unwrap_or(self.stream);
        // SAFETY: the copies are as large as what they go from and to, which nobody else touches until `finish`; the
        // kernels are the caller's promise. Whatever is enqueued comes before the event.
        unsafe {
            let enqueued = self.enqueue(args, phases, stream);
            let recorded = call!(cuEventRecord(self.done, stream));
            if recorded.is_err() {
                let _ = call!(cuStreamSynchronize(stream)); // or `finish` would not wait for it
            }
            Ok(enqueued.and(recorded)?)
        }
    }

    unsafe fn enqueue(
        &mut self,
        args: &PaArgs,
        phases: impl Iterator<Item = u32>,
        stream: sys::CUstream,
    ) -> Result<(), Failed> {
        if self.stale {
            let (to, from) = (self.tables.address(), self.next_tables.bytes());
            // SAFETY: see `start`.
            unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream)) }?;
            self.stale = false;
        }
        for phase in phases {
            // SAFETY: see `start`.
            unsafe { self.launch(args, phase, stream) }?;
        }
        let (to, from) = (self.ended.bytes_mut(), self.channels.address());
        // SAFETY: see `start`.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream)) }
    }

    /// Why an average can't be enqueued on this stream.
    ///
    /// # Safety
    /// It is one.
    pub(crate) unsafe fn refuses(&self, stream: sys::CUstream) -> Result<Option<&'static str>, Failed> {
        let _bound = self.context.bind()?;
        let (mut flags, mut capture) = (0, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE);
        // SAFETY: the caller's promise.
        unsafe {
            call!(cuStreamIsCapturing(stream, &mut capture))?;
            call!(cuStreamGetFlags(stream, &mut flags))?;
        }
        if capture != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(Some("a stream that is being captured"));
        }
        let blocking = flags & sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32 == 0;
        Ok(blocking.then_some("a blocking stream"))
    }

    /// Whether what was started is done.
    pub(crate) fn is_done(&self) -> bool {
        // SAFETY: this rank's event.
        let ready = self.context.bind().and_then(|_bound| unsafe { call!(cuEventQuery(self.done)) });
        // Any other error comes back from `finish`, which does not wait for it.
        !matches!(ready, Err(Failed { result: sys::CUresult::CUDA_ERROR_NOT_READY, .. }))
    }

    /// Waits for what was started.
    pub(crate) fn finish(&mut self) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: this rank's event.
        unsafe { call!(cuEventSynchronize(self.done)) }
    }

    unsafe fn launch(&self, args: &PaArgs, phase: u32, stream: sys::CUstream) -> Result<(), Failed> {
        let mut parameters: [*mut c_void; 1] = [std::ptr::from_ref(args).cast_mut().cast()];
        // SAFETY: the kernel takes one PaArgs, which the driver copies now.
        unsafe {
            call!(cuLaunchCooperativeKernel(
                self.context.kernel(phase),
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

impl Drop for Rank {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        // SAFETY: made by `new`, if they are not null; the driver destroys them when their work is done.
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
