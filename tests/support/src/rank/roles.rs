//! Roles of ranks in tests about the rendezvous.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use param_averager::{Communicator, Device};

use super::worker::{builder, join, number, say};

fn pause(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

/// Averages with the others of its job once; every element of its model is the job's number.
pub fn job() -> i32 {
    let own = number("PA_TEST_JOB").unwrap() as f32;
    let result = join().and_then(|communicator| {
        say(&format!("in {}", communicator.world().unwrap()));
        let mut model = vec![vec![own; 1000]];
        let mut averager = builder(communicator).build(&mut model)?;
        averager.average(&mut model)?;
        assert!(model[0].iter().all(|&x| x == own), "jobs are mixed: {} is not {own}", model[0][0]);
        Ok(averager)
    });
    match result {
        Ok(_its_world) => {
            pause(number("PA_TEST_LINGER_MS").unwrap_or(0));
            say(&format!("averaged {own}"));
            0
        }
        Err(error) => {
            say(&format!("error {own} {error}"));
            3
        }
    }
}

/// Holds its place in a world, with `PA_TEST_MEGABYTES` of memory, until it is killed.
pub fn hold() -> i32 {
    if let Some(more) = number("PA_TEST_MORE_THREADS") {
        let own = std::fs::read_dir("/proc/self/task").unwrap().count() as u64;
        let limit =
            rustix::process::Rlimit { current: Some(own + more), maximum: Some(own + more) };
        rustix::process::setrlimit(rustix::process::Resource::Nproc, limit).unwrap();
        say("limited");
    }
    let memory = vec![1u8; number("PA_TEST_MEGABYTES").unwrap_or(0) as usize * 1_000_000];
    match join() {
        Ok(communicator) => {
            say(&format!("in {}", communicator.world().unwrap()));
            say("ready");
            loop {
                pause(1000);
                std::hint::black_box((&memory, &communicator));
            }
        }
        Err(error) => {
            say(&format!("error {error}"));
            3
        }
    }
}

/// Admits one joiner, but only after a line on the standard input.
pub fn admit_one() -> i32 {
    let communicator = join().unwrap();
    let mut model = vec![vec![communicator.rank() as f32; 1000]];
    let mut averager = builder(communicator).build(&mut model).unwrap();
    say("ready");
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    while averager.world_size() < 3 {
        if averager.average(&mut model).unwrap().join_pending {
            averager.admit_joiner(&mut model).unwrap();
        }
    }
    0
}

/// A world in a process that has forked, without exec, a child which outlives it.
pub fn fork() -> i32 {
    let communicator = join().unwrap();
    let mut model = vec![vec![0.0f32; 10]];
    let averager = builder(communicator).build(&mut model).unwrap();
    // SAFETY: the child calls nothing but async-signal-safe functions.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::close(0);
            libc::close(1);
            libc::close(2);
            libc::sleep(60);
            libc::_exit(0)
        }
    }
    say(&format!("child {child}"));
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    drop(averager);
    say("over");
    0
}

/// Prints what the environment says about this rank.
pub fn launched() -> i32 {
    say(&format!("is_launched {}", Communicator::is_launched()));
    match Communicator::builder().timeout(Duration::from_secs(1)).from_env() {
        Ok(_) => say("environment is right"),
        Err(error) => say(&format!("error {error}")),
    }
    0
}

/// Tries to join again and again, on several threads, and withdraws soon; then joins.
pub fn try_to_join() -> i32 {
    const THREADS: u64 = 8;
    let name = std::env::var("PA_TEST_NAME").unwrap();
    let timeout = Duration::from_millis(number("PA_TEST_TRY_MS").unwrap());
    let tries = number("PA_TEST_TRIES").unwrap();
    let withdrawn = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while withdrawn.load(Ordering::Relaxed) < tries {
                    let joined = Communicator::builder().rendezvous(&name).timeout(timeout).join();
                    let error = joined.unwrap_err().to_string();
                    // Such an attempt had become a peer of the members, or was about to.
                    let was_in =
                        error.contains("admitted no process") || error.contains("did not answer");
                    withdrawn.fetch_add(u64::from(was_in), Ordering::Relaxed);
                }
            });
        }
    });
    say(&format!("withdrawn {}", withdrawn.into_inner()));
    let communicator = Communicator::join(name, Device::cpu()).unwrap();
    let mut model = vec![vec![0.0f32; 1000]];
    let averager = builder(communicator).build(&mut model).unwrap();
    say(&format!("joined {} {}", averager.world_size(), model[0][0]));
    0
}
