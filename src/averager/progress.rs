//! Record of the changes that a call of several steps has made to the tensors so far.

use crate::{Error, Report, TensorState};

/// The changes that one call has made to the tensors before its current step.
///
/// A call such as `LocalSgd::step` averages, admits a process, and may recover. Each step has its
/// own result, but the caller gets one. The functions that make several steps return [`Halt`] as
/// their error, which only a `Progress` can make of an [`Error`], so that none of them can report
/// "no tensor was changed" after an earlier step has changed some.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    averaged: Option<Box<Report>>,
    written: bool,
}

/// The error of a call of several steps.
#[derive(Debug)]
pub(crate) struct Halt(Error);

impl Progress {
    /// Notes an average that was completed.
    pub(crate) fn averaged(&mut self, report: &Report) {
        self.averaged = Some(Box::new(report.clone()));
    }

    /// Notes a step that failed and after which the call goes on.
    pub(crate) fn survived(&mut self, error: &Error) {
        self.written |= error.tensors() != TensorState::Unchanged;
    }

    /// True if a step that failed may have left tensors half written.
    pub(crate) fn has_written(&self) -> bool {
        self.written
    }

    /// The error of the whole call, of which `cause` ended the current step.
    pub(crate) fn halt(&mut self, cause: Error) -> Halt {
        let hides_a_change = self.written && cause.tensors() == TensorState::Unchanged;
        if self.averaged.is_none() && !hides_a_change {
            return Halt(cause);
        }
        Halt(Error::AfterAverage { averaged: self.averaged.take(), cause: Box::new(cause) })
    }
}

impl Halt {
    /// The error for the caller. No `From`: a second one for `Error` would leave `?` in users'
    /// closures without a type.
    pub(crate) fn error(self) -> Error {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Phase;
    use crate::Algorithm;

    fn lost(committed: bool) -> Error {
        Error::PeerLost { rank: 1, phase: Phase::Gather, committed }
    }

    #[test]
    fn errors_tell_what_earlier_steps_have_changed() {
        let mut progress = Progress::default();
        assert_eq!(progress.halt(lost(false)).error(), lost(false));
        progress.survived(&lost(false));
        assert_eq!(progress.halt(lost(false)).error(), lost(false));
        progress.survived(&lost(true));
        assert_eq!(progress.halt(lost(true)).error(), lost(true), "it says so itself");
        let error = progress.halt(lost(false)).error();
        assert!(error.tensors() != TensorState::Unchanged && error.is_fatal(), "{error:?}");
        assert!(error.to_string().contains("partly averaged"), "{error}");

        let report = Report {
            bytes: 4,
            elapsed: Default::default(),
            waited: Default::default(),
            active: Default::default(),
            measured: Default::default(),
            hosts: 1,
            world_size: 2,
            algorithm: Algorithm::Ring,
            channels: 1,
            chunk_bytes: 0,
            compression: Default::default(),
            join_pending: true,
            lost_state: 0.0,
            local_steps: 0,
            telemetry: None,
        };
        for cause in [lost(true), lost(false), Error::AllWeightsZero] {
            let mut progress = Progress::default();
            progress.averaged(&report);
            let error = progress.halt(cause.clone()).error();
            assert!(
                error.tensors() != TensorState::Unchanged && error.is_fatal() == cause.is_fatal(),
                "{error:?}"
            );
            assert!(error.to_string().contains("every tensor holds the mean"), "{error}");
            let source = std::error::Error::source(&error).unwrap();
            assert_eq!(source.to_string(), cause.to_string());
        }
    }
}
