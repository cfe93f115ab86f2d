//! Coded averages: the memory that they need, and which averages they are.

use super::table::Table;
use super::{flag, Algorithm, Builder, Call, ParamAverager, Work};
use crate::abi::{PaBucket, PA_COMMITTED, PA_FLAG_CODED, PA_PACK_BYTES};
use crate::backend::{Memory, MemorySpace};
use crate::schedule::place;
use crate::tensor::Dtype;
use crate::{Compression, Error};

/// Progress of an averager to its first coded average. The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reference {
    /// The next average is made in full, and its result becomes the reference.
    Missing,
    /// So is the average that was launched last, if it is committed.
    Launched {
        /// True if there was a reference before, which stays if that average has failed.
        was_set: bool,
    },
    Set,
}

impl Builder {
    /// Error of compression with other options: the option, what was found, and what is expected.
    pub(super) fn compression_refusal(&self) -> Option<(&'static str, String, &'static str)> {
        let found = |what: &str| format!("{what}, with Compression::{:?}", self.compression);
        match () {
            _ if self.compression == Compression::None => None,
            _ if self.algorithm == Algorithm::Direct => Some((
                "algorithm",
                found("Direct"),
                "Auto or Ring: the direct average sends nothing that could be coded",
            )),
            _ if !self.all_or_nothing => Some((
                "all_or_nothing",
                found("false"),
                "true: a coded average commits, since all ranks count from its result",
            )),
            _ if self.reject_non_finite == Some(false) => Some((
                "reject_non_finite",
                found("false"),
                "true: a value that is not finite has no code",
            )),
            _ if self.stage.is_some() => Some((
                "stage",
                found("one"),
                "none: what a stage leaves is rounded by the code on its way to the ranks",
            )),
            _ if self.outer.mixes() => Some((
                "outer",
                found(&self.outer.to_string()),
                "no share to keep: all ranks count from the values that they have alike",
            )),
            _ => None,
        }
    }

    /// Error of compression for the first tensor that is not of f32.
    pub(super) fn uncoded(&self, table: &Table) -> Option<Error> {
        let bucket = table.buckets.iter().find(|bucket| bucket.dtype != Dtype::F32)?;
        (self.compression != Compression::None).then(|| Error::InvalidOption {
            rank: self.communicator.rank(),
            option: "compression",
            found: format!("{:?}, with {}", self.compression, table.describe(bucket.tensors[0])),
            expected: "tensors of f32 alone; others in an averager of their own, without \
                       compression",
        })
    }
}

/// Allocates the reference and the residual of a bucket. Behind the residual lies a word for each
/// channel, which says what it is.
pub(super) fn memory(
    space: &MemorySpace,
    raw: &mut PaBucket,
    channels: u32,
) -> Result<[Memory; 2], String> {
    let bytes = raw.packs as usize * PA_PACK_BYTES as usize;
    let words = channels as usize * size_of::<u32>();
    let both = [Memory::new(space, bytes)?, Memory::new(space, bytes + words)?];
    (raw.reference, raw.residual) = (both[0].address(), both[1].address());
    raw.residual_state = raw.residual + bytes as u64;
    Ok(both)
}

impl ParamAverager {
    /// True if averages can be coded.
    pub(super) fn has_code(&self) -> bool {
        !self.own.coded.is_empty()
    }

    /// True if this call's average is coded. Averages that give the ranks values to begin with are
    /// made in full, and so is the first one after them that all ranks take part in with their own.
    pub(super) fn is_coded(&mut self, call: Call) -> bool {
        self.note_reference();
        self.reference == Reference::Set && !place::sets_values(call.place)
    }

    /// True if averages can be coded from now on, or are never. The same on every rank.
    pub(crate) fn has_reference(&mut self) -> bool {
        if self.under_way.is_some() {
            return true; // or it would not have begun; its records are being written
        }
        let _ = self.own.engine.finish(); // of a forgotten `Pending`
        self.note_reference();
        !self.has_code() || self.reference == Reference::Set
    }

    /// Flag of a kernel that goes on from the average that was launched last.
    pub(super) fn coded_flag(&self) -> u32 {
        flag(PA_FLAG_CODED, self.compression != Compression::None)
    }

    /// Notes that an average is launched.
    pub(super) fn launched_coded(&mut self, call: Call, is_coded: bool) {
        self.compression = match is_coded {
            true => self.options.compression,
            false => Compression::None,
        };
        // Members of a world that admits a process keep values of their own, which may differ.
        // All other averages in full are of the whole model, and so give the whole reference: those
        // of a fragment or of a copy begin with one, and are coded.
        if self.has_code() && !is_coded && call.place != place::ADMISSION {
            debug_assert!(call.fragment.is_none() && call.work == Work::InPlace, "{call:?}");
            self.reference = Reference::Launched { was_set: self.reference == Reference::Set };
        }
    }

    /// Notes whether the last average has given the reference.
    fn note_reference(&mut self) {
        if let Reference::Launched { was_set } = self.reference {
            let is_set = was_set || self.ended().all(|status| status.outcome == PA_COMMITTED);
            self.reference = if is_set { Reference::Set } else { Reference::Missing };
        }
    }
}
