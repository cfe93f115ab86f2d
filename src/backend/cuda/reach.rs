//! Access of devices to a trainer's tensors on another device, for the direct average.

use std::ffi::c_int;

use cudarc::driver::sys::{
    self, CUmemAccess_flags as Access, CUmemLocation, CUpointer_attribute as Of,
};

use super::driver::call;
use super::Context;

impl Context {
    /// True if these devices can read and write the memory of this device at the address. They have
    /// peer access to this context, which covers all that `cuMemAlloc` has allocated in it. Memory
    /// of a pool is made accessible to them: all of the pool, for good. No other memory is theirs,
    /// such as pages of `cuMemMap`, or what another context or process has allocated. `shared`: the
    /// pool that was made accessible last, which is not asked again.
    pub(crate) fn lends(&self, address: u64, readers: &[usize], shared: &mut u64) -> bool {
        let Ok(_bound) = self.bind() else { return false };
        // SAFETY: a pointer, whatever the address.
        let pool: Option<u64> =
            unsafe { attribute(Of::CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, address) };
        if let Some(pool) = pool.filter(|&pool| pool != 0) {
            let is_shared = pool == *shared || readers.iter().all(|&reader| share(pool, reader));
            if is_shared {
                *shared = pool;
            }
            return is_shared;
        }
        // SAFETY: a pointer, and a truth value of at most 64 bits in all versions.
        let [context, is_plain] = unsafe {
            [Of::CU_POINTER_ATTRIBUTE_CONTEXT, Of::CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE]
                .map(|of| attribute(of, address))
        };
        context == Some(self.raw() as u64) && is_plain.is_some_and(|plain| plain != 0)
    }
}

/// An attribute of an address. `None` if the driver does not know it.
///
/// # Safety
/// The attribute has at most 64 bits.
unsafe fn attribute(of: Of, address: u64) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: the attribute fits. An unknown address is an error and not a fault.
    unsafe { call!(cuPointerGetAttribute((&raw mut value).cast(), of, address)) }.ok()?;
    Some(value)
}

/// Makes a pool accessible to a device, unless it is. False if the driver refuses.
fn share(pool: u64, reader: usize) -> bool {
    let pool = pool as sys::CUmemoryPool;
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
