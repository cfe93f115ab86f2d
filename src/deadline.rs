//! Deadlines of waits.

use std::time::{Duration, Instant};

/// Upper bound on timeouts: a century, which no kernel clock overflows.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Instant after `timeout`. Valid for every `timeout`, whereas `Instant::now() + timeout` panics
/// for very long ones.
pub(crate) fn after(timeout: Duration) -> Instant {
    Instant::now() + timeout.min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_duration_is_a_deadline(
            seconds in any::<u64>(), nanoseconds in 0u32..1_000_000_000
        ) {
            let timeout = Duration::new(seconds, nanoseconds);
            let before = Instant::now();
            let deadline = after(timeout);
            prop_assert!(deadline.saturating_duration_since(before) >= timeout.min(LONGEST));
            // Further durations can be added.
            prop_assert!(deadline.checked_add(LONGEST).is_some());
        }
    }

    #[test]
    fn the_ends_of_the_range_are_deadlines() {
        assert!(after(Duration::MAX) > Instant::now() + LONGEST / 2);
        assert!(after(Duration::ZERO) <= Instant::now());
    }
}
