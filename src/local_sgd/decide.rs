//! Input of a schedule that adapts: measurements of this rank, and values that all ranks agree on.

use std::time::Instant;

use super::{Action, LocalSgd};
use crate::schedule::{place, Agreed, Rate, Reason};
use crate::{Error, Report, Result};

/// Measurements of this rank for its schedule.
#[derive(Debug)]
pub(super) struct Measured {
    /// Learning rate of the last step.
    pub(super) rate: Option<f64>,
    /// Begin of the steps that are timed.
    begin: Instant,
    /// Position at that time.
    position: u64,
    /// True if an average was enqueued then, whose time is not that of a step.
    holds_average: bool,
    /// Seconds of this rank's last two averages; NaN: unknown.
    averages: [f64; 2],
    /// Relative change of this rank's parameters by the last average of a step, and the number of
    /// steps before it; NaN: unknown.
    change: [f64; 2],
}

impl Measured {
    pub(super) fn from(position: u64) -> Measured {
        Measured {
            rate: None,
            begin: Instant::now(),
            position,
            holds_average: false,
            averages: [f64::NAN; 2],
            change: [f64::NAN; 2],
        }
    }

    /// Forgets the measurements from before a view change, or before ranks met again.
    pub(super) fn restart(&mut self, position: u64) {
        *self = Measured { rate: self.rate, ..Measured::from(position) };
    }

    /// Begins the steps of the next average.
    fn begin_round(&mut self, position: u64, holds_average: bool) {
        (self.begin, self.position, self.holds_average) = (Instant::now(), position, holds_average);
    }

    /// Seconds of a step since the last average, and of an average: the shorter one of the last
    /// two, since the first one is slow, and any may be disturbed. NaN: unknown.
    fn times(&self, position: u64) -> [f64; 2] {
        let mut seconds = self.begin.elapsed().as_secs_f64();
        if self.holds_average {
            seconds -= self.averages[0];
        }
        let step = seconds / position.saturating_sub(self.position) as f64;
        let [last, before] = self.averages;
        let average = if before.is_nan() { before } else { last.min(before) };
        [if step.is_finite() { step } else { f64::NAN }, average]
    }
}

impl LocalSgd {
    /// Rate that ranks compare in an average at `place`.
    fn rate_at(&self, place: u64) -> Option<Rate> {
        (self.schedule().needs_rate() && place::is_step(place)).then(|| match self.measured.rate {
            Some(rate) if is_rate(rate) => Rate::Known(rate),
            _ => Rate::Unusable { rank: self.averager.number() },
        })
    }

    /// Reason to average at `place`.
    pub(super) fn reason(&self, place: u64) -> Reason {
        Reason {
            schedule: self.schedule(),
            course: self.decisions.course,
            rate: self.rate_at(place),
            unfit: self.refusal_at(place).map(|_| self.averager.number()),
        }
    }

    /// Measurements that an average at `place` agrees on.
    pub(super) fn measured_at(&self, place: u64) -> Option<[f64; 2]> {
        let schedule = self.schedule();
        match place::is_step(place) {
            true if schedule.needs_times() => {
                Some(self.measured.times(self.decisions.course.position))
            }
            true if schedule.needs_telemetry() => Some(self.measured.change),
            _ => None,
        }
    }

    /// The result of a due average, unless this rank has no learning rate: its peers have got an
    /// error.
    pub(super) fn unless_without_rate(&self, made: Result<Action>) -> Result<Action> {
        let is_refused = matches!(
            made,
            Err(Error::SchedulesDiffer { .. } | Error::HostsDiffer { .. }) | Ok(Action::Enqueued)
        );
        let rate = self.measured.rate;
        if !is_refused || !self.schedule().needs_rate() || rate.is_some_and(is_rate) {
            return made;
        }
        Err(Error::InvalidOption {
            rank: self.rank(),
            option: "learning rate",
            found: rate.map_or("not given".into(), |rate| rate.to_string()),
            expected: "a finite number from 0 on, passed to LocalSgd::step_with, for a quadratic \
                       schedule",
        })
    }

    /// Values that all ranks have after an average at `place` that was made with this rate.
    pub(super) fn agreed(&mut self, report: &Report, place: u64, rate: Option<f64>) -> Agreed {
        if let Some(active) = report.active {
            let [last, _] = self.measured.averages;
            self.measured.averages = [active.as_secs_f64(), last];
        }
        match &report.telemetry {
            Some(telemetry) if place::is_step(place) => {
                let change = telemetry.relative_change();
                // 0 is known, too, and is no 0 for the ranks.
                let change = if change == 0.0 { f64::MIN_POSITIVE } else { change };
                self.measured.change = [change, report.local_steps as f64];
            }
            _ => {}
        }
        let (bytes, ranks) = (report.bytes as f64, report.world_size as f64);
        let within = 2.0 * bytes * report.compression.ratio() * (ranks - 1.0) / ranks;
        let between = if report.hosts > 1 { self.averager.bytes_to_hosts() } else { 0.0 };
        let sent = within + between;
        Agreed { measured: report.measured, sent, rate }
    }

    /// Begins to time the steps after an average.
    pub(super) fn begin_round(&mut self, holds_average: bool) {
        if self.schedule().needs_times() {
            self.measured.begin_round(self.decisions.course.position, holds_average);
        }
    }
}

/// True for a learning rate that H can be computed from.
fn is_rate(rate: f64) -> bool {
    rate >= 0.0 && rate.is_finite()
}
