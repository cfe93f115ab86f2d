//! Tensors by address, with the CUDA stream that orders their uses.

use std::ffi::c_void;

use super::{Lend, LendError, Loan};
use crate::Parameters;
#[cfg(doc)]
use crate::{Error, ParamAverager};

/// Tensors on a CUDA device by their addresses ([`TensorMut::from_raw_parts`]), with the stream
/// that orders their uses.
///
/// [`average`](ParamAverager::average) then runs behind the work of the stream and waits;
/// [`start`](ParamAverager::start) enqueues and returns.
///
/// The stream is a `CUstream` (a `cudaStream_t` is the same) of the device's primary context, and
/// of any kind: non-blocking, blocking, the null stream (0 or `CU_STREAM_LEGACY`), or the default
/// stream of the calling thread (`CU_STREAM_PER_THREAD`). The average runs on a stream of the
/// averager's own, ordered by events; a `start` on a non-blocking stream runs there. On CPUs the
/// stream is ignored.
///
/// `average` waits, so ranks may even share one stream; so does a step of
/// [`LocalSgd`](crate::LocalSgd) with another than a non-blocking stream, if a second rank of the
/// process is on the device. A stream that a rank gives to `start` waits for the average, and so
/// for the peers. If a peer's average is behind that, both wait until the
/// timeout. Therefore, of ranks on one device that are threads of one process,
///
/// * no two give one stream to `start`;
/// * none gives a blocking stream (a thread's default stream is one) to `start` while another
///   averages on the null stream, or without a stream; nor the other way round;
/// * if they give blocking streams to `start`, nothing uses the null stream of the device, as
///   `cudaMemcpy` and `cudaMemset` do, from the first rank's `start` to the last one's.
///
/// What breaks one of the first two is refused ([`Error::InvalidOption`]) on the rank that comes
/// later. Its peers get an error when it drops its averager, or at the timeout. The third can't be
/// seen, nor can the first two between replays of graphs, or between two ranks of one process that
/// met as processes do. Ranks on other devices, and in other processes, have streams of their own.
///
/// While the stream is being captured, [`start`](ParamAverager::start) captures the average into
/// the graph.
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
