//! Borrowed tensors and their element types.

use std::fmt;
use std::marker::PhantomData;

#[cfg(feature = "half")]
use half::{bf16, f16};

use crate::abi::{PA_BF16, PA_F16, PA_F32, PA_F64};
use crate::device::Device;
use crate::hash::fnv1a;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Dtype {
    /// 32-bit float; sums are made in f32.
    F32,
    /// 64-bit float; sums are made in f64.
    F64,
    /// IEEE half precision; sums are made in f32.
    F16,
    /// bfloat16; sums are made in f32.
    Bf16,
}

impl Dtype {
    /// All dtypes, in the kernels' order.
    pub const ALL: [Dtype; 4] = [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::Bf16];

    /// Size of one element, in bytes.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F64 => 8,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }

    /// Number of the dtype in the kernels.
    pub(crate) const fn code(self) -> u32 {
        match self {
            Dtype::F32 => PA_F32,
            Dtype::F64 => PA_F64,
            Dtype::F16 => PA_F16,
            Dtype::Bf16 => PA_BF16,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Dtype::F32 => "f32",
            Dtype::F64 => "f64",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// Name of a tensor, and what tells it from others of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity<'a> {
    pub(crate) name: &'a str,
    pub(crate) part: u32,
    pub(crate) outer: Option<&'a str>,
    pub(crate) scope: u64,
}

mod sealed {
    pub trait Sealed {}
}

/// Rust type of a tensor's elements: `f32`, `f64` and, with the feature `half`, `half::f16` and
/// `half::bf16`.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// Dtype of the type.
    const DTYPE: Dtype;
}

/// One tensor of this rank, borrowed for one average: contiguous elements of one dtype, at any
/// address that suits the dtype. An average never copies or moves it.
///
/// A mutable slice converts safely: `TensorMut::from(&mut weights[..]).named("wte")`. Ranks compare
/// the names when an averager is built, each average compares them with those of the build, and
/// errors give them. Names are unique. Unnamed tensors of one dtype and size can't be told apart,
/// so they are refused unless the order of the list is known to be right
/// ([`allow_unnamed`](crate::Builder::allow_unnamed)).
pub struct TensorMut<'a> {
    name: Option<&'a str>,
    /// Number of the tensor among those that share its name: the tensors of one key of a map.
    part: u32,
    /// Key of the outermost map that holds the map which names it, and a digest of all such keys.
    scope: (Option<&'a str>, u64),
    pointer: *mut u8,
    elements: usize,
    dtype: Dtype,
    device: Device,
    unordered: Option<Unordered>,
    memory: PhantomData<&'a mut [u8]>,
}

/// Reason to refuse a tensor: its uses on other streams can't be ordered with an average.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Only cudarc's slices have one.
pub(crate) enum Unordered {
    /// The tensor belongs to another `CudaContext` than the stream.
    OtherContext,
    /// The tensor was allocated on another stream, and has no events.
    Untracked,
    /// The tensor's last use was captured, so its events belong to a graph.
    InAGraph,
}

// SAFETY: it stands for a mutable slice of floats, which can be sent.
unsafe impl Send for TensorMut<'_> {}

impl<'a> TensorMut<'a> {
    /// Tensor of `elements` elements of `dtype`, from `pointer` on, in memory of `device`.
    ///
    /// A pointer that is null or not aligned to the dtype, and tensors that overlap, are errors
    /// when they are used.
    ///
    /// # Safety
    /// For the lifetime `'a`, the memory must be valid for reads and writes of that many elements
    /// by the device, hold initialised elements, and be accessed by nothing but averagers of this
    /// world. On a CUDA device, accesses include work on non-blocking streams, which an average
    /// does not wait for.
    pub unsafe fn from_raw_parts(
        pointer: *mut u8,
        elements: usize,
        dtype: Dtype,
        device: Device,
    ) -> Self {
        TensorMut {
            name: None,
            part: 0,
            scope: (None, 0),
            pointer,
            elements,
            dtype,
            device,
            unordered: None,
            memory: PhantomData,
        }
    }

    /// The same tensor with a name.
    pub fn named(mut self, name: &'a str) -> Self {
        self.name = Some(name);
        self
    }

    /// Name of the tensor, if it has one.
    pub fn name(&self) -> Option<&str> {
        self.name
    }

    /// The same tensor as one of several that share a name.
    pub(crate) fn numbered(self, part: u32) -> Self {
        TensorMut { part, ..self }
    }

    /// The same tensor, of a map that this key holds.
    pub(crate) fn within(self, key: &'a str) -> Self {
        let keys = key.bytes().chain(self.scope.1.to_le_bytes());
        TensorMut { scope: (Some(key), fnv1a(keys)), ..self }
    }

    /// What tells the tensor from all others. The name is empty if there is none.
    pub(crate) fn identity(&self) -> Identity<'_> {
        let (outer, scope) = self.scope;
        Identity { name: self.name.unwrap_or_default(), part: self.part, outer, scope }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// True if the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Dtype of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Device of its memory.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The same tensor for as long as this one is borrowed.
    pub(crate) fn reborrow(&mut self) -> TensorMut<'_> {
        TensorMut { memory: PhantomData, ..*self }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn unordered(self, unordered: Option<Unordered>) -> Self {
        TensorMut { unordered, ..self }
    }

    /// Reason to refuse the tensor, if there is one.
    pub(crate) fn refusal(&self) -> Option<Unordered> {
        self.unordered
    }

    pub(crate) fn address(&self) -> u64 {
        self.pointer as u64
    }
}

impl fmt::Debug for TensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}[{}; {}] on {}",
            self.name.unwrap_or("tensor"),
            self.dtype,
            self.elements,
            self.device
        )
    }
}

macro_rules! elements {
    ($($(#[$on:meta])* $element:ty => $dtype:ident),*) => {$(
        $(#[$on])*
        impl sealed::Sealed for $element {}
        $(#[$on])*
        impl Element for $element {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )*};
}
elements!(
    f32 => F32,
    f64 => F64,
    #[cfg(feature = "half")]
    f16 => F16,
    #[cfg(feature = "half")]
    bf16 => Bf16
);

impl<'a, T: Element> From<&'a mut [T]> for TensorMut<'a> {
    fn from(elements: &'a mut [T]) -> Self {
        let (pointer, count) = (elements.as_mut_ptr().cast(), elements.len());
        // SAFETY: the slice is borrowed mutably for 'a, and T is the element type of that dtype.
        unsafe { Self::from_raw_parts(pointer, count, T::DTYPE, Device::cpu()) }
    }
}

impl<'a, T: Element> From<&'a mut Vec<T>> for TensorMut<'a> {
    fn from(elements: &'a mut Vec<T>) -> Self {
        Self::from(&mut elements[..])
    }
}
