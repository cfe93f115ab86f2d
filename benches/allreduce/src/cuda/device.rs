//! A rank's device, and what is made on it: memory, page-locked memory, streams and events that
//! give themselves back.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::result::{self, stream::StreamKind, DriverError};
use cudarc::driver::{sys, CudaContext};
use param_averager::{Communicator, Device};

use crate::failure::Failure;

/// The devices of this machine that the driver shows.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Their names, by ordinal.
    pub names: Vec<String>,
    /// There is no GPU: a library plays one on the CPU. Nothing that it takes is a GPU's time.
    pub simulated: bool,
    elapsed: ElapsedTime,
}

/// cuEventElapsedTime of the driver. cudarc calls its second version, and panics where the driver
/// is older than that.
type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

impl Machine {
    /// Asks the library whether it can use them before cudarc is called, which panics without a
    /// driver.
    pub fn open() -> Result<Self, Failure> {
        if let Err(error) = Communicator::from_devices(&[Device::cuda(0)]) {
            return Err(Failure::Failed(format!(
                "{error}\n\nhint: --backend cpu, the default, runs the same kernels on this \
                 machine's cores"
            )));
        }
        let failed =
            |error: DriverError| Failure::Failed(format!("the NVIDIA driver says {error}"));
        let count = CudaContext::device_count().map_err(failed)?;
        let name = |ordinal| result::device::get(ordinal).and_then(result::device::get_name);
        let names = (0..count).map(name).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let simulated = names.iter().any(|name| name.contains("cudasim"));
        Ok(Machine { names, simulated, elapsed: elapsed_time()? })
    }

    pub fn visible(&self) -> usize {
        self.names.len()
    }
}

fn elapsed_time() -> Result<ElapsedTime, Failure> {
    let names =
        if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: the driver, which is loaded already.
    let library = names.iter().find_map(|name| unsafe { libloading::Library::new(*name) }.ok());
    // SAFETY: the function has had this type since CUDA 2.
    let function = library.as_ref().and_then(|library| unsafe {
        library.get::<ElapsedTime>(b"cuEventElapsedTime\0").ok().map(|function| *function)
    });
    std::mem::forget(library); // cudarc keeps it loaded, too
    function.ok_or_else(|| {
        Failure::Failed(
            "the NVIDIA driver has no cuEventElapsedTime: install a complete one".into(),
        )
    })
}

/// The device of one rank.
#[derive(Clone, Debug)]
pub struct Gpu {
    pub rank: usize,
    pub ordinal: usize,
    context: Arc<CudaContext>,
    elapsed: ElapsedTime,
    simulated: bool,
}

impl Gpu {
    pub fn open(machine: &Machine, rank: usize, ordinal: usize) -> Result<Self, Failure> {
        let context = CudaContext::new(ordinal).map_err(|error| {
            Failure::Failed(format!(
                "rank {rank} can't use cuda:{ordinal}: {error}; see what else uses it"
            ))
        })?;
        Ok(Gpu { rank, ordinal, context, elapsed: machine.elapsed, simulated: machine.simulated })
    }

    pub fn device(&self) -> Device {
        Device::cuda(self.ordinal)
    }

    /// Makes its context this thread's current one.
    pub fn bind(&self) -> Result<(), Failure> {
        self.check("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    /// Names the rank, the device and the function of a call that failed.
    pub fn check<T>(&self, function: &str, result: Result<T, DriverError>) -> Result<T, Failure> {
        result.map_err(|error| {
            let hint = match error.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    "; use a smaller -e, --scale, fewer ranks with -g, or fewer rows of --baseline"
                }
                _ => "; see what the device reports, and run again",
            };
            Failure::Failed(format!(
                "rank {}, cuda:{}: {function}: {error}{hint}",
                self.rank, self.ordinal
            ))
        })
    }

    pub fn processors(&self) -> Result<u32, Failure> {
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let count = self.check("cuDeviceGetAttribute", self.context.attribute(attribute))?;
        Ok(count.max(1) as u32)
    }
}

/// Memory of a device. Not of a pool, which peers could not be given access to.
#[derive(Debug)]
pub struct DeviceMemory {
    gpu: Gpu,
    address: u64,
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

    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns when it is done. No kernel uses it.
    pub fn zero(&self) -> Result<(), Failure> {
        self.gpu.bind()?;
        // SAFETY: own memory, of this size.
        self.gpu
            .check("cuMemsetD8", unsafe { result::memset_d8_sync(self.address, 0, self.bytes) })?;
        // It may return earlier.
        self.gpu.check("cuCtxSynchronize", result::ctx::synchronize())
    }

    /// Copies from its start. Returns when it is done; no kernel uses it.
    pub fn upload(&self, from: &[u8]) -> Result<(), Failure> {
        self.gpu.bind()?;
        let from = &from[..from.len().min(self.bytes)];
        // SAFETY: not more than there is.
        self.gpu.check("cuMemcpyHtoD", unsafe { result::memcpy_htod_sync(self.address, from) })
    }

    /// As `upload`, in the other direction.
    pub fn download(&self, to: &mut [u8]) -> Result<(), Failure> {
        self.gpu.bind()?;
        let bytes = to.len().min(self.bytes);
        // SAFETY: not more than there is.
        self.gpu.check("cuMemcpyDtoH", unsafe {
            result::memcpy_dtoh_sync(&mut to[..bytes], self.address)
        })
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

/// Page-locked memory of the host.
#[derive(Debug)]
pub struct Pinned {
    gpu: Gpu,
    pub start: *mut c_void,
    pub bytes: usize,
}

// SAFETY: plain memory, which only copies that a stream orders touch.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self, Failure> {
        gpu.bind()?;
        let bytes = bytes.max(1);
        // SAFETY: a context is bound, and the size is not 0.
        let start = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let start = gpu.check("cuMemHostAlloc", start)?;
        // SAFETY: allocated with this size. Copies read it.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { gpu: gpu.clone(), start, bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `new`. An error leaves nothing to do.
            let _ = unsafe { result::free_host(self.start) };
        }
    }
}

/// A stream of the non-blocking kind.
#[derive(Debug)]
pub struct Stream {
    gpu: Gpu,
    pub raw: sys::CUstream,
}

impl Stream {
    pub fn new(gpu: &Gpu) -> Result<Self, Failure> {
        gpu.bind()?;
        let raw = gpu.check("cuStreamCreate", result::stream::create(StreamKind::NonBlocking))?;
        Ok(Stream { gpu: gpu.clone(), raw })
    }

    /// What it is given later comes after what `other` was given before.
    pub fn follow(&self, other: &Stream, mark: &Event) -> Result<(), Failure> {
        mark.record(other)?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: a stream and an event that live.
        self.gpu.check("cuStreamWaitEvent", unsafe {
            result::stream::wait_event(self.raw, mark.raw, flags)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made by `new`. An error leaves nothing to do.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A moment on a stream.
#[derive(Debug)]
pub struct Event {
    gpu: Gpu,
    raw: sys::CUevent,
}

impl Event {
    pub fn new(gpu: &Gpu) -> Result<Self, Failure> {
        gpu.bind()?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let raw = gpu.check("cuEventCreate", result::event::create(flags))?;
        Ok(Event { gpu: gpu.clone(), raw })
    }

    pub fn record(&self, stream: &Stream) -> Result<(), Failure> {
        // SAFETY: an event and a stream that live.
        self.gpu.check("cuEventRecord", unsafe { result::event::record(self.raw, stream.raw) })
    }

    /// Waits for it.
    pub fn wait(&self) -> Result<(), Failure> {
        // SAFETY: an event that lives.
        self.gpu.check("cuEventSynchronize", unsafe { result::event::synchronize(self.raw) })
    }

    /// Whether it has come.
    pub fn is_done(&self) -> Result<bool, Failure> {
        // SAFETY: an event that lives.
        match unsafe { result::event::query(self.raw) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            other => self.gpu.check("cuEventQuery", other).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: made by `new`. An error leaves nothing to do.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// A rank's stream with an event at each end of what is timed.
#[derive(Debug)]
pub struct Clock {
    pub stream: Stream,
    start: Event,
    pub stop: Event,
}

impl Clock {
    pub fn new(gpu: &Gpu) -> Result<Self, Failure> {
        Ok(Clock { stream: Stream::new(gpu)?, start: Event::new(gpu)?, stop: Event::new(gpu)? })
    }

    pub fn start(&self) -> Result<(), Failure> {
        self.start.record(&self.stream)
    }

    pub fn stop(&self) -> Result<(), Failure> {
        self.stop.record(&self.stream)
    }

    /// Waits for the end and says how long it took. A simulated device's time is nobody's business:
    /// 0.
    pub fn took(&self) -> Result<Option<Duration>, Failure> {
        self.stop.wait()?;
        let gpu = &self.stop.gpu;
        if gpu.simulated {
            return Ok(Some(Duration::ZERO));
        }
        let mut milliseconds = 0.0;
        // SAFETY: two events of one context, recorded and over.
        let result = unsafe { (gpu.elapsed)(&mut milliseconds, self.start.raw, self.stop.raw) };
        gpu.check("cuEventElapsedTime", result.result())?;
        Ok(Some(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3)))
    }
}
