//! Notice to the user about a long wait.

use std::io::Write;
use std::time::{Duration, Instant};

/// Time until the notice.
const PATIENCE: Duration = Duration::from_secs(10);

/// One line on standard error, written once.
#[derive(Debug)]
pub(super) struct Notice {
    at: Instant,
    is_said: bool,
}

impl Notice {
    pub(super) fn new() -> Notice {
        Notice { at: Instant::now() + PATIENCE, is_said: false }
    }

    /// The time at which the notice is due.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    pub(super) fn is_said(&self) -> bool {
        self.is_said
    }

    /// Writes the notice if it is due.
    pub(super) fn look(&mut self, text: impl FnOnce() -> String) {
        if !self.is_said && Instant::now() >= self.at {
            self.is_said = true;
            // Standard error may be closed.
            let _ = writeln!(std::io::stderr(), "param-averager: after {PATIENCE:?}, {}", text());
        }
    }
}
