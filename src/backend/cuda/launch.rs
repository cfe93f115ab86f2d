//! Launches: one rank launches for all ranks of its process on its device, when all have met.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use super::streams::{Event, LaunchStream};
use super::Context;
use crate::abi::{PaArgs, PaLaunch, PA_MAX_WORLD};
use crate::backend::Attendance;
use crate::plan::Launch;

/// Threads of a block. 128 registers each are half the register file of a multiprocessor, so that a
/// block also finds room beside a trainer's kernel; a lane has at least 4 packs in flight, which
/// are 16 KiB a block (tests/kernels/sass.rs).
pub(crate) const THREADS: u32 = 256;

/// A rank's part of an average, which it brings to the meeting.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// Ordinal of the rank's device.
    pub(super) device: usize,
    /// Recorded behind the work that the average follows.
    pub(super) ready: Arc<Event>,
    /// Changed tables, to be copied to the device: address there, address here, bytes.
    pub(super) tables: Option<(u64, usize, usize)>,
    pub(super) args: PaArgs,
    pub(super) launches: Vec<Launch>,
}

/// Result of the launches on a device: the event behind them, or the reason why the driver refused
/// one. `None` from a rank that did not launch.
pub(crate) type Launched = Option<Result<Arc<Event>, Failed>>;

/// The rank that launches for all ranks on its device: the first one.
pub(super) fn leader_of(device: usize, parts: &[Part]) -> usize {
    parts.iter().position(|part| part.device == device).expect("a rank's own device")
}

/// Launches the parts of all ranks on the device, behind the work that any rank of the world
/// waits for: no kernel waits for work of a peer. `meeting` is one of processes, to which this rank
/// comes in the stream. `done` is recorded behind all.
///
/// # Safety
/// `parts` are those of an average of all ranks. Every rank keeps its promises of `Rank::start`
/// until `done` has been reached.
pub(super) unsafe fn launch_all(
    context: &Context,
    stream: &LaunchStream,
    meeting: Option<&Attendance>,
    parts: &[Part],
    done: &Event,
) -> Result<(), Failed> {
    let _bound = context.bind()?;
    let on = stream.raw();
    let own = || parts.iter().filter(|part| part.device == context.ordinal());
    // SAFETY: the stream's context is bound. Sources and destinations of the copies have the same
    // size, and no other code accesses them until `done`; the caller guarantees the rest.
    unsafe {
        for part in parts {
            part.ready.hold(on)?;
        }
        for (to, from, bytes) in own().filter_map(|part| part.tables) {
            call!(cuMemcpyHtoDAsync_v2(to, from as *const c_void, bytes, on))?;
        }
        #[cfg(processes)]
        if let Some(meeting) = meeting {
            super::arrivals::enqueue(meeting, on)?;
        }
        #[cfg(not(processes))]
        let _ = meeting;
        // The launches of ranks differ where a rank's tensors are wrong, which are not looked at,
        // or where ranks make different calls, which none of these kernels takes past its entry
        // barrier. All ranks take part in each that meets, whose it may be: a rank left out would
        // be waited for.
        let most = own().map(|part| &part.launches).max_by_key(|all| all.len());
        for &each in most.into_iter().flatten() {
            let ranks = own().filter(|part| each.meets() || part.launches.contains(&each));
            let args: Vec<PaArgs> = ranks.map(|part| part.args).collect();
            launch(context, each, &args, on)?;
        }
        done.record(on)
    }
}

/// Launches a grid with the blocks of these ranks.
///
/// # Safety
/// As `Rank::start`, for each rank. `stream` belongs to the context, which is bound.
pub(super) unsafe fn launch(
    context: &Context,
    launch: Launch,
    ranks: &[PaArgs],
    stream: sys::CUstream,
) -> Result<(), Failed> {
    let mut all: PaLaunch = bytemuck::Zeroable::zeroed();
    assert!(!ranks.is_empty() && ranks.len() <= PA_MAX_WORLD as usize);
    for (to, args) in all.args.iter_mut().zip(ranks) {
        let (from_segment, to_segment) = launch.segments;
        *to = PaArgs { from_segment, to_segment, ..*args };
    }
    let mut parameters: [*mut c_void; 1] = [(&raw mut all).cast()];
    // SAFETY: the kernel takes one PaLaunch, which the driver copies during the call.
    unsafe {
        call!(cuLaunchKernel(
            context.kernel(launch.kernel),
            ranks[0].channels,
            ranks.len() as u32,
            1,
            THREADS,
            1,
            1,
            0,
            stream,
            parameters.as_mut_ptr(),
            std::ptr::null_mut()
        ))
    }
}
