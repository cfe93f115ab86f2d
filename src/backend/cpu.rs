//! Runs the kernels on CPU threads: a block is a thread, the averager's own for channel 0 and one
//! more for each other.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::limits::thread;
use crate::abi::PaArgs;

/// Bytes of the stack of a channel's thread.
const STACK: usize = 2 << 20;

type RunBlock = unsafe extern "C" fn(args: *const PaArgs, kernel: u32, channel: u32);

extern "C" {
    fn pa_run_block_baseline(args: *const PaArgs, kernel: u32, channel: u32);
    #[cfg(target_arch = "x86_64")]
    fn pa_run_block_avx2(args: *const PaArgs, kernel: u32, channel: u32);
    #[cfg(target_arch = "x86_64")]
    fn pa_run_block_avx512(args: *const PaArgs, kernel: u32, channel: u32);
}

/// An instruction set that the kernels were compiled for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Isa {
    pub(crate) name: &'static str,
    run: RunBlock,
}

/// Those that this machine has, best first.
pub(crate) fn instruction_sets() -> Vec<Isa> {
    let mut sets = vec![];
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("f16c") && has!("fma");
        if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
            sets.push(Isa { name: "avx512", run: pa_run_block_avx512 });
        }
        if avx2 {
            sets.push(Isa { name: "avx2", run: pa_run_block_avx2 });
        }
    }
    sets.push(Isa { name: "baseline", run: pa_run_block_baseline });
    sets
}

impl Isa {
    /// Runs one block of one phase on this thread.
    ///
    /// # Safety
    /// What `args` points at is as `kernels/abi.h` describes it and valid until the call returns,
    /// and only one thread runs this channel of this rank. The tensors are borrowed mutably for as
    /// long.
    pub(crate) unsafe fn run_block(self, args: &PaArgs, kernel: u32, channel: u32) {
        // SAFETY: as this function's; the machine has the instruction set, or `self` would not
        // exist.
        unsafe { (self.run)(args, kernel, channel) }
    }
}

/// The threads of one rank's channels after the first.
pub(crate) struct Workers {
    isa: Isa,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    job: Mutex<Job>,
    started: Condvar,
    ended: Condvar,
}

struct Job {
    /// Counts launches; a worker runs each once.
    number: u64,
    kernel: u32,
    args: PaArgs,
    /// Workers that have not finished this launch.
    running: usize,
    stop: bool,
}

impl Workers {
    pub(crate) fn new(isa: Isa, channels: u32, name: &str) -> Result<Self, String> {
        let args = bytemuck::Zeroable::zeroed();
        let job = Mutex::new(Job { number: 0, kernel: 0, args, running: 0, stop: false });
        let shared = Arc::new(Shared { job, started: Condvar::new(), ended: Condvar::new() });
        let mut workers = Workers { isa, shared, threads: vec![] };
        for channel in 1..channels {
            let shared = workers.shared.clone();
            // On an error the drop of `workers` ends the threads that did start.
            let name = format!("{name}-channel-{channel}");
            workers.threads.push(thread(name, STACK, move || work(isa, channel, &shared))?);
        }
        Ok(workers)
    }

    /// Runs one phase on all channels and returns when all are done.
    ///
    /// # Safety
    /// As [`Isa::run_block`], for all channels.
    pub(crate) unsafe fn launch(&self, args: &PaArgs, kernel: u32) {
        if !self.threads.is_empty() {
            let mut job = lock(&self.shared.job);
            *job = Job {
                number: job.number + 1,
                kernel,
                args: *args,
                running: self.threads.len(),
                stop: false,
            };
            self.shared.started.notify_all();
        }
        // SAFETY: the caller's promise; channel 0 is this thread's.
        unsafe { self.isa.run_block(args, kernel, 0) };
        if !self.threads.is_empty() {
            let mut job = lock(&self.shared.job);
            while job.running > 0 {
                job = self.shared.ended.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

fn work(isa: Isa, channel: u32, shared: &Shared) {
    let mut done = 0;
    loop {
        let (kernel, args) = {
            let mut job = lock(&shared.job);
            while job.number == done && !job.stop {
                job = shared.started.wait(job).unwrap_or_else(PoisonError::into_inner);
            }
            if job.stop {
                return;
            }
            done = job.number;
            (job.kernel, job.args)
        };
        // SAFETY: `launch` holds its caller's promise until `running` is 0; each worker has its own
        // channel.
        unsafe { isa.run_block(&args, kernel, channel) };
        let mut job = lock(&shared.job);
        job.running -= 1;
        if job.running == 0 {
            shared.ended.notify_one();
        }
    }
}

// A job is plain data: whatever a panicking holder left is whole.
fn lock(job: &Mutex<Job>) -> MutexGuard<'_, Job> {
    job.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Workers {
    fn drop(&mut self) {
        lock(&self.shared.job).stop = true;
        self.shared.started.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Workers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Workers({}, {} more threads)", self.isa.name, self.threads.len())
    }
}
