//! Layout: tensors to buckets, buckets to channels and shards. Pure arithmetic, no memory.
//! `kernels/segments.h` uses the same layout.
//!
//! ```text
//! tensors  wte f32 | ln f32 | wpe bf16 | head f32        in the order they are visited
//! buckets  f32: [wte|ln|head]      bf16: [wpe]           one per dtype (and fragment); tensors
//!                                                        start at a pack
//! channels [········][········]                          equal ranges of a bucket's packs
//! rounds   [n chunks][n chunks]…[n parts of the rest]    load of one trip around the ring
//! ```

use std::ops::Range;

use crate::abi::{PaSegment, PA_ALIGN_PACKS, PA_PACK_BYTES, PA_RUN_PACKS};
use crate::tensor::Dtype;

/// Dtype and size of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Element type.
    pub dtype: Dtype,
    /// Number of elements.
    pub elements: u64,
}

/// The tensors of one dtype as one index space of packs.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Element type of all its tensors.
    pub dtype: Dtype,
    /// Length in packs.
    pub packs: u64,
    /// Segments of its non-empty tensors, ascending; addresses are zero.
    pub segments: Vec<PaSegment>,
    /// Index of each segment's tensor in the list of all tensors.
    pub tensors: Vec<usize>,
}

/// Position of a tensor, as (bucket, segment); `None` for an empty tensor.
pub type Place = Option<(usize, usize)>;

/// Sorts the tensors of each fragment into buckets, one for each dtype with elements, in the order
/// of [`Dtype::ALL`]. The last result has the buckets of each fragment.
pub fn plan(shapes: &[Shape], fragments: u32) -> (Vec<Bucket>, Vec<Place>, Vec<Range<usize>>) {
    let mut buckets = Vec::new();
    let mut placement = vec![None; shapes.len()];
    let mut ranges = vec![];
    for tensors in cut(shapes, fragments) {
        let first = buckets.len();
        sort(shapes, tensors, &mut buckets, &mut placement);
        ranges.push(first..buckets.len());
    }
    (buckets, placement, ranges)
}

/// Cuts the list of tensors into fragments of about as many bytes each: a tensor belongs to the
/// fragment in which its middle lies. A fragment may be empty.
fn cut(shapes: &[Shape], fragments: u32) -> Vec<Range<usize>> {
    let bytes = |shape: &Shape| u128::from(shape.elements) * shape.dtype.size() as u128;
    let (parts, all) = (u128::from(fragments), shapes.iter().map(bytes).sum::<u128>().max(1));
    let mut ranges = vec![0..0; fragments as usize];
    let (mut before, mut part, mut first) = (0, 0, 0);
    for (index, shape) in shapes.iter().enumerate() {
        // In halves of bytes.
        let of = (((2 * before + bytes(shape)) * parts / (2 * all)) as usize).min(ranges.len() - 1);
        while part < of {
            ranges[part] = first..index;
            (part, first) = (part + 1, index);
        }
        before += bytes(shape);
    }
    ranges[part] = first..shapes.len();
    ranges[part + 1..].fill(shapes.len()..shapes.len());
    ranges
}

/// Sorts some tensors into buckets of their own.
fn sort(
    shapes: &[Shape],
    tensors: Range<usize>,
    buckets: &mut Vec<Bucket>,
    placement: &mut [Place],
) {
    for dtype in Dtype::ALL {
        let mut bucket = Bucket { dtype, packs: 0, segments: vec![], tensors: vec![] };
        let indexed = shapes.iter().enumerate().take(tensors.end).skip(tensors.start);
        for (index, shape) in indexed.filter(|(_, s)| s.dtype == dtype && s.elements > 0) {
            placement[index] = Some((buckets.len(), bucket.segments.len()));
            bucket.segments.push(PaSegment {
                address: 0,
                elements: shape.elements,
                first_pack: bucket.packs,
            });
            bucket.tensors.push(index);
            bucket.packs = bucket.packs.saturating_add(packs(*shape));
        }
        if bucket.packs > 0 {
            buckets.push(bucket);
        }
    }
}

/// Number of packs of a tensor.
fn packs(shape: Shape) -> u64 {
    shape.elements.div_ceil(u64::from(PA_PACK_BYTES) / shape.dtype.size() as u64)
}

/// Packs of each channel. The last channels may have fewer, or none.
pub fn channel_packs(packs: u64, channels: u32) -> u64 {
    align_up(packs.div_ceil(u64::from(channels)))
}

/// Upper bound on the packs of a channel that one rank reduces: one chunk per full round, and an
/// aligned n-th of the rest.
pub fn shard_packs(channel_packs: u64, world: u32, chunk: u32) -> u64 {
    let round = u64::from(chunk) * u64::from(world);
    let (rounds, rest) = (channel_packs / round, channel_packs % round);
    rounds * u64::from(chunk) + align_up(rest.div_ceil(u64::from(world)))
}

/// The sample of a bucket for telemetry: one run of `PA_RUN_PACKS` neighbouring packs in each
/// period of a channel's packs; see `kernels/sample.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Packs from the place of one run to that of the next.
    pub period: u64,
    /// Capacity of one channel's sample, in packs.
    pub packs: u64,
}

impl Sample {
    /// Sample of a bucket: all of 4 KiB and less, 4 runs of 1 KiB up to 512 KiB, one of 128 KiB up
    /// to 8 MiB, and then 64 runs. So it costs little beside an average of any size.
    pub fn of(packs: u64, channels: u32) -> Sample {
        let run = u64::from(PA_RUN_PACKS);
        let period = (packs / 4).clamp(run, (128 * run).max(packs / 64));
        let runs = channel_packs(packs, channels).div_ceil(period);
        Sample { period, packs: runs * run }
    }
}

/// A run of packs in one rank's shard of a bucket: where it lies in the bucket, and where in the
/// rank's memory of shards, `[channels][shard_packs]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First pack in the bucket.
    pub first: u64,
    /// First pack in the memory of shards.
    pub at: u64,
    /// Number of packs.
    pub packs: u64,
}

/// The shards of a bucket: how its packs are divided among channels and ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Division {
    /// Number of ranks.
    pub world: u32,
    /// Number of channels.
    pub channels: u32,
    /// Data packs of a slot.
    pub chunk: u32,
    /// True for the ring, whose channels are divided round by round.
    pub is_ring: bool,
}

impl Division {
    /// Shard of one rank, in ascending order. Allocates nothing: a division that was read from
    /// bytes may have any number of runs.
    pub fn runs(self, packs: u64, rank: u32) -> impl Iterator<Item = Run> {
        let each = channel_packs(packs, self.channels);
        let shard = shard_packs(each, self.world, self.chunk);
        let round = match self.is_ring {
            true => u64::from(self.chunk) * u64::from(self.world),
            false => each,
        };
        let of_channel = move |channel: u64| {
            let (mut begin, end) = ((channel * each).min(packs), ((channel + 1) * each).min(packs));
            let mut at = channel * shard;
            std::iter::from_fn(move || {
                while begin < end {
                    let next = (begin + round).min(end);
                    let part = align_up((next - begin).div_ceil(u64::from(self.world)));
                    let first = (begin + u64::from(rank) * part).min(next);
                    let run = Run { first, at, packs: (first + part).min(next) - first };
                    at += run.packs;
                    begin = next;
                    if run.packs > 0 {
                        return Some(run);
                    }
                }
                None
            })
        };
        (0..u64::from(self.channels)).flat_map(of_channel)
    }
}

/// Rounds up to a multiple of [`PA_ALIGN_PACKS`].
pub fn align_up(packs: u64) -> u64 {
    let align = u64::from(PA_ALIGN_PACKS);
    packs.checked_next_multiple_of(align).unwrap_or(u64::MAX / align * align)
}

impl Bucket {
    /// Finds the tensor of element `element` of the bucket, counted with the padding of its packs,
    /// and the index in that tensor.
    pub fn locate(&self, element: u64) -> (usize, u64) {
        let per_pack = u64::from(PA_PACK_BYTES) / self.dtype.size() as u64;
        let after =
            self.segments.partition_point(|segment| segment.first_pack * per_pack <= element);
        let segment = after.saturating_sub(1);
        (self.tensors[segment], element - self.segments[segment].first_pack * per_pack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn shapes() -> impl Strategy<Value = Vec<Shape>> {
        let shape = (0..4usize, 0u64..5000)
            .prop_map(|(d, elements)| Shape { dtype: Dtype::ALL[d], elements });
        prop::collection::vec(shape, 0..40)
    }

    proptest! {
        #[test]
        fn every_element_has_one_place(shapes in shapes(), fragments in 1u32..9) {
            let (buckets, placement, ranges) = plan(&shapes, fragments);
            prop_assert_eq!(ranges.len(), fragments as usize);
            let ends = ranges.iter().map(|range| range.end);
            let begins = ranges.iter().map(|range| range.start);
            prop_assert!(begins.skip(1).chain([buckets.len()]).eq(ends), "one behind the other");
            // Tensors come in the order of fragments.
            let of = |tensor: usize| placement[tensor].map(|(bucket, _)| {
                ranges.iter().position(|range| range.contains(&bucket)).unwrap()
            });
            let order: Vec<_> = (0..shapes.len()).filter_map(of).collect();
            prop_assert!(order.is_sorted());
            for bucket in &buckets {
                let per_pack = 16 / bucket.dtype.size() as u64;
                let mut end = 0;
                for (segment, &tensor) in bucket.segments.iter().zip(&bucket.tensors) {
                    prop_assert_eq!(segment.first_pack, end, "no gap and no overlap");
                    prop_assert_eq!(segment.elements, shapes[tensor].elements);
                    end += segment.elements.div_ceil(per_pack);
                    for element in [0, segment.elements - 1] {
                        let at = segment.first_pack * per_pack + element;
                        prop_assert_eq!(bucket.locate(at), (tensor, element));
                    }
                }
                prop_assert_eq!(bucket.packs, end);
            }
            for (shape, place) in shapes.iter().zip(&placement) {
                prop_assert_eq!(place.is_some(), shape.elements > 0);
                if let Some((bucket, segment)) = *place {
                    prop_assert_eq!(buckets[bucket].dtype, shape.dtype);
                    prop_assert_eq!(buckets[bucket].segments[segment].elements, shape.elements);
                }
            }
        }

        /// No fragment exceeds an equal share by more than the largest tensor.
        #[test]
        fn fragments_have_about_as_many_bytes(shapes in shapes(), fragments in 1u32..9) {
            let bytes = |shape: &Shape| shape.elements * shape.dtype.size() as u64;
            let all: u64 = shapes.iter().map(bytes).sum();
            let largest = shapes.iter().map(bytes).max().unwrap_or(0);
            for range in cut(&shapes, fragments) {
                let of: u64 = shapes[range].iter().map(bytes).sum();
                prop_assert!(of <= all / u64::from(fragments) + largest + 1);
            }
        }

        #[test]
        fn shards_have_every_pack_once(
            packs in 1u64..1 << 16, channels in 1u32..20, world in 1u32..=16, chunk in 1u32..64,
            is_ring: bool,
        ) {
            let chunk = chunk * PA_ALIGN_PACKS;
            let division = Division { world, channels, chunk, is_ring };
            let capacity = shard_packs(channel_packs(packs, channels), world, chunk);
            let mut all = vec![];
            for rank in 0..world {
                let mut end = 0;
                for run in division.runs(packs, rank) {
                    prop_assert!(run.at >= end, "no two runs share memory");
                    end = run.at + run.packs;
                    prop_assert!(end <= (run.at / capacity + 1) * capacity, "of one channel");
                    all.push((run.first, run.packs));
                }
                prop_assert!(end <= capacity * u64::from(channels));
            }
            all.sort_unstable();
            let end = all.iter().try_fold(0, |end, run| (run.0 == end).then_some(end + run.1));
            prop_assert_eq!(end, Some(packs));
        }

        #[test]
        fn channels_cover_the_bucket_and_shards_fit(
            packs in 1u64..1 << 30, channels in 1u32..64, world in 2u32..=16, chunk in 1u32..4096
        ) {
            let chunk = chunk * PA_ALIGN_PACKS;
            let each = channel_packs(packs, channels);
            prop_assert!(each * u64::from(channels) >= packs);
            // Packs that kernels/ring.h gives one rank of one channel: one chunk per full round,
            // and `part_of` the rest.
            let round = u64::from(chunk) * u64::from(world);
            let last = each % round;
            let own = each / round * u64::from(chunk) + align_up(last.div_ceil(u64::from(world)));
            prop_assert!(own <= shard_packs(each, world, chunk));
            let most = each.div_ceil(u64::from(world)) + u64::from(PA_ALIGN_PACKS);
            prop_assert!(shard_packs(each, world, chunk) <= most);
        }
    }
}
