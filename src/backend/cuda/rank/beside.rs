//! Launches on other devices that this device's kernels wait for, until they end or fail.

use std::sync::Arc;
use std::time::Duration;

use super::super::driver::Failed;
use super::super::launch::{Launched, Part};
use super::super::streams::Event;
use crate::backend::Arrivals;

/// The launches of an average on another device.
#[derive(Debug)]
pub(super) struct Beside {
    done: Arc<Event>,
    /// Positions of its ranks, as bits.
    ranks: u64,
    world: Arc<dyn Arrivals>,
}

/// Sets the launches beside those of the rank at `leader`, where a kernel waits for them without
/// limit. `parts` and `launched` are those of all ranks.
pub(super) fn set(
    beside: &mut Vec<Beside>,
    leader: usize,
    parts: &[Part],
    launched: &[Launched],
    world: &Arc<dyn Arrivals>,
) {
    beside.clear();
    if !parts[leader].launches.iter().any(|launch| launch.waits_for_exits()) {
        return;
    }
    let others = launched.iter().enumerate().filter(|&(position, _)| position != leader);
    for (position, launched) in others {
        let Some(Ok(done)) = launched else { continue };
        let is_there = |&(_, part): &(usize, &Part)| part.device == parts[position].device;
        let ranks = parts.iter().enumerate().filter(is_there).map(|(rank, _)| 1 << rank).sum();
        beside.push(Beside { done: done.clone(), ranks, world: world.clone() });
    }
}

/// Looks at the launches on other devices. Those that fail have ended, as has all work of their
/// context by what NVIDIA documents, so that nothing waits for them: the ranks there have departed,
/// though their own threads may not know yet. True if none is under way any more.
pub(super) fn look(beside: &[Beside]) -> bool {
    let is_over = |other: &Beside| match other.done.has_ended() {
        Ok(has_ended) => has_ended,
        Err(failed) if failed.is_of_lost_context() => {
            let is_there = |&position: &usize| other.ranks >> position & 1 != 0;
            (0..64).filter(is_there).for_each(|position| other.world.depart(position));
            true
        }
        Err(_) => false, // of this call alone
    };
    beside.iter().filter(|other| !is_over(other)).count() == 0
}

/// Waits for launches, and for those beside them.
pub(super) fn wait(done: &Event, beside: &mut Vec<Beside>) -> Result<(), Failed> {
    /// Looks before the wait sleeps.
    const AWAKE: u32 = 2000;
    let mut looks = 0;
    while !beside.is_empty() && !done.has_ended()? && !look(beside) {
        looks += 1;
        match looks {
            ..AWAKE => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(100)),
        }
    }
    beside.clear();
    done.synchronize()
}
