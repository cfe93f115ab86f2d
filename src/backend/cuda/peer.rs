//! Peer access between two devices of one process. The driver's answer is not sufficient: behind
//! some IOMMUs, switches and patched drivers, writes to a peer are lost without an error. So bytes
//! are transferred and compared.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUresult;

use super::driver::{call, Failed};
use super::{Context, DeviceMemory};
use crate::sync::lock;

/// Number of words transferred in each direction.
pub(super) const WORDS: u32 = 16 << 10;

/// Peer access (P2P) between two devices, as a test transfer has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerAccess {
    /// The driver reports no access, in one direction at least.
    Unsupported,
    /// The driver reports access, but transferred bytes were wrong. Parameters go through host
    /// memory.
    Broken,
    /// Bytes transferred in both directions, by writes and by reads, were right.
    Verified,
}

/// Tests the access between two devices once, and leaves it enabled if it works.
pub(crate) fn access(one: &Arc<Context>, other: &Arc<Context>) -> Result<PeerAccess, Failed> {
    if one.ordinal() == other.ordinal() {
        return Ok(PeerAccess::Verified);
    }
    // By ordinals, the lower one first. Locked during a test: a test that fails disables the
    // access, which must not happen under the kernels of a concurrent test of the same pair.
    static KNOWN: Mutex<BTreeMap<(usize, usize), PeerAccess>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&KNOWN);
    let pair = (one.ordinal().min(other.ordinal()), one.ordinal().max(other.ordinal()));
    if let Some(&known) = known.get(&pair) {
        return Ok(known);
    }
    let found = find(one, other)?;
    known.insert(pair, found);
    Ok(found)
}

fn find(one: &Arc<Context>, other: &Arc<Context>) -> Result<PeerAccess, Failed> {
    if !can(one, other)? || !can(other, one)? {
        return Ok(PeerAccess::Unsupported);
    }
    let there = match enable(one, other) {
        Err(failed) => return not_to_be_had(failed),
        Ok(there) => there,
    };
    let back = match enable(other, one) {
        Err(failed) => {
            disable(one, other, there)?;
            return not_to_be_had(failed);
        }
        Ok(back) => back,
    };
    if round_trips(one, other, 1)? && round_trips(other, one, 2)? {
        return Ok(PeerAccess::Verified);
    }
    // Disables the access that was enabled here, so that the application sees the state it left and
    // can decide for itself.
    disable(one, other, there)?;
    disable(other, one, back)?;
    Ok(PeerAccess::Broken)
}

/// Maps the lack of a free peer slot to `Unsupported`. Without NVSwitch a device has at most 8
/// peers; ranks reach further devices through the host.
fn not_to_be_had(failed: Failed) -> Result<PeerAccess, Failed> {
    match failed.result {
        CUresult::CUDA_ERROR_TOO_MANY_PEERS | CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED => {
            Ok(PeerAccess::Unsupported)
        }
        _ => Err(failed),
    }
}

/// Disables access, if `enable` has enabled it.
fn disable(from: &Context, to: &Context, given: bool) -> Result<(), Failed> {
    if !given {
        return Ok(());
    }
    let _bound = from.bind()?;
    // SAFETY: the context is retained.
    unsafe { call!(cuCtxDisablePeerAccess(to.raw())) }
}

/// True if the driver reports access.
fn can(from: &Context, to: &Context) -> Result<bool, Failed> {
    let mut can = 0;
    // SAFETY: devices of this driver.
    unsafe { call!(cuDeviceCanAccessPeer(&mut can, from.device(), to.device())) }?;
    Ok(can != 0)
}

/// Enables access of `from` to memory of `to`. True if it was disabled before.
fn enable(from: &Context, to: &Context) -> Result<bool, Failed> {
    let _bound = from.bind()?;
    // SAFETY: the context is retained.
    match unsafe { call!(cuCtxEnablePeerAccess(to.raw(), 0)) } {
        Ok(()) => Ok(true),
        Err(Failed { result: CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, .. }) => Ok(false),
        Err(failed) => Err(failed),
    }
}

/// True if `to` reads what `from` has written to its memory, and `from` reads what `to` has written
/// there.
fn round_trips(from: &Arc<Context>, to: &Arc<Context>, seed: u32) -> Result<bool, Failed> {
    let memory = DeviceMemory::new(to, WORDS as usize * 4)?;
    let (differs_here, differs_there) = (DeviceMemory::new(from, 4)?, DeviceMemory::new(to, 4)?);
    let there = memory.address();
    probe(from, there, seed, 0)?;
    probe(to, there, seed, differs_there.address())?;
    probe(to, there, !seed, 0)?;
    probe(from, there, !seed, differs_here.address())?;
    let (mut here, mut there) = ([1; 4], [1; 4]);
    differs_here.read(0, &mut here)?;
    differs_there.read(0, &mut there)?;
    Ok(here == [0; 4] && there == [0; 4])
}

/// Runs the probe kernel on a device and waits for it.
pub(super) fn probe(on: &Context, memory: u64, seed: u32, differs: u64) -> Result<(), Failed> {
    const THREADS: u32 = 256;
    let (mut memory, mut words, mut seed, mut differs) = (memory, WORDS, seed, differs);
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut memory).cast(),
        (&raw mut words).cast(),
        (&raw mut seed).cast(),
        (&raw mut differs).cast(),
    ];
    on.on_the_side(|stream| {
        // SAFETY: the kernel takes these four parameters, which the driver copies during the call;
        // `memory` holds `WORDS` words, and peer access to it is enabled.
        unsafe {
            let parameters = parameters.as_mut_ptr();
            call!(cuLaunchKernel(
                on.probe(),
                1,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters,
                std::ptr::null_mut()
            ))
        }
    })
}
