//! Whether two devices can use each other's memory. What the driver says of it is not enough:
//! behind some IOMMUs, switches and patched drivers, writes to a peer are lost without an error. So
//! bytes are moved and compared.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys::CUresult;

use super::driver::{call, Failed};
use super::{Context, DeviceMemory};

/// What is moved each way.
pub(super) const WORDS: u32 = 16 << 10;

/// Whether two devices can use each other's memory (P2P).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerAccess {
    /// The driver says that they cannot, in one direction at least.
    Unsupported,
    /// The driver says that they can, and bytes that were written or read that way were not what
    /// they should be.
    Broken,
    /// Bytes were moved both ways, by writing and by reading, and were right.
    Verified,
}

/// Finds out, once for two devices, and gives them access to each other's memory if it works.
pub(crate) fn access(one: &Arc<Context>, other: &Arc<Context>) -> Result<PeerAccess, Failed> {
    if one.ordinal() == other.ordinal() {
        return Ok(PeerAccess::Verified);
    }
    // By ordinals, the lower one first. Held while it is found out: who finds a pair broken takes
    // the access back, under the kernels of whoever tries the same pair at that moment.
    static KNOWN: Mutex<BTreeMap<(usize, usize), PeerAccess>> = Mutex::new(BTreeMap::new());
    // a map, whole at any time
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
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
    if moves(one, other, 1)? && moves(other, one, 2)? {
        return Ok(PeerAccess::Verified);
    }
    // As it was: a trainer that asks for it itself is told that it is there already, and may know
    // better.
    disable(one, other, there)?;
    disable(other, one, back)?;
    Ok(PeerAccess::Broken)
}

/// A device has no more than 8 peers where no switch joins them all: others are reached through the
/// host.
fn not_to_be_had(failed: Failed) -> Result<PeerAccess, Failed> {
    match failed.result {
        CUresult::CUDA_ERROR_TOO_MANY_PEERS | CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED => {
            Ok(PeerAccess::Unsupported)
        }
        _ => Err(failed),
    }
}

/// Takes back what `enable` gave, if it gave it.
fn disable(from: &Context, to: &Context, given: bool) -> Result<(), Failed> {
    if !given {
        return Ok(());
    }
    let _bound = from.bind()?;
    // SAFETY: a context that is retained.
    unsafe { call!(cuCtxDisablePeerAccess(to.raw())) }
}

/// What the driver says.
fn can(from: &Context, to: &Context) -> Result<bool, Failed> {
    let mut can = 0;
    // SAFETY: devices of this driver.
    unsafe { call!(cuDeviceCanAccessPeer(&mut can, from.device(), to.device())) }?;
    Ok(can != 0)
}

/// Lets `from` use memory of `to`. True: it could not before.
fn enable(from: &Context, to: &Context) -> Result<bool, Failed> {
    let _bound = from.bind()?;
    // SAFETY: a context that is retained.
    match unsafe { call!(cuCtxEnablePeerAccess(to.raw(), 0)) } {
        Ok(()) => Ok(true),
        Err(Failed { result: CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, .. }) => Ok(false),
        Err(failed) => Err(failed),
    }
}

/// Whether what `from` writes to memory of `to` is there, and what `to` writes is what `from`
/// reads.
fn moves(from: &Arc<Context>, to: &Arc<Context>, seed: u32) -> Result<bool, Failed> {
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

/// Runs the probe on a device and waits for it.
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
        // SAFETY: the kernel takes these four, which the driver copies now; `memory` holds so many
        // words, and peer access to it is enabled.
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
