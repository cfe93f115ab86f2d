//! The mean over all hosts: between the sum of this host's ranks and their commit, each rank
//! exchanges its shard with the ranks of its number on all other hosts.
//!
//! Each rank makes three steps with them. First all show what they are about to average; a host
//! whose own sum has failed, or that differs, ends the average on all hosts. Then the shards are
//! averaged. Then all show whether that, and the stage, succeeded. So the ranks of one number on
//! all hosts vote alike, and the commit of each host counts the same votes. A failure in the last
//! exchange can leave one host committed and another not: the next average finds that and says so.

mod sum;

use std::time::{Duration, Instant};

use super::table::Table;
use super::{Algorithm, Builder, Call, ParamAverager, Start};
use crate::backend::MemorySpace;
use crate::hash::Digest;
use crate::hosts::{HostLink, Hosts, HostsError};
use crate::schedule::place;
use crate::stage::Span;
use crate::{Compression, Error, Hierarchy, Result, Schedule};
use sum::Sums;

/// Words that the ranks of one number show one another before they average.
const WORDS: usize = 12;
/// Version of the exchange.
const VERSION: u64 = 1;

/// Facts that all hosts have in common, in the order in which they are compared.
const COMMON: [&str; 8] = [
    "protocol version",
    "ranks",
    "channels",
    "digest of its tensors and options",
    "averages of all hosts",
    "schedule",
    "call",
    "weighting",
];
/// Words behind those: 1 if this host's own sum has failed, the weight of its ranks, and the
/// largest of what they have measured.
const FAILED: usize = 8;
const WEIGHT: usize = 9;
const MEASURED: usize = 10;

/// Part of a rank in averages of all hosts.
pub(super) struct RankHosts {
    link: HostLink,
    every: u32,
    rank: usize,
    ranks: usize,
    channels: u32,
    /// Digest of the tensors and the options.
    layout: u64,
    /// True if the values that all begin with are the mean of all hosts, not those of host 0.
    starts_with_mean: bool,
    patience: Duration,
    /// Averages that this host has committed since the last one of all hosts.
    since: u32,
    /// Averages of all hosts that this host has committed.
    made: u64,
    /// True if the average that is under way is of all hosts.
    is_of_all: bool,
    /// Largest of what the ranks of all hosts have measured, in that average.
    measured: [f64; 2],
    sums: Sums,
}

/// Average that hosts are about to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) schedule: u64,
    pub(super) place: u64,
    pub(super) is_weighted: bool,
    /// Sum of the weights of this host's ranks.
    pub(super) weight: f64,
    /// Largest of what they have measured.
    pub(super) measured: [f64; 2],
}

impl Wanted {
    pub(super) fn new(call: &Call) -> Wanted {
        Wanted {
            schedule: call.schedule,
            place: call.place,
            is_weighted: call.weight.is_some(),
            // Known when the ranks of this host have met.
            weight: 0.0,
            measured: [0.0; 2],
        }
    }

    pub(super) fn sets_values(&self) -> bool {
        place::sets_values(self.place)
    }
}

impl RankHosts {
    pub(super) fn new(
        options: &Builder,
        table: &Table,
        chunk: u32,
        channels: u32,
    ) -> Option<RankHosts> {
        let (link, hierarchy) = options.hosts.clone()?;
        let communicator = &options.communicator;
        let mut digest = Digest::default();
        digest.add(&table.layout.digest().to_le_bytes());
        digest.add(&chunk.to_le_bytes());
        // The number of channels, which depends on the machine, is compared by itself.
        for (name, value) in options.shown().into_iter().filter(|(name, _)| name != "channels") {
            digest.add(name.as_bytes());
            digest.add(value.as_bytes());
        }
        Some(RankHosts {
            sums: Sums::new(link.hosts),
            every: hierarchy.every(),
            rank: communicator.rank(),
            ranks: communicator.world_size(),
            channels,
            layout: digest.value(),
            starts_with_mean: options.start == Start::Mean,
            patience: options.timeout / 4 * 3, // before the peers of this host stop waiting
            since: 0,
            made: 0,
            is_of_all: false,
            measured: [0.0; 2],
            link,
        })
    }

    /// True if the next average is of all hosts.
    pub(super) fn is_due(&self, sets_values: bool) -> bool {
        sets_values || self.since + 1 >= self.every
    }

    /// The number of hosts in the last average.
    pub(super) fn in_last(&self) -> usize {
        match self.is_of_all {
            true => self.link.hosts,
            false => 1,
        }
    }

    /// Largest of what all ranks have measured, in the last average, if that was of all hosts.
    pub(super) fn measured(&self) -> Option<[f64; 2]> {
        self.is_of_all.then_some(self.measured)
    }

    /// Begins an average, of all hosts or of this one.
    pub(super) fn begin(&mut self, is_of_all: bool) {
        self.is_of_all = is_of_all;
    }

    /// Notes the end of an average.
    pub(super) fn ended(&mut self, committed: bool) {
        match (committed, self.is_of_all) {
            (false, _) => {}
            (true, true) => (self.since, self.made) = (0, self.made + 1),
            (true, false) => self.since += 1,
        }
    }

    /// Tells the other hosts that this one can't average any more.
    pub(super) fn abort(&self, error: &Error) {
        self.link.abort(&error.to_string());
    }

    /// Bytes of the buffers.
    pub(super) fn bytes(&self) -> usize {
        self.sums.bytes()
    }

    fn deadline(&self) -> Instant {
        let now = Instant::now();
        now.checked_add(self.patience).unwrap_or(now + Duration::from_secs(86400))
    }

    fn lost(&self, error: HostsError) -> Error {
        Error::HostLost { rank: self.rank, host: error.host, reason: error.reason }
    }

    /// Shows words to the ranks of this number, and returns those of all hosts, host by host.
    fn show(&self, words: &[u64]) -> Result<Vec<u64>> {
        let deadline = self.deadline();
        let mut all = vec![0; words.len() * self.link.hosts];
        let (send, receive) = (bytemuck::cast_slice(words), bytemuck::cast_slice_mut(&mut all));
        let shown = self.link.call(|link| link.all_gather(send, receive, deadline));
        shown.map_err(|error| self.lost(error)).map(|()| all)
    }

    /// Replaces the values of this rank's shard by the mean of all hosts, weighted by host. Every
    /// host calls it, with `failed` if it has no mean of its own ranks.
    ///
    /// # Safety
    /// Nothing else uses the values of the spans, which are initialised unless `failed`.
    pub(super) unsafe fn average(
        &mut self,
        spans: &[Span],
        wanted: Wanted,
        failed: bool,
    ) -> Result<()> {
        let mut words = [0; WORDS];
        let weighting = u64::from(wanted.is_weighted);
        words[..FAILED].copy_from_slice(&[
            VERSION,
            self.ranks as u64,
            self.channels.into(),
            self.layout,
            self.made,
            wanted.schedule,
            wanted.place,
            weighting,
        ]);
        words[FAILED] = failed.into();
        words[WEIGHT] = wanted.weight.to_bits();
        words[MEASURED..].copy_from_slice(&wanted.measured.map(f64::to_bits));
        let all = self.show(&words)?;
        let hosts: Vec<&[u64]> = all.chunks(WORDS).collect();
        if let Some(host) = hosts.iter().position(|host| host[FAILED] != 0) {
            return Err(Error::HostRefused { host });
        }
        if let Some(error) = difference(&hosts) {
            return Err(error);
        }
        self.measured = [0, 1].map(|which| {
            let of = |host: &&[u64]| f64::from_bits(host[MEASURED + which]);
            hosts.iter().map(of).fold(0.0, f64::max)
        });
        let of_one = match wanted.place {
            place::RECOVERY => false,
            place::START => !self.starts_with_mean,
            _ => wanted.sets_values(),
        };
        let weight = |(host, words): (usize, &&[u64])| match of_one {
            true => f64::from(u8::from(host == 0)),
            false => f64::from_bits(words[WEIGHT]),
        };
        let weights: Vec<f64> = hosts.iter().enumerate().map(weight).collect();
        let deadline = self.deadline();
        let (link, sums) = (&self.link, &mut self.sums);
        // SAFETY: guaranteed by the caller.
        let made = link.call(|link| unsafe { sums.average(link, spans, &weights, deadline) });
        made.map_err(|error| self.lost(error))
    }

    /// Last exchange before the vote of this host's ranks: an error if a rank of this number has
    /// failed on any host.
    pub(super) fn agree(&self, failed: bool) -> Result<()> {
        let all = self.show(&[failed.into()])?;
        match all.iter().position(|&failed| failed != 0) {
            Some(host) => Err(Error::HostRefused { host }),
            None => Ok(()),
        }
    }
}

/// Error of hosts that differ in facts that they must have in common.
fn difference(hosts: &[&[u64]]) -> Option<Error> {
    let first = hosts[0];
    for (host, other) in hosts.iter().enumerate().skip(1) {
        for (index, name) in COMMON.iter().enumerate().filter(|(at, _)| first[*at] != other[*at]) {
            let word = |words: &[u64]| match *name {
                "ranks" | "channels" => format!("{} {name}", words[index]),
                "call" => place::call(words[index]),
                "weighting" if words[index] == 0 => "an average without weights".into(),
                "weighting" => "an average with weights".into(),
                "averages of all hosts" => {
                    format!("committed {} averages of all hosts before", words[index])
                }
                _ => format!("the {name} {:x}", words[index]),
            };
            return Some(Error::HostsDiffer { host, found: word(other), expected: word(first) });
        }
    }
    None
}

impl Builder {
    /// Averages over the ranks of several hosts, over a link of this rank to the ranks of the same
    /// number on all other hosts; see [`guide::hosts`](crate::guide::hosts). Default: none, the
    /// ranks of one host.
    ///
    /// The result is the mean of all ranks of all hosts, weighted by rank: each rank's part of the
    /// mean of its host, in f32 (f64 for f64), is summed over the hosts in f64, in their order, and
    /// rounded once to the tensors' dtype. All ranks of all hosts get the same bits. Each link
    /// carries 2 · (h − 1)/h of the bytes of a rank's part for h hosts, in f32. An
    /// [`outer`](Self::outer) optimizer and a [`stage`](Self::stage) come after it. `hierarchy`
    /// says which averages are of all hosts; `build` and `broadcast` always are, and give all ranks
    /// the values of host 0.
    ///
    /// No tensor changes unless the ranks of all hosts have agreed: [`Error::HostLost`],
    /// [`Error::HostRefused`] and [`Error::HostsDiffer`] name a host. All hosts have the same
    /// number of ranks. Ranks are on CPUs, and averages use the ring with its commit. Averagers of
    /// clones of one builder share the link.
    pub fn hosts(mut self, link: impl Hosts + 'static, hierarchy: Hierarchy) -> Self {
        self.hosts = Some((HostLink::new(link), hierarchy));
        self
    }

    /// True if the host has work between the sum and the commit.
    pub(super) fn has_stage(&self) -> bool {
        self.stage.is_some() || self.hosts.is_some()
    }

    /// True if averages between those of all hosts are of one host alone.
    pub(super) fn has_averages_of_one_host(&self) -> bool {
        self.hosts.as_ref().is_some_and(|(_, hierarchy)| hierarchy.every() > 1)
    }

    /// The option as all ranks of all hosts have it.
    pub(super) fn hosts_in_words(&self) -> String {
        match &self.hosts {
            None => "none".into(),
            Some((link, hierarchy)) => format!("{}, {hierarchy:?}", link.hosts),
        }
    }

    /// Option that contradicts an average over several hosts: its name, what was found, and what is
    /// expected.
    pub(super) fn hosts_refusal(&self) -> Option<(&'static str, String, &'static str)> {
        let launched = self.communicator.hosts();
        let Some((link, hierarchy)) = &self.hosts else {
            let found = format!("none, with ranks on {launched} hosts");
            let expected = "a link between them (Builder::hosts), or all ranks on one host";
            return (launched > 1).then_some(("hosts", found, expected));
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
            _ if self.start == Start::Own => {
                refused("start_from", "Own", "Rank or Mean: hosts begin with one model")
            }
            _ if self.compression != Compression::None => refused(
                "compression",
                &format!("{:?}", self.compression),
                "Compression::None: no code is made for the link between hosts yet",
            ),
            _ if self.overlap.is_on() => refused(
                "overlap",
                &self.overlap.to_string(),
                "Overlap::default(): a rank waits for its link",
            ),
            _ => match self.communicator.space() {
                MemorySpace::Host => None,
                MemorySpace::Cuda(_) => {
                    refused("hosts", "set, for a rank on a CUDA device", "ranks on CPUs")
                }
            },
        }
    }
}

impl ParamAverager {
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
