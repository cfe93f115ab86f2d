//! Plain memory that ranks share.

use std::alloc::{alloc, dealloc, Layout};
use std::io;
use std::ptr::NonNull;

use super::limits::{spare, why, Wanted};

/// Zeroed memory on a page boundary, touched at construction so that no average pays for page
/// faults. Who may access what in it, and when, is the protocol's business: it is reached through
/// raw addresses only.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address and a size; all accesses are the kernels' or atomic.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// Memory that can't be had is an error, with the limit in its text.
    pub(crate) fn new(bytes: usize) -> Result<Self, String> {
        const PAGE: usize = 4096;
        // What is large is made of large pages where the system has some: one fault where there
        // would be 512.
        let align = if bytes < HUGE { PAGE } else { HUGE };
        let failed = |error: io::Error| why("an allocation", Wanted::Memory(bytes), error);
        let layout = Layout::from_size_align(bytes.max(1), align)
            .map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc(layout) };
        let pointer = NonNull::new(pointer).ok_or_else(|| failed(io::Error::last_os_error()))?;
        let region = HostBuffer { pointer, layout };
        spare(0)?;
        advise(pointer, bytes / HUGE * HUGE);
        // SAFETY: just allocated with this size. Written, not alloc_zeroed: that maps pages at the
        // first write only.
        unsafe { pointer.write_bytes(0, layout.size()) };
        Ok(region)
    }

    pub(crate) fn address(&self) -> u64 {
        self.pointer.as_ptr() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// The contents, while nothing else uses the buffer.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised in `new`, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.layout.size()) }
    }

    /// The region as one object, for access by atomics or while nobody else has the region.
    pub(crate) fn as_ptr<T>(&self) -> *mut T {
        assert!(size_of::<T>() <= self.layout.size() && align_of::<T>() <= self.layout.align());
        self.pointer.as_ptr().cast()
    }
}

const HUGE: usize = 2 << 20;

/// To be made of large pages. It is all the same to whoever uses it.
fn advise(pointer: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes > 0 {
        // SAFETY: of one allocation; the advice changes nothing that it holds. Without such pages
        // it is an error without a consequence.
        let _ = unsafe {
            rustix::mm::madvise(pointer.as_ptr().cast(), bytes, rustix::mm::Advice::LinuxHugepage)
        };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (pointer, bytes);
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) };
    }
}
