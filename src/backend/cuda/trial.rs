//! A trial of peer access between two devices, and what it tells about the paths between them.

use std::sync::Arc;

use cudarc::driver::sys::CUresult;

use super::driver::{call, Failed};
use super::probe::{self, Path, Probed};
use super::Context;
use crate::backend::proximity::{PeerAccess, PeerRates};

/// Factor by which another path must be faster than writes to a peer for mailboxes to be there. In
/// memory of the host they take bandwidth of the host that others may need; and rates vary.
const MUCH_FASTER: f64 = 1.5;

/// Throughput in GB/s below which another path is not fast: that of 4 lanes of PCIe 3.0. Rates of a
/// simulated device, which is slower, decide nothing.
const FAST: f64 = 3.0;

/// Peer access between two devices, and what the paths between them carry, if that was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Link {
    pub(crate) access: PeerAccess,
    pub(crate) rates: Option<PeerRates>,
    /// True if each device can access tensors on the other, as the direct average does.
    pub(crate) is_direct: bool,
}

/// False if `PARAM_AVERAGER_P2P=0` forbids peer access.
pub(crate) fn is_allowed() -> bool {
    std::env::var_os("PARAM_AVERAGER_P2P").is_none_or(|value| value != "0")
}

/// True if `PARAM_AVERAGER_P2P=1` asks for peer access wherever data arrive, at whatever rate.
fn is_asked_for() -> bool {
    std::env::var_os("PARAM_AVERAGER_P2P").is_some_and(|value| value == "1")
}

/// Tries the access in this process.
pub(super) fn find(one: &Arc<Context>, other: &Arc<Context>) -> Result<Link, Failed> {
    let without = |access| Ok(Link { access, rates: None, is_direct: false });
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
                false => judge(&push, &pull, &host),
            };
            let is_right = |path| Ok(probe::direct(one, other, path)?.found.is_right);
            let is_direct = is_right(Path::Push)? && is_right(Path::Pull)?;
            return Ok(Link { access, rates: Some(rates), is_direct });
        }
    }
    // Disables the access that was enabled here, so that the application sees the state it left and
    // can decide for itself.
    disable(one, other, there)?;
    disable(other, one, back)?;
    without(PeerAccess::Broken)
}

/// Access over a link on which data arrive: writes, compared with reads and with memory of the
/// host.
fn judge(push: &Probed, pull: &Probed, host: &Probed) -> PeerAccess {
    let is_much_faster = |path: &Probed, than: f64| {
        let rate = path.found.rate;
        path.is_telling() && rate > FAST && rate > MUCH_FASTER * than
    };
    let is_read = is_much_faster(pull, push.found.rate);
    let best = if is_read { pull.found.rate } else { push.found.rate };
    match () {
        () if is_much_faster(host, best) => PeerAccess::Slow,
        () if is_read => PeerAccess::Pull,
        () => PeerAccess::Verified,
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
pub(super) fn can(from: &Context, to: &Context) -> Result<bool, Failed> {
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

    use super::super::probe::Found;
    use super::*;

    fn probed(rate: f64, sizes: usize) -> Probed {
        Probed { found: Found { is_right: true, rate, took: Duration::ZERO }, sizes }
    }

    #[test]
    fn the_path_is_chosen_that_is_much_faster_than_the_others() {
        use PeerAccess::{Pull, Slow, Verified};
        // Writes, reads and memory of the host in GB/s, the number of sizes probed of each.
        for (expected, [push, pull, host], sizes) in [
            (Verified, [370.0, 350.0, 50.0], 4),
            (Verified, [22.0, 18.0, 24.0], 4),
            (Verified, [22.0, 30.0, 24.0], 4),
            (Slow, [2.6, 2.4, 21.0], 4),
            (Pull, [2.6, 52.0, 21.0], 4), // such a fabric exists, and its opposite
            (Verified, [52.0, 2.6, 21.0], 4),
            (Slow, [1.0, 4.0, 21.0], 4),
            (Pull, [2.6, 20.0, 21.0], 4),
            // Nothing is concluded from the latency of small probes, nor from a simulation.
            (Verified, [1.0, 9.0, 10.0], 1),
            (Verified, [0.1, 0.9, 0.3], 3),
        ] {
            let [push, pull, host] = [push, pull, host].map(|rate| probed(rate, sizes));
            assert_eq!(judge(&push, &pull, &host), expected, "{push:?} {pull:?} {host:?}");
        }
    }
}
