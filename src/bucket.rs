//! Tensors to buckets, buckets to channels and shards: pure arithmetic, no memory.
//! `kernels/segments.h` walks the result.
//!
//! ```text
//! tensors  wte f32 | ln f32 | wpe bf16 | head f32          in the order they are visited
//! buckets  f32: [wte|ln|head]      bf16: [wpe]             one a dtype; each tensor starts a new 16-byte pack
//! channels [········][········]                            equal ranges of a bucket's packs
//! rounds   [n chunks][n chunks]…[n parts of the rest]      what one trip around the ring carries
//! ```

use crate::abi::{PaSegment, PA_ALIGN_PACKS, PA_PACK_BYTES};
use crate::tensor::Dtype;

/// What a tensor is, wherever it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its element type.
    pub dtype: Dtype,
    /// Its number of elements.
    pub elements: u64,
}

/// One dtype's tensors as one index space of packs.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// Of all its tensors.
    pub dtype: Dtype,
    /// Its length.
    pub packs: u64,
    /// Its tensors that have elements, ascending; addresses are zero.
    pub segments: Vec<PaSegment>,
    /// Each segment's tensor, as an index into the list of all tensors.
    pub tensors: Vec<usize>,
}

/// Where a tensor went: the bucket's index and the segment's, none for a tensor without elements.
pub type Place = Option<(usize, usize)>;

/// Sorts tensors into buckets, one for each dtype that occurs with elements, in the order of
/// [`Dtype::ALL`].
pub fn plan(shapes: &[Shape]) -> (Vec<Bucket>, Vec<Place>) {
    let mut buckets = Vec::new();
    let mut placement = vec![None; shapes.len()];
    for dtype in Dtype::ALL {
        let mut bucket = Bucket { dtype, packs: 0, segments: vec![], tensors: vec![] };
        for (index, shape) in
            shapes.iter().enumerate().filter(|(_, s)| s.dtype == dtype && s.elements > 0)
        {
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
    (buckets, placement)
}

/// Packs that a tensor takes.
fn packs(shape: Shape) -> u64 {
    shape.elements.div_ceil(u64::from(PA_PACK_BYTES) / shape.dtype.size() as u64)
}

/// Packs of each channel but the last ones, which may have less or nothing.
pub fn channel_packs(packs: u64, channels: u32) -> u64 {
    align_up(packs.div_ceil(u64::from(channels)))
}

/// Packs at most that one rank reduces of one channel: full rounds give it a chunk each, the rest
/// an aligned n-th.
pub fn shard_packs(channel_packs: u64, world: u32, chunk: u32) -> u64 {
    let round = u64::from(chunk) * u64::from(world);
    let (rounds, rest) = (channel_packs / round, channel_packs % round);
    rounds * u64::from(chunk) + align_up(rest.div_ceil(u64::from(world)))
}

/// Up to a multiple of [`PA_ALIGN_PACKS`].
pub fn align_up(packs: u64) -> u64 {
    let align = u64::from(PA_ALIGN_PACKS);
    packs.checked_next_multiple_of(align).unwrap_or(u64::MAX / align * align)
}

impl Bucket {
    /// The tensor that element `element` of the bucket (packs × elements a pack) lies in, and which
    /// of its elements.
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
        fn every_element_has_one_place(shapes in shapes()) {
            let (buckets, placement) = plan(&shapes);
            for bucket in &buckets {
                let per_pack = 16 / bucket.dtype.size() as u64;
                let mut end = 0;
                for (segment, &tensor) in bucket.segments.iter().zip(&bucket.tensors) {
                    prop_assert_eq!(segment.first_pack, end, "no gap and no overlap");
                    prop_assert_eq!(segment.elements, shapes[tensor].elements);
                    end += segment.elements.div_ceil(per_pack);
                    for element in [0, segment.elements - 1] {
                        prop_assert_eq!(bucket.locate(segment.first_pack * per_pack + element), (tensor, element));
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

        #[test]
        fn channels_cover_the_bucket_and_shards_fit(packs in 1u64..1 << 30, channels in 1u32..64, world in 2u32..=16, chunk in 1u32..4096) {
            let chunk = chunk * PA_ALIGN_PACKS;
            let each = channel_packs(packs, channels);
            prop_assert!(each * u64::from(channels) >= packs);
            // What kernels/ring.h gives one rank of one channel: a chunk a full round, part_of the
            // rest.
            let round = u64::from(chunk) * u64::from(world);
            let last = each % round;
            let own = each / round * u64::from(chunk) + align_up(last.div_ceil(u64::from(world)));
            prop_assert!(own <= shard_packs(each, world, chunk));
            prop_assert!(shard_packs(each, world, chunk) <= each.div_ceil(u64::from(world)) + u64::from(PA_ALIGN_PACKS));
        }
    }
}
