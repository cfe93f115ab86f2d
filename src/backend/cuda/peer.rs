//! Peer access between two devices of one process. The driver's answer is not sufficient: behind
//! some IOMMUs, switches and patched drivers, writes to a peer are lost without an error, though
//! copies may arrive. So a probe does what the ring does, see `probe`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::driver::Failed;
#[cfg(processes)]
use super::facts::connection;
#[cfg(processes)]
use super::trial::can;
use super::trial::find;
pub(crate) use super::trial::{is_allowed, Link};
use super::Context;
#[cfg(processes)]
use crate::backend::proximity::Connection;
use crate::backend::proximity::PeerAccess;
use crate::sync::lock;

/// Tests the access between two devices once, and leaves it enabled if it works.
pub(crate) fn access(one: &Arc<Context>, other: &Arc<Context>) -> Result<PeerAccess, Failed> {
    link(one, other).map(|link| link.access)
}

/// True if each device can access tensors on the other, as the direct average does.
pub(crate) fn is_direct(one: &Arc<Context>, other: &Arc<Context>) -> Result<bool, Failed> {
    link(one, other).map(|link| link.is_direct)
}

/// [`access`], with rates.
pub(crate) fn link(one: &Arc<Context>, other: &Arc<Context>) -> Result<Link, Failed> {
    if one.ordinal() == other.ordinal() {
        return Ok(Link { access: PeerAccess::Verified, rates: None, is_direct: true });
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
        true => Link { access: PeerAccess::Broken, rates: None, is_direct: false },
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
