//! Loans: a model's tensors for the time of one average, and the order of their other uses.

use std::ffi::c_void;
use std::fmt;
use std::time::Instant;

use super::table::Problem;
use super::{Call, Outcome, ParamAverager, Report, Work};
use crate::backend::Order;
use crate::error::LendSource;
use crate::{Error, Parameters, Result};

/// A model that lends its tensors for the time of one average.
///
/// Every list of tensors ([`Parameters`]) implements it. Implement this trait for tensors that must
/// be locked, assembled or ordered first: behind a lock, in a framework's storage, on a CUDA
/// stream. `lend` is called once when an averager is built, to look at the tensors, and then only
/// for an average, which for [`LocalSgd`](crate::LocalSgd) is one step of many. Peers may be
/// waiting meanwhile.
///
/// The tensors come in the same order on every rank. The order of a `HashMap` is no order: sort by
/// name, and pass the names on ([`TensorMut::named`](crate::TensorMut::named)), so that a
/// difference between ranks is an error when the averager is built.
///
/// ```
/// use std::sync::Mutex;
/// use param_averager::{Lend, LendError, Loan, TensorMut};
///
/// /// Weights, read by other threads under a lock.
/// struct Shared(Vec<(String, Mutex<Vec<f32>>)>);
///
/// impl Lend for Shared {
///     fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
///         let mut guards = vec![];
///         for (name, weights) in &self.0 {
///             let poisoned = |_| LendError::new(format!("the lock of {name} is poisoned"));
///             guards.push((name, weights.lock().map_err(poisoned)?));
///         }
///         guards.sort_by_key(|(name, _)| *name); // the same order on every rank
///         let lent = guards.iter_mut().map(|(name, w)| TensorMut::from(&mut w[..]).named(name));
///         average(Loan::new(&mut lent.collect::<Vec<_>>()));
///         Ok(())
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't lend its tensors to an average",
    note = "lists of tensors such as `Vec<Vec<f32>>` can; for a struct of your own, implement \
            `Parameters`",
    note = "candle: `VarParams` of the package `param-averager-candle` lends a `VarMap`; burn: \
            `BurnParams` of `param-averager-burn` lends a module",
    note = "tch and others: implement `Lend` for a type of your own that holds the model's \
            tensors sorted by name, and lends them for one average; see `param_averager::Lend`"
)]
pub trait Lend {
    /// Calls `average` once, with all tensors, in an order that is the same on every rank and at
    /// every call. When `average` returns, the average has been made, or enqueued on the loan's
    /// stream; its result goes to the caller of the collective call, not to `lend`.
    ///
    /// # Errors
    /// The reason why the tensors can't be lent now: a poisoned lock, a tensor that is not
    /// contiguous or holds no floats.
    ///
    /// * Before `average` was called: every rank gets [`Error::LendFailed`], this rank with its own
    ///   reason, and no tensor is changed. The same holds if `average` is not called. (Peers that
    ///   are processes get [`Error::PeerBuildFailed`] if an averager is being built.)
    /// * After it: the average was made, and the peers have it. This rank alone gets
    ///   [`Error::AfterAverage`]; its schedule goes on as that of its peers. (While an averager is
    ///   built it gets [`Error::LendFailed`], and has none; its peers lose it.)
    /// * While `average` is captured for a CUDA graph, `lend` must not fail before it: peers that
    ///   captured do not wait for an average now, so that this rank waits until its timeout.
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError>;
}

impl<P: Parameters + ?Sized> Lend for P {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        let mut tensors = self;
        average(Loan::new(&mut tensors));
        Ok(())
    }
}

/// Tensors of one average, for as long as [`Lend::lend`] runs, and the order of their uses.
pub struct Loan<'a>(Lent<'a>);

enum Lent<'a> {
    /// Tensors with no other use until the average has been made.
    Exclusive(&'a mut dyn Parameters),
    /// Tensors whose uses are all ordered on this stream.
    OnStream(&'a mut dyn Parameters, *mut c_void),
    /// Tensors whose uses are ordered by an adapter.
    Ordered(&'a mut dyn Ordered),
}

impl<'a> Loan<'a> {
    /// Tensors with no other use until the average has been made. On a CUDA device, the average
    /// runs behind the work of the null stream.
    pub fn new(tensors: &'a mut dyn Parameters) -> Self {
        Loan(Lent::Exclusive(tensors))
    }

    /// Tensors whose uses are ordered on a CUDA stream: the average runs behind the stream's
    /// earlier work, and later work sees the mean. [`RawCudaParams`](crate::RawCudaParams) says
    /// which streams are valid.
    ///
    /// # Safety
    /// As [`RawCudaParams::new`](crate::RawCudaParams::new).
    pub unsafe fn on_stream(tensors: &'a mut dyn Parameters, stream: *mut c_void) -> Self {
        Loan(Lent::OnStream(tensors, stream))
    }

    /// Tensors whose uses are ordered by an adapter of this crate.
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

/// Reason why tensors could not be lent. `?` converts an error into it and keeps it, as the source
/// of [`Error::LendFailed`] on this rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LendError {
    reason: String,
    source: Option<LendSource>,
}

impl LendError {
    /// Error with this text: the tensor, what was found, what to do.
    pub fn new(reason: impl Into<String>) -> Self {
        LendError { reason: reason.into(), source: None }
    }

    /// `lend` may catch a panic of `average`, or of the tensors.
    pub(super) fn panicked() -> Self {
        LendError::new("its tensors panicked while they were lent")
    }

    pub(super) fn of_rank(self, rank: usize) -> Error {
        Error::LendFailed { rank, reason: self.reason, source: self.source }
    }
}

// Not an `Error` itself, so that every error can become one.
impl<E: std::error::Error + Send + Sync + 'static> From<E> for LendError {
    fn from(error: E) -> Self {
        LendError { reason: error.to_string(), source: Some(LendSource::new(error)) }
    }
}

impl fmt::Display for LendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Tensors whose uses are ordered by an adapter: it makes the stream wait for earlier uses, and
/// later uses wait for the average.
pub(crate) trait Ordered {
    /// Calls `with` with the tensors at their current addresses.
    fn with_tensors(
        &mut self,
        rank: usize,
        with: &mut dyn FnMut(&mut dyn Parameters),
    ) -> Result<()>;

    /// Starts one average, as `begin` does. `waits` is true if the caller lets nothing use the
    /// tensors until it has waited for the average.
    fn begin(
        &mut self,
        averager: &mut ParamAverager,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Option<Outcome>>;
}

/// Average that has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    /// Its outcome, if it is known already.
    outcome: Option<Outcome>,
    /// Failure of `lend`: before the average, which tells the peers, or after it.
    failed: Option<Error>,
}

impl Begun {
    pub(super) fn is_over(&self) -> bool {
        self.outcome.is_some()
    }

    /// Failure of `lend`.
    pub(super) fn failed(self) -> Option<Error> {
        self.failed
    }
}

impl ParamAverager {
    /// Makes one average, which is done when this returns. A `lend` that fails after the average
    /// has made no difference to it: `take_late` returns that error.
    pub(crate) fn run<P: Lend + ?Sized>(&mut self, params: &mut P, call: Call) -> Result<Outcome> {
        let start = Instant::now();
        let begun = self.average_lent(params, call, true, start)?;
        self.conclude(begun, start)
    }

    /// Begins one average. Its outcome is known if the tensors have no stream, or if the caller
    /// `waits`.
    pub(crate) fn average_lent<P: Lend + ?Sized>(
        &mut self,
        params: &mut P,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Begun> {
        if call.work != Work::Apply {
            self.preflight()?; // the average has ended, whatever has happened since
        }
        let (mut made, mut loans) = (None, 0);
        let lent = params.lend(&mut |loan| {
            loans += 1;
            if loans == 1 {
                made = Some(self.average_loan(loan, call, waits, start));
            }
        });
        let failed = lent.and_then(|()| lent_once(loans)).err();
        match (made, failed) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(outcome)), failed) => {
                Ok(Begun { outcome, failed: failed.map(|failed| failed.of_rank(self.rank())) })
            }
            (None, failed) => {
                let own = failed.unwrap_or_else(LendError::panicked).of_rank(self.rank());
                self.refuse_to_average(call, own, start)
            }
        }
    }

    /// Waits for an average that has begun.
    pub(crate) fn conclude(&mut self, begun: Begun, start: Instant) -> Result<Outcome> {
        let ended = begun.outcome.map_or_else(|| self.end(start), Ok);
        match (ended, begun.failed) {
            (Ok(outcome @ Outcome::Averaged(_)), Some(failed)) => {
                self.late = Some(failed);
                Ok(outcome)
            }
            // Peers were told, or the average was captured, or moved nothing: this rank knows why.
            (
                Ok(Outcome::Unneeded { .. })
                | Err(Error::LendFailed { .. } | Error::InvalidOption { .. }),
                Some(failed),
            ) => Err(failed),
            (ended, _) => ended,
        }
    }

    /// Failure of a `lend` after its average was made. A call of several steps asks at its end, so
    /// that its other steps are the same on every rank.
    pub(crate) fn take_late(&mut self) -> Option<Error> {
        self.late.take()
    }

    /// The report of a call, unless its `lend` failed late.
    pub(super) fn unless_late(&mut self, report: Report) -> Result<Report> {
        match self.take_late() {
            None => Ok(report),
            Some(cause) => Err(Error::AfterAverage {
                averaged: Some(Box::new(report)),
                cause: Box::new(cause),
            }),
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
            Lent::Exclusive(tensors) => {
                // SAFETY: the tensors are borrowed until `end` has returned, below.
                let waits = call.work == Work::InPlace;
                (unsafe { self.begin(tensors, call, Order::NullStream, start) }?, waits)
            }
            Lent::OnStream(tensors, stream) => {
                // SAFETY: the promise of `Loan::on_stream`.
                unsafe { self.check_stream(stream, waits) }?;
                let order = if waits { Order::Behind(stream) } else { Order::Within(stream) };
                // SAFETY: as above.
                (unsafe { self.begin(tensors, call, order, start) }?, waits)
            }
            Lent::Ordered(params) => (params.begin(self, call, waits, start)?, waits),
        };
        match begun {
            None if waits => self.end(start).map(Some),
            begun => Ok(begun),
        }
    }

    /// Takes part in an average only to tell the peers that this rank has no tensors for it.
    fn refuse_to_average(&mut self, call: Call, own: Error, start: Instant) -> Result<Begun> {
        if self.is_alone() {
            return Err(own);
        }
        if call.work == Work::Apply {
            return Err(own); // the peers have made the average
        }
        let _ = self.own.engine.finish();
        // SAFETY: with a problem, no tensor is read or written.
        unsafe { self.launch(Some(Problem::NOT_LENT), call, Order::NullStream, start) }?;
        Ok(Begun { outcome: None, failed: Some(own) })
    }
}

/// Checks that one call of `lend` has called `average` once.
fn lent_once(loans: usize) -> std::result::Result<(), LendError> {
    match loans {
        0 => Err(LendError::new("its `lend` returned without calling `average`")),
        1 => Ok(()),
        _ => Err(LendError::new("its `lend` called `average` more than once")),
    }
}

/// Calls `with` with the tensors that `params` lends, without an average. Returns true if their
/// uses are ordered on a stream.
pub(super) fn with_tensors<P: Lend + ?Sized>(
    params: &mut P,
    rank: usize,
    with: &mut dyn FnMut(&mut dyn Parameters),
) -> Result<bool> {
    let (mut made, mut loans, mut on_stream) = (Ok(()), 0, false);
    let lent = params.lend(&mut |loan| {
        loans += 1;
        if loans == 1 {
            on_stream = !matches!(loan.0, Lent::Exclusive(_));
            made = match loan.0 {
                Lent::Exclusive(tensors) | Lent::OnStream(tensors, _) => {
                    with(tensors);
                    Ok(())
                }
                Lent::Ordered(params) => params.with_tensors(rank, with),
            };
        }
    });
    let lent = lent.and_then(|()| lent_once(loans));
    made.and(lent.map_err(|failed| failed.of_rank(rank)))?;
    Ok(on_stream)
}
