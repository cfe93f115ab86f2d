//! Role of a rank, chosen by name, and its options, from the environment. A rank prints its results
//! as lines that begin with @.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use param_averager::{Algorithm, Builder, Communicator, Device, Error, Link, LocalSgd, Schedule};

use super::{coded, outer, pairs, roles, survive};
use crate::notices;

pub fn say(line: &str) {
    // After a line feed: the test harness may have written half a line.
    let _ = std::io::stdout().write_all(format!("\n@{line}\n").as_bytes());
    let _ = std::io::stdout().flush();
}

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// Duration from a variable: in ms, or `longest`. Not set: 20 s.
fn duration(name: &str) -> Duration {
    match std::env::var(name) {
        Ok(longest) if longest == "longest" => Duration::MAX,
        _ => Duration::from_millis(number(name).unwrap_or(20_000)),
    }
}

pub fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

/// Ends as a killed process does: nothing is dropped or flushed.
pub fn die() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    unreachable!()
}

/// Runs a role, and returns the process's exit code.
pub fn run(role: &str) -> i32 {
    if let Some(patience) = number("PA_TEST_PATIENCE_MS") {
        notices::listen(Duration::from_millis(patience), |text| say(&format!("notice {text}")));
    }
    match role {
        "meet" => meet(),
        "restart" => restart(),
        "stages" => stages(),
        "survive" => survive::survive(),
        "train" => train(),
        "coded" => coded::coded(),
        "outer" => outer::outer(),
        "two" => pairs::two(),
        "two_admit" => pairs::two_admit(),
        "many_recover" => pairs::many_recover(),
        "two_sgd" => pairs::two_sgd(),
        "one_dropped" => pairs::one_dropped(),
        "job" => roles::job(),
        "hold" => roles::hold(),
        "fork" => roles::fork(),
        "admit_one" => roles::admit_one(),
        "launched" => roles::launched(),
        "try" => roles::try_to_join(),
        other => panic!("no role {other}"),
    }
}

/// True if this process joins a world that has begun.
pub fn is_late() -> bool {
    number("PA_TEST_JOIN").is_some()
}

/// The CUDA device of the ordinal in `PA_TEST_DEVICE`, or the CPU.
pub fn device() -> Device {
    number("PA_TEST_DEVICE").map_or(Device::cpu(), |ordinal| Device::cuda(ordinal as usize))
}

pub fn join() -> Result<Communicator, Error> {
    let timeout = duration("PA_TEST_MEET_MS");
    if is_late() {
        let world = Communicator::builder().rendezvous(std::env::var("PA_TEST_NAME").unwrap());
        return world.device(device()).timeout(timeout).join();
    }
    match number("PA_TEST_RANK") {
        None => Communicator::builder().device(device()).timeout(timeout).from_env()?.build(),
        Some(rank) => {
            let world = Communicator::builder()
                .rank(rank as usize)
                .world_size(number("PA_TEST_WORLD").unwrap() as usize)
                .rendezvous(std::env::var("PA_TEST_NAME").unwrap())
                .device(device())
                .timeout(timeout);
            match std::env::var("PA_TEST_JOB_NAME") {
                Ok(job) => world.job(job).build(),
                Err(_) => world.build(),
            }
        }
    }
}

pub fn builder(communicator: Communicator) -> Builder {
    let timeout = duration("PA_TEST_TIMEOUT_MS");
    let link = match std::env::var("PA_TEST_LINK").as_deref() {
        Ok("peer") => Link::Peer,
        Ok("pull") => Link::Pull,
        Ok("host") => Link::Host,
        _ => Link::Auto,
    };
    let builder = match device() == Device::cpu() {
        true => crate::options(communicator),
        false => {
            crate::options(communicator).channels(number("PA_TEST_CHANNELS").unwrap_or(2) as u32)
        }
    };
    let builder = match (number("PA_TEST_SHARD_STAGE"), device() == Device::cpu()) {
        (None, _) => builder,
        (Some(_), true) => builder.stage(|_| Ok(())),
        // SAFETY: the stage enqueues nothing.
        (Some(_), false) => unsafe { builder.device_stage(|_| Ok(())) },
    };
    builder
        .link(link)
        .timeout(timeout)
        .all_or_nothing(number("PA_TEST_ALL_OR_NOTHING") != Some(0))
        .reject_non_finite(number("PA_TEST_REJECT") == Some(1))
        .chunk_bytes(1 << 10)
}

/// Meets, averages once, prints the outcome.
fn meet() -> i32 {
    if let Some(most) = number("PA_TEST_FILES") {
        let limit = rustix::process::Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }
    let mut model =
        vec![vec![0.0f32; number("PA_TEST_ELEMENTS").unwrap_or(1000) as usize], vec![1.0; 10]];
    let result = join().and_then(|communicator| {
        let rank = communicator.rank();
        model[0].fill(rank as f32);
        let mut builder = builder(communicator);
        if let Some(slots) = number("PA_TEST_SLOTS") {
            builder = builder.slots(slots as u32);
        }
        let mut averager = builder.build(&mut model)?;
        assert_eq!(averager.algorithm(), Algorithm::Ring);
        if is_late() {
            return Err(Error::WorldSize { found: 0 }); // this rank was to be refused
        }
        averager.average(&mut model)?;
        Ok(averager.world_size())
    });
    match result {
        Ok(size) => {
            let mean = (size as f32 - 1.0) / 2.0;
            assert!(model[0].iter().all(|&x| x == mean), "{:?}", &model[0][..10]);
            assert!(model[1].iter().all(|&x| x == 1.0));
            say(&format!("averaged {size}"));
            0
        }
        Err(error) => {
            say(&format!("error {error}"));
            3
        }
    }
}

/// Role under torchrun, which starts all ranks again when one fails: rank 1 fails at first, while
/// the others wait for it.
fn restart() -> i32 {
    let is = |name, what| std::env::var(name).is_ok_and(|value| value == what);
    if is("TORCHELASTIC_RESTART_COUNT", "0") && is("RANK", "1") {
        say("failing");
        return 9;
    }
    meet()
}

/// Stops this process, once, if `PA_TEST_STOP_AT` is this place.
fn stop_at(place: &str) {
    static STOPPED: AtomicBool = AtomicBool::new(false);
    let is_here = std::env::var("PA_TEST_STOP_AT").is_ok_and(|at| at == place);
    if is_here && !STOPPED.swap(true, Ordering::Relaxed) {
        say("stopping");
        // Sent to this thread, which stops before it returns from the call. Another thread may take
        // a signal for the process, later.
        // SAFETY: no pointer is passed.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
}

/// Meets, builds, recovers and builds again until there is an averager, averages, and waits for a
/// line on the standard input. Stops or aborts where `PA_TEST_STOP_AT` says.
fn stages() -> i32 {
    let timeout = duration("PA_TEST_TIMEOUT_MS");
    let failed = |error: Error| {
        say(&format!("error {error}"));
        3
    };
    stop_at("join");
    let mut communicator = match join() {
        Ok(communicator) => communicator,
        Err(error) => return failed(error),
    };
    loop {
        stop_at("build");
        if std::env::var("PA_TEST_STOP_AT").is_ok_and(|at| at == "abort") {
            stop_at("abort");
            communicator.abort_handle().abort();
        }
        say("building");
        let mut model = vec![vec![communicator.rank() as f32; 100]];
        let built = builder(communicator.clone()).build(&mut model);
        match built.and_then(|mut averager| averager.average(&mut model).map(|_| averager)) {
            Ok(averager) => {
                say(&format!("averaged {}", averager.world_size()));
                let _ = std::io::stdin().read_line(&mut String::new());
                return 0;
            }
            Err(error) if matches!(error, Error::Aborted { .. }) => return failed(error),
            Err(error) => say(&format!("failed {error}")),
        }
        stop_at("recover");
        say("recovering");
        communicator = match communicator.recover(timeout) {
            Ok(communicator) => communicator,
            Err(error) => return failed(error),
        };
    }
}

/// Resources that a world holds in its process.
#[derive(Debug)]
pub struct Used {
    files: usize,
    /// Mappings of memory with a file, such as shared memory.
    mappings: usize,
    /// Bytes of the device.
    bytes: usize,
}

impl Used {
    pub fn now(bytes: usize) -> Used {
        let mappings = std::fs::read_to_string("/proc/self/maps").unwrap();
        Used {
            files: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: mappings.matches("/memfd:").count(),
            bytes,
        }
    }

    pub fn is_no_more_than(&self, before: &Used) -> bool {
        // a launch of the simulator's keeps a little for a while; a mailbox is larger
        const SLACK: usize = 64 << 10;
        self.files <= before.files
            && self.mappings <= before.mappings
            && self.bytes <= before.bytes + SLACK
    }
}

/// Minimises Σ (x - target)² with noise that differs between ranks; rank 1 of 4 panics half way.
fn train() -> i32 {
    let communicator = join().unwrap();
    let origin = number("PA_TEST_ORIGIN").unwrap_or(communicator.rank() as u64);
    let (dies, pause) = (number("PA_TEST_PANIC"), number("PA_TEST_STEP_US"));
    let target: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut x = vec![vec![0.0f32; 100]];
    let averager = builder(communicator).build(&mut x).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    let mut seed = origin + 1;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        say(&format!("begins at {}", sgd.position()));
        // Until a process has joined, too, if one is to.
        let (mut step, all) = (sgd.position(), number("PA_TEST_FINAL").unwrap_or(0) as usize);
        while step < 400 || sgd.world_size() < all {
            pause.into_iter().for_each(|pause| std::thread::sleep(Duration::from_micros(pause)));
            for (x, target) in x[0].iter_mut().zip(&target) {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let noise = (seed >> 33) as f32 / (1u64 << 31) as f32 - 0.5;
                *x -= 0.05 * (*x - target + noise);
            }
            assert!(dies != Some(step), "as it should");
            if let Err(error) = sgd.step(&mut x) {
                say(&format!("failed {error:?}"));
                sgd.recover(&mut x).unwrap();
            }
            step += 1;
        }
        sgd.finish(&mut x).unwrap();
        let loss: f32 = x[0].iter().zip(&target).map(|(x, target)| (x - target).powi(2)).sum();
        let bits = x[0].iter().fold(0u64, |hash, x| hash.rotate_left(7) ^ u64::from(x.to_bits()));
        say(&format!("trained {} {loss} {bits:x}", sgd.averager().world_size()));
    }));
    if result.is_err() {
        std::thread::sleep(Duration::from_millis(200)); // alive, but out of the world
        return 6;
    }
    0
}
