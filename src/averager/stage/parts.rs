//! Parts of a rank's shard.

use crate::abi::{PaBucket, PA_PACK_BYTES};
use crate::averager::table::Table;
use crate::bucket::Division;
use crate::stage::Span;
use crate::tensor::Dtype;

/// The parts of a rank's shard: the runs of its packs, cut at the ends of tensors, in the array at
/// `array`, in the type of sums.
pub(super) fn spans(
    table: &Table,
    division: &Division,
    position: u32,
    array: impl Fn(&PaBucket) -> u64,
) -> Vec<Span> {
    let (mut spans, mut at) = (vec![], 0);
    for (bucket, raw) in table.buckets.iter().zip(&table.raw) {
        let per_pack = u64::from(PA_PACK_BYTES) / bucket.dtype.size() as u64;
        let value = if bucket.dtype == Dtype::F64 { 8 } else { 4 };
        for run in division.runs(bucket.packs, position) {
            let (first, end) = (run.first * per_pack, (run.first + run.packs) * per_pack);
            let is_before = |segment: &crate::abi::PaSegment| {
                segment.first_pack * per_pack + segment.elements <= first
            };
            let from = bucket.segments.partition_point(is_before);
            for (segment, &tensor) in bucket.segments.iter().zip(&bucket.tensors).skip(from) {
                let begin = segment.first_pack * per_pack;
                if begin >= end {
                    break;
                }
                let (low, high) = (begin.max(first), (begin + segment.elements).min(end));
                let elements = (high - low) as usize;
                spans.push(Span {
                    tensor,
                    dtype: bucket.dtype,
                    first: (low - begin) as usize,
                    elements,
                    at,
                    address: array(raw) + (run.at * per_pack + low - first) * value,
                });
                at += elements;
            }
        }
    }
    spans
}
