//! Events and streams of this crate's own.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::Context;

/// An event without times. Dropping it while work waits for it is allowed.
#[derive(Debug)]
pub(crate) struct Event {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: a handle, which the driver allows on every thread.
unsafe impl Send for Event {}
// SAFETY: as above; the driver serialises calls.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Event, Failed> {
        let _bound = context.bind()?;
        let (flags, mut raw) = (sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32, null_mut());
        // SAFETY: the context is bound.
        unsafe { call!(cuEventCreate(&mut raw, flags)) }?;
        Ok(Event { context: context.clone(), raw })
    }

    /// Records the work of a stream so far.
    ///
    /// # Safety
    /// `stream` belongs to the context of this event, which is bound.
    pub(super) unsafe fn record(&self, stream: sys::CUstream) -> Result<(), Failed> {
        // SAFETY: the caller's promise.
        unsafe { call!(cuEventRecord(self.raw, stream)) }
    }

    /// Makes a stream of any device wait for what was recorded.
    ///
    /// # Safety
    /// `stream` belongs to the context that is bound.
    pub(super) unsafe fn hold(&self, stream: sys::CUstream) -> Result<(), Failed> {
        // SAFETY: the caller's promise.
        unsafe { call!(cuStreamWaitEvent(stream, self.raw, 0)) }
    }

    /// True if what was recorded has ended, or has failed.
    pub(super) fn is_over(&self) -> bool {
        self.has_ended().unwrap_or(true)
    }

    /// True if what was recorded has ended. An error if it has failed.
    pub(super) fn has_ended(&self) -> Result<bool, Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: an event of the context that is bound.
        match unsafe { call!(cuEventQuery(self.raw)) } {
            Err(Failed { result: sys::CUresult::CUDA_ERROR_NOT_READY, .. }) => Ok(false),
            ended => ended.map(|()| true),
        }
    }

    /// Waits until what was recorded has ended.
    pub(super) fn synchronize(&self) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: an event of the context that is bound.
        unsafe { call!(cuEventSynchronize(self.raw)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        // SAFETY: created by `new`; the driver destroys it when nothing waits for it any more.
        let _ = unsafe { call!(cuEventDestroy_v2(self.raw)) };
    }
}

/// A stream that waits for no other by itself, of the highest priority: its launches are placed
/// before waiting blocks of a trainer's kernels.
#[derive(Debug)]
pub(super) struct LaunchStream {
    context: Arc<Context>,
    raw: sys::CUstream,
}

// SAFETY: a handle, which the driver allows on every thread.
unsafe impl Send for LaunchStream {}

impl LaunchStream {
    pub(super) fn new(context: &Arc<Context>) -> Result<LaunchStream, Failed> {
        let _bound = context.bind()?;
        let (mut raw, mut least, mut greatest) = (null_mut(), 0, 0);
        let kind = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is bound.
        unsafe {
            call!(cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
            call!(cuStreamCreateWithPriority(&mut raw, kind, greatest))?;
        }
        Ok(LaunchStream { context: context.clone(), raw })
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }
}

impl Drop for LaunchStream {
    fn drop(&mut self) {
        let Ok(_bound) = self.context.bind() else { return };
        // SAFETY: created by `new`; the driver destroys it when its work has ended.
        let _ = unsafe { call!(cuStreamDestroy_v2(self.raw)) };
    }
}

/// True if a stream is being captured.
///
/// # Safety
/// `stream` belongs to the current context.
pub(super) unsafe fn is_capturing(stream: sys::CUstream) -> Result<bool, Failed> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    // SAFETY: guaranteed by the caller.
    unsafe { call!(cuStreamIsCapturing(stream, &mut status)) }?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
