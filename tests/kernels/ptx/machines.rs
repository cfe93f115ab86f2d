//! What a machine does, and the two machines: the CPU kernels, and PTX by the driver API of the
//! libcuda that is found.

use cudarc::driver::{
    result, sys, CudaContext, CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use param_averager::__testing::abi::{
    PaArgs, PaLaunch, PA_DIRECT, PA_MAX_WORLD, PA_RING, PA_RING_COMMIT,
};
use param_averager::__testing::run_block_cpu;
use std::sync::Arc;

/// A machine that can run a world. Memory is never freed: a case is small, and its process short.
pub trait Machine {
    /// Memory of a rank that its peers can reach too, at a multiple of 128 bytes.
    fn allocate(&self, rank: usize, bytes: usize) -> u64;
    /// Memory of the host that all ranks can reach.
    fn allocate_shared(&self, bytes: usize) -> u64;
    fn write(&self, rank: usize, address: u64, bytes: &[u8]);
    fn read(&self, rank: usize, address: u64, bytes: &mut [u8]);
    /// Runs the jobs, and `meanwhile` when all have been started.
    fn run(&self, jobs: &[Job], meanwhile: &dyn Fn());
}

/// One rank's part of each launch.
pub struct Job {
    pub rank: usize,
    pub args: PaArgs,
    /// The same on all ranks.
    pub launches: Vec<Launch>,
    pub threads: u32,
}

/// A kernel, and the segments that it runs.
#[derive(Clone, Copy)]
pub struct Launch {
    pub kernel: u32,
    pub segments: (u32, u32),
}

impl Launch {
    /// A rank's arguments in this launch.
    pub fn args(self, args: &PaArgs) -> PaArgs {
        let (from_segment, to_segment) = self.segments;
        PaArgs { from_segment, to_segment, ..*args }
    }
}

/// A block is a thread.
pub struct Cpu;

impl Machine for Cpu {
    fn allocate(&self, _: usize, bytes: usize) -> u64 {
        let memory = vec![0xa5u8; bytes + 128].leak();
        (memory.as_ptr() as u64).next_multiple_of(128)
    }
    fn allocate_shared(&self, bytes: usize) -> u64 {
        self.allocate(0, bytes)
    }
    fn write(&self, _: usize, address: u64, bytes: &[u8]) {
        // SAFETY: own memory, which no job is using.
        unsafe { std::ptr::copy(bytes.as_ptr(), address as *mut u8, bytes.len()) }
    }
    fn read(&self, _: usize, address: u64, bytes: &mut [u8]) {
        // SAFETY: as above.
        unsafe { std::ptr::copy(address as *const u8, bytes.as_mut_ptr(), bytes.len()) }
    }
    fn run(&self, jobs: &[Job], meanwhile: &dyn Fn()) {
        std::thread::scope(|scope| {
            for job in jobs {
                scope.spawn(move || {
                    for launch in &job.launches {
                        let args = &launch.args(&job.args);
                        std::thread::scope(|scope| {
                            for channel in 0..args.channels {
                                // SAFETY: the case laid the memory out as kernels/abi.h says.
                                scope.spawn(move || unsafe {
                                    run_block_cpu(args, launch.kernel, channel)
                                });
                            }
                        });
                    }
                });
            }
            meanwhile();
        });
    }
}

#[repr(transparent)]
struct Args(PaLaunch);
// SAFETY: plain data, and what the kernels take by value.
unsafe impl DeviceRepr for Args {}

struct Rank {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    functions: [Option<CudaFunction>; 4], // see index()
}

/// Rank r has device r to itself, or all ranks are on device 0, each launch with the blocks of all.
pub struct Cuda {
    ranks: Vec<Rank>,
    own_devices: bool,
}

impl Cuda {
    pub fn new(fatbin: &[u8], world: usize, own_devices: bool) -> Cuda {
        let contexts: Vec<_> = (0..world)
            .map(|rank| CudaContext::new(if own_devices { rank } else { 0 }).unwrap())
            .collect();
        for (a, one) in contexts.iter().enumerate().filter(|_| own_devices) {
            one.bind_to_thread().unwrap();
            for (_, other) in contexts.iter().enumerate().filter(|&(b, _)| a != b) {
                // SAFETY: both contexts live.
                unsafe { sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) }.result().unwrap();
            }
        }
        // All is loaded before anything runs: loading may wait for running kernels.
        let mut module = None;
        let ranks = contexts.into_iter().map(|context| {
            if module.is_none() || own_devices {
                module = Some(context.load_module(Ptx::from_binary(fatbin.to_vec())).unwrap());
            }
            let names = ["pa_direct", "pa_ring", "pa_ring_commit", "pa_scan"];
            // The fatbin of a mutant holds one kernel.
            let functions = names.map(|name| module.as_ref().unwrap().load_function(name).ok());
            let stream = context.new_stream().unwrap();
            Rank { functions, context, stream }
        });
        Cuda { ranks: ranks.collect(), own_devices }
    }

    /// Launches the parts of these jobs, on the stream of the first one.
    fn launch(&self, launch: Launch, jobs: &[Job]) {
        let mut args = Args(bytemuck::Zeroable::zeroed());
        assert!(jobs.len() <= PA_MAX_WORLD as usize);
        for (to, job) in args.0.args.iter_mut().zip(jobs) {
            *to = launch.args(&job.args);
        }
        let config = LaunchConfig {
            grid_dim: (jobs[0].args.channels, jobs.len() as u32, 1),
            block_dim: (jobs[0].threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let rank = &self.ranks[jobs[0].rank];
        let function = rank.functions[index(launch.kernel)].as_ref();
        let mut builder = rank.stream.launch_builder(function.expect("the fatbin has the kernel"));
        builder.arg(&args);
        // SAFETY: the case laid the memory out as kernels/abi.h says.
        unsafe { builder.launch(config) }.unwrap();
    }

    fn bind(&self, rank: usize) {
        self.ranks[rank].context.bind_to_thread().unwrap();
    }
}

impl Machine for Cuda {
    fn allocate(&self, rank: usize, bytes: usize) -> u64 {
        self.bind(rank);
        // Not from the stream's pool, which peer access does not cover. SAFETY: a context is bound.
        unsafe { result::malloc_sync(bytes.max(1)) }.unwrap()
    }
    fn allocate_shared(&self, bytes: usize) -> u64 {
        self.bind(0);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: a context is bound.
        unsafe { result::malloc_host(bytes, flags) }.unwrap() as u64
    }
    fn write(&self, rank: usize, address: u64, bytes: &[u8]) {
        self.bind(rank);
        // SAFETY: own memory, which no kernel is using.
        unsafe { result::memcpy_htod_sync(address, bytes) }.unwrap();
    }
    fn read(&self, rank: usize, address: u64, bytes: &mut [u8]) {
        self.bind(rank);
        // SAFETY: as above.
        unsafe { result::memcpy_dtoh_sync(bytes, address) }.unwrap();
    }
    fn run(&self, jobs: &[Job], meanwhile: &dyn Fn()) {
        self.ranks.iter().for_each(|rank| rank.context.synchronize().unwrap());
        // Jobs of one device.
        for jobs in jobs.chunks(if self.own_devices { 1 } else { jobs.len() }) {
            jobs[0].launches.iter().for_each(|&launch| self.launch(launch, jobs));
        }
        meanwhile();
        jobs.iter().for_each(|job| self.ranks[job.rank].stream.synchronize().unwrap());
    }
}

/// The index of a kernel among a rank's functions.
fn index(kernel: u32) -> usize {
    match kernel {
        PA_DIRECT => 0,
        PA_RING => 1,
        PA_RING_COMMIT => 2,
        _ => 3,
    }
}
