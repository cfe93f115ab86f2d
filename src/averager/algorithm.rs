//! Choice of how parameters move.

#[cfg(doc)]
use crate::{Builder, Error, ParamAverager};

/// Algorithm of an average: how the parameters move and where they are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// [`Direct`](Self::Direct) where ranks are threads of one process, on CPUs, on one CUDA device
    /// or on devices that NVLink connects, with verified access between every two; else
    /// [`Ring`](Self::Ring). On several devices the ring is taken, too, with
    /// [`Link::Host`](crate::Link::Host), and where other devices can't access the memory of a
    /// tensor of any rank when the averager is built.
    Auto,
    /// Ring all-reduce through mailboxes. Extra memory of a rank: at most S/n + 4 MiB for S bytes
    /// of parameters and n ranks, 16 MiB more on a CUDA device (32 MiB where the rank before it
    /// pushes and the rank itself is [pulled](crate::Link::Pull) from), and the state of an
    /// [outer optimizer](Builder::outer); 2 S with [compression](Builder::compression); with a
    /// [stage](Builder::stage) 4 bytes more for each element of f16 and bf16, over n. Shard s is
    /// summed in the order of ranks s+1, s+2, …, s, counted along
    /// [`ring_order`](ParamAverager::ring_order).
    Ring,
    /// Owner computes: the owner of each part reads all ranks' values, adds them in the order of
    /// [`ring_order`](ParamAverager::ring_order), which is that of the ranks unless they are on
    /// several CUDA devices, and writes all ranks' means. No mailboxes, one rounding, at most 1 MiB
    /// of extra memory, and the state of an [outer optimizer](Builder::outer).
    ///
    /// Between CUDA devices it needs peer access, which a probe of its own has found to work, and
    /// tensors in memory that `cuMemAlloc` has allocated in the primary context, or of a pool
    /// (`cuMemAllocAsync`, as cudarc allocates): the pool is made accessible to the devices of the
    /// other ranks (`cuMemPoolSetAccess`). Tensors in other memory are an [`Error::InvalidTensor`].
    /// A tensor is checked when its address changes. A tensor that keeps its address must stay in
    /// the same memory.
    Direct,
}
