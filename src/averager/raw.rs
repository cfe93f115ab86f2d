//! Tensors by address, with the CUDA stream that orders their uses.

use std::ffi::c_void;

use super::{Lend, LendError, Loan};
#[cfg(doc)]
use crate::ParamAverager;
use crate::Parameters;

/// Tensors on a CUDA device by their addresses ([`TensorMut::from_raw_parts`]), with the stream
/// that orders their uses.
///
/// [`average`](ParamAverager::average) then runs behind the work of the stream and waits;
/// [`start`](ParamAverager::start) enqueues the average and returns.
///
/// The stream is a `CUstream` (a `cudaStream_t` is the same) of the device's primary context, and
/// of any kind: non-blocking, blocking, the null stream (0 or `CU_STREAM_LEGACY`), or the default
/// stream of the calling thread (`CU_STREAM_PER_THREAD`). Ranks may share one. The average runs on
/// a stream of the averager's own, between events. On CPUs the stream is ignored.
///
/// While the stream is being captured, [`start`](ParamAverager::start) captures the average into
/// the graph, if every rank has a device of its own.
///
/// [`TensorMut::from_raw_parts`]: crate::TensorMut::from_raw_parts
#[derive(Debug)]
pub struct RawCudaParams<P> {
    tensors: P,
    stream: *mut c_void,
}

// SAFETY: a stream can be used from any thread.
unsafe impl<P: Send> Send for RawCudaParams<P> {}

impl<P: Parameters> RawCudaParams<P> {
    /// `tensors`, whose uses are ordered on `stream`.
    ///
    /// # Safety
    /// Until every average of the tensors is done, the stream and the tensors live, and the tensors
    /// are used only by work that is ordered before or after the average on that stream. The same
    /// holds for every replay of a graph with such an average in it, and the replay ends before the
    /// averager is dropped.
    pub unsafe fn new(stream: *mut c_void, tensors: P) -> Self {
        RawCudaParams { tensors, stream }
    }

    /// The tensors, without the stream.
    pub fn into_inner(self) -> P {
        self.tensors
    }
}

impl<P: Parameters> Lend for RawCudaParams<P> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        // SAFETY: the promise of `new`.
        average(unsafe { Loan::on_stream(&mut self.tensors, self.stream) });
        Ok(())
    }
}
