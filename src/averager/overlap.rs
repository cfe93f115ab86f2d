//! Averages of a copy, made while the tensors change: their start, and the addition of what they
//! have changed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::lend::Begun;
use super::table::Problem;
use super::{Builder, Call, Lend, Outcome, ParamAverager, Report, Work};
use crate::abi::{PaArgs, PA_APPLY, PA_SNAPSHOT};
use crate::backend::{Order, Unstarted};
use crate::schedule::place;
use crate::{Error, Overlap, Result};

/// Average of a copy of the parameters that was started. [`ParamAverager::finish_overlapped`] takes
/// it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "pass it to ParamAverager::finish_overlapped, on every rank"]
pub struct Overlapped {
    /// Number of the average among all that this process has started.
    number: u64,
}

/// Number of the next average of a copy.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// End of an average of a copy.
#[derive(Default)]
pub(crate) struct Landed {
    /// Report of the average, if it was made.
    pub(crate) report: Option<Report>,
    /// True if its result was added, or no rank needed it. False also if it was dropped before.
    pub(crate) is_over: bool,
    pub(crate) error: Option<Error>,
}

/// The average of a copy that an averager has started.
#[derive(Debug)]
pub(super) struct UnderWay {
    number: u64,
    call: Call,
    start: Instant,
    begun: Begun,
}

impl ParamAverager {
    /// Starts the average of a copy of one fragment of the parameters, numbered from 0, which is
    /// the whole model unless [`Overlap::fragments`](crate::Overlap::fragments) says otherwise.
    /// When this returns the parameters may change; on a CUDA stream, by work behind what is
    /// enqueued now. Collective; ranks meet in it that are threads and have CUDA devices, or
    /// processes whose devices have no stream memory operations.
    ///
    /// No other average of this averager begins before
    /// [`finish_overlapped`](Self::finish_overlapped), [`drop_overlapped`](Self::drop_overlapped),
    /// or [`recover`](Self::recover), which drops this one. [`LocalSgd`](crate::LocalSgd) makes
    /// both calls by itself.
    ///
    /// ```
    /// use param_averager::{Communicator, Device, Overlap, ParamAverager};
    ///
    /// Communicator::run(&[Device::cpu(), Device::cpu()], |communicator| {
    ///     let rank = communicator.rank() as f32;
    ///     let mut model = vec![vec![0.0f32; 1000]];
    ///     let overlap = Overlap::default().delay(1);
    ///     let builder = ParamAverager::builder(communicator).overlap(overlap);
    ///     let mut averager = builder.build(&mut model)?;
    ///     model[0].fill(rank);
    ///     let average = averager.start_overlapped(0, &mut model)?;
    ///     model[0].iter_mut().for_each(|x| *x += 10.0); // training goes on
    ///     averager.finish_overlapped(average, &mut model)?;
    ///     assert_eq!(model[0], [10.5; 1000]); // the mean of 0 and 1, and what came after it
    ///     Ok::<_, param_averager::Error>(())
    /// })?;
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// # Errors
    /// On this rank alone, with nothing started: [`Error::InvalidOption`] if the averager was built
    /// without a [delay](crate::Overlap::delay), the fragment does not exist, another average is
    /// under way, the stream is being captured, or an outer optimizer has no anchor, or compression
    /// no reference, yet since a recovery. Tensors that can't be used are an error of
    /// `finish_overlapped`, on every rank.
    pub fn start_overlapped<P: Lend + ?Sized>(
        &mut self,
        fragment: usize,
        params: &mut P,
    ) -> Result<Overlapped> {
        let place = place::overlapped(fragment);
        let call = Call { place, schedule: place::digest(place), ..Call::by_hand(None) };
        self.begin_overlapped(Call { fragment: Some(fragment), ..call }, params)
    }

    /// Waits for the average that was started, and adds its result less the copy to the parameters:
    /// all of it, or 1 − α ([`Overlap::alpha`](crate::Overlap::alpha)). Waits for nothing that
    /// peers do after they have started it, and is not stopped by their failures after that. If
    /// the parameters are used on a CUDA stream, the addition is enqueued there.
    ///
    /// # Errors
    /// As [`average`](Self::average), on every rank, with no tensor of this rank changed. An
    /// error of this rank's tensors or its `lend` is this rank's alone, and what the average has
    /// changed is lost to it: the next average makes up for that. [`Error::AfterAverage`] if the
    /// addition was made, and a `lend` has failed after the average or after the addition.
    pub fn finish_overlapped<P: Lend + ?Sized>(
        &mut self,
        average: Overlapped,
        params: &mut P,
    ) -> Result<Report> {
        let unknown = || Error::InvalidOption {
            rank: self.rank(),
            option: "average",
            found: "one that was dropped, or that LocalSgd has started, or of another averager"
                .into(),
            expected: "the one that this averager's start_overlapped has returned last",
        };
        let unknown = unknown();
        match self.end_overlapped(average, params) {
            Landed { error: Some(error), .. } => Err(error),
            Landed { report, .. } => report.ok_or(unknown),
        }
    }

    /// Waits for an average of a copy that was started, and drops what it has changed, on this rank
    /// alone. Does nothing if there is none. Where a token was lost, averages go on after it.
    pub fn drop_overlapped(&mut self) {
        if self.under_way.take().is_some() {
            let _ = self.own.engine.finish();
            self.note_no_replay();
        }
    }

    /// True if an average of a copy is under way and
    /// [`finish_overlapped`](Self::finish_overlapped) would not wait for it.
    pub fn is_overlapped_done(&self) -> bool {
        self.under_way.is_some() && self.own.engine.is_done()
    }

    /// Starts the average of a copy; see `start_overlapped`.
    pub(crate) fn begin_overlapped<P: Lend + ?Sized>(
        &mut self,
        call: Call,
        params: &mut P,
    ) -> Result<Overlapped> {
        self.preflight()?;
        let rank = self.rank();
        let refuse = |option, found: String, expected| {
            Err(Error::InvalidOption { rank, option, found, expected })
        };
        let (copies, fragments) = (self.options.overlap.copies(), self.table.fragments.len());
        if !copies {
            let found = format!("{}, for an average of a copy", self.options.overlap);
            return refuse("overlap", found, "a delay of 1 or more, which allocates the copy");
        }
        if call.fragment.is_some_and(|fragment| fragment >= fragments) {
            let found = format!("{}, of {fragments}", call.fragment.unwrap_or(0));
            return refuse("fragment", found, "the number of a fragment, from 0");
        }
        if !(self.has_anchor() && self.has_reference()) {
            return refuse(
                "overlap",
                "an average of a copy, before the first average since a recovery".into(),
                "one average that training waits for: the outer optimizer's steps, and what \
                 compression codes, begin from it",
            );
        }
        let (start, call) = (Instant::now(), Call { work: Work::OfCopy, ..call });
        let begun = self.average_lent(params, call, false, start)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.under_way = Some(UnderWay { number, call, start, begun });
        Ok(Overlapped { number })
    }

    /// Ends an average of a copy that was started; see `finish_overlapped`.
    pub(crate) fn end_overlapped<P: Lend + ?Sized>(
        &mut self,
        average: Overlapped,
        params: &mut P,
    ) -> Landed {
        let is_it = |under_way: &UnderWay| under_way.number == average.number;
        let Some(UnderWay { call, start, begun, .. }) = self.under_way.take_if(|it| is_it(it))
        else {
            return Landed::default();
        };
        let report = match self.conclude(begun, start) {
            Ok(Outcome::Averaged(report)) => report,
            Ok(Outcome::Unneeded { .. }) => return Landed { is_over: true, ..Landed::default() },
            Err(error) => {
                self.failed.iter_mut().for_each(of_a_copy);
                let mut error = error;
                of_a_copy(&mut error);
                return Landed { error: Some(error), ..Landed::default() };
            }
        };
        // Of the `lend` that gave the values to copy. The average was made all the same.
        let late = self.take_late();
        let after = |cause| Error::AfterAverage {
            averaged: Some(Box::new(report.clone())),
            cause: Box::new(cause),
        };
        let applied = match self.is_alone() {
            true => Ok(None),
            false => {
                let call = Call { work: Work::Apply, ..call };
                self.average_lent(params, call, false, Instant::now()).map(Begun::failed)
            }
        };
        let (is_over, error) = match applied {
            // Nothing was added, so the tensors are as training has left them.
            Err(cause) => (false, Some(cause)),
            Ok(failed) => (true, failed.or(late).map(after)),
        };
        Landed { report: Some(report), is_over, error }
    }

    /// How averages overlap with training.
    pub(crate) fn overlap(&self) -> Overlap {
        self.options.overlap
    }

    /// Error of a call that may not begin before an average of a copy was finished.
    pub(super) fn refusal_of_another(&self) -> Option<Error> {
        self.under_way.as_ref().map(|_| Error::InvalidOption {
            rank: self.rank(),
            option: "average",
            found: "another one, while one of a copy is under way".into(),
            expected: "ParamAverager::finish_overlapped first, or LocalSgd::flush",
        })
    }

    /// `begin` for work on a copy.
    ///
    /// # Safety
    /// As `begin`.
    pub(super) unsafe fn begin_beside(
        &mut self,
        problem: Option<Problem>,
        call: Call,
        order: Order,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        if let Order::Behind(stream) | Order::Within(stream) = order {
            // SAFETY: the caller's promise.
            if !self.is_alone() && unsafe { self.is_capturing(stream) }? {
                return Err(Error::InvalidOption {
                    rank: self.rank(),
                    option: "stream",
                    found: "being captured, for an average of a copy".into(),
                    expected: "a stream that is not captured, or ParamAverager::start",
                });
            }
        }
        if call.work == Work::Apply {
            if let Some(problem) = problem {
                return Err(self.table.error(self.rank(), problem));
            }
            // SAFETY: the caller's promise; the average has ended.
            return unsafe { self.run_beside(PA_APPLY, call, order) }.map(|()| None);
        }
        if self.is_alone() {
            self.call = call;
            return self.alone(self.refusal_of(problem, call), call, start).map(Some);
        }
        self.prepare_outer()?;
        if problem.is_none() {
            // SAFETY: the caller's promise.
            unsafe { self.run_beside(PA_SNAPSHOT, call, order) }?;
        }
        // Later work of the stream waits for the copy only.
        let order = match order {
            Order::Within(stream) => Order::Behind(stream),
            order => order,
        };
        // SAFETY: the caller's promise; from here on the copy is used, and the tensors are not.
        unsafe { self.launch(problem, call, order, start) }.map(|()| None)
    }

    /// Runs a kernel on the tensors and their copy.
    ///
    /// # Safety
    /// As `begin`. No average is running.
    unsafe fn run_beside(&mut self, kernel: u32, call: Call, order: Order) -> Result<()> {
        let (buckets, bucket_count) = self.place_tables(call.fragment, true);
        let share = 1.0 - self.options.overlap.alpha;
        let flags = self.args.flags | self.coded_flag();
        let args = PaArgs { buckets, bucket_count, share, flags, ..self.args };
        // SAFETY: the tables describe the tensors of the caller's promise; all other memory is this
        // averager's.
        unsafe { self.own.engine.run_local(&args, kernel, order) }.map_err(|failed| {
            if !matches!(failed, Unstarted::Refused { .. }) {
                self.agreement.control.give_up(self.position());
            }
            self.unstarted(failed)
        })
    }
}

impl Builder {
    /// Option, value and what is accepted, if the overlap can't be used.
    pub(super) fn overlap_refusal(&self) -> Option<(&'static str, String, &'static str)> {
        let overlap = self.overlap;
        let refused =
            |with: &str, expected| Some(("overlap", format!("{overlap}, {with}"), expected));
        match () {
            _ if overlap.refusal().is_some() => overlap.refusal(),
            _ if !overlap.is_on() => None,
            _ if self.telemetry => refused(
                "with telemetry",
                "one of the two: a sample tells of averages of the whole model, in place",
            ),
            _ if self.stage.is_some() => refused(
                "with a stage",
                "one of the two: a stage has the mean of the whole model, and its rank waits",
            ),
            _ if self.outer.mixes() => refused(
                "with an outer optimizer that keeps a share",
                "Overlap::alpha in the place of Outer::keeping",
            ),
            _ => None,
        }
    }
}

/// Error of an average of a copy: whatever it has written, no tensor has changed.
fn of_a_copy(error: &mut Error) {
    if let Error::Timeout { committed, .. }
    | Error::Aborted { committed, .. }
    | Error::PeerLost { committed, .. } = error
    {
        *committed = false;
    }
}
