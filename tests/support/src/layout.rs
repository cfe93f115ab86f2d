//! Random layouts, and models of them.

use param_averager::Dtype;
use proptest::prelude::*;

use crate::Guarded;

/// A tensor: dtype, elements, and by rank how many elements after a multiple of 16 bytes it begins.
pub type Shape = (Dtype, usize, Vec<usize>);

pub fn dtypes() -> impl Strategy<Value = Dtype> + Clone {
    prop::sample::select(&Dtype::ALL[..])
}

/// Numbers of elements: none, one, less than a pack or a few, and up to `most`.
pub fn elements(most: usize) -> impl Strategy<Value = usize> + Clone {
    prop_oneof![Just(0), Just(1), 2..40usize, 0..most]
}

/// Tensors of as many ranks, one in four of which does not begin at a multiple of 16 bytes.
pub fn shapes(ranks: usize, most_elements: usize) -> impl Strategy<Value = Shape> + Clone {
    let at = prop::collection::vec(prop_oneof![3 => Just(0), 1 => 0..8usize], ranks);
    (dtypes(), elements(most_elements), at)
}

/// Bytes of a chunk, of which a small model has many.
pub fn chunks() -> impl Strategy<Value = usize> {
    prop_oneof![Just(128usize), Just(256), Just(4096)]
}

/// A rank's tensors, of zeros.
pub fn model(layout: &[Shape], rank: usize) -> Vec<Guarded> {
    layout.iter().map(|(dtype, elements, at)| Guarded::new(*dtype, *elements, at[rank])).collect()
}
