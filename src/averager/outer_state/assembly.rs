//! New contents of the outer optimizer's state, assembled from the shards of other ranks.

use std::ops::Range;

use super::{BucketState, OuterState};
use crate::bucket::Run;

/// One run of one array, in a stream of bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) bucket: usize,
    pub(super) array: usize,
    pub(super) run: Run,
    /// Bytes of the stream before it.
    pub(super) before: usize,
}

impl Piece {
    pub(super) fn bytes(&self, state: &BucketState) -> usize {
        self.run.packs as usize * state.pack_bytes
    }
}

/// New contents of a rank's state, assembled from the shards of ranks in another view.
pub(super) struct Assembly<'a> {
    state: &'a OuterState,
    own: Vec<Piece>,
    /// Contents of the memory.
    contents: Vec<u8>,
}

impl<'a> Assembly<'a> {
    /// Contents with zeros in `arrays`, which are to be filled. The other arrays stay as they are.
    pub(super) fn new(state: &'a OuterState, arrays: Range<usize>) -> Result<Self, String> {
        let own = state.pieces(&state.division, &[state.position], arrays.clone());
        let mut contents = reserved(state.memory.bytes())?;
        // SAFETY: as in `read`.
        unsafe { state.memory.read(&mut contents) }?;
        for bucket in &state.buckets {
            for array in arrays.clone().filter(|&array| array <= bucket.slots) {
                contents[bucket.place(array, 0)..][..bucket.array].fill(0);
            }
        }
        Ok(Assembly { state, own, contents })
    }

    /// Copies this rank's share of a part of another rank's stream. The part begins `at` bytes into
    /// that stream; `theirs` are its pieces.
    pub(super) fn add(&mut self, theirs: &[Piece], at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        let from = theirs.partition_point(|piece| piece.before <= at).saturating_sub(1);
        for piece in theirs[from..].iter().take_while(|piece| piece.before < end) {
            let bucket = &self.state.buckets[piece.bucket];
            let size = bucket.pack_bytes as u64;
            // In bytes of the array's index space.
            let start = piece.run.first * size;
            let shown = start + (at.saturating_sub(piece.before)) as u64
                ..start + (end - piece.before).min(piece.bytes(bucket)) as u64;
            if shown.is_empty() {
                continue; // the stream has ended before this part
            }
            // Own pieces are in the order of buckets, arrays and packs.
            let array = (piece.bucket, piece.array);
            let first = self.own.partition_point(|own| {
                let end = (own.run.first + own.run.packs) * size;
                ((own.bucket, own.array), end) <= (array, shown.start)
            });
            let is_near =
                |own: &&Piece| (own.bucket, own.array) == array && own.run.first * size < shown.end;
            for own in self.own[first..].iter().take_while(is_near) {
                let mine = own.run.first * size..(own.run.first + own.run.packs) * size;
                let both = shown.start.max(mine.start)..shown.end.min(mine.end);
                let to = bucket.place(own.array, own.run.at) + (both.start - mine.start) as usize;
                let skipped =
                    (piece.before as i64 - at as i64 + (both.start - start) as i64) as usize;
                let count = (both.end - both.start) as usize;
                self.contents[to..to + count].copy_from_slice(&bytes[skipped..skipped + count]);
            }
        }
    }

    /// Writes the state. No average may be running.
    pub(super) fn write(self) -> Result<(), String> {
        // SAFETY: as in `read`.
        unsafe { self.state.memory.overwrite(&self.contents) }
    }
}

pub(super) fn reserved(bytes: usize) -> Result<Vec<u8>, String> {
    let mut all = vec![];
    all.try_reserve_exact(bytes).map_err(|error| error.to_string())?;
    all.resize(bytes, 0);
    Ok(all)
}
