//! The NVIDIA driver: loading, version check and errors.

use std::ffi::{c_int, CStr};
use std::sync::OnceLock;

use cudarc::driver::sys::CUresult;

/// Declares the driver functions that this crate calls: `api`, through which `call!` reaches them,
/// and `FUNCTIONS`, their names. cudarc panics at the first call of a missing function, so `find`
/// looks up all of them before. A call of a function that is not declared does not compile.
macro_rules! driver_api {
    ($($function:ident),* $(,)?) => {
        pub(crate) mod api {
            // Off Linux, CUDA IPC and meetings in streams are not used. On Linux an unused
            // declaration is a warning.
            #[cfg_attr(not(processes), allow(unused_imports))]
            pub(crate) use cudarc::driver::sys::{$($function),*};
        }
        const FUNCTIONS: &[&str] = &[$(stringify!($function)),*];
    };
}

driver_api! {
    cuInit,
    cuDriverGetVersion,
    cuGetErrorName,
    cuGetErrorString,
    cuDeviceGet,
    cuDeviceGetCount,
    cuDeviceGetAttribute,
    cuDeviceGetName,
    cuDeviceTotalMem_v2,
    cuDeviceGetPCIBusId,
    cuDeviceGetUuid_v2,
    cuDeviceCanAccessPeer,
    cuDeviceGetP2PAttribute,
    cuDevicePrimaryCtxRetain,
    cuDevicePrimaryCtxRelease_v2,
    cuCtxPushCurrent_v2,
    cuCtxPopCurrent_v2,
    cuCtxSynchronize,
    cuCtxEnablePeerAccess,
    cuCtxDisablePeerAccess,
    cuModuleLoadData,
    cuModuleUnload,
    cuModuleGetFunction,
    cuOccupancyMaxActiveBlocksPerMultiprocessor,
    cuLaunchKernel,
    cuStreamCreate,
    cuStreamCreateWithPriority,
    cuCtxGetStreamPriorityRange,
    cuStreamDestroy_v2,
    cuStreamSynchronize,
    cuStreamWaitEvent,
    cuStreamIsCapturing,
    cuStreamWriteValue32_v2,
    cuStreamWaitValue32_v2,
    cuThreadExchangeStreamCaptureMode,
    cuEventCreate,
    cuEventDestroy_v2,
    cuEventRecord,
    cuEventQuery,
    cuEventSynchronize,
    cuMemAlloc_v2,
    cuMemFree_v2,
    cuMemHostAlloc,
    cuMemFreeHost,
    cuMemHostRegister_v2,
    cuMemHostGetDevicePointer_v2,
    cuMemHostUnregister,
    cuMemGetAddressRange_v2,
    cuIpcGetMemHandle,
    cuIpcOpenMemHandle_v2,
    cuIpcCloseMemHandle,
    cuMemsetD8Async,
    cuMemcpyHtoDAsync_v2,
    cuMemcpyDtoHAsync_v2,
    cuMemcpyDtoDAsync_v2,
    cuPointerGetAttribute,
    cuMemPoolGetAccess,
    cuMemPoolSetAccess,
}

/// An NVIDIA driver that has been initialised.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver {
    /// The CUDA version that the driver supports, as 1000 · major + 10 · minor.
    version: i32,
    /// Number of devices visible to this process.
    pub(crate) devices: usize,
    /// `cuDeviceGetAttribute` by number.
    attribute: AttributeByNumber,
}

type AttributeByNumber = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> CUresult;

impl Driver {
    /// The CUDA version that the driver supports, such as 13.0.
    pub(crate) fn version(&self) -> String {
        format!("{}.{}", self.version / 1000, self.version % 1000 / 10)
    }

    /// An attribute of a device that not every version of CUDA has a name for. 0 if the driver does
    /// not know it.
    pub(crate) fn attribute(&self, number: i32, device: i32) -> i32 {
        let mut value = 0;
        // SAFETY: a function of the loaded driver, which checks its arguments.
        match unsafe { (self.attribute)(&mut value, number, device) } {
            CUresult::CUDA_SUCCESS => value,
            _ => 0,
        }
    }
}

/// The driver, or the reason why it can't be used and what to do. Looked up once.
pub(crate) fn get() -> Result<Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    DRIVER.get_or_init(find).clone()
}

fn find() -> Result<Driver, String> {
    let names =
        if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so", "libcuda.so.1"] };
    // SAFETY: loading the driver runs its initialisers, as in every CUDA program.
    let library = names.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    let Some(library) = library else {
        return Err(format!(
            "no NVIDIA driver: neither {} nor {} could be loaded; install the driver, or use \
             Device::cpu()",
            names[0], names[1]
        ));
    };
    for &function in FUNCTIONS {
        // SAFETY: the symbol is not used, only its presence checked.
        if unsafe { library.get::<*const ()>(function.as_bytes()) }.is_err() {
            return Err(format!("the NVIDIA driver is too old: it has no {function}; update it"));
        }
    }
    // SAFETY: its signature, where an enumeration of C is an int.
    let attribute = unsafe { library.get::<AttributeByNumber>(b"cuDeviceGetAttribute") };
    let attribute = *attribute.expect("it was there");
    std::mem::forget(library); // cudarc keeps it loaded, too
    let (mut version, mut devices) = (0, 0);
    // SAFETY: the functions exist, and the pointers are valid.
    unsafe {
        check("cuInit", api::cuInit(0)).map_err(|error| match error {
            Failed { result: CUresult::CUDA_ERROR_NO_DEVICE, .. } => {
                "the NVIDIA driver finds no device: check whether CUDA_VISIBLE_DEVICES hides it"
                    .into()
            }
            other => other.to_string(),
        })?;
        check("cuDriverGetVersion", api::cuDriverGetVersion(&mut version))?;
        check("cuDeviceGetCount", api::cuDeviceGetCount(&mut devices))?;
    }
    Ok(Driver { version, devices: devices.max(0) as usize, attribute })
}

/// A driver call that failed.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    function: &'static str,
    pub(crate) result: CUresult,
}

impl Failed {
    /// Stands for calls that were not made since a panic came before them.
    pub(crate) fn panicked() -> Failed {
        Failed { function: "launches that a panic has ended", result: CUresult::CUDA_ERROR_UNKNOWN }
    }

    /// True if the device's work has ended by a failure: the context is lost to this process.
    pub(crate) fn is_of_lost_context(&self) -> bool {
        use CUresult::*;
        matches!(
            self.result,
            CUDA_ERROR_ILLEGAL_ADDRESS
                | CUDA_ERROR_ILLEGAL_INSTRUCTION
                | CUDA_ERROR_MISALIGNED_ADDRESS
                | CUDA_ERROR_INVALID_ADDRESS_SPACE
                | CUDA_ERROR_INVALID_PC
                | CUDA_ERROR_HARDWARE_STACK_ERROR
                | CUDA_ERROR_ASSERT
                | CUDA_ERROR_LAUNCH_FAILED
                | CUDA_ERROR_LAUNCH_TIMEOUT
                | CUDA_ERROR_ECC_UNCORRECTABLE
                | CUDA_ERROR_NVLINK_UNCORRECTABLE
                | CUDA_ERROR_CONTEXT_IS_DESTROYED
                | CUDA_ERROR_DEINITIALIZED
        )
    }

    /// True if a stream capture prevents the call. The call had no effect then, and the device has
    /// not failed.
    pub(crate) fn is_of_capture(&self) -> bool {
        is_of_capture(self.result)
    }
}

/// True for the errors that only stream captures cause.
pub(crate) fn is_of_capture(result: CUresult) -> bool {
    let errors = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED as u32
        ..=CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD as u32;
    errors.contains(&(result as u32)) // the range includes CUDA_ERROR_CAPTURED_EVENT
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = std::ptr::null();
        // SAFETY: the driver is loaded, since a call to it failed; it returns static strings.
        let name = unsafe {
            match api::cuGetErrorName(self.result, &mut text) {
                CUresult::CUDA_SUCCESS => CStr::from_ptr(text).to_string_lossy(),
                _ => format!("error {}", self.result as u32).into(),
            }
        };
        // SAFETY: as above.
        let meaning = unsafe {
            match api::cuGetErrorString(self.result, &mut text) {
                CUresult::CUDA_SUCCESS => CStr::from_ptr(text).to_string_lossy(),
                _ => "not known to this driver".into(),
            }
        };
        write!(f, "{}: {name} ({meaning})", self.function)
    }
}

impl From<Failed> for String {
    fn from(failed: Failed) -> String {
        failed.to_string()
    }
}

/// Turns the result of a driver call into a `Result`.
pub(crate) fn check(function: &'static str, result: CUresult) -> Result<(), Failed> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(Failed { function, result }),
    }
}

/// Calls a driver function by its name and checks the result.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        $crate::backend::cuda::driver::check(
            stringify!($function),
            $crate::backend::cuda::driver::api::$function($($argument),*),
        )
    };
}
pub(crate) use call;
