//! An opened device: its primary context, which it shares with the application, and the loaded
//! kernels.

use std::collections::BTreeMap;
use std::ffi::{c_int, CString};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use super::driver::{self, call, Failed};
use super::launch::THREADS;
use crate::backend::reclaim::{register_spare, Reclaim};
use crate::sync::lock;

/// Names of the kernels, indexed by `PaKernel`.
const KERNELS: [&str; 17] = [
    "pa_direct",
    "pa_ring",
    "pa_ring_commit",
    "pa_scan",
    "pa_direct_step",
    "pa_ring_step",
    "pa_ring_mix",
    "pa_anchor",
    "pa_sample",
    "pa_compare",
    "pa_snapshot",
    "pa_apply",
    "pa_direct_delta",
    "pa_ring_int8",
    "pa_ring_bf16",
    "pa_reference",
    "pa_ring_vote",
];
/// Name of the kernel that tests peer access.
const PROBE: &str = "pa_probe";

/// A device with loaded kernels. One exists per device and process, for the life of the process:
/// unloading waits for every kernel on the device, and one of them may be an average of another
/// world that waits for the calling thread.
#[derive(Debug)]
pub(crate) struct Context {
    ordinal: usize,
    device: sys::CUdevice,
    raw: sys::CUcontext,
    module: sys::CUmodule,
    kernels: [sys::CUfunction; KERNELS.len()],
    probe: sys::CUfunction,
    /// Stream for copies while kernels run. It does not wait for the null stream.
    side: sys::CUstream,
    /// Blocks that can be resident at once, the minimum over all kernels.
    resident: u32,
    /// Unused memory, kept while this process has an averager on any device. Freeing it waits for
    /// every kernel on the device, and one of them may be an average that waits for the calling
    /// rank.
    spare: Mutex<Spare>,
}

/// Device memory and page-locked memory, each as (bytes, address).
#[derive(Debug, Default)]
pub(super) struct Spare {
    pub(super) device: Vec<(usize, u64)>,
    pub(super) pinned: Vec<(usize, u64)>,
}

// SAFETY: handles, which the driver allows on every thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens a device. An error says why it can't be used.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Context>, String> {
        static OPENED: Mutex<BTreeMap<usize, Arc<Context>>> = Mutex::new(BTreeMap::new());
        let mut open = lock(&OPENED);
        if let Some(context) = open.get(&ordinal) {
            return Ok(context.clone());
        }
        let context = Arc::new(Context::new(ordinal)?);
        open.insert(ordinal, context.clone());
        register_spare(context.clone());
        Ok(context)
    }

    fn new(ordinal: usize) -> Result<Context, String> {
        let fatbin = super::fatbin()?;
        let driver = driver::get()?;
        if ordinal >= driver.devices {
            return Err(format!(
                "this process has {} CUDA devices, numbered from 0",
                driver.devices
            ));
        }
        let mut context = Context {
            ordinal,
            device: 0,
            raw: null_mut(),
            module: null_mut(),
            kernels: [null_mut(); KERNELS.len()],
            probe: null_mut(),
            side: null_mut(),
            resident: 0,
            spare: Mutex::default(),
        };
        // SAFETY: the driver is loaded, and the pointers are valid.
        unsafe {
            call!(cuDeviceGet(&mut context.device, ordinal as c_int))?;
            call!(cuDevicePrimaryCtxRetain(&mut context.raw, context.device))?;
        }
        context.load(driver, fatbin)?;
        Ok(context)
    }

    fn load(&mut self, driver: driver::Driver, fatbin: &[u8]) -> Result<(), String> {
        let _bound = bind(self.raw)?;
        let context = self;
        // SAFETY: the context is bound; every handle is stored in a field of its type, and the drop
        // releases those created.
        unsafe {
            let (major, minor) = (
                context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            );
            call!(cuModuleLoadData(&mut context.module, fatbin.as_ptr().cast())).map_err(
                |error| {
                    format!(
                    "the driver, which supports CUDA {}, can't load the kernels for a device of \
                        compute capability {major}.{minor}: {error}; update the driver, or build \
                        with CUDA_COMPUTE_CAP={major}{minor} and an nvcc that is not newer than \
                        the driver",
                    driver.version()
                )
                },
            )?;
            let processors =
                context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let mut fit = c_int::MAX;
            let module = context.module;
            let find = |kernel: &mut sys::CUfunction, name| {
                let name = CString::new(name).expect("no zero in it");
                call!(cuModuleGetFunction(kernel, module, name.as_ptr()))
            };
            find(&mut context.probe, PROBE)?;
            for (kernel, name) in context.kernels.iter_mut().zip(KERNELS) {
                find(kernel, name)?;
                let mut blocks = 0;
                let threads = THREADS as c_int;
                call!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    &mut blocks,
                    *kernel,
                    threads,
                    0
                ))?;
                fit = fit.min(blocks);
            }
            context.resident = (fit * processors).max(0) as u32;
            call!(cuStreamCreate(
                &mut context.side,
                sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32
            ))?;
        }
        Ok(())
    }

    /// Number of blocks of [`THREADS`] threads that averages may have on the device at once: half
    /// of what fits, so that no average needs a device on which nothing else runs.
    pub(crate) fn usable_blocks(&self) -> u32 {
        #[cfg(feature = "__testing")]
        if super::former::is_asked_for() {
            return self.resident;
        }
        self.resident / 2
    }

    /// True if streams of this device can wait for words in memory.
    pub(crate) fn has_stream_waits(&self) -> bool {
        const CAN_USE_STREAM_MEM_OPS: i32 = 92; // has another name in some versions of CUDA
        driver::get().is_ok_and(|driver| driver.attribute(CAN_USE_STREAM_MEM_OPS, self.device) == 1)
    }

    /// True if kernels of different processes run at the same time on this device (MPS).
    pub(crate) fn has_mps(&self) -> bool {
        const MPS_ENABLED: i32 = 133; // of CUDA 12.4 and later
        driver::get().is_ok_and(|driver| driver.attribute(MPS_ENABLED, self.device) == 1)
    }

    /// True if the driver ends kernels that run for seconds, since the device has a display.
    pub(super) fn ends_long_kernels(&self) -> bool {
        self.attribute(Attribute::CU_DEVICE_ATTRIBUTE_KERNEL_EXEC_TIMEOUT).is_ok_and(|is| is != 0)
    }

    /// Makes the context current on this thread until the result is dropped.
    pub(super) fn bind(&self) -> Result<Bound, Failed> {
        bind(self.raw)
    }

    /// Runs `f`, which calls another library, with the context current on this thread.
    #[cfg(feature = "nccl")]
    pub(crate) fn bound<T>(&self, f: impl FnOnce() -> T) -> Result<T, Failed> {
        let _bound = self.bind()?;
        Ok(f())
    }

    /// Index of the device in this process.
    pub(crate) fn ordinal(&self) -> usize {
        self.ordinal
    }

    pub(super) fn device(&self) -> sys::CUdevice {
        self.device
    }

    pub(super) fn raw(&self) -> sys::CUcontext {
        self.raw
    }

    pub(super) fn probe(&self) -> sys::CUfunction {
        self.probe
    }

    pub(super) fn kernel(&self, kernel: u32) -> sys::CUfunction {
        self.kernels[kernel as usize]
    }

    /// Enqueues work on a stream that waits for no other stream, and waits for it.
    pub(super) fn on_the_side(
        &self,
        f: impl FnOnce(sys::CUstream) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let _bound = self.bind()?;
        f(self.side)?;
        // SAFETY: the context's own stream.
        unsafe { call!(cuStreamSynchronize(self.side)) }
    }

    /// Waits for all work that the device has been given so far.
    pub(crate) fn wait_for_all(&self) -> Result<(), Failed> {
        let _bound = self.bind()?;
        // SAFETY: no argument.
        unsafe { call!(cuCtxSynchronize()) }
    }

    /// Reads bytes after all work that the device has been given so far.
    ///
    /// # Safety
    /// The bytes are in memory of the device that stays allocated.
    pub(crate) unsafe fn read_behind_all(&self, from: u64, to: &mut [u8]) -> Result<(), Failed> {
        self.wait_for_all()?;
        self.on_the_side(|stream| {
            // SAFETY: the caller's promise; `to` outlives the copy, which is waited for.
            unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream)) }
        })
    }

    pub(super) fn spare(&self) -> MutexGuard<'_, Spare> {
        lock(&self.spare)
    }

    /// Frees unused memory. Waits for kernels.
    pub(super) fn free_spare(&self) {
        let spare = std::mem::take(&mut *self.spare());
        if spare.device.is_empty() && spare.pinned.is_empty() {
            return;
        }
        let Ok(_bound) = self.bind() else { return };
        for (_, address) in spare.device {
            // SAFETY: allocated by `memory`, and no longer used. An error leaves nothing to do.
            let _ = unsafe { call!(cuMemFree_v2(address)) };
        }
        for (_, address) in spare.pinned {
            // SAFETY: as above.
            let _ = unsafe { call!(cuMemFreeHost(address as *mut _)) };
        }
    }

    pub(super) fn attribute(&self, attribute: Attribute) -> Result<c_int, Failed> {
        let mut value = 0;
        // SAFETY: a device of this driver.
        unsafe { call!(cuDeviceGetAttribute(&mut value, attribute, self.device)) }?;
        Ok(value)
    }

    /// True if the address is in memory of this device.
    pub(crate) fn owns(&self, address: u64) -> bool {
        let Ok(_bound) = self.bind() else { return false };
        let mut ordinal: c_int = -1;
        let ordinal_of = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        let mut kind = 0u32;
        let kind_of = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // SAFETY: the attributes have these types. An unknown address is an error and not a fault.
        let known = unsafe {
            call!(cuPointerGetAttribute((&raw mut ordinal).cast(), ordinal_of, address)).is_ok()
                && call!(cuPointerGetAttribute((&raw mut kind).cast(), kind_of, address)).is_ok()
        };
        known
            && ordinal == self.ordinal as c_int
            && kind == sys::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.raw.is_null() {
            return;
        }
        // SAFETY: created by `new`, which then failed, unless null. An error leaves nothing to do.
        unsafe {
            if let Ok(_bound) = self.bind() {
                if !self.side.is_null() {
                    let _ = call!(cuStreamDestroy_v2(self.side));
                }
                if !self.module.is_null() {
                    let _ = call!(cuModuleUnload(self.module));
                }
            }
            let _ = call!(cuDevicePrimaryCtxRelease_v2(self.device));
        }
    }
}

/// The spare memory of the device.
impl Reclaim for Context {
    fn try_reclaim(&self) -> bool {
        self.free_spare();
        true
    }
}

/// Keeps a context current on this thread, and restores the previous one, which is the
/// application's. Also relaxes the capture mode, so that this thread may allocate and wait while
/// another thread captures a CUDA graph. Only work on the captured stream itself becomes part of a
/// graph.
pub(super) struct Bound {
    mode: sys::CUstreamCaptureMode,
    of_this_thread: PhantomData<*const ()>,
}

fn bind(context: sys::CUcontext) -> Result<Bound, Failed> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the caller has retained the context; the capture mode is swapped with the previous
    // one.
    unsafe {
        call!(cuCtxPushCurrent_v2(context))?;
        if let Err(failed) = call!(cuThreadExchangeStreamCaptureMode(&mut mode)) {
            let _ = call!(cuCtxPopCurrent_v2(&mut null_mut()));
            return Err(failed);
        }
    }
    Ok(Bound { mode, of_this_thread: PhantomData })
}

impl Drop for Bound {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: `bind` has pushed the context and swapped the mode. An error leaves nothing to
        // do.
        unsafe {
            let _ = call!(cuThreadExchangeStreamCaptureMode(&mut self.mode));
            let _ = call!(cuCtxPopCurrent_v2(&mut popped));
        }
    }
}
