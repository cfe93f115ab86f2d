//! Errors: what happened, to which rank and tensor, and what to do. One enum, and so a file of more
//! than 400 lines.

mod classes;
mod state;

use std::time::Duration;

use classes::{before, of_host, written};
pub use classes::{DeviceError, ErrorKind, LendSource, Phase, TensorState};
pub use state::StateError;

/// Result of this crate's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of any call: what happened, to which rank and tensor, and what to do.
///
/// Up to the commit, the error of an average is the same on every rank; after it, some ranks may
/// have succeeded. [`is_fatal`](Error::is_fatal) tells whether the averager can be used again,
/// [`tensors`](Error::tensors) what this rank's tensors hold now, and [`kind`](Error::kind) what
/// has to be mended. [`guide::failures`](crate::guide::failures) says how training goes on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A world has 1 to 16 ranks.
    #[error("{found} ranks are no world, which has 1 to {max}: start that many processes, or pass \
        that many devices to Communicator::from_devices", max = crate::abi::PA_MAX_WORLD)]
    WorldSize {
        /// Number of ranks asked for.
        found: usize,
    },

    /// A CUDA device was asked for that this build or this machine does not have.
    #[error("rank {rank} asks for {device}, which is not available: {reason}")]
    DeviceUnavailable {
        /// Rank that asks for it.
        rank: usize,
        /// Device, such as `cuda:0`.
        device: String,
        /// Reason, and what to do.
        reason: String,
    },

    /// The CUDA devices of this machine can't be listed.
    #[error("no CUDA device can be used: {reason}")]
    CudaUnavailable {
        /// Reason, and what to do.
        reason: String,
    },

    /// A launcher's environment variables are missing or contradict each other.
    #[error("{problem}")]
    Environment {
        /// Variables, what was found, and what to do.
        problem: String,
    },

    /// The processes of a world did not find one another. Every rank that waits gets the same
    /// error.
    #[error("rank {rank} can't enter its world: {reason}")]
    Rendezvous {
        /// This rank.
        rank: usize,
        /// Ranks that are missing or disagree, and what to do.
        reason: String,
    },

    /// A process could not join a world that has begun.
    #[error("the world {rendezvous:?} refused this process: {reason}")]
    JoinRefused {
        /// Name of the world.
        rendezvous: String,
        /// Reason, and what to do.
        reason: String,
    },

    /// A rank that is another process could not build its averager.
    #[error("rank {rank} can't build its averager: {reason}")]
    PeerBuildFailed {
        /// Rank that can't build.
        rank: usize,
        /// Text of that rank's own error.
        reason: String,
    },

    /// The other ranks went on without this one, since it did not reach the recovery in time.
    #[error(
        "rank {rank} was excluded: it did not reach the recovery within {timeout:?}. The \
        recovery has not changed its parameters. Drop its averagers and rejoin with \
        Communicator::join"
    )]
    Excluded {
        /// Former number of this rank.
        rank: usize,
        /// Longest wait of the recovery.
        timeout: Duration,
    },

    /// The world has lost or admitted a rank since this averager was built, through another
    /// averager.
    #[error(
        "rank {rank}: the world has lost or admitted a rank since this averager was built: \
        call recover on it, on every rank"
    )]
    StaleView {
        /// Former number of this rank.
        rank: usize,
    },

    /// Ranks that are threads can't recover or admit a process.
    #[error(
        "rank {rank} is a thread, and a world of threads can't recover: build a new one with \
        Communicator::from_devices"
    )]
    RecoveryUnsupported {
        /// This rank.
        rank: usize,
    },

    /// An option or argument has an invalid value.
    #[error("rank {rank}: the option `{option}` is {found}: {expected}")]
    InvalidOption {
        /// This rank.
        rank: usize,
        /// Name of the builder's method, or `stream`.
        option: &'static str,
        /// Value found.
        found: String,
        /// Valid values, or what to do.
        expected: &'static str,
    },

    /// A saved state can't be loaded. Nothing was changed.
    #[error("rank {rank} can't load its state: {cause}")]
    InvalidState {
        /// This rank.
        rank: usize,
        /// The reason: the content found, and the remedy.
        #[source]
        cause: StateError,
    },

    /// Ranks built their averagers with different options.
    #[error(
        "rank {rank} builds its averager with {found}, rank 0 with {expected}: use the same \
        builder options on every rank"
    )]
    OptionsDiffer {
        /// First rank that differs from rank 0.
        rank: usize,
        /// Option and value of that rank.
        found: String,
        /// Option and value of rank 0.
        expected: String,
    },

    /// Ranks built their averagers for different tensors.
    #[error(
        "rank {rank} builds its averager with {found} where rank 0 has {expected}: pass the same \
        tensors in the same order on every rank"
    )]
    LayoutsDiffer {
        /// First rank that differs from rank 0.
        rank: usize,
        /// First tensor that differs, or the number of tensors, on that rank.
        found: String,
        /// The same of rank 0.
        expected: String,
    },

    /// A rank passed other tensors than those that its averager was built for. No tensor was
    /// changed.
    #[error(
        "rank {rank} passes {found} where its averager was built for {expected}: pass the same \
        tensors in the same order, or build a new averager on every rank"
    )]
    LayoutChanged {
        /// First rank at fault.
        rank: usize,
        /// Tensor, or number of tensors, that it passed.
        found: String,
        /// Tensor, or number of tensors, that the averager was built for.
        expected: String,
    },

    /// A tensor can't be averaged as it is. No tensor was changed.
    #[error("rank {rank}: {tensor} {problem}")]
    InvalidTensor {
        /// Rank of the tensor.
        rank: usize,
        /// Index, name, dtype and number of elements of the tensor.
        tensor: String,
        /// Problem, and what to do.
        problem: String,
    },

    /// A rank's model could not lend its tensors. No tensor was changed, and every rank can go on.
    /// As the cause of [`Error::AfterAverage`]: after the average was made.
    #[error("rank {rank} could not lend its tensors: {reason}")]
    LendFailed {
        /// Rank of the model.
        rank: usize,
        /// Reason; on the rank that failed, the text of its [`LendError`](crate::LendError).
        reason: String,
        /// On that rank, the error that its `LendError` was made from, if there is one.
        source: Option<LendSource>,
    },

    /// Ranks average at different points of their schedules. No tensor was changed, and every rank
    /// can go on.
    #[error(
        "rank {rank} averages {found}, rank {reference} {expected} (no tensor was changed): use \
        the same Schedule on every rank, and call step once for each optimizer step, or skip where \
        it was left out; a rank that has fewer batches than its peers calls `done` after its last"
    )]
    SchedulesDiffer {
        /// First rank that differs from `reference`.
        rank: usize,
        /// First rank that has not called [`done`](crate::LocalSgd::done).
        reference: usize,
        /// Time and schedule of that rank's average, such as "after step 12 of every(8)".
        found: String,
        /// Time and schedule of the average of `reference`.
        expected: String,
    },

    /// Ranks made different calls at the same time. No tensor was changed, and every rank can go
    /// on.
    #[error(
        "rank {rank} calls {found}, rank {reference} {expected} (nothing was changed): make the \
        same calls in the same order on every rank"
    )]
    CallsDiffer {
        /// First rank that differs from `reference`.
        rank: usize,
        /// First rank that has not called [`done`](crate::LocalSgd::done).
        reference: usize,
        /// Call of that rank, such as "broadcast from rank 1".
        found: String,
        /// Call of `reference`.
        expected: String,
    },

    /// Some ranks passed a weight and some did not. No tensor was changed.
    #[error(
        "rank {rank} and a rank before it differ: one passes a weight (average_weighted, \
        step_weighted), the other none; use the same call on every rank"
    )]
    WeightingDiffers {
        /// First rank that differs from the first one.
        rank: usize,
    },

    /// A weight is negative, infinite or NaN. No tensor was changed.
    #[error(
        "rank {rank} passes the weight {weight}: weights are finite and not negative, such as \
        the number of samples seen"
    )]
    InvalidWeight {
        /// First rank at fault.
        rank: usize,
        /// Weight of that rank.
        weight: f64,
    },

    /// Every rank's weight is zero, so there is no mean. No tensor was changed.
    #[error(
        "all weights are zero, so there is no mean: at least one rank must pass a positive weight"
    )]
    AllWeightsZero,

    /// A rank holds a NaN or an infinity, which
    /// [`reject_non_finite`](crate::Builder::reject_non_finite) rejects. No tensor was changed.
    #[error(
        "rank {rank} holds a value that is not finite in {tensor}, element {element} (no \
        tensor of any rank was changed): restore that rank from a checkpoint, or leave it out with \
        weight 0"
    )]
    NonFinite {
        /// Last rank that holds one.
        rank: usize,
        /// Index, name, dtype and number of elements of the tensor.
        tensor: String,
        /// Index in the tensor of an element that is not finite.
        element: u64,
    },

    /// The [stage](crate::Builder::stage) of a rank has refused the average. No tensor was changed,
    /// and every rank can go on.
    #[error(
        "the stage of rank {rank} has refused the average: {reason} (no tensor of any rank was \
        changed)"
    )]
    StageVetoed {
        /// Rank of the stage, in the order of the ring the first of those that have refused.
        rank: usize,
        /// Text of that rank's [`Veto`](crate::Veto), of which other ranks get 1,000 bytes or a
        /// little more. If a rank does not look at the outcome within 5 seconds, other ranks are
        /// only told where the text is, and a rank that has refused gets its own.
        reason: String,
    },

    /// The [link between hosts](crate::Hosts) has failed: another host is late or gone, or the
    /// network. No tensor of this rank was changed. Hosts can't be lost and found again: restart
    /// all of them from a checkpoint.
    #[error(
        "rank {rank}: the link between hosts has failed{}: {reason} (no tensor was changed). The \
        link has ended: restart all hosts from a checkpoint", of_host(.host)
    )]
    HostLost {
        /// This rank, on its host.
        rank: usize,
        /// Host that is late or gone, if the link knows.
        host: Option<usize>,
        /// Reason, in the words of the link.
        reason: String,
    },

    /// A host has not made an average of all hosts, since it has failed there. No tensor of any
    /// rank was changed, and hosts can go on whose own error is not fatal.
    #[error(
        "host {host} has refused the average of all hosts, and its own error has the reason (no \
        tensor of any rank was changed)"
    )]
    HostRefused {
        /// First host that has.
        host: usize,
    },

    /// Hosts differ in their ranks, tensors, options or calls. No tensor of any rank was changed.
    #[error(
        "host {host} has {found}, and host 0 {expected}: give all hosts the same ranks, tensors, \
        options and calls (no tensor of any rank was changed)"
    )]
    HostsDiffer {
        /// First host that differs from host 0.
        host: usize,
        /// Difference of that host.
        found: String,
        /// The same of host 0.
        expected: String,
    },

    /// A rank did not reach an average, or stopped on the way.
    #[error("rank {rank} did not move for {timeout:?} {phase}{}: see what it does, or raise the \
        builder's `timeout`; then recover, or build a new world", written(.committed))]
    Timeout {
        /// Rank that every other rank waits for.
        rank: usize,
        /// Longest wait.
        timeout: Duration,
        /// Phase of the first rank to give up.
        phase: Phase,
        /// True if some tensors may hold the mean already, and others the rank's own values.
        committed: bool,
    },

    /// A rank called [`AbortHandle::abort`](crate::AbortHandle::abort).
    #[error("rank {rank} aborted the world {phase}{}: recover, or build a new world, to go \
        on", written(.committed))]
    Aborted {
        /// Rank of the handle.
        rank: usize,
        /// Phase of this world.
        phase: Phase,
        /// True if some tensors may hold the mean already, and others the rank's own values.
        committed: bool,
    },

    /// A rank dropped its averager or its communicator: it finished early, failed, panicked or was
    /// killed.
    #[error("rank {rank} has left the world {phase}{}: see why it ended; the other ranks can \
        recover, or build a new world", written(.committed))]
    PeerLost {
        /// Rank that left.
        rank: usize,
        /// Phase of the first rank to notice.
        phase: Phase,
        /// True if some tensors may hold the mean already, and others the rank's own values.
        committed: bool,
    },

    /// A call of several steps had changed tensors before one of its steps failed. Such a call is
    /// [`LocalSgd::step`](crate::LocalSgd::step), which averages and then admits a process.
    #[error("{}; a later step of the call failed: {cause}", before(.averaged))]
    AfterAverage {
        /// Report of the average that was completed. `None`: an average failed while tensors were
        /// written, and the call had begun to recover from it.
        averaged: Option<Box<crate::Report>>,
        /// Error of the step that failed.
        #[source]
        cause: Box<Error>,
    },

    /// An earlier average failed for good, and this call did nothing.
    #[error("an earlier call has failed for good ({cause}): recover, or build a new world")]
    Poisoned {
        /// Error of the earlier call.
        #[source]
        cause: Box<Error>,
    },

    /// A rank's CUDA device failed: it was out of memory when the averager was built, or its driver
    /// reported an error later.
    #[error(
        "rank {rank}: its CUDA device failed: {source}; free memory or see what the device \
        reports, then build a new world"
    )]
    DeviceFailed {
        /// Rank of the device.
        rank: usize,
        /// Function of the driver, and its error.
        source: DeviceError,
    },

    /// A rank could not allocate memory that processes share. No rank builds its averager.
    #[error("rank {rank} can't get memory to share with other processes: {reason}")]
    SharedMemory {
        /// Rank without memory.
        rank: usize,
        /// Error of the system, and what to do.
        reason: String,
    },

    /// A rank could not allocate the memory of its averager. No rank builds its averager.
    #[error("rank {rank} can't get the memory that its averager needs: {reason}")]
    Memory {
        /// Rank without memory.
        rank: usize,
        /// Error of the system, the limit that was met, and what to do.
        reason: String,
    },

    /// A rank could not start a thread for a channel. No rank builds its averager.
    #[error(
        "rank {rank} cannot start a thread for a channel: {reason}; build with fewer channels"
    )]
    Thread {
        /// Rank without a thread.
        rank: usize,
        /// Error of the system, the limit that was met, and what to do.
        reason: String,
    },
}
