//! Peer access between two devices of one process. The driver's answer is not sufficient: behind
//! some IOMMUs, switches and patched drivers, writes to a peer are lost without an error, though
//! copies may arrive. So a probe does what the ring does, see `probe`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::sys::CUresult;

use super::driver::{call, Failed};
use super::probe::{self, Path, Probed};
#[cfg(processes)]
use super::topology::connection;
use super::Context;
#[cfg(processes)]
use crate::backend::proximity::Connection;
use crate::backend::proximity::{PeerAccess, PeerRates};
use crate::sync::lock;

/// Factor by which memory of the host must be faster than the link for mailboxes to be there: a
/// mailbox in memory of the host takes bandwidth of the host that others may need.
const MUCH_FASTER: f64 = 1.5;

/// Throughput in GB/s below which memory of the host is not a fast path: that of 4 lanes of PCIe
/// 3.0. Rates of a simulated device, which is slower, decide nothing.
const FAST_HOST: f64 = 3.0;

/// Peer access between two devices, and what the paths between them carry, if that was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) access: PeerAccess,
    pub(crate) rates: Option<PeerRates>,
}

/// False if `PARAM_AVERAGER_P2P=0` forbids peer access.
pub(crate) fn is_allowed() -> bool {
    std::env::var_os("PARAM_AVERAGER_P2P").is_none_or(|value| value != "0")
}

/// True if `PARAM_AVERAGER_P2P=1` asks for peer access wherever data arrive, at whatever rate.
fn is_asked_for() -> bool {
    std::env::var_os("PARAM_AVERAGER_P2P").is_some_and(|value| value == "1")
}

/// Tests the access between two devices once, and leaves it enabled if it works.
pub(crate) fn access(one: &Arc<Context>, other: &Arc<Context>) -> Result<PeerAccess, Failed> {
    link(one, other).map(|link| link.access)
}

/// [`access`], with rates.
pub(crate) fn link(one: &Arc<Context>, other: &Arc<Context>) -> Result<Link, Failed> {
    if one.ordinal() == other.ordinal() {
        return Ok(Link { access: PeerAccess::Verified, rates: None });
    }
    // By ordinals, the lower one first. Locked during a test: a test that fails disables the
    // access, which must not happen under the kernels of a concurrent test of the same pair.
    static KNOWN: Mutex<BTreeMap<(usize, usize), Link>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&KNOWN);
    let pair = (one.ordinal().min(other.ordinal()), one.ordinal().max(other.ordinal()));
    if let Some(&known) = known.get(&pair) {
        return Ok(known);
    }
    #[cfg(processes)]
    let is_broken = is_risky(one, other)? && super::probe_child::finds_it_broken(one, other);
    #[cfg(not(processes))]
    let is_broken = false;
    let found = match is_broken {
        true => Link { access: PeerAccess::Broken, rates: None },
        false => find(one, other)?,
    };
    known.insert(pair, found);
    Ok(found)
}

/// True if a child process is to try first: there is a link to try, and it is not NVLink.
#[cfg(processes)]
fn is_risky(one: &Context, other: &Context) -> Result<bool, Failed> {
    #[cfg(feature = "__testing")]
    if std::env::var_os("PA_PROBE_CHILD").is_some() {
        return Ok(true);
    }
    let is_said = is_allowed() && can(one, other)? && can(other, one)?;
    Ok(is_said && connection(one, other)? != Connection::NvLink)
}

/// Tries the access in this process.
pub(super) fn find(one: &Arc<Context>, other: &Arc<Context>) -> Result<Link, Failed> {
    let without = |access| Ok(Link { access, rates: None });
    if !is_allowed() {
        return without(PeerAccess::Disabled);
    }
    if !can(one, other)? || !can(other, one)? {
        return without(PeerAccess::Unsupported);
    }
    let there = match enable(one, other) {
        Err(failed) => return not_to_be_had(failed).and_then(without),
        Ok(there) => there,
    };
    let back = match enable(other, one) {
        Err(failed) => {
            disable(one, other, there)?;
            return not_to_be_had(failed).and_then(without);
        }
        Ok(back) => back,
    };
    for context in [one, other] {
        probe::warm_up(context)?;
    }
    let push = probe::peer(one, other, Path::Push)?;
    if push.found.is_right {
        let pull = probe::peer(one, other, Path::Pull)?;
        if pull.found.is_right {
            let host = probe::host(one, other)?;
            let copy = probe::copies(one, other, push.sizes)?;
            let rates = PeerRates {
                push: push.found.rate,
                pull: pull.found.rate,
                host: host.found.rate,
                copy,
            };
            let access = match is_asked_for() {
                true => PeerAccess::Verified,
                false => judge(&push, &host),
            };
            return Ok(Link { access, rates: Some(rates) });
        }
    }
    // Disables the access that was enabled here, so that the application sees the state it left and
    // can decide for itself.
    disable(one, other, there)?;
    disable(other, one, back)?;
    without(PeerAccess::Broken)
}

/// Access over a link on which data arrive, compared with memory of the host.
fn judge(push: &Probed, host: &Probed) -> PeerAccess {
    let rate = host.found.rate;
    match host.is_telling() && rate > FAST_HOST && rate > MUCH_FASTER * push.found.rate {
        true => PeerAccess::Slow,
        false => PeerAccess::Verified,
    }
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::cuda::probe::Found;

    fn probed(rate: f64, sizes: usize) -> Probed {
        Probed { found: Found { is_right: true, rate, took: Duration::ZERO }, sizes }
    }

    #[test]
    fn a_link_that_is_much_slower_than_the_host_is_slow() {
        // A fabric that writes at 2.6 GB/s.
        assert_eq!(judge(&probed(2.6, 3), &probed(21.0, 4)), PeerAccess::Slow);
        assert_eq!(judge(&probed(22.0, 4), &probed(24.0, 4)), PeerAccess::Verified);
        // Nothing is concluded from the latency of small probes, nor from a simulation.
        assert_eq!(judge(&probed(1.0, 1), &probed(10.0, 1)), PeerAccess::Verified);
        assert_eq!(judge(&probed(0.1, 3), &probed(0.3, 3)), PeerAccess::Verified);
    }
}
