//! The shard of a rank on a CUDA device, for a stage that enqueues its work.

use std::ffi::c_void;
use std::ops::Range;

use super::{tells_of_itself, Share};
use crate::Dtype;

/// This rank's shard of the mean in memory of its CUDA device, for a
/// [stage](crate::Builder::device_stage) that enqueues what is to be done with it.
///
/// The parts and their addresses are the same at every average until the [layout](Self::layout)
/// changes.
#[derive(Debug)]
pub struct DeviceShard<'a>(Share<'a>, usize, *mut c_void);

/// Elements of one tensor that lie in a rank's [`DeviceShard`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DevicePart<'a> {
    /// Index of the tensor in the list of all tensors.
    pub tensor: usize,
    /// Name of the tensor as errors show it. Empty if it has none.
    pub name: &'a str,
    /// Dtype of the tensor, to which the values are rounded after the stage.
    pub dtype: Dtype,
    /// Index in the tensor of the first value.
    pub first: usize,
    /// Index of the first value among all values of the shard: the place of its state, for a stage
    /// that keeps a number for each value in one array of [`DeviceShard::len`] numbers.
    pub at: usize,
    /// Number of values, at least one.
    pub len: usize,
    /// Device address of the values, a multiple of 16. Their type is `f64` for a tensor of f64, and
    /// `f32` for all others.
    pub pointer: u64,
}

impl DevicePart<'_> {
    /// Indices of the values in their tensor.
    pub fn elements(&self) -> Range<usize> {
        self.first..self.first + self.len
    }
}

impl<'a> DeviceShard<'a> {
    pub(crate) fn new(share: Share<'a>, device: usize, stream: *mut c_void) -> Self {
        DeviceShard(share, device, stream)
    }

    tells_of_itself!();

    /// Ordinal of the device in this process, whose primary context is current during the call.
    pub fn device(&self) -> usize {
        self.1
    }

    /// CUDA stream (`CUstream`) on which the values are the mean, and what follows on it sees what
    /// the stage has made of them. A non-blocking stream of the averager's own. It is not to be
    /// captured, and not used after the call.
    pub fn stream(&self) -> *mut c_void {
        self.2
    }

    /// The parts, in an order that stays the same until the layout changes. What the stage's work
    /// leaves in their values is what all ranks get.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = DevicePart<'_>> {
        let Share { names, spans, .. } = self.0;
        spans.iter().map(|span| DevicePart {
            tensor: span.tensor,
            name: &names[span.tensor],
            dtype: span.dtype,
            first: span.first,
            at: span.at,
            len: span.elements,
            pointer: span.address,
        })
    }
}
