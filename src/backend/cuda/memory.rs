//! Device memory, and page-locked host memory that devices address.

use std::ffi::c_void;
#[cfg(processes)]
use std::os::fd::BorrowedFd;
use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};

use super::driver::{call, Failed};
#[cfg(processes)]
use super::ipc::IpcExport;
use super::Context;
use crate::backend::reclaim::reclaim_spare;

/// Device memory. It does not come from a pool, since peers may be given access to it and it may be
/// exported.
#[derive(Debug)]
pub(crate) struct DeviceMemory {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    /// Present if the memory can be opened by other processes.
    #[cfg(processes)]
    export: Option<Box<IpcExport>>,
}

impl DeviceMemory {
    /// Allocates zeroed memory, or reuses unused memory of the same size.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Failed> {
        let bytes = bytes.max(1);
        let spare = take(&mut context.spare().device, bytes);
        let address = match spare {
            Some(address) => address,
            None => allocate(context, bytes)?,
        };
        let memory = DeviceMemory {
            context: context.clone(),
            address,
            bytes,
            #[cfg(processes)]
            export: None,
        };
        memory.fill(0, bytes, 0)?;
        Ok(memory)
    }

    /// Allocates zeroed memory for export. It shares no allocation unit with other memory, and is
    /// never reused.
    #[cfg(processes)]
    pub(crate) fn exportable(context: &Arc<Context>, bytes: usize) -> Result<Self, String> {
        let address = allocate(context, bytes.max(1).next_multiple_of(IpcExport::BLOCK))?;
        let mut memory = DeviceMemory { context: context.clone(), address, bytes, export: None };
        memory.export = Some(Box::new(IpcExport::new(context, address)?));
        memory.fill(0, bytes, 0)?;
        Ok(memory)
    }

    /// Handle and file for importers.
    #[cfg(processes)]
    pub(crate) fn export_handle(&self) -> Option<(Vec<u8>, BorrowedFd<'_>)> {
        self.export.as_deref().map(IpcExport::handle)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies the first bytes, behind all work on the device.
    pub(crate) fn read(&self, to: &mut [u8]) -> Result<(), Failed> {
        // SAFETY: inside of this memory.
        unsafe { self.context.read_behind_all(self.at(0, to.len()), to) }
    }

    /// Writes bytes and waits for the copy. Kernels may run at the same time.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Result<(), Failed> {
        let to = self.at(offset, from.len());
        self.context.on_the_side(|stream| {
            // SAFETY: inside of this memory; `from` outlives the copy, which is waited for.
            unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), stream)) }
        })
    }

    pub(crate) fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), Failed> {
        let to = self.at(offset, bytes);
        // SAFETY: inside of this memory.
        self.context
            .on_the_side(|stream| unsafe { call!(cuMemsetD8Async(to, value, bytes, stream)) })
    }

    fn at(&self, offset: usize, bytes: usize) -> u64 {
        assert!(offset + bytes <= self.bytes);
        self.address + offset as u64
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        #[cfg(processes)]
        if let Some(export) = self.export.take() {
            return export.free_when_unused(&self.context, self.address);
        }
        self.context.spare().device.push((self.bytes, self.address));
        reclaim_spare();
    }
}

/// Page-locked host memory. Copies need no staging, and devices address it by the host's addresses.
#[derive(Debug)]
pub(crate) struct Pinned {
    context: Arc<Context>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: an address and a size; accesses are the kernels', atomic, or through `&mut`.
unsafe impl Send for Pinned {}
// SAFETY: as above; `bytes` is only used while no kernel accesses the memory.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Allocates zeroed memory, or reuses unused memory of the same size.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, Failed> {
        let spare = take(&mut context.spare().pinned, bytes);
        let start = match spare {
            Some(address) => address as *mut u8,
            None => or_free_spare(context, || {
                let mut start: *mut c_void = null_mut();
                // SAFETY: the context is bound.
                let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
                unsafe { call!(cuMemHostAlloc(&mut start, bytes.max(1), flags)) }
                    .map(|()| start.cast())
            })?,
        };
        // SAFETY: allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { context: context.clone(), start, bytes })
    }

    /// Address for the host and, since addresses are unified, for every device.
    pub(crate) fn address(&self) -> u64 {
        self.start as u64
    }

    pub(crate) fn size(&self) -> usize {
        self.bytes
    }

    /// The contents. No copy may be running, and no kernel may use the memory.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    /// The contents, mutably, under the same conditions.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.context.spare().pinned.push((self.bytes, self.start as u64));
        reclaim_spare();
    }
}

/// Removes unused memory of this size from a list.
fn take(spare: &mut Vec<(usize, u64)>, bytes: usize) -> Option<u64> {
    let index = spare.iter().position(|&(size, _)| size == bytes)?;
    Some(spare.swap_remove(index).1)
}

fn allocate(context: &Context, bytes: usize) -> Result<u64, Failed> {
    or_free_spare(context, || {
        let mut address = 0;
        // SAFETY: the context is bound.
        unsafe { call!(cuMemAlloc_v2(&mut address, bytes)) }.map(|()| address)
    })
}

/// Allocates. On a lack of memory, frees all unused memory and allocates again.
fn or_free_spare<T>(
    context: &Context,
    allocate: impl Fn() -> Result<T, Failed>,
) -> Result<T, Failed> {
    let _bound = context.bind()?;
    match allocate() {
        Err(Failed { result: CUresult::CUDA_ERROR_OUT_OF_MEMORY, .. }) => {
            context.free_spare();
            allocate()
        }
        result => result,
    }
}
