//! State that goes from the ranks of one view to those of another, byte by byte.

use proptest::prelude::*;

use super::assembly::Assembly;
use super::sharing::parts;
use super::*;
use crate::backend::MemorySpace;
use crate::plan::End;

/// Tensors' dtypes and packs, and the optimizer's slots.
#[derive(Clone, Debug)]
struct Model {
    buckets: Vec<(Dtype, u64)>,
    slots: usize,
}

/// Byte `at` of an array of a bucket's whole state; never 0.
fn byte(bucket: usize, array: usize, at: u64) -> u8 {
    let mixed =
        (at * 31 + bucket as u64 * 7 + array as u64 * 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as u8 | 1
}

impl Model {
    fn state(&self, division: Division, position: u32) -> OuterState {
        let mut end = 0;
        let bucket = |&(dtype, packs): &(Dtype, u64)| {
            let each = bucket::channel_packs(packs, division.channels);
            let shard = bucket::shard_packs(each, division.world, division.chunk);
            let pack_bytes = pack_bytes(dtype);
            let array = (shard * u64::from(division.channels)) as usize * pack_bytes;
            let at = end;
            end += array * (self.slots + 1);
            BucketState { at, mean: None, packs, pack_bytes, array, slots: self.slots }
        };
        let buckets = self.buckets.iter().map(bucket).collect();
        let memory = Memory::new(&MemorySpace::Host, end).unwrap().into();
        let is_previous_alike = AtomicBool::new(true);
        OuterState { division, position, memory, buckets, previous: None, is_previous_alike }
    }

    /// Calls `f(bucket, array, byte of the array's index space, byte of the rank's memory)` for all
    /// of a rank's state.
    fn each_byte(&self, state: &OuterState, mut f: impl FnMut(usize, usize, u64, usize)) {
        for (bucket, of) in state.buckets.iter().enumerate() {
            let size = of.pack_bytes as u64;
            for run in state.division.runs(of.packs, state.position) {
                for array in 0..=self.slots {
                    for byte in 0..run.packs * size {
                        let place = of.place(array, run.at) + byte as usize;
                        f(bucket, array, run.first * size + byte, place);
                    }
                }
            }
        }
    }

    fn contents(&self, state: &OuterState) -> Vec<u8> {
        let mut all = vec![0; state.memory.bytes()];
        // SAFETY: memory of this test.
        unsafe { state.memory.read(&mut all) }.unwrap();
        all
    }

    /// The state of a rank after some averages.
    fn filled(&self, division: Division, position: u32) -> OuterState {
        let state = self.state(division, position);
        let mut contents = self.contents(&state);
        self.each_byte(&state, |bucket, array, at, place| {
            contents[place] = byte(bucket, array, at);
        });
        // SAFETY: memory of this test.
        unsafe { state.memory.overwrite(&contents) }.unwrap();
        state
    }
}

fn divisions() -> impl Strategy<Value = Division> {
    (1u32..=6, 1u32..5, 1u32..6, any::<bool>()).prop_map(|(world, channels, chunk, is_ring)| {
        Division { world, channels, chunk: chunk * crate::abi::PA_ALIGN_PACKS, is_ring }
    })
}

fn models() -> impl Strategy<Value = Model> {
    let bucket = (0..4usize, 1u64..700).prop_map(|(dtype, packs)| (Dtype::ALL[dtype], packs));
    (prop::collection::vec(bucket, 1..4), 1usize..=2)
        .prop_map(|(buckets, slots)| Model { buckets, slots })
}

proptest! {
    /// Slots arrive whole, in messages of any size. Slots of lost ranks are 0, and their share is
    /// reported; but where the next rank of the ring has that state, too, it shows it. Anchors stay
    /// as they are.
    #[test]
    fn slots_arrive_in_any_later_view(
        model in models(), before in divisions(), after in divisions(), lost in 0u32..64,
        words in prop_oneof![Just(1usize), Just(13), Just(2048), 1usize..400], is_shared: bool,
    ) {
        let piece = 8 * words;
        let alive = |rank: &u32| lost >> rank & 1 == 0;
        let mut old: Vec<OuterState> =
            (0..before.world).map(|rank| model.filled(before, rank)).collect();
        if is_shared && before.world > 1 {
            for rank in 0..old.len() {
                let memory = old[(rank + old.len() - 1) % old.len()].memory().clone();
                old[rank].set_previous(Some(memory));
            }
        }
        old.retain(|old| alive(&old.position));
        // One of them has joined.
        let headers: Vec<Vec<u64>> =
            [vec![]].into_iter().chain(old.iter().map(OuterState::header)).collect();
        let parts = parts(headers.iter().map(|header| &header[..]));
        let read = |(old, parts): (&OuterState, &(_, Vec<u32>))| old.read(&parts.1, 1..3).unwrap();
        let streams: Vec<Vec<u8>> =
            [vec![]].into_iter().chain(old.iter().zip(&parts[1..]).map(read)).collect();
        let is_kept = |rank: &u32| {
            let next = (rank + 1) % before.world;
            alive(rank) || is_shared && before.world > 1 && alive(&next)
        };
        let mut owner: Vec<Vec<u32>> =
            model.buckets.iter().map(|&(_, packs)| vec![u32::MAX; packs as usize]).collect();
        for (owner, &(_, packs)) in owner.iter_mut().zip(&model.buckets) {
            for rank in 0..before.world {
                for run in before.runs(packs, rank) {
                    owner[run.first as usize..][..run.packs as usize].fill(rank);
                }
            }
        }
        let all: usize = owner.iter().map(Vec::len).sum();
        let gone = owner.iter().flatten().filter(|rank| !is_kept(rank)).count();
        for rank in 0..after.world {
            let state = model.filled(after, rank); // what was there before goes
            let pieces: Vec<Vec<Piece>> = parts
                .iter()
                .map(|(division, positions)| state.pieces(division, positions, 1..3))
                .collect();
            let share = state.lost_share(&pieces);
            prop_assert!((share - gone as f64 / all as f64).abs() < 1e-9, "{share}, {gone}");
            let mut assembly = Assembly::new(&state, 1..3).unwrap();
            let longest = streams.iter().map(Vec::len).max().unwrap_or(0);
            for at in (0..longest).step_by(piece) {
                for (pieces, stream) in pieces.iter().zip(&streams) {
                    let part = stream.get(at..).unwrap_or_default();
                    assembly.add(pieces, at, &part[..part.len().min(piece)]);
                }
            }
            assembly.write().unwrap();
            let contents = model.contents(&state);
            let mut wrong = None;
            model.each_byte(&state, |bucket, array, at, place| {
                let size = state.buckets[bucket].pack_bytes as u64;
                let is_kept = array == 0 || is_kept(&owner[bucket][(at / size) as usize]);
                let want = if is_kept { byte(bucket, array, at) } else { 0 };
                if contents[place] != want {
                    wrong.get_or_insert((bucket, array, at));
                }
            });
            prop_assert_eq!(wrong, None, "rank {}", rank);
        }
    }
}

#[test]
fn averages_mix_only_where_they_are_told_to() {
    use crate::abi::{PA_FLAG_STEP, PA_FLAG_WHOLE};
    let flags = |end| {
        let flags = ParamAverager::flags_of(end);
        (flags & PA_FLAG_WHOLE != 0, flags & PA_FLAG_STEP != 0)
    };
    assert_eq!(flags(End::Mean), (true, false));
    assert_eq!(flags(End::Anchor), (true, false));
    assert_eq!(flags(End::Step), (true, true));
    assert_eq!(flags(End::Mix), (false, true));
}
