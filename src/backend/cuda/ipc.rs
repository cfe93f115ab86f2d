//! Memory that several processes share and devices address: host memory that each process
//! registers, and device memory that one process exports (CUDA IPC).

use std::ffi::{c_char, c_uint};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::Context;
use crate::backend::reclaim::{defer, Reclaim};
use crate::backend::{ImportLock, Mapping, Memfd};

/// Host memory shared with other processes, page-locked and mapped for every device of this
/// process.
#[derive(Debug)]
pub(crate) struct Registered {
    context: Arc<Context>,
    /// `None` only during the drop.
    memfd: Option<Memfd>,
    /// Address for devices.
    address: u64,
}

impl Registered {
    pub(crate) fn new(context: &Arc<Context>, memfd: Memfd) -> Result<Self, Failed> {
        let _bound = context.bind()?;
        let start = memfd.address() as *mut _;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // An empty memfd has one byte mapped.
        let bytes = memfd.bytes().max(1);
        // SAFETY: mapped with this size until it is unregistered.
        unsafe { call!(cuMemHostRegister_v2(start, bytes, flags)) }?;
        let mut registered =
            Registered { context: context.clone(), memfd: Some(memfd), address: 0 };
        // SAFETY: registered for devices above.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut registered.address, start, 0)) }?;
        Ok(registered)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Waits until all work that the device has been given so far has written the memory.
    pub(crate) fn wait_for_device(&self) -> Result<(), Failed> {
        self.context.wait_for_all()
    }

    pub(crate) fn memfd(&self) -> &Memfd {
        self.memfd.as_ref().expect("until it is dropped")
    }

    pub(crate) fn memfd_mut(&mut self) -> &mut Memfd {
        self.memfd.as_mut().expect("until it is dropped")
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(memfd) = self.memfd.take() {
            let what = What::Registered(memfd.into_mapping());
            defer(DeferredFree { context: self.context.clone(), what });
        }
    }
}

/// Export of device memory: the IPC handle, and the lock that its importers hold.
#[derive(Debug)]
pub(super) struct IpcExport {
    handle: sys::CUipcMemHandle,
    lock: ImportLock,
}

impl IpcExport {
    /// Allocation unit of the driver in bytes. The driver exports whole units, with all their
    /// contents.
    pub(super) const BLOCK: usize = 2 << 20;

    pub(super) fn new(context: &Context, address: u64) -> Result<IpcExport, String> {
        let (mut handle, lock) = (sys::CUipcMemHandle { reserved: [0; 64] }, ImportLock::new()?);
        let _bound = context.bind()?;
        // SAFETY: the start of an allocation of this context.
        unsafe { call!(cuIpcGetMemHandle(&mut handle, address)) }?;
        Ok(IpcExport { handle, lock })
    }

    /// Handle and file for importers.
    pub(super) fn handle(&self) -> (Vec<u8>, BorrowedFd<'_>) {
        (self.handle.reserved.map(|byte| byte as u8).to_vec(), self.lock.file())
    }

    /// Frees the memory as soon as no process has it open. A rank that was stopped during a failed
    /// average may still write to it when it resumes.
    pub(super) fn free_when_unused(self, context: &Arc<Context>, address: u64) {
        let what = What::IpcExport(address, self.lock);
        defer(DeferredFree { context: context.clone(), what });
    }
}

/// Device memory that another process has exported.
#[derive(Debug)]
pub(crate) struct IpcImport {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    /// `None` only during the drop.
    lock: Option<ImportLock>,
}

impl IpcImport {
    /// Opens memory of another process, of at least `bytes` bytes. Drivers do not open exports of
    /// this process itself.
    pub(crate) fn open(
        context: &Arc<Context>,
        handle: &[u8],
        file: OwnedFd,
        bytes: usize,
    ) -> Result<Self, String> {
        let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
        if handle.len() != raw.reserved.len() {
            return Err(format!("the handle has {} bytes instead of 64", handle.len()));
        }
        raw.reserved.iter_mut().zip(handle).for_each(|(raw, byte)| *raw = *byte as c_char);
        let lock = Some(ImportLock::take(file)?);
        let _bound = context.bind()?;
        let (mut address, mut base, mut found) = (0, 0, 0);
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        // SAFETY: the context is bound; an invalid handle is an error.
        unsafe { call!(cuIpcOpenMemHandle_v2(&mut address, raw, flags)) }?;
        let import = IpcImport { context: context.clone(), address, bytes, lock };
        // SAFETY: an address of this context.
        unsafe { call!(cuMemGetAddressRange_v2(&mut base, &mut found, address)) }?;
        let room = (base + found as u64).saturating_sub(address);
        match room < bytes as u64 {
            true => Err(format!("the memory has {room} bytes, but {bytes} are needed")),
            false => Ok(import),
        }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for IpcImport {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take() {
            let what = What::IpcImport { address: self.address, _lock: lock };
            defer(DeferredFree { context: self.context.clone(), what });
        }
    }
}

/// Memory that this process no longer uses and that other processes may have open.
#[derive(Debug)]
struct DeferredFree {
    context: Arc<Context>,
    what: What,
}

#[derive(Debug)]
enum What {
    /// Unregistered, then unmapped.
    Registered(Mapping),
    /// Closed; then its lock is released.
    IpcImport {
        address: u64,
        _lock: ImportLock,
    },
    IpcExport(u64, ImportLock),
}

impl Reclaim for DeferredFree {
    /// False if another process still has the memory open.
    fn try_reclaim(&self) -> bool {
        // The device is lost, and all its memory with it.
        let Ok(_bound) = self.context.bind() else { return true };
        // SAFETY: created by this process in this context, and no longer used by its kernels. An
        // error leaves nothing to do.
        unsafe {
            let _ = match &self.what {
                What::Registered(mapping) => {
                    call!(cuMemHostUnregister(mapping.address() as *mut _))
                }
                What::IpcImport { address, .. } => call!(cuIpcCloseMemHandle(*address)),
                What::IpcExport(_, lock) if !lock.end() => return false,
                What::IpcExport(address, _) => call!(cuMemFree_v2(*address)),
            };
        }
        true
    }
}
