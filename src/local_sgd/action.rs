//! Results of the calls of [`LocalSgd`](super::LocalSgd).

use crate::{Error, Report};

/// Result of a call of [`LocalSgd`](super::LocalSgd).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// The step was counted, and no average was due.
    Counted {
        /// Steps until the next average, at least 1.
        until_next: u64,
    },
    /// The parameters are now the mean of all ranks' parameters, or the result of the
    /// [outer optimizer](crate::Builder::outer)'s step.
    Averaged(Report),
    /// An average was enqueued on the parameters' CUDA stream: work enqueued there from now on sees
    /// its result. Its outcome comes with the next average, or from
    /// [`wait`](super::LocalSgd::wait).
    Enqueued,
    /// The average of a copy was started, as [`Overlap`](crate::Overlap) says: training goes on
    /// meanwhile. A step that also ends an earlier one returns `Averaged`.
    Started {
        /// Steps until its result is added, in a step that returns `Averaged`.
        ends_in: u64,
    },
    /// A process was admitted: the world has one more rank, which has a copy of the model.
    Admitted {
        /// Average that was due, made just before. `None`: this rank was alone, and its parameters
        /// are unchanged.
        average: Option<Report>,
    },
    /// This is the only rank left, and the failed average had begun to write: each element is this
    /// rank's own or the result of that average.
    PartlyAveraged,
    /// No rank had taken a step since the last average, so no parameter was moved.
    Unneeded,
    /// This is the only rank, with neither an outer optimizer nor a stage, or Local SGD is not
    /// enabled: the step was counted, and the parameters are unchanged.
    Alone,
}

impl Action {
    /// Report of the average, if one was made.
    pub fn report(&self) -> Option<&Report> {
        match self {
            Action::Averaged(report) => Some(report),
            Action::Admitted { average } => average.as_ref(),
            _ => None,
        }
    }

    /// Error of a call that has this result, and failed in a later part.
    pub(super) fn after(self, cause: Error) -> Error {
        match self.report() {
            Some(report) => {
                let averaged = Some(Box::new(report.clone()));
                Error::AfterAverage { averaged, cause: Box::new(cause) }
            }
            None => cause,
        }
    }
}
