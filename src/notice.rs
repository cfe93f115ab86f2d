//! Notices to the user: a wait that takes long, and what would otherwise go unsaid. They are events
//! of `tracing`, target `param_averager`; a program without a subscriber gets those of long waits
//! on standard error.

use std::time::{Duration, Instant};

/// Time until a wait is told of.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time until a wait that begins now is told of.
#[cfg(not(feature = "__testing"))]
pub(crate) fn patience() -> Duration {
    PATIENCE
}

#[cfg(feature = "__testing")]
pub(crate) use testing::patience;

#[cfg(feature = "__testing")]
pub(crate) mod testing {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    static MILLIS: AtomicU64 = AtomicU64::new(super::PATIENCE.as_millis() as u64);

    pub(crate) fn patience() -> Duration {
        Duration::from_millis(MILLIS.load(Ordering::Relaxed))
    }

    /// Sets the time after which waits are told of, for waits that begin later.
    pub fn set_patience(patience: Duration) {
        MILLIS.store(patience.as_millis() as u64, Ordering::Relaxed);
    }
}

/// Notice of one wait, told once, after `patience`.
#[derive(Debug)]
pub(crate) struct Notice {
    rank: Option<usize>,
    at: Instant,
    after: Duration,
    is_told: bool,
}

impl Notice {
    /// Notice of a wait that begins now, of this rank if it has a number.
    pub(crate) fn new(rank: Option<usize>) -> Notice {
        let after = patience();
        Notice { rank, at: Instant::now() + after, after, is_told: false }
    }

    /// True if it is to be told now.
    pub(crate) fn is_due(&self) -> bool {
        !self.is_told && Instant::now() >= self.at
    }

    /// The time at which the notice is due.
    pub(crate) fn at(&self) -> Instant {
        self.at
    }

    pub(crate) fn is_told(&self) -> bool {
        self.is_told
    }

    /// Tells `text` if the notice is due.
    pub(crate) fn look(&mut self, text: impl FnOnce() -> String) {
        if self.is_due() {
            self.is_told = true;
            tell_wait(self.rank, &format!("after {:?}, {}", self.after, text()));
        }
    }
}

/// Tells of a long wait: by `tracing` if there is a subscriber, else on standard error.
pub(crate) fn tell_wait(rank: Option<usize>, text: &str) {
    if !has_subscriber() {
        use std::io::Write;
        // Standard error may be closed.
        let _ = writeln!(std::io::stderr(), "param-averager: {text}");
    }
    warn(rank, text);
}

/// Tells a warning, by `tracing` alone.
pub(crate) fn warn(rank: Option<usize>, text: &str) {
    #[cfg(feature = "tracing")]
    tracing::warn!(target: "param_averager", rank, "{text}");
    #[cfg(not(feature = "tracing"))]
    let _ = (rank, text);
}

fn has_subscriber() -> bool {
    #[cfg(feature = "tracing")]
    return tracing::dispatcher::has_been_set();
    #[cfg(not(feature = "tracing"))]
    false
}
