//! The outer optimizer's state as bytes, for checkpoints: each rank saves its shard.

use std::ops::Range;

use super::assembly::{Assembly, Piece};
use super::{AnchorState, BucketState, OuterState};
use crate::abi::{PA_ALIGN_PACKS, PA_MAX_WORLD};
use crate::averager::coded::Reference;
use crate::averager::ParamAverager;
use crate::bucket::{Division, Run};
use crate::error::StateError;
use crate::plan::End;
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
    /// True if the ranks' values differ.
    is_mixed: bool,
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
            is_mixed: from.u8()? != 0,
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
    /// Name of the optimizer, with the number of fragments: states of another number have their
    /// elements in another order.
    fn kind_of_state(&self) -> String {
        match self.options.overlap.fragments {
            1 => self.options.outer.to_string(),
            fragments => format!("{}, {fragments} fragments", self.options.outer),
        }
    }

    /// This rank's shard of the outer optimizer's state; `None` without one. No average may be
    /// running.
    pub(crate) fn save_outer(&mut self) -> Result<Option<Vec<u8>>> {
        let _ = self.own.engine.finish(); // of a forgotten `Pending`
        self.note_anchor();
        let state = match self.anchor {
            AnchorState::ToInherit => self.state_to_pass_on(),
            _ => self.own.outer.clone(),
        };
        let Some(state) = state else { return Ok(None) };
        let Division { world, channels, chunk, is_ring } = state.division;
        let mut to = Writer::default();
        to.text(&self.kind_of_state());
        [world, channels, chunk].into_iter().for_each(|number| to.u32(number));
        to.u8(is_ring.into());
        to.u32(state.position);
        to.u8((self.anchor == AnchorState::Set).into());
        to.u8(self.mixed.into());
        let stream =
            state.read(&[state.position], ALL).map_err(|reason| self.state_error(reason))?;
        to.bytes(&stream);
        Ok(Some(to.0))
    }

    /// Replaces this rank's shard of the outer optimizer's state, from the shards that ranks of a
    /// world of any size have saved. Only after
    /// [`StateError::Memory`] the state may have changed in part.
    pub(crate) fn load_outer(&mut self, saved: &[Vec<u8>]) -> Result<(), StateError> {
        let _ = self.own.engine.finish();
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
        let expected = self.kind_of_state();
        if let Some(other) = shards.iter().find(|shard| shard.optimizer != expected) {
            return Err(StateError::OtherOuter { found: other.optimizer.into(), expected });
        }
        // Before anything is allocated for a division, which may be any.
        let is_whole =
            |shard: &Shard| own.bytes_of(&shard.division, shard.position) == shard.stream.len();
        if !shards.iter().all(is_whole) {
            return Err(StateError::Corrupt);
        }
        let pieces = |shard: &Shard| own.pieces(&shard.division, &[shard.position], ALL);
        let all: Vec<Vec<Piece>> = shards.iter().map(pieces).collect();
        let (lacks, of) = own.lacks(&all);
        if lacks > 0 {
            return Err(StateError::MissingShards { found: saved.len(), lacks, of });
        }
        let no_memory = |reason| StateError::Memory { reason };
        let mut assembly = Assembly::new(&own, ALL).map_err(no_memory)?;
        for (theirs, shard) in all.iter().zip(&shards) {
            assembly.add(theirs, 0, shard.stream);
        }
        assembly.write().map_err(no_memory)?;
        let is_set = shards.iter().all(|shard| shard.is_set);
        self.anchor = if is_set { AnchorState::Set } else { AnchorState::Missing };
        self.mixed = shards.iter().any(|shard| shard.is_mixed);
        self.inherited = None;
        // Until the first step of all ranks from what they have loaded.
        own.note_previous(false);
        self.end = End::Anchor;
        // The outer parameters are other ones than those that the ranks have had last.
        self.reference = Reference::Missing;
        Ok(())
    }
}

impl OuterState {
    /// Bytes of the stream of a rank of any division. Allocates nothing.
    fn bytes_of(&self, division: &Division, position: u32) -> usize {
        let of = |state: &BucketState| {
            let packs: u64 = division.runs(state.packs, position).map(|run| run.packs).sum();
            packs as usize * state.pack_bytes * (state.slots + 1)
        };
        self.buckets.iter().map(of).sum()
    }

    /// Number of packs of this rank's shard that no rank has, and of all its packs.
    fn lacks(&self, pieces: &[Vec<Piece>]) -> (u64, u64) {
        let mut theirs: Vec<_> = pieces.iter().flatten().filter(|piece| piece.array == 0).collect();
        theirs.sort_unstable_by_key(|piece| (piece.bucket, piece.run.first));
        // Runs without overlap, in order.
        let mut runs: Vec<(usize, u64, u64)> = vec![];
        for piece in theirs {
            let (bucket, first) = (piece.bucket, piece.run.first);
            let end = first + piece.run.packs;
            match runs.last_mut() {
                Some(last) if last.0 == bucket && last.2 >= first => last.2 = last.2.max(end),
                _ => runs.push((bucket, first, end)),
            }
        }
        let (mut lacks, mut of) = (0, 0);
        let division = self.division;
        let own = self.buckets.iter().enumerate().flat_map(|(bucket, state)| {
            division.runs(state.packs, self.position).map(move |run| (bucket, run))
        });
        for (bucket, Run { first, packs, .. }) in own {
            let end = first + packs;
            let from = runs.partition_point(|run| (run.0, run.2) <= (bucket, first));
            let near = runs[from..].iter().take_while(|run| run.0 == bucket && run.1 < end);
            let has: u64 = near.map(|run| run.2.min(end) - run.1.max(first)).sum();
            lacks += packs - has;
            of += packs;
        }
        (lacks, of)
    }
}
