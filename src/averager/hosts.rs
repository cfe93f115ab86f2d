//! The mean over all hosts: between the sum of this host's ranks and their commit, each rank
//! exchanges its shard with the ranks of its number on all other hosts.
//!
//! Each rank makes three steps with them. First all show what they are about to average; a host
//! whose own sum has failed, or that differs, ends the average on all hosts. Then the shards are
//! averaged. Then all show whether that, and the stage, succeeded. So the ranks of one number on
//! all hosts vote alike, and each host counts the same votes. A host that fails after its word in
//! the last exchange, or that a failed host's word has not reached, may not have committed where
//! others have. Its link has ended, and their next average fails.

mod coded;
mod mean;
mod options;
mod sum;

use std::time::{Duration, Instant};

use super::table::Table;
use super::{Builder, Call, Start};
use crate::hash::Digest;
use crate::hosts::{HostLink, HostsError, HostsLimit};
use crate::schedule::place;
use crate::stage::Span;
use crate::{Compression, Error, Result};
use coded::Coded;
use sum::Sums;

/// Words that the ranks of one number show one another before they average.
const WORDS: usize = 13;
/// Version of the exchange.
const VERSION: u64 = 2;

/// Facts that all hosts have in common, in the order in which they are compared.
const COMMON: [&str; 9] = [
    "protocol version",
    "ranks",
    "channels",
    "digest of its tensors and options",
    "averages of all hosts",
    "call",
    "schedule",
    "weighting",
    "code",
];
/// Words behind those: the state of this host's own sum (an `Own`), the weight of its ranks, and
/// the largest of what they have measured.
const WEIGHTING: usize = 7;
const OWN: usize = 9;
const WEIGHT: usize = 10;
const MEASURED: usize = 11;

/// State of the sum of one host's ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Own {
    Made,
    Failed,
    /// Made, if the average is of all hosts, but no rank of this one has anything to average.
    Unneeded,
}

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
    /// Averages that this host has begun since the last one of all hosts: as many on each.
    since: u32,
    /// Averages of all hosts that this host has committed.
    made: u64,
    /// True if the average that is under way is of all hosts.
    is_of_all: bool,
    /// True until its end is noted.
    is_open: bool,
    /// True if hosts have averaged alone since the last average of all that was committed.
    are_apart: bool,
    /// Weights that this host's ranks have passed in its own averages since the last one of all
    /// hosts, and in the average that is under way.
    passed: f64,
    passes: f64,
    /// Largest of what the ranks of all hosts have measured, in that average.
    measured: [f64; 2],
    /// Wait for the last host to come to that average.
    waited: Duration,
    sums: Sums,
    coded: Option<Coded>,
}

/// Average that hosts are about to make.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) schedule: u64,
    pub(super) place: u64,
    /// Sum of the weights of this host's ranks, and whether they have passed weights.
    pub(super) weight: f64,
    pub(super) is_weighted: bool,
    /// Largest of what they have measured.
    pub(super) measured: [f64; 2],
    /// True if the outer optimizer makes a step, and so has an anchor.
    pub(super) has_anchor: bool,
}

impl Wanted {
    pub(super) fn new(call: &Call, has_anchor: bool) -> Wanted {
        Wanted {
            schedule: call.schedule,
            place: call.place,
            // To be set when the ranks of this host have met.
            weight: 0.0,
            is_weighted: false,
            measured: [0.0; 2],
            has_anchor,
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
            coded: (options.hosts_compression != Compression::None)
                .then(|| Coded::new(options.hosts_compression, !options.outer.is_mean())),
            every: hierarchy.every(),
            rank: communicator.rank(),
            ranks: communicator.world_size(),
            channels,
            layout: digest.value(),
            starts_with_mean: options.start == Start::Mean,
            patience: options.timeout,
            since: 0,
            made: 0,
            is_of_all: false,
            is_open: false,
            are_apart: false,
            passed: 0.0,
            passes: 0.0,
            measured: [0.0; 2],
            waited: Duration::ZERO,
            link,
        })
    }

    /// True if hosts may differ: they have averaged alone since the last average of all.
    pub(super) fn are_apart(&self) -> bool {
        self.are_apart
    }

    /// True if the next average is of all hosts, if it is at this place.
    pub(super) fn is_of_all(&self, place: u64) -> bool {
        let is_last = self.since + 1 >= self.every || place == place::FINISH;
        is_last || place::sets_values(place)
    }

    /// Limits of an average's wait for all hosts to come, and of the exchange of values, from now.
    /// The wait for the words after it has an eighth of the builder's `timeout` more.
    pub(super) fn limits<'a>(&self, is_over: &'a dyn Fn() -> bool) -> [HostsLimit<'a>; 2] {
        [self.patience / 2, self.patience / 4 * 3].map(|limit| HostsLimit::new(limit, is_over))
    }

    /// Wait for the last host to come to the last average.
    pub(super) fn waited(&self) -> Duration {
        self.waited
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

    /// Begins an average. Returns true if it is of all hosts.
    pub(super) fn begin(&mut self, wanted: &Wanted) -> bool {
        let place = wanted.place;
        self.passes = if wanted.is_weighted { wanted.weight } else { 0.0 };
        self.is_of_all = self.is_of_all(place);
        self.since = if self.is_of_all { 0 } else { self.since + 1 };
        self.are_apart |= !self.is_of_all; // on all hosts alike, whether it is committed or not
        self.waited = Duration::ZERO;
        self.is_open = true;
        self.is_of_all
    }

    /// Notes the end of an average, once or more often.
    pub(super) fn ended(&mut self, committed: bool) {
        if !std::mem::take(&mut self.is_open) || !committed {
            return;
        }
        match self.is_of_all {
            true => {
                self.made += 1;
                (self.are_apart, self.passed) = (false, 0.0);
                self.coded.iter_mut().for_each(Coded::commit);
            }
            false => self.passed += self.passes,
        }
    }

    /// Tells the other hosts that this one can't average any more.
    pub(super) fn abort(&self, reason: &str) {
        self.link.abort(reason);
    }

    /// Bytes of the buffers.
    pub(super) fn bytes(&self) -> usize {
        self.sums.bytes() + self.coded.as_ref().map_or(0, Coded::bytes)
    }

    fn lost(&self, error: HostsError) -> Error {
        Error::HostLost { rank: self.rank, host: error.host, reason: error.reason }
    }

    /// Shows words to the ranks of this number, and returns those of all hosts, host by host.
    fn show(&self, words: &[u64], limit: &HostsLimit<'_>) -> Result<Vec<u64>> {
        let mut all = vec![0; words.len() * self.link.hosts];
        let (send, receive) = (bytemuck::cast_slice(words), bytemuck::cast_slice_mut(&mut all));
        let shown = self.link.call(|link| link.all_gather(send, receive, limit));
        shown.map_err(|error| self.lost(error)).map(|()| all)
    }

    /// True if an average can be coded, and is if all hosts average.
    fn is_coded(&self, wanted: &Wanted) -> bool {
        let is_set = |coded: &Coded| coded.is_set(wanted.has_anchor);
        !wanted.sets_values() && self.coded.as_ref().is_some_and(is_set)
    }

    /// True if an average needs the anchors of the outer optimizer.
    pub(super) fn needs_anchors(&self, wanted: &Wanted) -> bool {
        wanted.has_anchor && self.is_coded(wanted)
    }

    /// Replaces the values of this rank's shard by the mean of all hosts, weighted by host. Every
    /// host calls it, also one whose ranks have made no sum. False if no host has anything to
    /// average. `anchors` are those of the outer optimizer, if they are needed.
    ///
    /// # Safety
    /// Nothing else uses the values of the spans, which are initialised if `own` is `Made`.
    pub(super) unsafe fn average(
        &mut self,
        (spans, anchors): (&[Span], &[Span]),
        wanted: Wanted,
        own: Own,
        [to_come, limit]: &[HostsLimit<'_>; 2],
    ) -> Result<bool> {
        let mut words = [0; WORDS];
        words[..OWN].copy_from_slice(&[
            VERSION,
            self.ranks as u64,
            self.channels.into(),
            self.layout,
            self.made,
            wanted.place,
            wanted.schedule,
            wanted.is_weighted.into(),
            self.is_coded(&wanted).into(),
        ]);
        words[OWN] = own as u64;
        // The weights of all steps since hosts have had one model. Without weights hosts count by
        // their ranks.
        let passed = if wanted.is_weighted { self.passed } else { 0.0 };
        words[WEIGHT] = (wanted.weight + passed).to_bits();
        words[MEASURED..].copy_from_slice(&wanted.measured.map(f64::to_bits));
        let start = Instant::now();
        let all = self.show(&words, to_come)?;
        self.waited = start.elapsed();
        let hosts: Vec<&[u64]> = all.chunks(WORDS).collect();
        let is = |own: Own| move |host: &&[u64]| host[OWN] == own as u64;
        if let Some(host) = hosts.iter().position(is(Own::Failed)) {
            return Err(Error::HostRefused { host });
        }
        if let Some(error) = difference(&hosts) {
            return Err(error);
        }
        if hosts.iter().all(is(Own::Unneeded)) && !self.are_apart {
            return Ok(false);
        }
        self.measured = [0, 1].map(|which| {
            let of = |host: &&[u64]| f64::from_bits(host[MEASURED + which]);
            hosts.iter().map(of).fold(0.0, f64::max)
        });
        let of_one = self.gives_values_of_one(wanted.place);
        // As for ranks: where others pass weights, a host without news counts by its own alone.
        let is_weighted = |host: &&[u64]| host[WEIGHTING] != 0;
        let are_weighted = hosts.iter().any(|host| is(Own::Made)(host) && is_weighted(host));
        let weight = |(host, words): (usize, &&[u64])| match of_one {
            true => f64::from(u8::from(host == 0)),
            false if are_weighted && !is_weighted(words) => 0.0,
            false => f64::from_bits(words[WEIGHT]).min(f64::MAX),
        };
        let weights: Vec<f64> = hosts.iter().enumerate().map(weight).collect();
        if !weights.iter().any(|&weight| weight > 0.0) {
            return Err(Error::AllWeightsZero);
        }
        let is_coded = self.is_coded(&wanted);
        let (link, sums, mut coded) = (&self.link, &mut self.sums, self.coded.as_mut());
        if let Some(coded) = coded.as_mut().filter(|_| wanted.has_anchor && is_coded) {
            // SAFETY: guaranteed by the caller, here and below.
            unsafe { coded.refer_to(anchors) };
        }
        let code = coded.as_deref_mut().filter(|_| is_coded);
        // SAFETY: as above.
        let made = link.call(|link| unsafe { sums.average(link, spans, &weights, limit, code) });
        if let Some(coded) = coded.filter(|_| made.is_ok() && !is_coded) {
            // SAFETY: as above.
            unsafe { coded.made_in_full(spans) };
        }
        made.map_err(|error| self.lost(error)).map(|()| true)
    }

    /// True if an average at this place gives all hosts the values of host 0.
    fn gives_values_of_one(&self, place: u64) -> bool {
        match place {
            place::RECOVERY => false,
            place::START => !self.starts_with_mean,
            _ => place::sets_values(place),
        }
    }

    /// True if this host's values do not count in an average at this place, whatever they are.
    pub(super) fn only_receives(&self, place: u64) -> bool {
        self.link.host != 0 && self.gives_values_of_one(place)
    }

    /// True if this host's values count in an average, if others do not.
    pub(super) fn counts(&self, wanted: &Wanted) -> bool {
        let has_weight = !wanted.is_weighted || wanted.weight + self.passed > 0.0;
        has_weight && !self.only_receives(wanted.place)
    }

    /// Last exchange before the vote of this host's ranks: an error if a rank of this number has
    /// failed on any host.
    pub(super) fn agree(&self, failed: bool, is_over: &dyn Fn() -> bool) -> Result<()> {
        // The ranks of this host wait for its vote as long as the other hosts wait for it.
        let limit = HostsLimit::new(self.patience / 8, is_over);
        let all = self.show(&[failed.into()], &limit)?;
        match all.iter().position(|&failed| failed != 0) {
            Some(host) => Err(Error::HostRefused { host }),
            None => Ok(()),
        }
    }
}

/// Error of hosts that differ in facts that they must have in common.
fn difference(hosts: &[&[u64]]) -> Option<Error> {
    let is_needed = |host: &[u64]| host[OWN] != Own::Unneeded as u64;
    let with_news = hosts.iter().copied().find(|host| is_needed(host)).unwrap_or(hosts[0]);
    let of = |at: usize| if at == WEIGHTING { with_news } else { hosts[0] };
    for (host, &other) in hosts.iter().enumerate() {
        // A host without news may not know of weights yet.
        let is_compared = |at: usize| at != WEIGHTING || is_needed(other);
        let differs = |(at, _): &(usize, &&str)| is_compared(*at) && of(*at)[*at] != other[*at];
        if let Some((index, name)) = COMMON.iter().enumerate().find(differs) {
            let first = of(index);
            let word = |words: &[u64]| match *name {
                "ranks" | "channels" => format!("{} {name}", words[index]),
                "call" => place::call(words[index]),
                "weighting" if words[index] == 0 => "an average without weights".into(),
                "weighting" => "an average with weights".into(),
                "code" if words[index] == 0 => "an average in full".into(),
                "code" => "an average in code".into(),
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
