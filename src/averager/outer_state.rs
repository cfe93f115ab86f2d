//! State of the outer optimizer: this rank's shard of it, and its way to the ranks of a later view.

#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::Arc;

use super::table::Table;
use super::{flag, Builder, Call, ParamAverager};
use crate::abi::{
    PaBucket, PaOuter, PaStatus, PA_COMMITTED, PA_FLAG_STEP, PA_FLAG_WHOLE, PA_PACK_BYTES,
};
use crate::backend::Memory;
use crate::bucket::{self, Division, Run};
use crate::plan::{End, Launch, Plan};
use crate::schedule::place;
use crate::tensor::Dtype;
use crate::world::Shown;
use crate::{Error, Result};

/// The launches of an averager's averages, by their end.
pub(super) struct Launches {
    mean: Vec<Launch>,
    anchor: Vec<Launch>,
    step: Vec<Launch>,
    mix: Vec<Launch>,
}

impl Launches {
    pub(super) fn new(options: &Builder, ring: bool) -> Launches {
        let world = options.communicator.world_size() as u32;
        let to = |end| {
            Plan::new(ring, options.commits_late(), options.rejects_non_finite(), end)
                .launches(world, options.is_sequenced())
        };
        let with_state = |end| if options.outer.is_mean() { vec![] } else { to(end) };
        Launches {
            mean: to(End::Mean),
            anchor: with_state(End::Anchor),
            step: with_state(End::Step),
            mix: with_state(End::Mix),
        }
    }

    pub(super) fn to(&self, end: End) -> &[Launch] {
        match end {
            End::Mean => &self.mean,
            End::Anchor => &self.anchor,
            End::Step => &self.step,
            End::Mix => &self.mix,
        }
    }
}

/// Progress of an averager with an outer optimizer to its first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AnchorState {
    /// The state of an earlier view is to be taken over, at the first average.
    ToInherit,
    /// The next average gives the anchor.
    Missing,
    /// The average that was launched last gives the anchor, if it is committed.
    Launched {
        /// True if there was an anchor before, which stays if that average has failed.
        was_set: bool,
    },
    Set,
}

/// The state of the outer optimizer on one rank: for each bucket the anchor and the slots, each
/// `[channels][shard_packs]` of elements in the type of sums.
#[derive(Debug)]
pub(super) struct OuterState {
    pub(super) division: Division,
    /// Ring position of this rank.
    position: u32,
    buckets: Vec<BucketState>,
}

#[derive(Debug)]
struct BucketState {
    memory: Memory,
    /// The mean before the commit, where it is wider than the tensors.
    mean: Option<Memory>,
    packs: u64,
    /// Bytes of the state of a pack, in each array.
    pack_bytes: usize,
    /// Bytes of an array.
    array: usize,
    slots: usize,
}

impl OuterState {
    /// Allocates zeroed state.
    pub(super) fn new(
        options: &Builder,
        table: &Table,
        chunk: u32,
        channels: u32,
        is_ring: bool,
    ) -> Result<OuterState, String> {
        let (communicator, slots) = (&options.communicator, options.outer.slots());
        let world = communicator.world_size() as u32;
        let space = communicator.space();
        let mut buckets = vec![];
        for bucket in &table.buckets {
            let each = bucket::channel_packs(bucket.packs, channels);
            let shard = bucket::shard_packs(each, world, chunk) * u64::from(channels);
            let pack_bytes = pack_bytes(bucket.dtype);
            let array = shard as usize * pack_bytes;
            let is_wider = pack_bytes > PA_PACK_BYTES as usize;
            let mean = match is_ring && is_wider {
                true => Some(Memory::new(space, array)?),
                false => None,
            };
            let memory = Memory::new(space, array * (slots + 1))?;
            let packs = bucket.packs;
            buckets.push(BucketState { memory, mean, packs, pack_bytes, array, slots });
        }
        Ok(OuterState {
            division: Division { world, channels, chunk, is_ring },
            position: communicator.placement().position(communicator.rank()) as u32,
            buckets,
        })
    }

    /// Completes the kernels' table of a bucket.
    pub(super) fn complete(&mut self, index: usize, raw: &mut PaBucket, outer: PaOuter) {
        let state = &self.buckets[index];
        raw.state = state.memory.address();
        raw.outer = outer;
        if self.division.is_ring {
            raw.mean = state.mean.as_ref().map_or(raw.shard, Memory::address);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let of = |state: &BucketState| {
            state.memory.bytes() + state.mean.as_ref().map_or(0, Memory::bytes)
        };
        self.buckets.iter().map(of).sum()
    }

    /// Pieces of some arrays of the state of a rank at `position`, in the order of its stream of
    /// bytes. Array 0 is the anchor.
    fn pieces(&self, division: &Division, position: u32, arrays: Range<usize>) -> Vec<Piece> {
        let mut pieces = vec![];
        let mut before = 0;
        for (bucket, state) in self.buckets.iter().enumerate() {
            let runs = division.shard(state.packs, position);
            for array in arrays.clone().filter(|&array| array <= state.slots) {
                for &run in &runs {
                    pieces.push(Piece { bucket, array, run, before });
                    before += run.packs as usize * state.pack_bytes;
                }
            }
        }
        pieces
    }

    /// Reads this rank's state as one stream of bytes. No average may be running.
    pub(super) fn read(&self, arrays: Range<usize>) -> Result<Vec<u8>, String> {
        let pieces = self.pieces(&self.division, self.position, arrays);
        let mut bytes = vec![];
        for (index, state) in self.buckets.iter().enumerate() {
            let mut all = reserved(state.memory.bytes())?;
            // SAFETY: this rank's memory, which no average uses now.
            unsafe { state.memory.read(&mut all) }?;
            for piece in pieces.iter().filter(|piece| piece.bucket == index) {
                let at = piece.array * state.array + piece.run.at as usize * state.pack_bytes;
                bytes.extend_from_slice(&all[at..][..piece.bytes(state)]);
            }
        }
        Ok(bytes)
    }
}

/// One run of one array, in a stream of bytes.
#[derive(Clone, Copy, Debug)]
struct Piece {
    bucket: usize,
    array: usize,
    run: Run,
    /// Bytes of the stream before it.
    before: usize,
}

impl Piece {
    fn bytes(&self, state: &BucketState) -> usize {
        self.run.packs as usize * state.pack_bytes
    }
}

/// New contents of a rank's state, put together of what ranks of other views have.
pub(super) struct Assembly<'a> {
    state: &'a OuterState,
    own: Vec<Piece>,
    /// Contents of the memory of each bucket.
    contents: Vec<Vec<u8>>,
}

impl<'a> Assembly<'a> {
    /// A state of zeros, of which `arrays` are to be filled. The others stay as they are.
    pub(super) fn new(state: &'a OuterState, arrays: Range<usize>) -> Result<Self, String> {
        let own = state.pieces(&state.division, state.position, arrays.clone());
        let mut contents = vec![];
        for bucket in &state.buckets {
            let mut all = reserved(bucket.memory.bytes())?;
            // SAFETY: as in `read`.
            unsafe { bucket.memory.read(&mut all) }?;
            for array in arrays.clone().filter(|&array| array <= bucket.slots) {
                all[array * bucket.array..][..bucket.array].fill(0);
            }
            contents.push(all);
        }
        Ok(Assembly { state, own, contents })
    }

    /// Copies what this rank needs of a part of another rank's stream, which begins `at` bytes into
    /// it. `theirs` are the pieces of that rank.
    fn add(&mut self, theirs: &[Piece], at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        let from = theirs.partition_point(|piece| piece.before <= at).saturating_sub(1);
        for piece in theirs[from..].iter().take_while(|piece| piece.before < end) {
            let bucket = &self.state.buckets[piece.bucket];
            let size = bucket.pack_bytes as u64;
            // In bytes of the array's index space.
            let start = piece.run.first * size;
            let shown = start + (at.saturating_sub(piece.before)) as u64
                ..start + (end - piece.before).min(piece.bytes(bucket)) as u64;
            for own in &self.own {
                if (own.bucket, own.array) != (piece.bucket, piece.array) {
                    continue;
                }
                let mine = own.run.first * size..(own.run.first + own.run.packs) * size;
                let both = shown.start.max(mine.start)..shown.end.min(mine.end);
                if both.is_empty() {
                    continue;
                }
                let to = own.array * bucket.array
                    + (own.run.at * size + (both.start - mine.start)) as usize;
                let skipped =
                    (piece.before as i64 - at as i64 + (both.start - start) as i64) as usize;
                let count = (both.end - both.start) as usize;
                self.contents[own.bucket][to..to + count]
                    .copy_from_slice(&bytes[skipped..skipped + count]);
            }
        }
    }

    /// Writes the state. No average may be running.
    fn write(self) -> Result<(), String> {
        for (bucket, contents) in self.state.buckets.iter().zip(&self.contents) {
            // SAFETY: as in `read`.
            unsafe { bucket.memory.overwrite(contents) }?;
        }
        Ok(())
    }
}

/// Bytes of the state of a pack.
fn pack_bytes(dtype: Dtype) -> usize {
    PA_PACK_BYTES as usize * if dtype.size() == 2 { 2 } else { 1 }
}

fn reserved(bytes: usize) -> Result<Vec<u8>, String> {
    let mut all = vec![];
    all.try_reserve_exact(bytes).map_err(|error| error.to_string())?;
    all.resize(bytes, 0);
    Ok(all)
}

impl ParamAverager {
    /// True if averages make outer steps.
    pub(crate) fn has_outer(&self) -> bool {
        self.own.outer.is_some()
    }

    /// Error of `LocalSgd::done` where ranks keep a share of their values. The ranks that are not
    /// done make due averages, which mix, or the last one, which does not.
    pub(crate) fn refusal_of_done(&self) -> Option<Error> {
        self.options.outer.mixes().then(|| Error::InvalidOption {
            rank: self.rank(),
            option: "outer",
            found: format!("{}, with LocalSgd::done", self.options.outer),
            expected: "no share to keep; or LocalSgd::finish, after as many steps on every rank",
        })
    }

    /// End of this call's average.
    pub(super) fn end_of(&self, call: Call) -> End {
        match (&self.own.outer, self.anchor) {
            (None, _) => End::Mean,
            (Some(_), AnchorState::Set) if !place::sets_values(call.place) => {
                match self.options.outer.mixes() && call.place != place::FINISH {
                    true => End::Mix,
                    false => End::Step,
                }
            }
            _ => End::Anchor,
        }
    }

    /// Flags of an average with this end.
    pub(super) fn flags_of(end: End) -> u32 {
        flag(PA_FLAG_WHOLE, end != End::Mix)
            | flag(PA_FLAG_STEP, matches!(end, End::Step | End::Mix))
    }

    /// State of the outer optimizer for an averager in a later view.
    pub(super) fn state_to_pass_on(&self) -> Option<Arc<OuterState>> {
        match self.anchor {
            AnchorState::ToInherit => self.inherited.clone(),
            _ => self.own.outer.clone(),
        }
    }

    /// Brings the outer optimizer's state up to date before a launch. Collective where the state of
    /// an earlier view is taken over.
    pub(super) fn prepare_outer(&mut self) -> Result<()> {
        if let AnchorState::Launched { was_set } = self.anchor {
            let is_committed = |status: PaStatus| status.outcome == PA_COMMITTED;
            let is_set = was_set || self.ended().all(is_committed);
            self.anchor = if is_set { AnchorState::Set } else { AnchorState::Missing };
        }
        if self.anchor == AnchorState::ToInherit {
            self.take_over()?;
            self.inherited = None;
            self.anchor = AnchorState::Missing;
        }
        Ok(())
    }

    /// Takes over the outer optimizer's slots from an earlier view, whose ranks had other shards.
    /// Every rank shows what it has, piece by piece, and takes what belongs to its shard now.
    fn take_over(&mut self) -> Result<()> {
        /// Bytes in a message. As text, a word has up to 21 bytes, and a message between processes
        /// takes 64 KiB.
        const PIECE: usize = 16 << 10;
        let Some(own) = self.own.outer.clone() else { return Ok(()) };
        let slots = 1..3;
        let rank = self.rank();
        let no_memory = |reason| Error::Memory { rank, reason };
        let old = self.inherited.clone();
        let stream = old.as_ref().map_or(Ok(vec![]), |old| old.read(slots.clone()));
        let stream = stream.map_err(no_memory)?;
        let shown = old.as_ref().map(|old| {
            let Division { world, channels, chunk, is_ring } = old.division;
            [world, channels, chunk, is_ring.into(), old.position].map(u64::from)
        });
        let call = "the outer optimizer's state, at the first average of a view";
        let words = shown.map_or(vec![], Vec::from);
        let headers = self.exchange(Shown { call: call.into(), words })?;
        let pieces: Vec<Vec<Piece>> = headers
            .iter()
            .map(|shown| match shown.words[..] {
                [world, channels, chunk, is_ring, position] => {
                    let [world, channels, chunk] = [world, channels, chunk].map(|word| word as u32);
                    let division = Division { world, channels, chunk, is_ring: is_ring != 0 };
                    own.pieces(&division, position as u32, slots.clone())
                }
                _ => vec![],
            })
            .collect();
        self.lost_state = own.lost_share(&pieces);
        let mut assembly = Assembly::new(&own, slots).map_err(no_memory)?;
        let length = |pieces: &Vec<Piece>| {
            pieces.last().map_or(0, |last| last.before + last.bytes(&own.buckets[last.bucket]))
        };
        let longest = pieces.iter().map(length).max().unwrap_or(0);
        for at in (0..longest).step_by(PIECE) {
            let part = stream.get(at..).unwrap_or_default();
            let words = to_words(&part[..part.len().min(PIECE)]);
            let all = self.exchange(Shown { call: format!("{call}, from byte {at}"), words })?;
            for (theirs, shown) in pieces.iter().zip(all) {
                let bytes: Vec<u8> =
                    shown.words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let left = length(theirs).saturating_sub(at);
                assembly.add(theirs, at, &bytes[..bytes.len().min(left)]);
            }
        }
        assembly.write().map_err(no_memory)
    }
}

impl OuterState {
    /// Share of the first slot that no rank has.
    fn lost_share(&self, pieces: &[Vec<Piece>]) -> f64 {
        let all: u64 = self.buckets.iter().map(|state| state.packs).sum();
        let mut runs: Vec<_> = pieces
            .iter()
            .flatten()
            .filter(|piece| piece.array == 1)
            .map(|piece| (piece.bucket, piece.run.first, piece.run.first + piece.run.packs))
            .collect();
        runs.sort_unstable();
        let (mut covered, mut reached) = (0, (0, 0));
        for (bucket, first, end) in runs {
            if bucket != reached.0 {
                reached = (bucket, 0);
            }
            covered += end.saturating_sub(first.max(reached.1));
            reached.1 = reached.1.max(end);
        }
        1.0 - covered as f64 / all.max(1) as f64
    }
}

/// Bytes as words, the last one filled up with zeros.
fn to_words(bytes: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    };
    bytes.chunks(8).map(word).collect()
}
