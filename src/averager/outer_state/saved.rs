//! The outer optimizer's state as bytes, for checkpoints: each rank saves its shard.

use std::ops::Range;

use super::assembly::{Assembly, Piece};
use super::{AnchorState, OuterState};
use crate::abi::{PA_ALIGN_PACKS, PA_MAX_WORLD};
use crate::averager::ParamAverager;
use crate::bucket::Division;
use crate::error::StateError;
use crate::saved::{Reader, Writer};
use crate::Result;

/// Name of the section.
pub(crate) const OUTER: &str = "outer";

/// All arrays of the state, the anchor included.
const ALL: Range<usize> = 0..3;

/// Most channels of a rank, as `Builder::channels` has it.
const MOST_CHANNELS: u32 = 1024;

/// A rank's state, as it was saved.
struct Shard<'a> {
    optimizer: &'a str,
    division: Division,
    position: u32,
    /// True if steps can begin from its anchor.
    is_set: bool,
    stream: &'a [u8],
}

impl<'a> Shard<'a> {
    fn from_bytes(bytes: &'a [u8]) -> Option<Shard<'a>> {
        let mut from = Reader(bytes);
        let shard = Shard {
            optimizer: from.text()?,
            division: Division {
                world: from.u32()?,
                channels: from.u32()?,
                chunk: from.u32()?,
                is_ring: from.u8()? != 0,
            },
            position: from.u32()?,
            is_set: from.u8()? != 0,
            stream: from.0,
        };
        let Division { world, channels, chunk, .. } = shard.division;
        let is_possible = (1..=PA_MAX_WORLD).contains(&world)
            && (1..=MOST_CHANNELS).contains(&channels)
            && chunk > 0
            && chunk.is_multiple_of(PA_ALIGN_PACKS)
            && shard.position < world;
        is_possible.then_some(shard)
    }
}

impl ParamAverager {
    /// This rank's shard of the outer optimizer's state; `None` without one. No average may be
    /// running.
    pub(crate) fn save_outer(&mut self) -> Result<Option<Vec<u8>>> {
        self.note_anchor();
        let Some(state) = self.state_to_pass_on() else { return Ok(None) };
        let Division { world, channels, chunk, is_ring } = state.division;
        let mut to = Writer::default();
        to.text(&self.options.outer.to_string());
        [world, channels, chunk].into_iter().for_each(|number| to.u32(number));
        to.u8(is_ring.into());
        to.u32(state.position);
        to.u8((self.anchor == AnchorState::Set).into());
        let stream = state.read(ALL).map_err(|reason| self.state_error(reason))?;
        to.bytes(&stream);
        Ok(Some(to.0))
    }

    /// Replaces this rank's shard of the outer optimizer's state, from the shards that ranks of a
    /// world of any size have saved. Only after
    /// [`StateError::Memory`] the state may have changed in part.
    pub(crate) fn load_outer(&mut self, saved: &[Vec<u8>]) -> Result<(), StateError> {
        let Some(own) = self.own.outer.clone() else {
            return match saved.is_empty() {
                true => Ok(()),
                false => Err(StateError::UnknownSection { tag: OUTER.into() }),
            };
        };
        if saved.is_empty() {
            return Err(StateError::MissingSection { tag: OUTER.into() });
        }
        let shards: Option<Vec<Shard>> = saved.iter().map(|one| Shard::from_bytes(one)).collect();
        let shards = shards.ok_or(StateError::Corrupt)?;
        let expected = self.options.outer.to_string();
        if let Some(other) = shards.iter().find(|shard| shard.optimizer != expected) {
            return Err(StateError::OtherOuter { found: other.optimizer.into(), expected });
        }
        let no_memory = |reason| StateError::Memory { reason };
        let mut assembly = Assembly::new(&own, ALL).map_err(no_memory)?;
        let mut all = vec![];
        for shard in &shards {
            let theirs = own.pieces(&shard.division, shard.position, ALL);
            if own.length(&theirs) != shard.stream.len() {
                return Err(StateError::Corrupt);
            }
            assembly.add(&theirs, 0, shard.stream);
            all.push(theirs);
        }
        let (lacks, of) = own.lacks(&all);
        if lacks > 0 {
            return Err(StateError::MissingShards { found: saved.len(), lacks, of });
        }
        assembly.write().map_err(no_memory)?;
        let is_set = shards.iter().all(|shard| shard.is_set);
        self.anchor = if is_set { AnchorState::Set } else { AnchorState::Missing };
        Ok(())
    }
}

impl OuterState {
    /// Packs of this rank's shard that no rank has, and packs in all.
    fn lacks(&self, pieces: &[Vec<Piece>]) -> (u64, u64) {
        let (mut lacks, mut of) = (0, 0);
        for own in self.pieces(&self.division, self.position, 0..1) {
            let (first, end) = (own.run.first, own.run.first + own.run.packs);
            let theirs = pieces.iter().flatten();
            let theirs = theirs.filter(|piece| (piece.bucket, piece.array) == (own.bucket, 0));
            let mut runs: Vec<(u64, u64)> = theirs
                .map(|piece| (piece.run.first.max(first), piece.run.first + piece.run.packs))
                .map(|(from, to)| (from, to.min(end)))
                .filter(|(from, to)| from < to)
                .collect();
            runs.sort_unstable();
            let mut reached = first;
            for (from, to) in runs {
                lacks += from.saturating_sub(reached);
                reached = reached.max(to);
            }
            lacks += end - reached;
            of += own.run.packs;
        }
        (lacks, of)
    }
}
