//! Values that stand for averages outside of the step count. A step count never reaches them.

pub(crate) const FINISH: u64 = u64::MAX;
pub(crate) const RECOVERY: u64 = u64::MAX - 1;
pub(crate) const ADMISSION: u64 = u64::MAX - 2;
pub(crate) const BY_HAND: u64 = u64::MAX - 3;
/// The mean that all ranks begin with.
pub(crate) const START: u64 = u64::MAX - 4;
/// A rank that has ended its steps.
pub(crate) const DONE: u64 = u64::MAX - 5;
/// Copies of rank 0, of rank 1, and so on.
const COPIES: u64 = u64::MAX - 0xffff;
const LAST_COPY: u64 = COPIES + 0xff;

/// Averages of a copy of fragment 0, of fragment 1, and so on.
const FRAGMENTS: u64 = COPIES - 0x10000;
const LAST_FRAGMENT: u64 = FRAGMENTS + 0xffff;

/// The average of a copy of a fragment, outside of a schedule.
pub(crate) fn overlapped(fragment: usize) -> u64 {
    FRAGMENTS + fragment.min(0xffff) as u64
}

/// A copy of rank `root`'s tensors. Roots that are too large for every world share a place.
pub(crate) fn copy_of(root: usize) -> u64 {
    COPIES + root.min(0xff) as u64
}

/// True for averages that give the ranks values to begin with.
pub(crate) fn sets_values(place: u64) -> bool {
    matches!(place, RECOVERY | ADMISSION | START | COPIES..=LAST_COPY)
}

/// True for an average that follows a step of the schedule.
pub(crate) fn is_step(place: u64) -> bool {
    place < FRAGMENTS
}

/// True for averages that `LocalSgd` makes in the course of training.
pub(crate) fn is_of_schedule(place: u64) -> bool {
    is_step(place) || place == FINISH || place == RECOVERY
}

/// The value by which ranks check that they average at the same place, outside of a schedule.
pub(crate) fn digest(place: u64) -> u64 {
    crate::hash::fnv1a(place.to_le_bytes()) | 1
}

/// The call of a place, in words.
pub(crate) fn call(place: u64) -> String {
    match place {
        FINISH => "LocalSgd::sync or finish".into(),
        DONE => "LocalSgd::done".into(),
        RECOVERY => "LocalSgd::recover".into(),
        ADMISSION => "admit_joiner".into(),
        BY_HAND => "average".into(),
        START => "build, which starts from the mean".into(),
        COPIES..=LAST_COPY => format!("broadcast from rank {}", place - COPIES),
        FRAGMENTS..=LAST_FRAGMENT => {
            format!("start_overlapped of fragment {}", place - FRAGMENTS)
        }
        step => format!("LocalSgd::step, its step {step}"),
    }
}

/// The time of an average in the course of training, in words, to follow "averages".
pub(crate) fn time(place: u64) -> String {
    match place {
        FINISH => "in `sync` or `finish`".into(),
        RECOVERY => "in a recovery".into(),
        step => format!("after step {step}"),
    }
}
