//! Pauses between two looks at what a link waits for.

use std::time::Duration;

/// Looks before the first yield, and before the first sleep.
const SPINS: u32 = 1000;
const YIELDS: u32 = 10_000;
const SLEEP: Duration = Duration::from_micros(50);

/// Looks that one wait has made.
#[derive(Default)]
pub(super) struct Looks(u32);

impl Looks {
    pub(super) fn pause(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            ..SPINS => std::hint::spin_loop(),
            SPINS..YIELDS => std::thread::yield_now(),
            _ => std::thread::sleep(SLEEP),
        }
    }
}
