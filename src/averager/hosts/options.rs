//! Options of a builder for several hosts, and calls that they exclude.

use crate::averager::{Algorithm, Builder, ParamAverager, Start};
use crate::bucket::Bucket;
use crate::hosts::{HostLink, Hosts};
use crate::tensor::Dtype;
use crate::{Compression, Error, Hierarchy, Schedule};

impl Builder {
    /// Averages over the ranks of several hosts, over a link of this rank to the ranks of the same
    /// number on all other hosts; see [`guide::hosts`](crate::guide::hosts). Default: none, the
    /// ranks of one host.
    ///
    /// The result is the mean of all ranks of all hosts, weighted by rank: each rank's part of the
    /// mean of its host, in f32 (f64 for f64), is summed over the hosts in f64, in their order, and
    /// rounded to f32 and to the tensors' dtype. All ranks of all hosts get the same bits. Each
    /// link carries 2 · (h − 1)/h of the bytes of a rank's part for h hosts, in f32. An
    /// [`outer`](Self::outer) optimizer and a [`stage`](Self::stage) come after it. `hierarchy`
    /// says which averages are of all hosts; `build` and `broadcast` always are, and give all ranks
    /// the values of host 0, unless [`Start::Mean`] is set.
    ///
    /// No tensor changes unless the ranks of all hosts have agreed: [`Error::HostLost`],
    /// [`Error::HostRefused`] and [`Error::HostsDiffer`] name a host. All hosts have the same
    /// number of ranks. Averages use the ring with its commit. Averagers of clones of one builder
    /// share the link.
    ///
    /// On CUDA devices the host exchanges a copy of the rank's part, in page-locked memory: 4 bytes
    /// (8 for f64) for each of its elements. An average that is
    /// [started](crate::ParamAverager::start) returns when the exchange has ended, and is not
    /// captured into a CUDA graph.
    pub fn hosts(mut self, link: impl Hosts + 'static, hierarchy: Hierarchy) -> Self {
        self.hosts = Some((HostLink::new(link), hierarchy));
        self
    }

    /// Code in which hosts send their means to one another, for slow links: how far the mean of a
    /// host has come from the last result, or from the outer optimizer's anchor, in f32. All but
    /// tensors of f64 are coded; they travel as they are. What a code rounds away is sent in the
    /// next average, so that all hosts get the same bits within a bound of the mean: see
    /// [`guide::hosts`](crate::guide::hosts). It takes 16 + 8/h bytes of memory for each element of
    /// a rank's part and h hosts, and values that are not finite are rejected. Averages that give
    /// the ranks values to begin with travel in full, and so do those from which outer steps begin.
    /// Default: [`Compression::None`].
    pub fn hosts_compression(mut self, compression: Compression) -> Self {
        self.hosts_compression = compression;
        self
    }

    /// The same without a link to other hosts.
    pub(in crate::averager) fn within_host(mut self) -> Self {
        (self.hosts, self.hosts_compression) = (None, Compression::None);
        self.communicator = self.communicator.within_host();
        self
    }

    /// True if the exchange with other hosts refers to the outer optimizer's anchors.
    pub(in crate::averager) fn needs_anchors(&self) -> bool {
        self.hosts_compression != Compression::None && !self.outer.is_mean()
    }

    /// True if the host has work between the sum and the commit.
    pub(in crate::averager) fn has_stage(&self) -> bool {
        self.stage.is_some() || self.hosts.is_some()
    }

    /// True if averages between those of all hosts are of one host alone.
    pub(in crate::averager) fn has_averages_of_one_host(&self) -> bool {
        self.hosts.as_ref().is_some_and(|(_, hierarchy)| hierarchy.every() > 1)
    }

    /// The option as all ranks of all hosts have it.
    pub(in crate::averager) fn hosts_in_words(&self) -> String {
        match &self.hosts {
            None => "none".into(),
            Some((link, hierarchy)) => format!("{}, {hierarchy:?}", link.hosts),
        }
    }

    /// Option that contradicts an average over several hosts: its name, what was found, and what is
    /// expected.
    pub(in crate::averager) fn hosts_refusal(
        &self,
    ) -> Option<(&'static str, String, &'static str)> {
        let launched = self.communicator.hosts();
        let Some((link, hierarchy)) = &self.hosts else {
            let found = format!("none, with ranks on {launched} hosts");
            let expected = "a link between them (Builder::hosts), or all ranks on one host";
            if launched > 1 {
                return Some(("hosts", found, expected));
            }
            let found = format!("{:?}, without hosts", self.hosts_compression);
            let expected = "Builder::hosts, or Compression::None";
            let is_coded = self.hosts_compression != Compression::None;
            return is_coded.then_some(("hosts_compression", found, expected));
        };
        let refused = |option, found: &str, expected| {
            Some((option, format!("{found}, with {} hosts", link.hosts), expected))
        };
        match () {
            _ if link.host >= link.hosts => {
                let found = format!("host {} of {}", link.host, link.hosts);
                Some(("hosts", found, "a link that numbers hosts from 0"))
            }
            _ if launched > 1 && launched != link.hosts => {
                let found = format!("a link of {}, with ranks on {launched}", link.hosts);
                Some(("hosts", found, "a link of the hosts that the launcher has started"))
            }
            _ if hierarchy.every() == 0 => {
                Some(("hosts", "Outer { every: 0 }".into(), "every: 1 or more"))
            }
            _ if self.algorithm == Algorithm::Direct => refused(
                "algorithm",
                "Direct",
                "Auto or Ring: only the ring commits after it has summed",
            ),
            _ if !self.all_or_nothing => refused(
                "all_or_nothing",
                "false",
                "true, the default: hosts agree between the sum and the commit",
            ),
            _ if hierarchy.every() > 1 && !self.outer.is_mean() => refused(
                "outer",
                &self.outer.to_string(),
                "Outer::mean with Hierarchy::Outer: steps of one host would lead hosts apart",
            ),
            _ if hierarchy.every() > 1 && self.stage.is_some() => refused(
                "stage",
                "set",
                "none with Hierarchy::Outer: stages of one host would lead hosts apart",
            ),
            _ if self.start == Start::Own => {
                refused("start_from", "Own", "Rank or Mean: hosts begin with one model")
            }
            _ if self.compression != Compression::None => refused(
                "compression",
                &format!("{:?}", self.compression),
                "Compression::None; Builder::hosts_compression is that of the link between hosts",
            ),
            _ if self.hosts_compression != Compression::None && !self.rejects_non_finite() => {
                refused(
                    "reject_non_finite",
                    "false, with a code",
                    "true, the default: a value that is not finite has no code",
                )
            }
            _ if self.overlap.is_on() => refused(
                "overlap",
                &self.overlap.to_string(),
                "Overlap::default(): a rank waits for its link",
            ),
            _ => None,
        }
    }
}

impl ParamAverager {
    /// Error of calls that change the members of a world: those of other hosts would not change.
    pub(in crate::averager) fn refusal_of_regrouping(&self) -> Option<Error> {
        self.options.hosts.is_some().then(|| Error::InvalidOption {
            rank: self.rank(),
            option: "hosts",
            found: format!("{}, and ranks that recover or join", self.options.hosts_in_words()),
            expected: "the same ranks to the end: restart all hosts from a checkpoint, or \
                recover_within_host, to go on on this host alone",
        })
    }

    /// True if an average at this place makes hosts agree that have averaged alone.
    pub(crate) fn evens_out_hosts(&self, place: u64) -> bool {
        self.stage.as_ref().is_some_and(|stage| stage.evens_out(place))
    }

    /// Number of this rank among those of all hosts.
    pub(crate) fn number(&self) -> usize {
        let host = self.options.hosts.as_ref().map_or(0, |(link, _)| link.host);
        host * self.world_size() + self.rank()
    }

    /// True if no other rank takes part in an average of this one.
    pub(crate) fn has_no_peer(&self) -> bool {
        self.world_size() == 1 && self.options.hosts.is_none()
    }

    /// Bytes that each rank sends to other hosts in an average of all.
    pub(crate) fn bytes_to_hosts(&self) -> f64 {
        let Some((link, _)) = &self.options.hosts else { return 0.0 };
        let coded = 4.0 * self.options.hosts_compression.ratio();
        let wide = |dtype: Dtype| if dtype == Dtype::F64 { 8.0 } else { coded };
        let of = |bucket: &Bucket| {
            let elements: u64 = bucket.segments.iter().map(|segment| segment.elements).sum();
            elements as f64 * wide(bucket.dtype)
        };
        let bytes = self.table.buckets.iter().map(of).sum::<f64>();
        let hosts = link.hosts as f64;
        2.0 * (hosts - 1.0) / hosts * bytes / self.world_size() as f64
    }

    /// Error of a schedule that adapts, where some averages are of one host alone: its ranks would
    /// agree on another H than those of other hosts.
    pub(crate) fn refusal_of_adapting(&self, schedule: &Schedule) -> Option<Error> {
        let adapts = schedule.needs_times() || schedule.needs_telemetry();
        (adapts && self.options.has_averages_of_one_host()).then(|| Error::InvalidOption {
            rank: self.rank(),
            option: "hosts",
            found: format!("{}, with {schedule}", self.options.hosts_in_words()),
            expected: "Hierarchy::Every, or a schedule that measures nothing, such as \
                       Schedule::every",
        })
    }
}
