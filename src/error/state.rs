//! Reasons why a saved state can't be loaded.

/// Reason why [`LocalSgd::load`](crate::LocalSgd::load) can't load a state: what was found, and
/// what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Bytes that do not begin as a saved state does.
    #[error("these bytes are no saved state: pass those that LocalSgd::save has returned")]
    NotAState,

    /// A state in the format of another version of this crate.
    #[error(
        "it has format {found}, where this version of param-averager reads format {expected}: load \
        it with the version that has saved it"
    )]
    OtherVersion {
        /// Format of the state.
        found: u32,
        /// Format that this version reads.
        expected: u32,
    },

    /// A state whose end is missing.
    #[error("it was cut off after {found} bytes{}: take another copy", of(.expected))]
    Truncated {
        /// Number of bytes found.
        found: u64,
        /// Number of bytes that were saved, if that is known.
        expected: Option<u64>,
    },

    /// A state with a wrong checksum or a wrong structure.
    #[error("its bytes have changed since they were saved: take another copy")]
    Corrupt,

    /// A state of other tensors.
    #[error(
        "it was saved for {found}, and this model has {expected}: load it with the model that it \
        was saved with, the tensors in the same order"
    )]
    OtherLayout {
        /// Number of tensors and of bytes of the state, and a digest of names, dtypes and sizes.
        found: String,
        /// The same of the averager.
        expected: String,
    },

    /// A state of another schedule.
    #[error(
        "it was saved with the schedule {found}, and this one is {expected}: pass the same \
        Schedule, or begin the new one at the position with LocalSgd::at"
    )]
    OtherSchedule {
        /// Schedule of the state.
        found: String,
        /// Schedule of the `LocalSgd`.
        expected: String,
    },

    /// A state of another rank, saved between two averages, when each rank had steps of its own.
    #[error(
        "rank {found} of {world_size} has saved it {steps} steps after an average: load on each \
        rank what it has saved itself, or save after LocalSgd::sync, when any rank can load it"
    )]
    OtherRank {
        /// Rank that saved the state.
        found: usize,
        /// Number of ranks then.
        world_size: usize,
        /// Steps applied since the last average.
        steps: u64,
    },

    /// States of different steps.
    #[error(
        "one of the states was saved at step {found}, and another at step {expected}: pass those \
        that the ranks have saved after the same step"
    )]
    OtherStep {
        /// Position of the state that differs.
        found: u64,
        /// Position of the others.
        expected: u64,
    },

    /// A state of another outer optimizer.
    #[error(
        "it was saved with the outer optimizer {found}, and this one is {expected}: pass the same \
        Outer to Builder::outer, and as many fragments to Builder::overlap"
    )]
    OtherOuter {
        /// Optimizer of the state.
        found: String,
        /// Optimizer of the averager.
        expected: String,
    },

    /// Missing parts of the outer optimizer's state: it is divided among the ranks, and this rank
    /// needs parts of states that were not passed.
    #[error(
        "of the outer optimizer's {of} packs of this rank, {lacks} are in none of the {found} \
        states that were passed: where the number of ranks, of channels or the algorithm has \
        changed, pass what all ranks have saved to LocalSgd::load_all"
    )]
    MissingShards {
        /// Number of states.
        found: usize,
        /// Packs of 16 bytes of parameters that no state has.
        lacks: u64,
        /// Packs that this rank needs.
        of: u64,
    },

    /// No memory on this rank for the state, or a failed device.
    #[error("it can't be copied to this rank's memory: {reason}")]
    Memory {
        /// The reason.
        reason: String,
    },

    /// A state with a part that this `LocalSgd` does not know, and that the rest depends on.
    #[error(
        "it has a part `{tag}` that this LocalSgd does not know: build the averager with the \
        options that it was saved with, and this crate's version that has saved it or a later one"
    )]
    UnknownSection {
        /// Name of the part.
        tag: String,
    },

    /// A state without a part that this `LocalSgd` needs.
    #[error(
        "its part `{tag}` is missing: build the averager with the options that it was saved with"
    )]
    MissingSection {
        /// Name of the part.
        tag: String,
    },
}

fn of(expected: &Option<u64>) -> String {
    expected.map_or(String::new(), |expected| format!(" of {expected}"))
}
