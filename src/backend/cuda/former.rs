//! The former way of averages, as a mutant for tests: every rank launches cooperative grids of its
//! own, without meeting its peers on the host, on a device that they may fill, and a kernel waits
//! for a late rank as long as the averager does. Tests assert that it hangs or fails on devices
//! that behave unkindly (`tests/device/unkind.rs`).

use std::ffi::c_void;
use std::time::Duration;

use cudarc::driver::sys;

use super::driver::{call, check, Failed};
use super::launch::{Part, THREADS};
use super::streams::{Event, LaunchStream};
use super::Context;
use crate::abi::{PaArgs, PaLaunch, PA_RING_COMMIT};
use crate::plan::Launch;

/// True if tests ask for it.
pub(super) fn is_asked_for() -> bool {
    std::env::var_os("PA_FORMER_WAY").is_some_and(|value| value == "1")
}

/// Launches the part of one rank, behind its own work alone. `done` is recorded behind it.
///
/// # Safety
/// As `launch::launch_all`.
pub(super) unsafe fn launch_one(
    context: &Context,
    stream: &LaunchStream,
    part: &Part,
    timeout: Duration,
    done: &Event,
) -> Result<(), Failed> {
    let _bound = context.bind()?;
    let on = stream.raw();
    let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: guaranteed by the caller.
    unsafe {
        part.ready.hold(on)?;
        if let Some((to, from, bytes)) = part.tables {
            call!(cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, on))?;
        }
        for &each in &part.launches {
            for Launch { kernel, segments: (from_segment, to_segment) } in halves(each, &part.args)
            {
                let args = PaArgs { from_segment, to_segment, timeout_ns, ..part.args };
                launch(context, kernel, args, on)?;
            }
        }
        done.record(on)
    }
}

/// The ring with a commit was two launches: up to the vote, and from the commit on.
fn halves(launch: Launch, args: &PaArgs) -> Vec<Launch> {
    let (first, end) = launch.segments;
    let commit = args.world + 1;
    match launch.kernel == PA_RING_COMMIT && (first + 1..end).contains(&commit) {
        true => {
            let of = |segments| Launch { segments, ..launch };
            vec![of((first, commit)), of((commit, end))]
        }
        false => vec![launch],
    }
}

/// Launches a cooperative grid with the blocks of one rank.
///
/// # Safety
/// As `launch::launch`.
unsafe fn launch(
    context: &Context,
    kernel: u32,
    args: PaArgs,
    stream: sys::CUstream,
) -> Result<(), Failed> {
    let mut all: PaLaunch = bytemuck::Zeroable::zeroed();
    all.args[0] = args;
    let mut parameters: [*mut c_void; 1] = [(&raw mut all).cast()];
    let (kernel, parameters) = (context.kernel(kernel), parameters.as_mut_ptr());
    // SAFETY: the kernel takes one PaLaunch, which the driver copies during the call.
    let result = unsafe {
        let (x, y) = (args.channels, THREADS);
        sys::cuLaunchCooperativeKernel(kernel, x, 1, 1, y, 1, 1, 0, stream, parameters)
    };
    check("cuLaunchCooperativeKernel", result)
}
