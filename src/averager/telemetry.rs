//! Telemetry of averages: the change of this rank's parameters by an average, and the ways out:
//! events of `tracing`, instruments of `metrics`, lines of CSV.

pub(super) mod waits;

use super::{ParamAverager, Report};

/// Norms of one rank's parameters around an average, and the waits of all ranks. Norms are
/// estimates from a sample of the elements, the same in every average. For models of up to 4 KiB
/// all elements are in it.
///
/// Elements that are NaN or infinite, or were, are in no norm.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Telemetry {
    /// Euclidean norm of the parameters after the average: ‖w̄‖.
    pub norm: f64,
    /// Euclidean norm of the change that the average made to this rank's parameters: ‖wᵢ − w̄‖, the
    /// divergence of this rank, if the average gave the mean; otherwise the distance to the result
    /// of the [outer optimizer](crate::Outer).
    pub change: f64,
    /// Largest change of an element of the sample.
    pub largest_change: f64,
    /// Share of the elements that are NaN or infinite after the average, or were before.
    pub non_finite: f64,
    waits: waits::Waits,
}

impl Telemetry {
    /// Change relative to the norm: ‖wᵢ − w̄‖ / ‖w̄‖, what flodl watches. 0 if nothing has changed.
    pub fn relative_change(&self) -> f64 {
        if self.change == 0.0 {
            0.0
        } else {
            self.change / self.norm
        }
    }
}

impl Report {
    /// Names of the columns of [`csv`](Self::csv), with commas between them.
    pub const CSV_COLUMNS: &str = "world_size,algorithm,bytes,elapsed_s,waited_s,algbw_gb_s,\
        local_steps,norm,change,relative_change,largest_change,non_finite,lost_state,\
        waits_s";

    /// This report as one line of comma-separated values, without a line break: times in seconds,
    /// bandwidths in GB/s. The columns of [`Telemetry`] are empty where there is none. That of
    /// [`Telemetry::waits`] is a list, with semicolons between the ranks.
    pub fn csv(&self) -> String {
        let (telemetry, waits) = match &self.telemetry {
            Some(of) => {
                let norms = format!(
                    "{},{},{},{},{}",
                    of.norm,
                    of.change,
                    of.relative_change(),
                    of.largest_change,
                    of.non_finite
                );
                (norms, of.waits_in_seconds().to_string())
            }
            None => (",,,,".into(), String::new()),
        };
        format!(
            "{},{:?},{},{},{},{},{},{telemetry},{},{waits}",
            self.world_size,
            self.algorithm,
            self.bytes,
            self.elapsed.as_secs_f64(),
            self.waited.as_secs_f64(),
            self.algbw(),
            self.local_steps,
            self.lost_state
        )
    }
}

impl ParamAverager {
    /// True if reports have telemetry.
    pub(crate) fn has_telemetry(&self) -> bool {
        self.options.telemetry
    }

    /// Norms from the samples of all channels.
    pub(super) fn telemetry(&self) -> Telemetry {
        let mut sums = [0.0; 4];
        for status in self.ended() {
            let [norm, change, largest, bad] = status.sampled;
            sums = [sums[0] + norm, sums[1] + change, sums[2].max(largest), sums[3] + bad];
        }
        let [norm, change, largest_change, bad] = sums;
        let segments = self.table.buckets.iter().flat_map(|bucket| &bucket.segments);
        let elements: u64 = segments.map(|segment| segment.elements).sum();
        let non_finite = (bad / elements.max(1) as f64).min(1.0);
        let (norm, change, waits) = (norm.sqrt(), change.sqrt(), self.waits());
        Telemetry { norm, change, largest_change, non_finite, waits }
    }

    /// Tells subscribers and recorders of an average that this rank has made.
    pub(super) fn publish(&self, report: &Report) {
        #[cfg(feature = "tracing")]
        {
            let of = report.telemetry.as_ref();
            tracing::debug!(
                target: "param_averager",
                rank = self.rank(),
                call = %crate::schedule::place::call(self.call.place),
                world_size = report.world_size,
                bytes = report.bytes,
                elapsed_s = report.elapsed.as_secs_f64(),
                waited_s = report.waited.as_secs_f64(),
                algbw_gb_s = report.algbw(),
                local_steps = report.local_steps,
                norm = of.map(|of| of.norm),
                change = of.map(|of| of.change),
                relative_change = of.map(|of| of.relative_change()),
                largest_change = of.map(|of| of.largest_change),
                non_finite = of.map(|of| of.non_finite),
                waits_s = of.map(|of| tracing::field::debug(of.waits_in_seconds())),
                "an average was made"
            );
        }
        #[cfg(feature = "metrics")]
        self.metrics.record(report);
        let _ = report; // without either feature
    }
}

/// Instruments of the program's recorder of `metrics`, as of `build`: an average looks up no name.
#[cfg(feature = "metrics")]
pub(super) struct Metrics {
    averages: metrics::Counter,
    bytes: metrics::Counter,
    elapsed: metrics::Histogram,
    waited: metrics::Histogram,
    world_size: metrics::Gauge,
    local_steps: metrics::Gauge,
    norm: metrics::Gauge,
    change: metrics::Gauge,
    relative_change: metrics::Gauge,
    largest_change: metrics::Gauge,
    non_finite: metrics::Gauge,
    /// Waits of all ranks.
    waits: Vec<metrics::Gauge>,
}

#[cfg(feature = "metrics")]
impl Metrics {
    pub(super) fn new(rank: usize, world: usize) -> Metrics {
        use metrics::{counter, gauge, histogram};
        let rank = rank.to_string();
        let wait = |peer: usize| {
            let peer = peer.to_string();
            gauge!("param_averager_peer_waited_seconds", "rank" => rank.clone(), "peer" => peer)
        };
        let gauge = |name: &'static str| gauge!(name, "rank" => rank.clone());
        let histogram = |name: &'static str| histogram!(name, "rank" => rank.clone());
        let counter = |name: &'static str| counter!(name, "rank" => rank.clone());
        Metrics {
            averages: counter("param_averager_averages_total"),
            bytes: counter("param_averager_bytes_total"),
            elapsed: histogram("param_averager_elapsed_seconds"),
            waited: histogram("param_averager_waited_seconds"),
            world_size: gauge("param_averager_world_size"),
            local_steps: gauge("param_averager_local_steps"),
            norm: gauge("param_averager_norm"),
            change: gauge("param_averager_change"),
            relative_change: gauge("param_averager_relative_change"),
            largest_change: gauge("param_averager_largest_change"),
            non_finite: gauge("param_averager_non_finite"),
            waits: (0..world).map(wait).collect(),
        }
    }

    fn record(&self, report: &Report) {
        self.averages.increment(1);
        self.bytes.increment(report.bytes);
        self.elapsed.record(report.elapsed);
        self.waited.record(report.waited);
        self.world_size.set(report.world_size as f64);
        self.local_steps.set(report.local_steps as f64);
        if let Some(of) = &report.telemetry {
            self.norm.set(of.norm);
            self.change.set(of.change);
            self.relative_change.set(of.relative_change());
            self.largest_change.set(of.largest_change);
            self.non_finite.set(of.non_finite);
            self.waits.iter().zip(of.waits()).for_each(|(gauge, wait)| gauge.set(*wait));
        }
    }
}
