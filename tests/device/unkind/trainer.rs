//! A rank's trainer: its kernels, and its calls that a device may hold back.

use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::Random;

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

/// Elements of a model, all of one value.
pub const ELEMENTS: usize = 40_000;
/// Shared memory of a block of `hold`: all that a multiprocessor has.
const HELD_BYTES: u32 = 227 << 10;

/// A rank's trainer: its stream, its kernels, and its memory.
pub struct Trainer {
    device: Device,
    pub stream: sys::CUstream,
    chance: Random,
    pub model: Model,
    loss: u64,
    spare: u64,
    pinned: *mut c_void,
    module: sys::CUmodule,
    pub step: sys::CUfunction,
    first: sys::CUfunction,
    held: Option<*mut u32>,
}

impl Trainer {
    /// `act`: its later action. `seed`: decides which streams it creates beside its own.
    pub fn new(act: &str, seed: u64, device: Device, rank: usize) -> Trainer {
        let context = CudaContext::new(ordinal(device)).unwrap();
        context.bind_to_thread().unwrap();
        std::mem::forget(context);
        let mut trainer = Trainer {
            device,
            stream: std::ptr::null_mut(),
            chance: Random(100 * seed + rank as u64),
            model: Model::new(device, &[(Dtype::F32, ELEMENTS, 0)], rank as u64),
            loss: 0,
            spare: 0,
            pinned: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            step: std::ptr::null_mut(),
            first: std::ptr::null_mut(),
            held: None,
        };
        if seed > 0 {
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
            if act == "launch" {
                trainer.first = function(c"first"); // with CUDASIM_LAZY=launch this loads nothing
            }
        }
        trainer.launch(trainer.step);
        trainer.synchronize();
        trainer
    }

    /// Creates up to three streams that nothing uses: the order of creation decides which streams
    /// share a hardware queue.
    pub fn more_streams(&mut self) {
        for _ in 0..self.chance.below(4) {
            stream();
        }
    }

    /// Launches a kernel of one thread that writes to `loss`.
    pub fn launch(&self, kernel: sys::CUfunction) {
        let mut loss = self.loss;
        let mut parameters: [*mut c_void; 1] = [(&raw mut loss).cast()];
        // SAFETY: the kernel takes one address, of own memory.
        unsafe {
            result::launch_kernel(kernel, (1, 1, 1), (1, 1, 1), 0, self.stream, &mut parameters)
        }
        .unwrap();
    }

    pub fn synchronize(&self) {
        // SAFETY: own stream.
        unsafe { result::stream::synchronize(self.stream) }.unwrap();
    }

    /// Enqueues a step that sets all weights to a value.
    pub fn fill(&self, value: f32) {
        let weights = self.model.tensor_address(0);
        // SAFETY: own memory and stream.
        unsafe { sys::cuMemsetD32Async(weights, value.to_bits(), ELEMENTS, self.stream) }
            .result()
            .unwrap();
    }

    /// Three steps, each with its loss read back.
    pub fn steps(&self, rank: usize) {
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
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0f32; ELEMENTS];
        let weights = self.model.tensor_address(0);
        // SAFETY: own memory and stream; `values` outlives the copy.
        unsafe { result::memcpy_dtoh_async(&mut values, weights, self.stream) }.unwrap();
        self.synchronize();
        values
    }

    /// One call of a trainer's that a device may hold back while a kernel runs.
    pub fn act(&mut self, act: &str) {
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
    pub fn hold(&mut self) {
        if self.held.is_some() {
            return;
        }
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

    pub fn release(&mut self) {
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
