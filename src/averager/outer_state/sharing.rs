//! State of the outer optimizer that outlives its rank: the next rank of the ring maps its memory.
//!
//! No rank keeps a copy, which would be one step old after a death between averages. What a lost
//! rank has left is of the same step as the next rank's own state. A step is committed for all
//! ranks or for none. The lost rank has made it whole before it has sent its result, and without
//! that the next rank has not ended the average. The step after it begins when the next rank has
//! come to the next average. A rank that is lost while it makes a step leaves numbers from before
//! the step and from after it, each of them whole. While ranks load saved states, what one has may
//! not be what the other has; see `is_previous_alike`.
//!
//! State of ranks on CUDA devices lies in page-locked memory of the host, since memory of a device
//! ends with its process. The order above holds for what kernels store there. Only the ring
//! has ranks that share: its outer step is a launch of its own on every way that averages take, and
//! the launch that sends the result comes later on the same stream, so all stores of the step come
//! before the fence at system scope by which a chunk of the result is published (`Block::leave`).
//! The next rank has acquired every chunk before its launches end, and its host reads behind them.
//! When a process is killed, its device may end a kernel anywhere, or go on with it for a moment
//! while peers read. Kernels store 16 aligned bytes at a time, so each number is the one before
//! the step or after it; tests see that on CPUs and on simulated devices only.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::OuterState;
use crate::averager::Builder;
use crate::backend::Memory;
use crate::bucket::Division;
#[cfg(doc)]
use crate::ParamAverager;

impl Builder {
    /// State of the [outer](Self::outer) optimizer in memory that the next rank of the ring maps,
    /// too. That memory outlives the process of a lost rank, and a
    /// [recovery](ParamAverager::recover) carries its share over from there: nothing of the
    /// velocity is lost, unless the rank and the next one of the ring are lost before the first
    /// step without the first of them; [`guide::outer`](crate::guide::outer) has all cases. The
    /// state is shared memory of processes then, as mailboxes are, with two descriptors more for
    /// each averager.
    ///
    /// On CPUs it takes no more memory, and averages do nothing more for it. On CUDA devices the
    /// state moves to page-locked memory of the host, where OpenDiLoCo has its outer optimizer,
    /// too. It takes no memory of the device: 8 · N/n bytes less there for N parameters and n
    /// ranks, 12 · N/n with [`Outer::adam`](crate::Outer::adam), twice that for f64. In each outer
    /// step the kernel reads as many bytes over the device's link to the host, such as PCIe, and
    /// writes as many. That is 1/(n − 1) of what a ring of f32 through memory of the host
    /// ([`Link::Host`](crate::Link::Host)) moves in each direction; 1.5/(n − 1) with Adam.
    ///
    /// Has no effect without an outer optimizer, and for threads, which can't recover. Ranks of
    /// several [hosts](Self::hosts) recover within their host. Default: `false`.
    pub fn share_outer_state(mut self, share: bool) -> Self {
        self.share_outer_state = share;
        self
    }

    /// True if another process maps this rank's state of the outer optimizer.
    pub(in crate::averager) fn shares_state(&self) -> bool {
        let communicator = &self.communicator;
        let has_peers =
            communicator.placement().between_processes() && communicator.world_size() > 1;
        self.share_outer_state && has_peers && !self.outer.is_mean()
    }
}

/// For each rank, by the headers of all, the division of the earlier view, and the positions there
/// whose states it shows.
pub(super) fn parts<'a>(headers: impl Iterator<Item = &'a [u64]>) -> Vec<(Division, Vec<u32>)> {
    let parse = |words: &[u64]| match words[..] {
        [world, channels, chunk, is_ring, position, has_previous] => {
            let [world, channels, chunk] = [world, channels, chunk].map(|word| word as u32);
            let division = Division { world, channels, chunk, is_ring: is_ring != 0 };
            let position = position as u32;
            let previous = (has_previous != 0).then(|| (position + world - 1) % world);
            (division, vec![position], previous)
        }
        _ => (Division { world: 1, channels: 1, chunk: 1, is_ring: false }, vec![], None),
    };
    let all: Vec<_> = headers.map(parse).collect();
    let is_shown = |division: &Division, position| {
        all.iter().any(|(other, own, _)| (other, &own[..]) == (division, &[position]))
    };
    let with_previous = |(division, own, previous): &(Division, Vec<u32>, Option<u32>)| {
        let previous = previous.filter(|&previous| !is_shown(division, previous));
        (*division, own.iter().copied().chain(previous).collect())
    };
    all.iter().map(with_previous).collect()
}

impl OuterState {
    /// Memory that the next rank of the ring maps.
    pub(in crate::averager) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Sets the memory of the rank before this one in the ring.
    pub(in crate::averager) fn set_previous(&mut self, previous: Option<Arc<Memory>>) {
        self.previous = previous;
    }

    /// Notes whether the rank before has the state that belongs to this rank's.
    pub(super) fn note_previous(&self, is_alike: bool) {
        self.is_previous_alike.store(is_alike, Ordering::Relaxed);
    }

    /// Division and position of this rank, and whether it has the state of the rank before.
    pub(super) fn header(&self) -> Vec<u64> {
        let has_previous =
            self.previous.is_some() && self.is_previous_alike.load(Ordering::Relaxed);
        let Division { world, channels, chunk, is_ring } = self.division;
        let words = [world, channels, chunk, is_ring.into(), self.position];
        words.into_iter().chain([has_previous.into()]).map(u64::from).collect()
    }
}
