//! What the machine itself can do, with the bench's sizes: copies within a device, and copies from
//! and to the host.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::device::{Clock, DeviceMemory, Event, Gpu, Pinned, Stream};
use crate::crew::Work;
use crate::failure::Failure;

/// Page-locked memory of a rank in each direction, at most: it is used again and again.
pub const PINNED_BYTES: usize = 64 << 20;

/// Every rank copies `bytes` within its device: reads them once and writes them once, as the direct
/// average does at best.
pub fn device_copy(
    gpu: Gpu,
    own: Arc<DeviceMemory>,
    flat: Arc<DeviceMemory>,
    bytes: usize,
) -> Result<Work, Failure> {
    let clock = Clock::new(&gpu)?;
    Ok(Box::new(move || {
        clock.start()?;
        // SAFETY: both hold so many bytes, and are this member's while it works.
        let copied = unsafe {
            result::memcpy_dtod_async(flat.address(), own.address(), bytes, clock.stream.raw)
        };
        gpu.check("cuMemcpyDtoDAsync", copied)?;
        clock.stop()?;
        clock.took()
    }))
}

/// Every rank copies `bytes` from page-locked memory of the host to its device, and as many back at
/// the same time.
pub fn host_copies(
    gpu: Gpu,
    own: Arc<DeviceMemory>,
    flat: Arc<DeviceMemory>,
    pinned: [Arc<Pinned>; 2],
    bytes: usize,
) -> Result<Work, Failure> {
    let (clock, back) = (Clock::new(&gpu)?, Stream::new(&gpu)?);
    let (begun, done) = (Event::new(&gpu)?, Event::new(&gpu)?);
    let [there, here] = pinned;
    let most = there.bytes.min(here.bytes);
    Ok(Box::new(move || {
        clock.start()?;
        back.follow(&clock.stream, &begun)?;
        for at in (0..bytes).step_by(most) {
            let (size, at) = (most.min(bytes - at), at as u64);
            // SAFETY: inside of all four, which are this member's while it works.
            unsafe {
                let to = sys::cuMemcpyHtoDAsync_v2(
                    flat.address() + at,
                    there.start,
                    size,
                    clock.stream.raw,
                );
                gpu.check("cuMemcpyHtoDAsync", to.result())?;
                let from =
                    sys::cuMemcpyDtoHAsync_v2(here.start, own.address() + at, size, back.raw);
                gpu.check("cuMemcpyDtoHAsync", from.result())?;
            }
        }
        clock.stream.follow(&back, &done)?;
        clock.stop()?;
        clock.took()
    }))
}
