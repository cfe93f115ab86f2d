//! Values that the ranks begin with, and copies of one rank's values.

use super::table::Table;
use super::{Call, Lend, Outcome, ParamAverager, Report};
use crate::backend::MemorySpace;
use crate::hash::Digest;
use crate::notice;
use crate::schedule::place;
use crate::{Error, Result};

/// Values that the tensors of all ranks hold when [`Builder::build`](crate::Builder::build)
/// returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Start {
    /// The values of this rank, copied to all others. `Rank(0)` is the default, as in PyTorch's
    /// `DistributedDataParallel`: ranks that begin with different weights would average unrelated
    /// models.
    Rank(usize),
    /// The mean of all ranks' values.
    Mean,
    /// Each rank's own values. They are read once, to compare a digest of them with the peers':
    /// [`differing_ranks`](ParamAverager::differing_ranks). On a CUDA device this waits for all of
    /// the device's work and copies the tensors to the host. Refused with an
    /// [outer optimizer](crate::Builder::outer), whose steps begin from values that all ranks have.
    Own,
}

impl ParamAverager {
    /// Replaces every tensor by rank `root`'s, bit for bit, on all ranks. Collective.
    ///
    /// [`build`](crate::Builder::build) does it by itself, from rank 0, unless
    /// [`start_from`](crate::Builder::start_from) says otherwise, and a process that
    /// [joins](crate::Communicator::join) gets the model when it is admitted. So it is needed only
    /// where one rank has changed its tensors on its own, such as by loading a checkpoint.
    ///
    /// # Errors
    /// As [`average`](ParamAverager::average). [`Error::InvalidOption`] if no rank has this number,
    /// and [`Error::CallsDiffer`] if another rank passes another root or makes another call.
    pub fn broadcast<P: Lend + ?Sized>(&mut self, root: usize, params: &mut P) -> Result<Report> {
        let made = self.run(params, Call::copy_of(root, self.rank())).map(Outcome::report);
        // Of a root that does not exist, all ranks have weight 0: so peers need not wait.
        let report = made.map_err(|error| match error {
            Error::AllWeightsZero => Error::InvalidOption {
                rank: self.rank(),
                option: "root",
                found: format!("{root}, in a world of {}", self.world_size()),
                expected: "the number of a rank, from 0",
            },
            error => error,
        })?;
        self.unless_late(report)
    }

    /// Gives the tensors of a new averager the values that all ranks begin with.
    pub(super) fn start_values<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<()> {
        let is_again = self.agreement.is_again(); // its tensors are trained
        if self.is_alone() || is_again || self.admitted.is_some() {
            return Ok(());
        }
        match self.options.start {
            start if self.world_size() == 1 && start != Start::Own => {
                let call = Call { place: place::START, ..Call::by_hand(None) };
                let report = self.run(params, call.with_digest_of_place()).map(Outcome::report)?;
                self.unless_late(report).map(drop)
            }
            // Not a refusal of the handshake: later views, which may be smaller, compare the
            // option, too, and copy nothing. It is the same on every rank.
            Start::Rank(root) if root >= self.world_size() => Err(Error::InvalidOption {
                rank: self.rank(),
                option: "start_from",
                found: format!("Rank({root}), in a world of {}", self.world_size()),
                expected: "the number of a rank, from 0, or Mean, or Own",
            }),
            Start::Rank(root) => self.broadcast(root, params).map(drop),
            Start::Mean => {
                let call = Call { place: place::START, ..Call::by_hand(None) };
                let report = self.run(params, call.with_digest_of_place()).map(Outcome::report)?;
                self.unless_late(report).map(drop)
            }
            Start::Own => {
                let differing = self.differing_ranks();
                if !differing.is_empty() && self.rank() == 0 {
                    let text = format!(
                        "the ranks begin with different values: {differing:?} differ from rank 0"
                    );
                    notice::warn(Some(0), &text);
                }
                Ok(())
            }
        }
    }

    /// Ranks whose values differed from rank 0's when this averager was built with [`Start::Own`];
    /// the same on every rank. Empty for any other start, and since a process has joined.
    pub fn differing_ranks(&self) -> Vec<usize> {
        let handshakes = &self.agreement.handshakes;
        if handshakes.iter().any(|shown| shown.digest.is_none()) {
            return vec![];
        }
        let differs = |&rank: &usize| handshakes[rank].digest != handshakes[0].digest;
        (0..handshakes.len()).filter(differs).collect()
    }
}

impl Call {
    /// A copy of rank `root`'s tensors to all ranks.
    fn copy_of(root: usize, rank: usize) -> Call {
        let weight = Some(if root == rank { 1.0 } else { 0.0 });
        Call { place: place::copy_of(root), ..Call::by_hand(weight) }.with_digest_of_place()
    }

    /// The same call, which fits only calls of the same place.
    fn with_digest_of_place(self) -> Call {
        Call { schedule: place::digest(self.place), ..self }
    }
}

/// Digest of all tensors' values.
///
/// # Safety
/// The table has the addresses of tensors that are valid now and that nothing else uses, except for
/// work on their device, which is waited for.
pub(super) unsafe fn digest(table: &Table, space: &MemorySpace) -> Result<u64, String> {
    /// Bytes that are read at once.
    const PIECE: usize = 16 << 20;
    let mut digest = Digest::default();
    let mut copy = vec![];
    for bucket in &table.buckets {
        for segment in &bucket.segments {
            let bytes = segment.elements as usize * bucket.dtype.size();
            for start in (0..bytes).step_by(PIECE) {
                let (address, piece) = (segment.address + start as u64, PIECE.min(bytes - start));
                match space {
                    // SAFETY: part of a tensor; the caller's promise.
                    MemorySpace::Host => digest
                        .add(unsafe { std::slice::from_raw_parts(address as *const u8, piece) }),
                    MemorySpace::Cuda(context) => {
                        copy.resize(piece, 0);
                        // SAFETY: as above.
                        unsafe { context.read_behind_all(address, &mut copy) }?;
                        digest.add(&copy);
                    }
                }
            }
        }
    }
    Ok(digest.value())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;

    fn of(values: &mut [Vec<f32>]) -> u64 {
        let (table, problem) =
            Table::new(&mut &mut *values, Device::cpu(), MemorySpace::Host, vec![], 1);
        assert!(problem.is_none());
        // SAFETY: the tensors are borrowed.
        unsafe { digest(&table, &MemorySpace::Host) }.unwrap()
    }

    #[test]
    fn digest_tells_every_bit_and_every_order_apart() {
        let mut values = vec![vec![1.0f32, 2.0, 3.0], vec![4.0, 5.0, 6.0], vec![7.0]];
        let first = of(&mut values);
        assert_eq!(first, of(&mut values.clone()));
        for (tensor, element) in [(0, 0), (0, 2), (1, 1), (2, 0)] {
            for bit in 0..32 {
                let mut other = values.clone();
                let value = &mut other[tensor][element];
                *value = f32::from_bits(value.to_bits() ^ 1 << bit);
                assert_ne!(first, of(&mut other), "bit {bit} of {tensor}, {element}");
            }
        }
        values.swap(0, 1);
        assert_ne!(first, of(&mut values));
        values.swap(0, 1);
        values[0].swap(0, 1);
        assert_ne!(first, of(&mut values));
    }
}
