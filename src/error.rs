//! Everything that can go wrong, and what to do about it.

use std::fmt;
use std::time::Duration;

/// The result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Where in an average a rank was when it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Building the averager: ranks wait for one another and compare layouts.
    Build,
    /// The meeting: ranks wait for one another and compare what they are about to do.
    Meet,
    /// Summing. No tensor has changed.
    Reduce,
    /// The vote before any rank writes. No tensor has changed.
    Commit,
    /// Writing the mean.
    Gather,
    /// Waiting until every rank has written.
    Exit,
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
        })
    }
}

/// What was found wrong, and what to do about it.
///
/// Up to the commit, the error of an average is the same on every rank; after it, ranks that were
/// done may have succeeded. [`Error::is_fatal`] tells whether the averager can be used again,
/// [`Error::tensors`] what this rank's tensors hold now.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A world needs 1 to 16 ranks.
    #[error("a world of {found} ranks: it has 1 to {max}; start so many processes, or give \
        Communicator::from_devices so many devices", max = crate::abi::PA_MAX_WORLD)]
    WorldSize {
        /// Ranks asked for.
        found: usize,
    },

    /// A CUDA device was asked for that this build or this machine can't serve.
    #[error("rank {rank} asks for {device}, which is not available: {reason}")]
    DeviceUnavailable {
        /// The rank that asks.
        rank: usize,
        /// The device, such as `cuda:0`.
        device: String,
        /// Why, and what to do.
        reason: String,
    },

    /// The CUDA devices can't be looked at.
    #[error("no CUDA device can be used: {reason}")]
    CudaUnavailable {
        /// Why, and what to do.
        reason: String,
    },

    /// What a launcher says of this process through environment variables is missing or contradicts
    /// itself.
    #[error("{problem}")]
    Environment {
        /// The variables, what was found, and what to do.
        problem: String,
    },

    /// The processes of a world did not find one another. Every rank that waits gets the same
    /// error.
    #[error("rank {rank} can't enter its world: {reason}")]
    Rendezvous {
        /// This rank.
        rank: usize,
        /// Who is missing or disagrees, and what to do.
        reason: String,
    },

    /// A process could not join a world that has begun.
    #[error("this process was refused by the world {rendezvous:?}: {reason}")]
    JoinRefused {
        /// The name of the world.
        rendezvous: String,
        /// Why, and what to do.
        reason: String,
    },

    /// A rank that is another process could not build its averager.
    #[error("rank {rank} can't build its averager: {reason}")]
    PeerBuildFailed {
        /// The rank.
        rank: usize,
        /// Its own error.
        reason: String,
    },

    /// The others went on without this rank, since it did not come to the recovery in time.
    #[error(
        "rank {rank} was excluded: it did not reach the recovery within {timeout:?}. The \
        recovery has not changed its parameters. Drop its averagers and rejoin with Communicator::join"
    )]
    Excluded {
        /// What this rank was.
        rank: usize,
        /// How long this rank would have waited.
        timeout: Duration,
    },

    /// The ranks of this averager's world have lost one or let one in since it was built, through
    /// another averager.
    #[error(
        "rank {rank}: the world has lost or admitted a rank since this averager was built: \
        call recover on it, on every rank"
    )]
    StaleView {
        /// What this rank was.
        rank: usize,
    },

    /// A world of this kind can't go on after a failure.
    #[error(
        "rank {rank} is a thread, and a world of threads can't recover: build a new one with \
        Communicator::from_devices"
    )]
    RecoveryUnsupported {
        /// This rank.
        rank: usize,
    },

    /// An option of the builder has a value it can't have.
    #[error("rank {rank}: the option `{option}` is {found}: {expected}")]
    InvalidOption {
        /// This rank.
        rank: usize,
        /// The builder's method.
        option: &'static str,
        /// The value.
        found: String,
        /// What it can be.
        expected: &'static str,
    },

    /// Ranks built their averagers with different options.
    #[error(
        "rank {rank} builds its averager with {found}, rank 0 with {expected}: use the same \
        builder options on every rank"
    )]
    OptionsDiffer {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Its option and value.
        found: String,
        /// Rank 0's.
        expected: String,
    },

    /// Ranks built their averagers for different tensors.
    #[error(
        "rank {rank} builds its averager with {found} where rank 0 has {expected}: every rank \
        must pass the same tensors in the same order"
    )]
    LayoutsDiffer {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Its tensor, or how many it has.
        found: String,
        /// Rank 0's.
        expected: String,
    },

    /// A rank passed other tensors than it built its averager for. No tensor was changed.
    #[error(
        "rank {rank} passes {found} where its averager was built for {expected}: pass the same \
        tensors in the same order, or build a new averager on every rank"
    )]
    LayoutChanged {
        /// The first rank at fault.
        rank: usize,
        /// What it passed.
        found: String,
        /// What it built the averager for.
        expected: String,
    },

    /// A tensor that can't be averaged as it is.
    #[error("rank {rank}: {tensor} {problem}")]
    InvalidTensor {
        /// This rank.
        rank: usize,
        /// The tensor.
        tensor: String,
        /// What is wrong with it and what to do.
        problem: String,
    },

    /// A rank's model could not lend its tensors. No tensor was changed, and every rank can go on.
    #[error("rank {rank} could not lend its tensors, so no rank averaged: {reason}")]
    LendFailed {
        /// The rank.
        rank: usize,
        /// On that rank, what its [`Lend`](crate::Lend) says.
        reason: String,
    },

    /// Ranks average at different points of their schedules. No tensor was changed, and every rank
    /// can go on.
    #[error(
        "rank {rank} averages {found}, rank 0 {expected} (no tensor was changed): use the same \
        Schedule on every rank, and call step once for each optimizer step, or skip where it was \
        left out; a rank that has made fewer steps than the others and is in `finish` calls it \
        again until they are there, too"
    )]
    SchedulesDiffer {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Its place in the schedule, such as "after step 12".
        found: String,
        /// Rank 0's.
        expected: String,
    },

    /// Some ranks passed a weight and some did not. No tensor was changed.
    #[error(
        "one of rank {rank} and rank 0 called average_weighted, the other average: use the \
        same call on every rank"
    )]
    WeightingDiffers {
        /// The first rank that differs from rank 0.
        rank: usize,
    },

    /// A weight that is negative, infinite or NaN. No tensor was changed.
    #[error(
        "rank {rank} passes the weight {weight}: weights are finite and not negative, such as \
        the number of samples seen"
    )]
    InvalidWeight {
        /// The first rank at fault.
        rank: usize,
        /// Its weight.
        weight: f64,
    },

    /// Every rank's weight is zero: there is no mean. No tensor was changed.
    #[error(
        "all weights are zero, so there is no mean: at least one rank must pass a positive weight"
    )]
    AllWeightsZero,

    /// A rank holds a NaN or an infinity and was asked to reject it. No tensor was changed.
    #[error(
        "rank {rank} holds a value that is not finite in {tensor}, element {element} (no \
        tensor of any rank was changed): restore that rank from a checkpoint, or leave it out with \
        weight 0"
    )]
    NonFinite {
        /// The last rank that does.
        rank: usize,
        /// The tensor.
        tensor: String,
        /// An element that is not finite, counted in the tensor.
        element: u64,
    },

    /// A rank did not come, or stopped on the way.
    #[error("rank {rank} did not move for {timeout:?} {phase}{}: see what it does, or raise the \
        builder's `timeout`; then build a new world", written(.committed))]
    Timeout {
        /// The rank that every other one waits for.
        rank: usize,
        /// How long one wait may last.
        timeout: Duration,
        /// Where the first rank to give up was.
        phase: Phase,
        /// Some tensors may hold the mean already, others the rank's own values.
        committed: bool,
    },

    /// A rank called [`AbortHandle::abort`](crate::AbortHandle::abort).
    #[error("rank {rank} aborted the world {phase}{}: build a new world to go \
        on", written(.committed))]
    Aborted {
        /// The rank whose handle it was.
        rank: usize,
        /// Where this world was.
        phase: Phase,
        /// Some tensors may hold the mean already, others the rank's own values.
        committed: bool,
    },

    /// A rank dropped its averager or its communicator: it finished early, failed or panicked.
    #[error("rank {rank} has left the world {phase}{}: see why it ended; the others can go on in a \
        new world", written(.committed))]
    PeerLost {
        /// The rank that is gone.
        rank: usize,
        /// Where the first rank to notice was.
        phase: Phase,
        /// Some tensors may hold the mean already, others the rank's own values.
        committed: bool,
    },

    /// A call of several steps had changed tensors before one of its steps failed: such as
    /// [`LocalSgd::step`](crate::LocalSgd::step), which averages, and then lets a process in.
    #[error("{}; what followed failed: {cause}", before(.averaged))]
    AfterAverage {
        /// The average that was completed; `None`: one that failed while tensors were written, and
        /// that the call had begun to recover from.
        averaged: Option<Box<crate::Report>>,
        /// The error of the step that failed.
        #[source]
        cause: Box<Error>,
    },

    /// An earlier average failed for good, and this call did nothing.
    #[error("this world has failed before ({cause}): build a new one")]
    Poisoned {
        /// That failure.
        #[source]
        cause: Box<Error>,
    },

    /// A rank's CUDA device failed: out of memory when the averager was built, or anything that the
    /// driver reports later.
    #[error(
        "rank {rank}: its CUDA device failed: {source}; free memory or see what the device \
        reports, then build a new world"
    )]
    DeviceFailed {
        /// The rank.
        rank: usize,
        /// What the driver said.
        source: DeviceError,
    },

    /// Memory that processes share can't be had.
    #[error("rank {rank} can't get memory to share with other processes: {reason}")]
    SharedMemory {
        /// The rank.
        rank: usize,
        /// What the system said, and what to do.
        reason: String,
    },

    /// Memory of this process that an averager needs can't be had. Nobody builds one.
    #[error("rank {rank} can't get the memory that its averager needs: {reason}")]
    Memory {
        /// The rank.
        rank: usize,
        /// What the system said, the limit that was met, and what to do.
        reason: String,
    },

    /// A thread could not be started for a channel.
    #[error(
        "rank {rank} cannot start a thread for a channel: {reason}; build with fewer channels"
    )]
    Thread {
        /// This rank.
        rank: usize,
        /// What the system said, the limit that was met, and what to do.
        reason: String,
    },
}

/// Failure of a CUDA device: the function of the driver that failed and the driver's own text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(String);

impl From<String> for DeviceError {
    fn from(text: String) -> Self {
        DeviceError(text)
    }
}

/// Cause of an [`Error`], by what has to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument, an option or a call of this program.
    Usage,
    /// A difference between ranks that must be the same on all of them.
    Mismatch,
    /// A rank that is late, gone, aborted or can't take part.
    Peer,
    /// A device or its driver.
    Device,
    /// Variables, limits and memory of the process.
    Environment,
}

impl Error {
    /// Cause of the error. An error that was caused by another one has that one's kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::AfterAverage { cause, .. } | Error::Poisoned { cause } => cause.kind(),
            Error::WorldSize { .. }
            | Error::RecoveryUnsupported { .. }
            | Error::InvalidOption { .. }
            | Error::InvalidTensor { .. }
            | Error::LendFailed { .. }
            | Error::InvalidWeight { .. }
            | Error::AllWeightsZero
            | Error::LayoutChanged { .. }
            | Error::NonFinite { .. } => ErrorKind::Usage,
            Error::OptionsDiffer { .. }
            | Error::LayoutsDiffer { .. }
            | Error::SchedulesDiffer { .. }
            | Error::WeightingDiffers { .. } => ErrorKind::Mismatch,
            Error::Rendezvous { .. }
            | Error::JoinRefused { .. }
            | Error::PeerBuildFailed { .. }
            | Error::Excluded { .. }
            | Error::StaleView { .. }
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

    /// True if no averager of this rank in this world can be used any more. Those of all other
    /// ranks can't either, except after [`Error::Excluded`], where the others went on.
    pub fn is_fatal(&self) -> bool {
        if let Error::AfterAverage { cause, .. } = self {
            return cause.is_fatal();
        }
        matches!(
            self,
            Error::Timeout { .. }
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
    /// Each element is either the rank's own or the mean. An average among the ranks that are left
    /// makes them agree again.
    MayBeMixed,
    /// The device failed, so nothing is known: restore them from a checkpoint.
    Unknown,
}

fn before(averaged: &Option<Box<crate::Report>>) -> &'static str {
    match averaged {
        Some(_) => "the average was made, and every tensor holds the mean",
        None => "an average failed while tensors were written, which may be partly averaged",
    }
}

fn written(committed: &bool) -> &'static str {
    if *committed {
        " (tensors may be partly averaged)"
    } else {
        " (no tensor was changed)"
    }
}

#[cfg(test)]
mod tests {
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
