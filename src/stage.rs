//! A user's own stage: a function that has this rank's shard of the mean before the commit.

mod device;

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice::from_raw_parts_mut;
use std::sync::{Arc, Mutex};

pub use device::{DevicePart, DeviceShard};

use crate::sync::lock;
use crate::Dtype;

/// This rank's shard of the mean, for a [stage](crate::Builder::stage).
///
/// The shards of all ranks together have each element of the model once. A shard consists of
/// [parts](Self::parts), each a range of one tensor. They are the same at every average until the
/// [layout](Self::layout) changes.
#[derive(Debug)]
pub struct Shard<'a>(Share<'a>);

/// The parts of a shard, and the average that it belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Share<'a> {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) layout: u32,
    pub(crate) sets_values: bool,
    pub(crate) was_committed: bool,
    pub(crate) names: &'a [String],
    pub(crate) spans: &'a [Span],
}

/// Declares what a shard tells of itself, wherever its values are.
macro_rules! tells_of_itself {
    () => {
        /// This rank's number.
        pub fn rank(&self) -> usize {
            self.0.rank
        }

        /// The number of ranks.
        pub fn world_size(&self) -> usize {
            self.0.world_size
        }

        /// Number of the division of the model among the ranks. Another number than at the last
        /// call means other parts: the world has lost or admitted a rank since, or this process has
        /// joined.
        pub fn layout(&self) -> u32 {
            self.0.layout
        }

        /// True for an average that gives the ranks values to begin with: that of
        /// [`build`](crate::Builder::build), a [`broadcast`](crate::ParamAverager::broadcast), the
        /// average of [`LocalSgd::recover`](crate::LocalSgd::recover), and that with a process that
        /// joins. The stage may look at the values, such as to keep them as an optimizer's anchor;
        /// to change them is a veto.
        pub fn sets_values(&self) -> bool {
            self.0.sets_values
        }

        /// True if all ranks have committed the average of the stage's last call. False if that
        /// failed, so that no tensor holds its result: state that depends on it is as before that
        /// call.
        pub fn was_committed(&self) -> bool {
            self.0.was_committed
        }

        /// Number of values in all parts.
        pub fn len(&self) -> usize {
            self.0.spans.last().map_or(0, |last| last.at + last.elements)
        }

        /// True if this rank has no element: the model has fewer packs of 16 bytes than ranks.
        pub fn is_empty(&self) -> bool {
            self.0.spans.is_empty()
        }
    };
}
use tells_of_itself;

/// Place of a part, and of its values in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) tensor: usize,
    pub(crate) dtype: Dtype,
    /// First element in the tensor.
    pub(crate) first: usize,
    /// Number of elements.
    pub(crate) elements: usize,
    /// First element among all elements of the shard.
    pub(crate) at: usize,
    /// Address of the values.
    pub(crate) address: u64,
}

/// Elements of one tensor that lie in a rank's [`Shard`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Part<'a> {
    /// Index of the tensor in the list of all tensors.
    pub tensor: usize,
    /// Name of the tensor as errors show it. Empty if it has none.
    pub name: &'a str,
    /// Dtype of the tensor, to which the values are rounded after the stage.
    pub dtype: Dtype,
    /// Index in the tensor of the first value.
    pub first: usize,
    /// Index of the first value among all values of the shard: the place of its state, for a stage
    /// that keeps a number for each value in one vector of [`Shard::len`] numbers.
    pub at: usize,
    /// The mean of these elements.
    pub values: Values<'a>,
}

/// Values of a part, in the type of sums.
#[derive(Debug)]
#[non_exhaustive]
pub enum Values<'a> {
    /// Elements of a tensor of f32, f16 or bf16.
    F32(&'a mut [f32]),
    /// Elements of a tensor of f64.
    F64(&'a mut [f64]),
}

impl<'a> Shard<'a> {
    /// # Safety
    /// The addresses of the spans are those of initialised values in memory of the host, which
    /// nothing else uses for `'a`.
    pub(crate) unsafe fn new(share: Share<'a>) -> Self {
        Shard(share)
    }

    tells_of_itself!();

    /// The parts, in an order that stays the same until the layout changes. What a stage leaves in
    /// their values is what all ranks get.
    pub fn parts(&mut self) -> impl ExactSizeIterator<Item = Part<'_>> {
        let Share { names, spans, .. } = self.0;
        spans.iter().map(|span| Part {
            tensor: span.tensor,
            name: &names[span.tensor],
            dtype: span.dtype,
            first: span.first,
            at: span.at,
            // SAFETY: the promise of `new`; spans are disjoint, and the shard is borrowed mutably.
            values: unsafe { span.values() },
        })
    }
}

impl Part<'_> {
    /// Indices of the values in their tensor.
    pub fn elements(&self) -> Range<usize> {
        self.first..self.first + self.values.len()
    }
}

impl Values<'_> {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::F64(values) => values.len(),
        }
    }

    /// True if there are no values. A [`Part`] has one at least.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the values.
    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::F64(values) => bytemuck::cast_slice(values),
        }
    }

    /// Index of the first value that a tensor of this dtype can't hold as a finite one.
    pub(crate) fn first_beyond(&self, dtype: Dtype) -> Option<usize> {
        // The smallest numbers that are rounded to infinity.
        let end = match dtype {
            Dtype::F16 => 65520.0,
            Dtype::Bf16 => f32::from_bits(0x7f7f_8000),
            _ => f32::INFINITY,
        };
        match self {
            Values::F32(values) => first_beyond(values, |x| x.abs() < end),
            Values::F64(values) => first_beyond(values, |x| x.is_finite()),
        }
    }
}

/// Index of the first value that does not fit. Looks at many values at a time, since this is a pass
/// over the whole shard.
fn first_beyond<T: Copy>(values: &[T], fits: impl Fn(T) -> bool) -> Option<usize> {
    const MANY: usize = 256;
    let all_fit = |many: &[T]| many.iter().fold(true, |all, &value| all & fits(value));
    let many = values.chunks(MANY).position(|many| !all_fit(many))? * MANY;
    values[many..].iter().position(|&value| !fits(value)).map(|at| many + at)
}

impl Span {
    /// Bytes of the values.
    pub(crate) fn bytes(&self) -> usize {
        self.elements * if self.dtype == Dtype::F64 { 8 } else { 4 }
    }

    /// # Safety
    /// The address is that of initialised values, which nothing else uses for `'a`.
    pub(crate) unsafe fn values<'a>(&self) -> Values<'a> {
        // SAFETY: guaranteed by the caller; memory of shards is aligned to a pack.
        unsafe {
            match self.dtype {
                Dtype::F64 => {
                    Values::F64(from_raw_parts_mut(self.address as *mut f64, self.elements))
                }
                _ => Values::F32(from_raw_parts_mut(self.address as *mut f32, self.elements)),
            }
        }
    }
}

/// Reason of a [stage](crate::Builder::stage) to refuse an average. `?` converts any error into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veto(String);

impl Veto {
    /// Veto with this text: the tensor, what was found, what to do.
    pub fn new(reason: impl Into<String>) -> Self {
        Veto(reason.into())
    }
}

// Not an `Error` itself, so that every error can become one.
impl<E: std::error::Error> From<E> for Veto {
    fn from(error: E) -> Self {
        Veto(error.to_string())
    }
}

impl fmt::Display for Veto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A user's function, which an averager and its successors in later views share.
#[derive(Clone)]
pub(crate) struct Stage {
    pub(crate) is_on_device: bool,
    inner: Arc<Mutex<Inner>>,
}

type OnHost = dyn FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send;
type OnDevice = dyn FnMut(&mut DeviceShard<'_>) -> Result<(), Veto> + Send;

pub(crate) enum Function {
    Host(Box<OnHost>),
    Device(Box<OnDevice>),
}

struct Inner {
    /// True after a panic of the function, whose state may be half changed.
    is_broken: bool,
    was_committed: bool,
    function: Function,
}

impl Stage {
    pub(crate) fn new(function: Function) -> Stage {
        let is_on_device = matches!(function, Function::Device(_));
        let inner = Inner { is_broken: false, was_committed: false, function };
        Stage { is_on_device, inner: Arc::new(Mutex::new(inner)) }
    }

    /// Calls the function by `call`, which is also told whether the average of the last call was
    /// committed. A panic is a veto, now and at every later call.
    pub(crate) fn call(
        &self,
        call: impl FnOnce(&mut Function, bool) -> Result<(), Veto>,
    ) -> Result<(), Veto> {
        let inner = &mut *lock(&self.inner);
        if inner.is_broken {
            let reason = "its function has panicked in an earlier average: build a new averager";
            return Err(Veto::new(reason));
        }
        let was_committed = std::mem::take(&mut inner.was_committed);
        let function = &mut inner.function;
        let called = catch_unwind(AssertUnwindSafe(|| call(function, was_committed)));
        called.unwrap_or_else(|panic| {
            inner.is_broken = true;
            Err(Veto(format!("its function has panicked: {}", text_of(&*panic))))
        })
    }

    /// Notes whether the average of the last call was committed.
    pub(crate) fn ended(&self, committed: bool) {
        lock(&self.inner).was_committed = committed;
    }
}

fn text_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("with no message")
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_on_device { "a function for devices" } else { "a function" })
    }
}
