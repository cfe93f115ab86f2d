//! Host memory that the ranks of one process share.

use std::alloc::{alloc, dealloc, Layout};
use std::io;
use std::ptr::NonNull;

use super::limits::{spare, why, Wanted};

/// Zeroed, page-aligned memory. Its pages are touched at construction, so that no average pays for
/// page faults. Access goes through raw addresses; the mailbox protocol orders it.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address and a size; the kernels and atomics make all accesses.
unsafe impl Send for HostBuffer {}
// SAFETY: as above.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// Allocates memory. An error names the limit that was met.
    pub(crate) fn new(bytes: usize) -> Result<Self, String> {
        const PAGE: usize = 4096;
        // A large buffer is aligned for huge pages, which save 511 of 512 page faults where the
        // system has some.
        let align = if bytes < HUGE { PAGE } else { HUGE };
        let failed = |error: io::Error| why("an allocation", Wanted::Memory(bytes), error);
        let layout = Layout::from_size_align(bytes.max(1), align)
            .map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc(layout) };
        let pointer = NonNull::new(pointer).ok_or_else(|| failed(io::Error::last_os_error()))?;
        let buffer = HostBuffer { pointer, layout };
        spare(0)?;
        advise(pointer, bytes / HUGE * HUGE);
        // SAFETY: just allocated with this size. Written, since alloc_zeroed would map pages only
        // at their first write.
        unsafe { pointer.write_bytes(0, layout.size()) };
        Ok(buffer)
    }

    pub(crate) fn address(&self) -> u64 {
        self.pointer.as_ptr() as u64
    }

    pub(crate) fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// The contents. The kernels must not use the buffer at the same time.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: initialised in `new`, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.layout.size()) }
    }

    /// The buffer as one object, for access by atomics, or while no other code accesses it.
    pub(crate) fn as_ptr<T>(&self) -> *mut T {
        assert!(size_of::<T>() <= self.layout.size() && align_of::<T>() <= self.layout.align());
        self.pointer.as_ptr().cast()
    }
}

const HUGE: usize = 2 << 20;

/// Asks for huge pages. The contents do not depend on it.
fn advise(pointer: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes > 0 {
        // SAFETY: a range of one allocation; the advice does not change its contents. An error
        // means that there are no huge pages, and has no consequence.
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
