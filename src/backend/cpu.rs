//! CPU threads that run the kernels. A block is a thread: the averager's own for channel 0, or one
//! that stands for it, and one worker for each further channel.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::limits::thread;
use crate::abi::PaArgs;
use crate::sync::{lock, wait};

/// Stack of a worker in bytes.
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

/// Instruction sets of this machine that the kernels were compiled for, best first.
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
    /// Runs one block of one kernel on this thread.
    ///
    /// # Safety
    /// The memory that `args` refers to is as `kernels/abi.h` describes it and valid until the call
    /// returns. Only this thread runs this channel of this rank. The tensors are mutably borrowed
    /// for as long.
    pub(crate) unsafe fn run_block(self, args: &PaArgs, kernel: u32, channel: u32) {
        // SAFETY: the caller's guarantees are this function's; `Isa` values exist only for
        // instruction sets of this machine.
        unsafe { (self.run)(args, kernel, channel) }
    }
}

/// Worker threads of a rank, for all channels but the first.
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
    /// Counts launches. A worker runs each launch once.
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
            // On an error the drop of `workers` ends the threads that have started.
            let name = format!("{name}-channel-{channel}");
            workers.threads.push(thread(name, STACK, move || work(isa, channel, &shared))?);
        }
        Ok(workers)
    }

    /// Runs one kernel on all channels and returns when all are done.
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
        // SAFETY: guaranteed by the caller; channel 0 belongs to this thread.
        unsafe { self.isa.run_block(args, kernel, 0) };
        if !self.threads.is_empty() {
            let mut job = lock(&self.shared.job);
            while job.running > 0 {
                job = wait(&self.shared.ended, job);
            }
        }
    }
}

/// Thread that runs the launches of one average while the averager's own thread trains: it takes
/// channel 0 in that thread's place.
pub(crate) struct Aside {
    shared: Arc<AsideShared>,
    thread: Option<JoinHandle<()>>,
}

struct AsideShared {
    state: Mutex<AsideState>,
    changed: Condvar,
}

#[derive(Default)]
struct AsideState {
    /// Launches that were started and not taken by the thread.
    list: Option<Vec<(PaArgs, u32)>>,
    /// True from the start of a list to its end.
    is_running: bool,
    stop: bool,
}

impl Aside {
    pub(crate) fn new(workers: Arc<Workers>, name: &str) -> Result<Aside, String> {
        let shared = Arc::new(AsideShared { state: Mutex::default(), changed: Condvar::new() });
        let of_thread = shared.clone();
        let run = move || run_aside(&workers, &of_thread);
        let thread = Some(thread(format!("{name}-aside"), STACK, run)?);
        Ok(Aside { shared, thread })
    }

    /// Starts a list of launches, each when the one before has ended.
    ///
    /// # Safety
    /// As [`Workers::launch`], until `wait` has returned. Nothing else launches meanwhile.
    pub(crate) unsafe fn start(&self, list: Vec<(PaArgs, u32)>) {
        self.wait();
        let mut state = lock(&self.shared.state);
        (state.list, state.is_running) = (Some(list), true);
        self.shared.changed.notify_all();
    }

    /// True if `wait` returns at once.
    pub(crate) fn is_done(&self) -> bool {
        !lock(&self.shared.state).is_running
    }

    /// Waits for the launches that were started.
    pub(crate) fn wait(&self) {
        let mut state = lock(&self.shared.state);
        while state.is_running {
            state = wait(&self.shared.changed, state);
        }
    }
}

fn run_aside(workers: &Workers, shared: &AsideShared) {
    loop {
        let mut state = lock(&shared.state);
        let list = loop {
            match state.list.take() {
                Some(list) => break list,
                None if state.stop => return,
                None => state = wait(&shared.changed, state),
            }
        };
        drop(state);
        for (args, kernel) in list {
            // SAFETY: the promise of `Aside::start`, until `is_running` is false.
            unsafe { workers.launch(&args, kernel) };
        }
        lock(&shared.state).is_running = false;
        shared.changed.notify_all();
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        lock(&self.shared.state).stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Aside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aside({})", if self.is_done() { "idle" } else { "running" })
    }
}

fn work(isa: Isa, channel: u32, shared: &Shared) {
    let mut done = 0;
    loop {
        let (kernel, args) = {
            let mut job = lock(&shared.job);
            while job.number == done && !job.stop {
                job = wait(&shared.started, job);
            }
            if job.stop {
                return;
            }
            done = job.number;
            (job.kernel, job.args)
        };
        // SAFETY: the caller's guarantees hold until `running` is 0; each worker has its own
        // channel.
        unsafe { isa.run_block(&args, kernel, channel) };
        let mut job = lock(&shared.job);
        job.running -= 1;
        if job.running == 0 {
            shared.ended.notify_one();
        }
    }
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
