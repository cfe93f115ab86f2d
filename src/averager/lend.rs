//! Lending: how an average gets at a model's tensors, and how their other uses are ordered with it.

use std::ffi::c_void;
use std::fmt;
use std::time::Instant;

use super::table::Problem;
use super::{Call, Outcome, ParamAverager};
use crate::{Error, Parameters, Result};

/// A model that lends its tensors for the time of one average.
///
/// Every list of tensors ([`Parameters`]) is one, with nothing to write. Implement this trait for
/// tensors that are not simply there: behind a lock, in a framework's storage, on a CUDA stream.
/// `lend` is called only if an average is made, which for [`LocalSgd`](crate::LocalSgd) is one step
/// of many, and while peers may be waiting.
///
/// ```
/// use std::sync::Mutex;
/// use param_averager::{Lend, LendError, Loan, TensorMut};
///
/// /// Weights that other threads read under a lock.
/// struct Shared(Vec<(String, Mutex<Vec<f32>>)>);
///
/// impl Lend for Shared {
///     fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
///         let mut guards = vec![];
///         for (name, weights) in &self.0 {
///             let guard = weights.lock().map_err(|_| LendError::new(format!("{name} is poisoned")))?;
///             guards.push((name, guard));
///         }
///         guards.sort_by_key(|(name, _)| *name); // the same order on every rank
///         let mut tensors: Vec<_> =
///             guards.iter_mut().map(|(name, w)| TensorMut::from(&mut w[..]).named(name)).collect();
///         average(Loan::new(&mut tensors));
///         Ok(())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't lend its tensors to an average",
    note = "lists of tensors such as `Vec<Vec<f32>>` can; for a struct of your own, implement \
            `Parameters`",
    note = "candle, burn, tch: implement `Lend` for a type of your own that holds the model's \
            tensors sorted by name, and lends them for one average; see `param_averager::Lend`"
)]
pub trait Lend {
    /// Calls `average` once, with all tensors, in an order that is the same on every rank and at
    /// every call. When it returns, the average has been made, or enqueued on the loan's stream;
    /// how it ended is told to the caller of the average, not here.
    ///
    /// # Errors
    /// Why the tensors can't be lent now: a lock that is poisoned, a tensor that is not contiguous
    /// or no float. Every rank then gets [`Error::LendFailed`], and no tensor is changed. The same
    /// holds if `average` is not called.
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError>;
}

impl<P: Parameters + ?Sized> Lend for P {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        let mut tensors = self;
        average(Loan::new(&mut tensors));
        Ok(())
    }
}

/// The tensors of one average, for as long as [`Lend::lend`] runs, and what orders their uses.
pub struct Loan<'a>(Lent<'a>);

enum Lent<'a> {
    /// Nothing else uses the tensors until the average has been made.
    Exclusive(&'a mut dyn Parameters),
    /// All uses of the tensors are ordered on this stream.
    OnStream(&'a mut dyn Parameters, *mut c_void),
    /// An adapter orders their uses.
    Ordered(&'a mut dyn Ordered),
}

impl<'a> Loan<'a> {
    /// Tensors that nothing else uses until the average has been made. On a CUDA device, the
    /// average runs behind what the null stream was given before.
    pub fn new(tensors: &'a mut dyn Parameters) -> Self {
        Loan(Lent::Exclusive(tensors))
    }

    /// Tensors whose uses are ordered on a CUDA stream: the average runs behind what the stream was
    /// given, and what it is given later finds the mean. See [`RawCudaParams`] for streams that can
    /// be used.
    ///
    /// # Safety
    /// As [`RawCudaParams::new`].
    pub unsafe fn on_stream(tensors: &'a mut dyn Parameters, stream: *mut c_void) -> Self {
        Loan(Lent::OnStream(tensors, stream))
    }

    /// Tensors whose uses an adapter of this crate orders.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub(crate) fn ordered(params: &'a mut dyn Ordered) -> Self {
        Loan(Lent::Ordered(params))
    }
}

impl fmt::Debug for Loan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Lent::Exclusive(_) => "Loan::Exclusive",
            Lent::OnStream(..) => "Loan::OnStream",
            Lent::Ordered(_) => "Loan::Ordered",
        })
    }
}

/// Why tensors could not be lent. Any error becomes one by `?`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LendError(String);

impl LendError {
    /// An error with this text: which tensor, what was found, what to do.
    pub fn new(reason: impl Into<String>) -> Self {
        LendError(reason.into())
    }
}

// Not an `Error` itself, so that every error can become one.
impl<E: std::error::Error> From<E> for LendError {
    fn from(error: E) -> Self {
        LendError(error.to_string())
    }
}

impl fmt::Display for LendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Tensors on a CUDA device by their addresses ([`TensorMut::from_raw_parts`]), with the stream
/// that orders their uses.
///
/// [`average`](ParamAverager::average) then runs behind the work of the stream and waits;
/// [`start`](ParamAverager::start) enqueues and returns.
///
/// The stream is a `CUstream` (a `cudaStream_t` is the same) of the device's primary context. It is
/// this rank's own: on a stream that ranks share, the first one's average would wait for one that
/// is behind it. And it is of the non-blocking kind: what a peer does on the null stream would wait
/// for the others. Any other is refused, on this rank alone, whose peers find out when it drops its
/// averager or at the timeout. With ranks on CPUs no stream is looked at.
///
/// A stream that is being captured takes an average by [`start`](ParamAverager::start) into its
/// graph.
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
    /// Until every average of them is done, the stream lives, and the tensors live and are used by
    /// nothing but work that is ordered before or after it on that stream. This holds for every
    /// replay of a graph that such an average was captured in, and the replay ends before the
    /// averager is dropped.
    pub unsafe fn new(stream: *mut c_void, tensors: P) -> Self {
        RawCudaParams { tensors, stream }
    }
}

impl<P: Parameters> Lend for RawCudaParams<P> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        // SAFETY: the promise of `new`.
        average(unsafe { Loan::on_stream(&mut self.tensors, self.stream) });
        Ok(())
    }
}

/// Tensors with an order of their own: an adapter makes the stream wait for their earlier uses, and
/// later uses wait for the average.
pub(crate) trait Ordered {
    /// Calls `with` with the tensors as they are now.
    fn with_tensors(
        &mut self,
        with: &mut dyn FnMut(&mut dyn Parameters),
    ) -> std::result::Result<(), String>;

    /// Starts one average, as `begin` does. `waits`: the caller lets nothing use the tensors until
    /// it has waited for the average.
    fn begin(
        &mut self,
        averager: &mut ParamAverager,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Option<Outcome>>;
}

impl ParamAverager {
    /// One average, made when it returns.
    pub(crate) fn run<P: Lend + ?Sized>(&mut self, params: &mut P, call: Call) -> Result<Outcome> {
        let start = Instant::now();
        match self.average_lent(params, call, true, start)? {
            Some(outcome) => Ok(outcome),
            None => unreachable!("it was waited for"),
        }
    }

    /// One average. `None`: it is under way on a stream, which `waits` excludes.
    pub(super) fn average_lent<P: Lend + ?Sized>(
        &mut self,
        params: &mut P,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        self.preflight()?;
        let (mut made, mut loans) = (None, 0);
        let lent = params.lend(&mut |loan| {
            loans += 1;
            if loans == 1 {
                made = Some(self.average_loan(loan, call, waits, start));
            }
        });
        let lent = lent.and_then(|()| match loans {
            0 => Err(LendError::new("its `lend` returned without calling `average`")),
            1 => Ok(()),
            _ => Err(LendError::new("its `lend` called `average` more than once")),
        });
        match (made, lent) {
            (Some(Ok(outcome)), Ok(())) => Ok(outcome),
            (Some(Err(error)), _) => Err(error),
            (None, Ok(())) => unreachable!("a loan is an average"),
            (None, Err(failed)) => self.refuse_to_average(failed, call, start),
            (Some(Ok(outcome)), Err(failed)) => {
                let cause = Box::new(self.lend_failed(failed));
                match outcome.map_or_else(|| self.end(start), Ok)? {
                    Outcome::Averaged(report) => {
                        Err(Error::AfterAverage { averaged: Some(Box::new(report)), cause })
                    }
                    Outcome::Unneeded => Err(*cause),
                }
            }
        }
    }

    fn average_loan(
        &mut self,
        loan: Loan<'_>,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        let (begun, waits) = match loan.0 {
            // SAFETY: the tensors are borrowed until `end` has returned, below.
            Lent::Exclusive(tensors) => (unsafe { self.begin(tensors, call, None, start) }?, true),
            Lent::OnStream(tensors, stream) => {
                // SAFETY: the promise of `Loan::on_stream`.
                unsafe { self.check_stream(stream, waits) }?;
                // SAFETY: as above.
                (unsafe { self.begin(tensors, call, Some(stream), start) }?, waits)
            }
            Lent::Ordered(params) => (params.begin(self, call, waits, start)?, waits),
        };
        match begun {
            None if waits => self.end(start).map(Some),
            begun => Ok(begun),
        }
    }

    /// Takes part in an average only to say that this rank has no tensors for it.
    fn refuse_to_average(
        &mut self,
        failed: LendError,
        call: Call,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        let own = self.lend_failed(failed);
        if self.world_size() == 1 {
            return Err(own);
        }
        // SAFETY: with a problem, no tensor is read or written.
        let begun = unsafe { self.launch(Some(Problem::NOT_LENT), call, None) };
        match begun.and_then(|()| self.end(start)) {
            // This rank knows why.
            Err(Error::LendFailed { rank, .. }) if rank == self.rank() => Err(own),
            ended => ended.map(Some),
        }
    }

    fn lend_failed(&self, failed: LendError) -> Error {
        Error::LendFailed { rank: self.rank(), reason: failed.to_string() }
    }
}

/// Calls `with` with the tensors that `params` lends, for what is no average.
pub(super) fn with_tensors<P: Lend + ?Sized>(
    params: &mut P,
    with: &mut dyn FnMut(&mut dyn Parameters),
) -> std::result::Result<(), LendError> {
    let mut made = Err(LendError::new("its `lend` returned without calling `average`"));
    let lent = params.lend(&mut |loan| {
        made = match loan.0 {
            Lent::Exclusive(tensors) | Lent::OnStream(tensors, _) => {
                with(tensors);
                Ok(())
            }
            Lent::Ordered(params) => params.with_tensors(with).map_err(LendError),
        };
    });
    lent.and(made)
}
