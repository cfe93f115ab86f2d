//! Probe of peer access in a process of its own, before this process tries: behind a broken switch
//! or bridge, a kernel that writes to a peer may end the context, and with it the trainer. Between
//! devices that NVLink connects there is no such risk, and no child.
//!
//! The child is this program again, which runs the probe before `main` and exits. So that no `main`
//! runs twice, there is a child only if this code is part of the executable and has been called
//! before `main` here, too.

use std::ffi::CStr;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{trial, Context};
use crate::backend::proximity::PeerAccess;

/// Variable with the ordinals of the two devices that a child probes.
const DEVICES: &CStr = c"PARAM_AVERAGER_PROBE_CHILD";

/// Exit codes that no other program is likely to have.
const WORKS: i32 = 113;
const IS_BROKEN: i32 = 114;
const IS_UNKNOWN: i32 = 115;

/// Time for a child to start, to open two devices and to probe.
const LIMIT: Duration = Duration::from_secs(30);

static WAS_CALLED: AtomicBool = AtomicBool::new(false);

#[used]
#[link_section = ".init_array"]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    WAS_CALLED.store(true, Ordering::Relaxed);
    // SAFETY: a string that ends in zero. No other thread changes the environment before `main`.
    let devices = unsafe { libc::getenv(DEVICES.as_ptr()) };
    if devices.is_null() {
        return;
    }
    // SAFETY: what `getenv` returns is a string.
    let devices = unsafe { CStr::from_ptr(devices) }.to_owned();
    // A panic must not unwind into the loader; threads of the driver must not outlive this.
    let code = std::panic::catch_unwind(|| probe(devices.to_str().unwrap_or_default()));
    // SAFETY: ends the process.
    unsafe { libc::_exit(code.unwrap_or(IS_UNKNOWN)) }
}

/// Probes in the child, and returns its exit code.
fn probe(devices: &str) -> i32 {
    #[cfg(feature = "__testing")]
    if std::env::var_os("PA_PROBE_CHILD").is_some_and(|value| value == "crash") {
        std::process::abort();
    }
    let ordinals: Vec<usize> = devices.split(',').filter_map(|word| word.parse().ok()).collect();
    let contexts: Vec<_> =
        ordinals.iter().filter_map(|&ordinal| Context::open(ordinal).ok()).collect();
    let [one, other] = &contexts[..] else { return IS_UNKNOWN };
    match trial::find(one, other).map(|link| link.access) {
        Ok(PeerAccess::Verified | PeerAccess::Pull | PeerAccess::Slow) => WORKS,
        Ok(PeerAccess::Broken) | Err(_) => IS_BROKEN,
        Ok(PeerAccess::Unsupported | PeerAccess::Disabled) => IS_UNKNOWN,
    }
}

/// True if a child has found that peer access does not work, or has died of it. False if it works,
/// and where there can be no child.
pub(super) fn finds_it_broken(one: &Context, other: &Context) -> bool {
    if !WAS_CALLED.load(Ordering::Relaxed) || !is_in_executable() {
        return false;
    }
    let mut command = Command::new("/proc/self/exe");
    let devices = format!("{},{}", one.ordinal(), other.ordinal());
    command.env(DEVICES.to_str().expect("ASCII"), devices);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => {
                return status.code() == Some(IS_BROKEN) || status.signal().is_some();
            }
            Ok(None) if start.elapsed() < LIMIT => std::thread::sleep(Duration::from_millis(2)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return true;
            }
        }
    }
}

/// True if this code is part of the executable, and not of a library that it loads: then the child
/// calls it before `main`.
fn is_in_executable() -> bool {
    let here = before_main as *const () as usize;
    let Ok(executable) = std::fs::read_link("/proc/self/exe") else { return false };
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return false };
    maps.lines().any(|line| {
        let mut words = line.split_whitespace();
        let range = words.next().and_then(|range| range.split_once('-'));
        let range = range.and_then(|(from, to)| {
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some(number(from)?..number(to)?)
        });
        range.is_some_and(|range| range.contains(&here))
            && executable.to_str().is_some_and(|path| line.ends_with(path))
    })
}
