//! A rank's device, and what cudarc's safe types leave to do: memory that peers can be given access
//! to, errors that name the rank, and the clock.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{
    result, sys, CudaContext, CudaEvent, CudaStream, DriverError, PinnedHostSlice,
};
use param_averager::{Communicator, Device};

use crate::averager::{self, Replica};
use crate::failure::Failure;
use crate::memory::Placed;

/// The devices that the driver shows.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Names, by ordinal.
    pub names: Vec<String>,
    /// There is no GPU: a library plays one on the CPU. Nothing that it takes is a GPU's time.
    pub simulated: bool,
}

impl Machine {
    pub fn open() -> Result<Self, Failure> {
        // The library looks before cudarc is called, which panics without a driver.
        if let Err(error) = Communicator::from_devices(&[Device::cuda(0)]) {
            return Err(Failure::Failed(format!(
                "{error}\n\nhint: --backend cpu, the default, runs the same kernels on this \
                 machine's cores"
            )));
        }
        let names = || (0..CudaContext::device_count()?).map(name).collect();
        let names: Result<Vec<String>, DriverError> = names();
        let names =
            names.map_err(|error| Failure::Failed(format!("the NVIDIA driver says {error}")))?;
        let simulated = names.iter().any(|name| name.contains("cudasim"));
        Ok(Machine { names, simulated })
    }

    pub fn visible(&self) -> usize {
        self.names.len()
    }
}

fn name(ordinal: i32) -> Result<String, DriverError> {
    result::device::get(ordinal).and_then(result::device::get_name)
}

/// The device of one rank.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub rank: usize,
    pub ordinal: usize,
    pub context: Arc<CudaContext>,
    simulated: bool,
}

impl Gpu {
    pub fn open(machine: &Machine, rank: usize, ordinal: usize) -> Result<Self, Failure> {
        let context = CudaContext::new(ordinal).map_err(|error| {
            Failure::Failed(format!(
                "rank {rank} can't use cuda:{ordinal}: {error}; see what else uses it"
            ))
        })?;
        Ok(Gpu { rank, ordinal, context, simulated: machine.simulated })
    }

    pub fn bind(&self) -> Result<(), Failure> {
        self.check("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    /// Names the rank and the device of what failed.
    pub fn failed(&self, what: &str) -> Failure {
        Failure::Failed(format!("rank {}, cuda:{}: {what}", self.rank, self.ordinal))
    }

    /// Names the function, too.
    pub fn check<T>(&self, function: &str, result: Result<T, DriverError>) -> Result<T, Failure> {
        result.map_err(|error| {
            let hint = match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    "use a smaller -e, --scale, fewer ranks with -g, or fewer rows of --baseline"
                }
                _ => "see what the device reports, and run again",
            };
            self.failed(&format!("{function}: {error}; {hint}"))
        })
    }

    pub fn processors(&self) -> Result<u32, Failure> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.check("cuDeviceGetAttribute", self.context.attribute(attribute))?;
        Ok(count.max(1) as u32)
    }

    /// Page-locked memory, zeroed.
    pub fn pinned(&self, bytes: usize) -> Result<PinnedHostSlice<u8>, Failure> {
        // SAFETY: set below.
        let pinned = unsafe {
            self.context.alloc_pinned_with_flags::<u8>(bytes, sys::CU_MEMHOSTALLOC_PORTABLE)
        };
        let mut pinned = self.check("cuMemHostAlloc", pinned)?;
        let start = self.check("cuEventSynchronize", pinned.as_mut_ptr())?;
        // SAFETY: allocated with this size.
        unsafe { start.write_bytes(0, bytes) };
        Ok(pinned)
    }
}

/// Memory of a device. Not a `CudaSlice`, which may lie in a pool: peers could not be given access
/// to it, and NCCL lets ranks of one process read each other's buffers.
#[derive(Debug)]
pub struct DeviceMemory {
    gpu: Gpu,
    pub address: u64,
    bytes: usize,
}

impl DeviceMemory {
    /// Zeroed.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, Failure> {
        gpu.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: a context is bound, and the size is not 0.
        let address = gpu.check("cuMemAlloc", unsafe { result::malloc_sync(bytes) })?;
        let memory = DeviceMemory { gpu: gpu.clone(), address, bytes };
        memory.zero()?;
        Ok(memory)
    }

    /// Returns when it is done. No kernel uses the memory.
    pub fn zero(&self) -> Result<(), Failure> {
        self.gpu.bind()?;
        // SAFETY: own memory, of this size.
        let set = unsafe { result::memset_d8_sync(self.address, 0, self.bytes) };
        self.gpu.check("cuMemsetD8", set)?;
        // It may return earlier.
        self.gpu.check("cuCtxSynchronize", self.gpu.context.synchronize())
    }

    /// Copies from its start. Returns when it is done; no kernel uses the memory.
    pub fn upload(&self, from: &[u8]) -> Result<(), Failure> {
        self.gpu.bind()?;
        let from = &from[..from.len().min(self.bytes)];
        // SAFETY: not more than there is.
        let copied = unsafe { result::memcpy_htod_sync(self.address, from) };
        self.gpu.check("cuMemcpyHtoD", copied)
    }

    /// As `upload`, in the other direction.
    pub fn download(&self, to: &mut [u8]) -> Result<(), Failure> {
        self.gpu.bind()?;
        let bytes = to.len().min(self.bytes);
        // SAFETY: not more than there is.
        let copied = unsafe { result::memcpy_dtoh_sync(&mut to[..bytes], self.address) };
        self.gpu.check("cuMemcpyDtoH", copied)
    }

    pub fn replica(self: &Arc<Self>, tensors: &Arc<[Placed]>) -> Replica {
        let device = Device::cuda(self.gpu.ordinal);
        Replica::new(self.address as *mut u8, tensors, device, self.clone())
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `new`. An error leaves nothing to do.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// A rank's stream with an event at each end of what is timed.
pub struct Clock {
    gpu: Gpu,
    pub stream: Arc<CudaStream>,
    start: CudaEvent,
    stop: CudaEvent,
}

impl Clock {
    /// Binds the rank's device to this thread.
    pub fn new(gpu: &Gpu) -> Result<Self, Failure> {
        gpu.bind()?;
        let stream = gpu.check("cuStreamCreate", gpu.context.new_stream())?;
        let event = || {
            let flags = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
            gpu.check("cuEventCreate", gpu.context.new_event(flags))
        };
        Ok(Clock { gpu: gpu.clone(), stream, start: event()?, stop: event()? })
    }
}

impl averager::Clock for Clock {
    fn stream(&self) -> Option<*mut c_void> {
        Some(self.stream.cu_stream().cast())
    }

    fn start(&self) -> Result<(), Failure> {
        self.gpu.check("cuEventRecord", self.start.record(&self.stream))
    }

    fn stop(&self) -> Result<(), Failure> {
        self.gpu.check("cuEventRecord", self.stop.record(&self.stream))
    }

    /// A simulated device's time means nothing: 0.
    fn took(&self) -> Result<Option<Duration>, Failure> {
        self.gpu.check("cuEventSynchronize", self.stop.synchronize())?;
        if self.gpu.simulated {
            return Ok(Some(Duration::ZERO));
        }
        let ms = self.gpu.check("cuEventElapsedTime", self.start.elapsed_ms(&self.stop))?;
        Ok(Some(Duration::from_secs_f64(f64::from(ms.max(0.0)) / 1e3)))
    }
}
