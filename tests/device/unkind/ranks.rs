//! Ranks with trainers of their own, as threads and as processes: the bodies of the scenarios.

use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::process::start_all;
use test_support::rank::join;
use test_support::{ranks_of, Random};

use crate::cuda::model::{ordinal, Model};

/// Kernels of a trainer. `hold` stays until a word in memory of the host is set.
const TRAINER: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry step(.param .u64 loss) {
  .reg .b32 %r;
  .reg .b64 %d<2>;
  ld.param.u64 %d0, [loss];
  cvta.to.global.u64 %d1, %d0;
  mov.u32 %r, 1;
  st.global.u32 [%d1], %r;
  ret;
}
.visible .entry first(.param .u64 loss) {
  .reg .b32 %r;
  .reg .b64 %d<2>;
  ld.param.u64 %d0, [loss];
  cvta.to.global.u64 %d1, %d0;
  mov.u32 %r, 2;
  st.global.u32 [%d1], %r;
  ret;
}
.visible .entry hold(.param .u64 word) {
  .reg .pred %p;
  .reg .b32 %r;
  .reg .b64 %d<2>;
  ld.param.u64 %d0, [word];
  cvta.to.global.u64 %d1, %d0;
again:
  ld.relaxed.sys.global.u32 %r, [%d1];
  setp.eq.u32 %p, %r, 0;
  @%p bra again;
  ret;
}
\0";

const ELEMENTS: usize = 40_000;
/// Variable with the timeout of the averagers in seconds, for a slot on a GPU.
const TIMEOUT: &str = "PA_UNKIND_TIMEOUT_S";
/// More launches than a launch queue holds.
const AHEAD: usize = 1100;
/// Shared memory of a block of `hold`: all that a multiprocessor has.
const HELD_BYTES: u32 = 227 << 10;

/// Action of the last rank's trainer while its peers wait for it, and options of the averages.
#[derive(Clone, Debug)]
struct Plan {
    act: String,
    algorithm: Option<Algorithm>,
    devices: Vec<usize>,
    seed: u64,
}

impl Plan {
    /// Reads `ACT ALGORITHM DEVICES [SEED]`, such as `alloc ring 0,1`.
    fn new(words: &[&str]) -> Plan {
        let [act, algorithm, devices, ..] = words else { panic!("no plan: {words:?}") };
        let algorithm = match *algorithm {
            "ring" => Some(Algorithm::Ring),
            "direct" => Some(Algorithm::Direct),
            "auto" => None,
            other => panic!("no algorithm {other}"),
        };
        let devices = devices.split(',').map(|ordinal| ordinal.parse().expect("an ordinal"));
        let seed = words.get(3).map_or(0, |seed| seed.parse().expect("a seed"));
        Plan { act: (*act).to_owned(), algorithm, devices: devices.collect(), seed }
    }
}

/// Runs a world of threads.
pub fn threads(words: &[&str]) {
    let plan = Plan::new(words);
    let devices: Vec<Device> = plan.devices.iter().copied().map(Device::cuda).collect();
    ranks_of(&devices, |communicator| averages(&plan, communicator));
}

/// Variable with the plan of a rank that is a process.
const PLAN: &str = "PA_UNKIND_PLAN";

/// Runs a world of processes, which inherit the simulator's settings.
pub fn processes(words: &[&str]) {
    let plan = Plan::new(words);
    let mut ranks = start_all("unkind", plan.devices.len(), |rank| {
        vec![("PA_TEST_DEVICE", plan.devices[rank].to_string()), (PLAN, words.join(" "))]
    });
    let ends: Vec<Option<i32>> = ranks.iter_mut().map(|rank| rank.end()).collect();
    let output: Vec<_> = ranks.iter().map(|rank| rank.output.join("\n")).collect();
    assert!(ends.iter().all(|end| *end == Some(0)), "{ends:?}\n{}", output.join("\n"));
}

/// Runs one rank of [`processes`], and returns its exit code.
pub fn process() -> i32 {
    let words = std::env::var(PLAN).expect("a plan");
    averages(&Plan::new(&words.split(' ').collect::<Vec<_>>()), join().unwrap());
    0
}

/// Three averages, of other values each time. The peers of the last rank wait for it twice, while
/// its trainer acts.
fn averages(plan: &Plan, communicator: Communicator) {
    let (rank, world) = (communicator.rank(), communicator.world_size());
    let mut trainer = Trainer::new(plan, communicator.device(), rank);
    // Longer than a wedge takes to be found, so that the simulator says what hangs.
    let timeout = std::env::var(TIMEOUT).map_or(25, |seconds| seconds.parse().expect("seconds"));
    let timeout = Duration::from_secs(timeout);
    let mut builder = test_support::options(communicator).timeout(timeout);
    if let Some(algorithm) = plan.algorithm {
        builder = builder.algorithm(algorithm);
    }
    if plan.act == "peer" {
        builder = builder.link(Link::Peer); // refused if the probe of peer access fails
    }
    // Where room on the device is what a scenario is about, as many channels as by default.
    if !matches!(plan.act.as_str(), "averages" | "resident") {
        builder = builder.channels(2);
    }
    let mut averager = builder.build(&mut trainer.model).unwrap();
    trainer.more_streams();
    if plan.act == "resident" && rank == 0 {
        trainer.hold();
    }
    for round in 0..3 {
        trainer.fill((10 * round + 2 * rank) as f32);
        if rank + 1 == world && round > 0 {
            trainer.act(&plan.act);
        }
        if plan.act == "trainers" {
            trainer.steps(rank);
        }
        let is_started = matches!(plan.act.as_str(), "ahead" | "started");
        // SAFETY: own stream and memory, which live until the process ends.
        let mut params = unsafe { RawCudaParams::new(trainer.stream.cast(), &mut trainer.model) };
        let report = if is_started {
            let pending = averager.start(&mut params).unwrap();
            if plan.act == "ahead" {
                (0..AHEAD).for_each(|_| trainer.launch(trainer.step));
            }
            pending.wait().unwrap()
        } else {
            averager.average(&mut params).unwrap()
        };
        assert_eq!((report.world_size, report.bytes), (world, 4 * ELEMENTS as u64));
        let mean = (10 * round + world - 1) as f32;
        let found = trainer.values();
        assert!(found.iter().all(|x| *x == mean), "rank {rank}, {round}: {} {mean}", found[0]);
    }
    trainer.release();
    std::mem::forget((averager, trainer)); // freed with the process
}

/// A rank's trainer: its stream, its kernels, and its memory.
struct Trainer {
    device: Device,
    stream: sys::CUstream,
    chance: Random,
    model: Model,
    loss: u64,
    spare: u64,
    pinned: *mut c_void,
    module: sys::CUmodule,
    step: sys::CUfunction,
    first: sys::CUfunction,
    held: Option<*mut u32>,
}

impl Trainer {
    fn new(plan: &Plan, device: Device, rank: usize) -> Trainer {
        let context = CudaContext::new(ordinal(device)).unwrap();
        context.bind_to_thread().unwrap();
        std::mem::forget(context);
        let mut trainer = Trainer {
            device,
            stream: std::ptr::null_mut(),
            chance: Random(100 * plan.seed + rank as u64),
            model: Model::new(device, &[(Dtype::F32, ELEMENTS, 0)], rank as u64),
            loss: 0,
            spare: 0,
            pinned: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            step: std::ptr::null_mut(),
            first: std::ptr::null_mut(),
            held: None,
        };
        if plan.seed > 0 {
            trainer.more_streams();
        }
        trainer.stream = stream();
        // SAFETY: a context is bound; PTX, and names that it has.
        unsafe {
            trainer.loss = result::malloc_sync(512).unwrap();
            trainer.spare = result::malloc_sync(512).unwrap();
            trainer.pinned = pinned();
            trainer.module = result::module::load_data(TRAINER.as_ptr().cast()).unwrap();
            let function = |name: &std::ffi::CStr| {
                result::module::get_function(trainer.module, name.to_owned()).unwrap()
            };
            trainer.step = function(c"step");
            if plan.act == "launch" {
                trainer.first = function(c"first"); // with CUDASIM_LAZY=launch this loads nothing
            }
        }
        trainer.launch(trainer.step);
        trainer.synchronize();
        trainer
    }

    /// Creates up to three streams that nothing uses: the order of creation decides which streams
    /// share a hardware queue.
    fn more_streams(&mut self) {
        for _ in 0..self.chance.below(4) {
            stream();
        }
    }

    /// Launches a kernel of one thread that writes to `loss`.
    fn launch(&self, kernel: sys::CUfunction) {
        let mut loss = self.loss;
        let mut parameters: [*mut c_void; 1] = [(&raw mut loss).cast()];
        // SAFETY: the kernel takes one address, of own memory.
        unsafe {
            result::launch_kernel(kernel, (1, 1, 1), (1, 1, 1), 0, self.stream, &mut parameters)
        }
        .unwrap();
    }

    fn synchronize(&self) {
        // SAFETY: own stream.
        unsafe { result::stream::synchronize(self.stream) }.unwrap();
    }

    /// Enqueues a step that sets all weights to a value.
    fn fill(&self, value: f32) {
        let weights = self.model.tensor_address(0);
        // SAFETY: own memory and stream.
        unsafe { sys::cuMemsetD32Async(weights, value.to_bits(), ELEMENTS, self.stream) }
            .result()
            .unwrap();
    }

    /// Three steps, each with its loss read back.
    fn steps(&self, rank: usize) {
        for _ in 0..3 {
            self.launch(self.step);
            let mut loss = [0u32; 1];
            // SAFETY: own memory and stream; `loss` outlives the copy.
            unsafe { result::memcpy_dtoh_async(&mut loss, self.loss, self.stream) }.unwrap();
            self.synchronize();
            assert_eq!(loss, [1]);
            std::thread::sleep(Duration::from_millis(20 * rank as u64));
        }
    }

    /// The weights, read on the trainer's stream.
    fn values(&self) -> Vec<f32> {
        let mut values = vec![0f32; ELEMENTS];
        let weights = self.model.tensor_address(0);
        // SAFETY: own memory and stream; `values` outlives the copy.
        unsafe { result::memcpy_dtoh_async(&mut values, weights, self.stream) }.unwrap();
        self.synchronize();
        values
    }

    /// One call of a trainer's that a device may hold back while a kernel runs.
    fn act(&mut self, act: &str) {
        let late = match act {
            "averages" | "waited" | "peer" | "trainers" | "resident" => 0,
            "late" => 4000,
            "later" => 1500,
            _ => 150, // the peers wait by now
        };
        std::thread::sleep(Duration::from_millis(late));
        let mut module = std::ptr::null_mut();
        let image = TRAINER.as_ptr().cast();
        // SAFETY: own memory, each freed once; PTX, and a name that it has.
        unsafe {
            match act {
                "alloc" | "late" => drop(result::malloc_sync(4096).unwrap()),
                "free" => self.free_once(),
                "pinned" => drop(pinned()),
                "unpinned" => self.unpin_once(),
                "registered" => {
                    let page = Box::leak(vec![0u8; 8192].into_boxed_slice());
                    let page = page.as_mut_ptr().cast();
                    sys::cuMemHostRegister_v2(page, 8192, 0).result().unwrap();
                }
                "module" => sys::cuModuleLoadData(&mut module, image).result().unwrap(),
                "fetch" => {
                    result::module::get_function(self.module, c"first".to_owned()).unwrap();
                }
                "launch" => self.launch(self.first),
                "synchronize" => sys::cuCtxSynchronize().result().unwrap(),
                _ => {}
            }
        }
    }

    /// # Safety
    /// A context is bound.
    unsafe fn free_once(&mut self) {
        let spare = std::mem::take(&mut self.spare);
        if spare != 0 {
            // SAFETY: allocated by `new`.
            unsafe { result::free_sync(spare) }.unwrap();
        }
    }

    /// # Safety
    /// A context is bound.
    unsafe fn unpin_once(&mut self) {
        let pinned = std::mem::replace(&mut self.pinned, std::ptr::null_mut());
        if !pinned.is_null() {
            // SAFETY: allocated by `new`.
            unsafe { result::free_host(pinned) }.unwrap();
        }
    }

    /// Launches a block that fills a multiprocessor until `release`.
    fn hold(&mut self) {
        let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a context is bound; the kernel takes the address of a word, which stays.
        unsafe {
            let word: *mut u32 = pinned().cast();
            word.write_volatile(0);
            let hold = result::module::get_function(self.module, c"hold".to_owned()).unwrap();
            sys::cuFuncSetAttribute(hold, shared, HELD_BYTES as i32).result().unwrap();
            let mut address = word as u64;
            let mut parameters: [*mut c_void; 1] = [(&raw mut address).cast()];
            result::launch_kernel(
                hold,
                (1, 1, 1),
                (32, 1, 1),
                HELD_BYTES,
                stream(),
                &mut parameters,
            )
            .unwrap();
            self.held = Some(word);
        }
    }

    fn release(&mut self) {
        if let Some(word) = self.held.take() {
            // SAFETY: allocated by `hold`, and never freed.
            unsafe { word.write_volatile(1) };
            let context = CudaContext::new(ordinal(self.device)).unwrap();
            context.synchronize().unwrap();
        }
    }
}

/// A new stream of the current context that waits for no other by itself.
fn stream() -> sys::CUstream {
    result::stream::create(result::stream::StreamKind::NonBlocking).unwrap()
}

/// A page of memory of the host that devices address.
///
/// # Safety
/// A context is bound.
unsafe fn pinned() -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { result::malloc_host(4096, sys::CU_MEMHOSTALLOC_PORTABLE) }.unwrap()
}
