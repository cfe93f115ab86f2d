//! Host memory that a library sends from a device, on a stream of its own.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{call, Failed};
use super::memory::{DeviceMemory, Pinned};
use super::streams::{Event, LaunchStream};
use super::Context;

/// Buffers on the host and on the device, to send and to receive, and the stream that copies
/// between them. No call waits for the stream.
#[derive(Debug)]
pub(crate) struct Staging {
    context: Arc<Context>,
    stream: LaunchStream,
    copied: Event,
    send: (Pinned, DeviceMemory),
    receive: (Pinned, DeviceMemory),
}

impl Staging {
    /// Buffers of `bytes` each.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Staging, Failed> {
        let both =
            || Ok::<_, Failed>((Pinned::new(context, bytes)?, DeviceMemory::new(context, bytes)?));
        Ok(Staging {
            context: context.clone(),
            stream: LaunchStream::new(context)?,
            copied: Event::new(context)?,
            send: both()?,
            receive: both()?,
        })
    }

    /// Makes buffers of at least `bytes`. The stream has nothing left to do.
    pub(crate) fn grow_idle(&mut self, bytes: usize) -> Result<(), Failed> {
        if bytes > self.send.0.size() {
            *self = Staging::new(&self.context, bytes)?;
        }
        Ok(())
    }

    pub(crate) fn stream(&self) -> *mut c_void {
        self.stream.raw().cast()
    }

    /// Device addresses of what is sent, and of what is received.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        (self.send.1.address(), self.receive.1.address())
    }

    /// Enqueues the copy of these bytes to the device. The stream has nothing left to do.
    pub(crate) fn upload(&mut self, bytes: &[u8]) -> Result<(), Failed> {
        let (host, device) = &mut self.send;
        host.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        let _bound = self.context.bind()?;
        let (to, from, stream) =
            (device.address(), host.address() as *const c_void, self.stream.raw());
        // SAFETY: both buffers are as long, and live until the stream has ended.
        unsafe { call!(cuMemcpyHtoDAsync_v2(to, from, bytes.len(), stream)) }
    }

    /// Enqueues the copy of as many received bytes to the host, behind all else.
    pub(crate) fn download(&mut self, bytes: usize) -> Result<(), Failed> {
        let (host, device) = &self.receive;
        assert!(bytes <= host.size());
        let _bound = self.context.bind()?;
        let (to, from, stream) =
            (host.address() as *mut c_void, device.address(), self.stream.raw());
        // SAFETY: both buffers are as long, and live until the stream has ended.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to, from, bytes, stream)) }?;
        // SAFETY: a stream of the context that is bound.
        unsafe { self.copied.record(stream) }
    }

    /// True when what `download` has enqueued is over.
    pub(crate) fn is_downloaded(&self) -> Result<bool, Failed> {
        self.copied.has_ended()
    }

    /// The bytes that were downloaded last.
    pub(crate) fn received(&self) -> &[u8] {
        self.receive.0.bytes()
    }
}
