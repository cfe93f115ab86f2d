//! Notice of a rank to its user when it waits for others for long.

use std::io::Write;
use std::time::{Duration, Instant};

/// How long a rank waits before it says so.
const PATIENCE: Duration = Duration::from_secs(10);

/// One line on standard error, once.
#[derive(Debug)]
pub(super) struct Notice {
    at: Instant,
    is_said: bool,
}

impl Notice {
    pub(super) fn new() -> Notice {
        Notice { at: Instant::now() + PATIENCE, is_said: false }
    }

    /// When it is due.
    pub(super) fn at(&self) -> Instant {
        self.at
    }

    pub(super) fn is_said(&self) -> bool {
        self.is_said
    }

    /// Writes it if it is due.
    pub(super) fn look(&mut self, text: impl FnOnce() -> String) {
        if !self.is_said && Instant::now() >= self.at {
            self.is_said = true;
            // Nobody may read it.
            let _ = writeln!(std::io::stderr(), "param-averager: after {PATIENCE:?}, {}", text());
        }
    }
}
