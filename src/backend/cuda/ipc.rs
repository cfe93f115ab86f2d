//! Memory that processes share and devices address: the host's, registered by each of them, and a
//! device's, lent by the process that allocated it (CUDA IPC).

use std::ffi::{c_char, c_uint};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::running::defer;
use super::Context;
use crate::backend::{ImportLock, Mapping, Memfd};

/// Memory of the host that other processes have, too, page-locked here and mapped for every device
/// of this one.
#[derive(Debug)]
pub(crate) struct Registered {
    context: Arc<Context>,
    /// Until it is dropped.
    shared: Option<Memfd>,
    /// As devices know it.
    address: u64,
}

impl Registered {
    pub(crate) fn new(context: &Arc<Context>, shared: Memfd) -> Result<Self, Failed> {
        let _bound = context.bind()?;
        let start = shared.address() as *mut _;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: mapped with this size, and it stays so until it is unregistered.
        unsafe { call!(cuMemHostRegister_v2(start, shared.bytes(), flags)) }?;
        let mut registered =
            Registered { context: context.clone(), shared: Some(shared), address: 0 };
        // SAFETY: registered for devices just now.
        unsafe { call!(cuMemHostGetDevicePointer_v2(&mut registered.address, start, 0)) }?;
        Ok(registered)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn shared(&self) -> &Memfd {
        self.shared.as_ref().expect("until it is dropped")
    }

    pub(crate) fn shared_mut(&mut self) -> &mut Memfd {
        self.shared.as_mut().expect("until it is dropped")
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.take() {
            let what = What::Registered(shared.into_mapping());
            defer(DeferredFree { context: self.context.clone(), what });
        }
    }
}

/// What goes with memory that other processes may open.
#[derive(Debug)]
pub(super) struct IpcExport {
    handle: sys::CUipcMemHandle,
    lease: ImportLock,
}

impl IpcExport {
    /// Drivers lend whole blocks of this size, with all that is in them.
    pub(super) const BLOCK: usize = 2 << 20;

    pub(super) fn new(context: &Context, address: u64) -> Result<IpcExport, String> {
        let (mut handle, lease) = (sys::CUipcMemHandle { reserved: [0; 64] }, ImportLock::new()?);
        let _bound = context.bind()?;
        // SAFETY: the start of memory of this context.
        unsafe { call!(cuIpcGetMemHandle(&mut handle, address)) }?;
        Ok(IpcExport { handle, lease })
    }

    /// What others open the memory by.
    pub(super) fn offer(&self) -> (Vec<u8>, BorrowedFd<'_>) {
        (self.handle.reserved.map(|byte| byte as u8).to_vec(), self.lease.file())
    }

    /// Its memory goes when nobody has it open any more: who was stopped in an average that others
    /// gave up writes there when it goes on.
    pub(super) fn end(self, context: &Arc<Context>, address: u64) {
        let what = What::Lent(address, self.lease);
        defer(DeferredFree { context: context.clone(), what });
    }
}

/// Memory of another process's device, or of this one's that another process allocated.
#[derive(Debug)]
pub(crate) struct IpcImport {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    /// Until it is dropped.
    lease: Option<ImportLock>,
}

impl IpcImport {
    /// What another process offers, of so many bytes. Drivers open nothing that is this process's
    /// own.
    pub(crate) fn open(
        context: &Arc<Context>,
        handle: &[u8],
        file: OwnedFd,
        bytes: usize,
    ) -> Result<Self, String> {
        let mut raw = sys::CUipcMemHandle { reserved: [0; 64] };
        if handle.len() != raw.reserved.len() {
            return Err(format!("a handle of {} bytes", handle.len()));
        }
        raw.reserved.iter_mut().zip(handle).for_each(|(raw, byte)| *raw = *byte as c_char);
        let lease = Some(ImportLock::take(file)?);
        let _bound = context.bind()?;
        let (mut address, mut base, mut found) = (0, 0, 0);
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        // SAFETY: the context is bound; a handle that is none is an error.
        unsafe { call!(cuIpcOpenMemHandle_v2(&mut address, raw, flags)) }?;
        let borrowed = IpcImport { context: context.clone(), address, bytes, lease };
        // SAFETY: an address of this context's.
        unsafe { call!(cuMemGetAddressRange_v2(&mut base, &mut found, address)) }?;
        let room = (base + found as u64).saturating_sub(address);
        match room < bytes as u64 {
            true => Err(format!("it has {room} bytes, where {bytes} are needed")),
            false => Ok(borrowed),
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
        if let Some(lease) = self.lease.take() {
            let what = What::IpcImport { address: self.address, _lease: lease };
            defer(DeferredFree { context: self.context.clone(), what });
        }
    }
}

/// Memory that this process does not use any more, and that other processes had or have.
#[derive(Debug)]
pub(super) struct DeferredFree {
    context: Arc<Context>,
    what: What,
}

#[derive(Debug)]
enum What {
    /// Unmapped afterwards.
    Registered(Mapping),
    /// Its lease ends afterwards.
    IpcImport {
        address: u64,
        _lease: ImportLock,
    },
    Lent(u64, ImportLock),
}

impl DeferredFree {
    /// Gives it back, unless a process that it is lent to still has it open. Waits for kernels.
    pub(super) fn give_back(&self) -> bool {
        // the device is lost, and all with it
        let Ok(_bound) = self.context.bind() else { return true };
        // SAFETY: made by this process
        // in this context, and used by
        // none of its kernels any more.
        // An error leaves nothing to do.
        unsafe {
            let _ = match &self.what {
                What::Registered(mapping) => {
                    call!(cuMemHostUnregister(mapping.address() as *mut _))
                }
                What::IpcImport { address, .. } => call!(cuIpcCloseMemHandle(*address)),
                What::Lent(_, lease) if !lease.end() => return false,
                What::Lent(address, _) => call!(cuMemFree_v2(*address)),
            };
        }
        true
    }
}
