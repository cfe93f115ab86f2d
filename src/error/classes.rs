//! Classes of errors, and the parts that errors are made of.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::Error;

/// Part of an average that a rank was in when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Building the averager: ranks wait for one another and compare options and layouts.
    Build,
    /// Entry barrier: ranks wait for one another and compare their calls.
    Meet,
    /// Summing. No tensor has changed.
    Reduce,
    /// Vote before any rank writes. No tensor has changed.
    Commit,
    /// Writing the mean.
    Gather,
    /// Wait until every rank has written.
    Exit,
    /// A barrier, or a reduction of scalars. No tensor has a part in it.
    Exchange,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Build => "while building the averager",
            Phase::Meet => "at the start of an average",
            Phase::Reduce => "while summing",
            Phase::Commit => "at the vote before writing",
            Phase::Gather => "while writing the mean",
            Phase::Exit => "at the end of an average",
            Phase::Exchange => "at a barrier, or while scalars were reduced or state was moved",
        })
    }
}

/// Failure of a CUDA device: the function of the driver that failed, and the driver's own text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(String);

impl From<String> for DeviceError {
    fn from(text: String) -> Self {
        DeviceError(text)
    }
}

/// Error of a model's own code, which [`Error::LendFailed`] keeps as its source. Equal to its
/// clones only.
#[derive(Clone)]
pub struct LendSource(Arc<dyn std::error::Error + Send + Sync>);

impl LendSource {
    pub(crate) fn new(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        LendSource(Arc::new(error))
    }
}

// Not an `Error` itself: `source` gives the error inside, of its own type.
impl Deref for LendSource {
    type Target = dyn std::error::Error + Send + Sync;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for LendSource {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for LendSource {}

impl fmt::Debug for LendSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Cause of an [`Error`]: what has to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument, an option or a call of this program.
    Usage,
    /// A difference between ranks in something that must be the same on all of them.
    Mismatch,
    /// A rank that is late, gone, aborted or can't take part.
    Peer,
    /// A device or its driver.
    Device,
    /// Variables, limits and memory of the process.
    Environment,
}

impl Error {
    /// Cause of the error. An error with a [`source`](std::error::Error::source) has the kind of
    /// its source.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::AfterAverage { cause, .. } | Error::Poisoned { cause } => cause.kind(),
            Error::WorldSize { .. }
            | Error::RecoveryUnsupported { .. }
            | Error::InvalidOption { .. }
            | Error::InvalidState { .. }
            | Error::InvalidTensor { .. }
            | Error::LendFailed { .. }
            | Error::InvalidWeight { .. }
            | Error::AllWeightsZero
            | Error::LayoutChanged { .. }
            | Error::NonFinite { .. }
            | Error::StageVetoed { .. } => ErrorKind::Usage,
            Error::OptionsDiffer { .. }
            | Error::LayoutsDiffer { .. }
            | Error::SchedulesDiffer { .. }
            | Error::CallsDiffer { .. }
            | Error::HostsDiffer { .. }
            | Error::WeightingDiffers { .. } => ErrorKind::Mismatch,
            Error::Rendezvous { .. }
            | Error::JoinRefused { .. }
            | Error::PeerBuildFailed { .. }
            | Error::Excluded { .. }
            | Error::StaleView { .. }
            | Error::HostLost { .. }
            | Error::HostRefused { .. }
            | Error::Timeout { .. }
            | Error::Aborted { .. }
            | Error::PeerLost { .. } => ErrorKind::Peer,
            Error::DeviceUnavailable { .. }
            | Error::CudaUnavailable { .. }
            | Error::DeviceFailed { .. } => ErrorKind::Device,
            Error::Environment { .. }
            | Error::SharedMemory { .. }
            | Error::Memory { .. }
            | Error::Thread { .. } => ErrorKind::Environment,
        }
    }

    /// True if no averager of this rank in this world can be used until it has recovered
    /// ([`LocalSgd::recover`](crate::LocalSgd::recover), of ranks that are processes). The same
    /// holds on all other ranks, except after [`Error::Excluded`], where the others went on.
    pub fn is_fatal(&self) -> bool {
        if let Error::AfterAverage { cause, .. } = self {
            return cause.is_fatal();
        }
        matches!(
            self,
            Error::Timeout { .. }
                | Error::HostLost { .. }
                | Error::Aborted { .. }
                | Error::PeerLost { .. }
                | Error::DeviceFailed { .. }
                | Error::Poisoned { .. }
                | Error::StaleView { .. }
                | Error::Excluded { .. }
        )
    }

    /// State of this rank's tensors after the call that failed.
    pub fn tensors(&self) -> TensorState {
        match self {
            Error::Timeout { committed: true, .. }
            | Error::Aborted { committed: true, .. }
            | Error::PeerLost { committed: true, .. } => TensorState::MayBeMixed,
            Error::AfterAverage { averaged, cause } => match (averaged, cause.tensors()) {
                (Some(_), TensorState::Unchanged) => TensorState::Averaged,
                (None, TensorState::Unchanged) => TensorState::MayBeMixed,
                (_, state) => state,
            },
            Error::DeviceFailed { .. } => TensorState::Unknown,
            _ => TensorState::Unchanged,
        }
    }
}

/// State of a rank's tensors after a call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TensorState {
    /// Every tensor holds what it held before the call.
    Unchanged,
    /// Every tensor holds the mean: a later step of the call failed.
    Averaged,
    /// Each element is either the rank's own value or the mean. An average among the ranks that are
    /// left makes them agree again.
    MayBeMixed,
    /// Nothing is known, since the device failed: restore the tensors from a checkpoint.
    Unknown,
}

/// Beginning of an `AfterAverage`.
pub(super) fn before(averaged: &Option<Box<crate::Report>>) -> &'static str {
    match averaged {
        Some(_) => "the average was made, and every tensor holds the mean",
        None => "an average failed while tensors were written, which may be partly averaged",
    }
}

/// Host in the error of a link.
pub(super) fn of_host(host: &Option<usize>) -> String {
    host.map_or(String::new(), |host| format!(", at host {host}"))
}

/// End of an error that may have come after the commit.
pub(super) fn written(committed: &bool) -> &'static str {
    if *committed {
        " (tensors may be partly averaged)"
    } else {
        " (no tensor was changed)"
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn errors_that_follow_from_others_show_them() {
        let cause = Error::PeerLost { rank: 1, phase: Phase::Meet, committed: false };
        let boxed = || Box::new(cause.clone());
        for error in [
            Error::Poisoned { cause: boxed() },
            Error::AfterAverage { averaged: None, cause: boxed() },
        ] {
            let source = std::error::Error::source(&error).expect("a source").to_string();
            assert_eq!(source, cause.to_string());
            assert_eq!((error.kind(), error.is_fatal()), (ErrorKind::Peer, true));
        }
        assert!(std::error::Error::source(&cause).is_none());
    }

    #[test]
    fn an_excluded_rank_has_no_averager_left() {
        let excluded = Error::Excluded { rank: 2, timeout: Duration::from_secs(1) };
        assert!(excluded.is_fatal() && excluded.tensors() == TensorState::Unchanged);
    }
}
