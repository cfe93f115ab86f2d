//! Access of devices to a trainer's tensors on another device, for the direct average.

use std::ffi::c_int;

use cudarc::driver::sys::{
    self, CUmemAccess_flags as Access, CUmemLocation, CUpointer_attribute as Attribute,
};

use super::driver::call;
use super::Context;

impl Context {
    /// True if these devices can read and write the memory of this device at the address. They have
    /// peer access to this device, which covers all that `cuMemAlloc` has allocated. Memory of a
    /// pool is made accessible to them: all of the pool, for good. Everything else is not theirs,
    /// such as memory that was mapped page by page (`cuMemMap`) or came from another process.
    pub(crate) fn lends(&self, address: u64, readers: &[usize]) -> bool {
        let Ok(_bound) = self.bind() else { return false };
        let mut pool: sys::CUmemoryPool = std::ptr::null_mut();
        let mut is_plain = 0u64; // wide enough for every type that the attribute has had
        let [handle, plain] = [
            Attribute::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
            Attribute::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
        ];
        // SAFETY: the attributes fit. An unknown address is an error and not a fault.
        let known = unsafe {
            call!(cuPointerGetAttribute((&raw mut pool).cast(), handle, address)).is_ok()
                && call!(cuPointerGetAttribute((&raw mut is_plain).cast(), plain, address)).is_ok()
        };
        known && (is_plain != 0 || (!pool.is_null() && readers.iter().all(|&to| share(pool, to))))
    }
}

/// Makes a pool accessible to a device, unless it is. False if the driver refuses.
fn share(pool: sys::CUmemoryPool, reader: usize) -> bool {
    let mut flags = Access::CU_MEM_ACCESS_FLAGS_PROT_NONE;
    let mut location = device(reader);
    // SAFETY: the pool of memory that the caller borrows, and a device of this driver.
    unsafe {
        if call!(cuMemPoolGetAccess(&mut flags, pool, &mut location)).is_err() {
            return false;
        }
        let whole = Access::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let wanted = sys::CUmemAccessDesc { location, flags: whole };
        flags == whole || call!(cuMemPoolSetAccess(pool, &wanted, 1)).is_ok()
    }
}

/// Memory of a device, as a location.
fn device(ordinal: usize) -> CUmemLocation {
    const DEVICE: c_int = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as c_int;
    // SAFETY: its kind and its number; newer bindings have the number in a union.
    unsafe { std::mem::transmute::<[c_int; 2], CUmemLocation>([DEVICE, ordinal as c_int]) }
}
