//! Transfer of the outer optimizer's state to the ranks of a later view.

use super::assembly::{Assembly, Piece};
use super::sharing::parts;
use super::OuterState;
use crate::averager::ParamAverager;
use crate::world::Shown;
use crate::Result;

impl ParamAverager {
    /// Takes over the outer optimizer's slots from an earlier view, whose ranks had other shards.
    /// Every rank shows its slots, piece by piece, and those of the rank that was before it in the
    /// ring, if it has them and that rank is lost. It takes the parts of its new shard.
    pub(super) fn take_over(&mut self) -> Result<()> {
        /// Bytes in a message. As text, a word has up to 21 bytes, and a message between processes
        /// takes 64 KiB.
        const PIECE: usize = 16 << 10;
        let Some(own) = self.own.outer.clone() else { return Ok(()) };
        let slots = 1..3;
        let old = self.inherited.clone();
        let call = "the outer optimizer's state, at the first average of a view";
        let words = old.as_ref().map_or(vec![], |old| old.header());
        let headers = self.exchange(Shown { call: call.into(), words })?;
        let parts = parts(headers.iter().map(|shown| &shown.words[..]));
        let stream = match &old {
            Some(old) => old.read(&parts[self.rank()].1, slots.clone()),
            None => Ok(vec![]),
        };
        let stream = stream.map_err(|reason| self.state_lost(reason))?;
        let pieces: Vec<Vec<Piece>> = parts
            .iter()
            .map(|(division, positions)| own.pieces(division, positions, slots.clone()))
            .collect();
        self.lost_state = own.lost_share(&pieces);
        let assembly = Assembly::new(&own, slots);
        let mut assembly = assembly.map_err(|reason| self.state_lost(reason))?;
        let longest = pieces.iter().map(|theirs| own.length(theirs)).max().unwrap_or(0);
        for at in (0..longest).step_by(PIECE) {
            let part = stream.get(at..).unwrap_or_default();
            let words = to_words(&part[..part.len().min(PIECE)]);
            let all = self.exchange(Shown { call: format!("{call}, from byte {at}"), words })?;
            for (theirs, shown) in pieces.iter().zip(all) {
                let bytes: Vec<u8> =
                    shown.words.iter().flat_map(|word| word.to_le_bytes()).collect();
                let left = own.length(theirs).saturating_sub(at);
                assembly.add(theirs, at, &bytes[..bytes.len().min(left)]);
            }
        }
        assembly.write().map_err(|reason| self.state_lost(reason))
    }
}

impl OuterState {
    /// Share of the first slot that no rank has.
    pub(super) fn lost_share(&self, pieces: &[Vec<Piece>]) -> f64 {
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
