//! Building all averagers of a world again, in an order that all processes agree on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::frame::Kind;
use super::peer_state::Ring;
use super::ProcessBootstrap;
use crate::deadline;
use crate::sync::lock;
use crate::world::{Agreement, Communicator, Rebuild};
use crate::{Error, Result};

/// First build number of averagers that are built again. Larger than any number of a first build.
const AGAIN: u32 = 1 << 31;

/// The averagers of one process.
#[derive(Debug, Default)]
pub(super) struct Averagers {
    all: Mutex<Vec<Weak<dyn Rebuild>>>,
    /// The view in which all averagers have been built. Locked while a thread builds them.
    built_in: Mutex<Option<u32>>,
}

/// Message of a process before it builds its averagers again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AveragerList {
    /// Ordinals of the sender's averagers.
    all: BTreeSet<String>,
    /// Ordinal of the averager that the sender averages next, if any.
    averages: Option<String>,
}

impl Averagers {
    /// Averagers that have not been dropped, by ordinal.
    fn alive(&self) -> BTreeMap<String, Arc<dyn Rebuild>> {
        let mut all = lock(&self.all);
        all.retain(|averager| averager.strong_count() > 0);
        let alive = all.iter().filter_map(Weak::upgrade);
        alive.map(|averager| (averager.ordinal().to_owned(), averager)).collect()
    }
}

impl ProcessBootstrap {
    pub(in crate::world) fn register(&self, averager: Weak<dyn Rebuild>) {
        let mut all = lock(&self.peer_set.averagers.all);
        all.retain(|averager| averager.strong_count() > 0);
        all.push(averager);
    }

    /// True if a member has departed or left this view, or an averager of this view has failed for
    /// good. A peer may report a failure before this process detects the departure.
    pub(in crate::world) fn has_lost_a_member(&self) -> bool {
        let view = self.number();
        if self.status().failure.is_some() {
            return true;
        }
        let state = self.peer_set.lock();
        let has_failed = |(averager, ring): (Arc<Agreement>, Ring)| {
            ring.view == view && averager.control.failure().is_some()
        };
        let lost = self.others().any(|peer| state.is_lost(peer, view));
        lost || state.built().into_iter().any(has_failed)
    }

    /// Builds the averagers again; see `Communicator::rebuild`. Each process sends all others the
    /// ordinals of its averagers. Those that every process has are built, in the order of their
    /// ordinals.
    pub(in crate::world) fn rebuild(
        &self,
        communicator: &Communicator,
        averages: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let averagers = &self.peer_set.averagers;
        let mut built_in = lock(&averagers.built_in);
        if *built_in == Some(self.number()) {
            return Ok(());
        }
        let ours = averagers.alive();
        let own = AveragerList {
            all: ours.keys().cloned().collect(),
            averages: averages.map(str::to_owned),
        };
        let (number, deadline) = ((self.number(), 0), deadline::after(timeout));
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        self.send_to_others(Kind::Averagers, number, &own, &[], deadline)?;
        let mut theirs = vec![own; self.members().len()];
        for (rank, frame) in
            self.receive_from_others(Kind::Averagers, number, deadline, timeout, false, |_| false)?
        {
            theirs[rank] = frame.parse().map_err(|error| {
                let reason = format!("its list of averagers can't be parsed: {error}");
                self.fail(Error::PeerBuildFailed { rank, reason })
            })?;
        }
        // A rank that averages another averager next would make the others wait in vain.
        let mut next = theirs
            .iter()
            .enumerate()
            .filter_map(|(rank, theirs)| Some((rank, theirs.averages.as_ref()?)));
        let first = next.next().map(|(_, ordinal)| ordinal);
        if let Some((rank, _)) = next.find(|&(_, ordinal)| Some(ordinal) != first) {
            let reason = "it recovers another LocalSgd first: after a failure, recover every \
                LocalSgd, in the same order on every rank";
            return Err(Error::PeerBuildFailed { rank, reason: reason.into() });
        }
        let all: BTreeSet<&String> = theirs.iter().flat_map(|theirs| &theirs.all).collect();
        for (index, ordinal) in all.into_iter().enumerate() {
            let lacks = theirs.iter().position(|theirs| !theirs.all.contains(ordinal));
            match (ours.get(ordinal), lacks) {
                (Some(averager), None) => averager.rebuild(communicator, AGAIN + index as u32)?,
                (Some(averager), Some(rank)) => averager.refuse(communicator, rank),
                (None, _) => {} // the other ranks refuse it, since this process has dropped it
            }
        }
        *built_in = Some(self.number());
        Ok(())
    }

    /// The number of a build.
    pub(super) fn number_of_build(&self, again: Option<u32>) -> u32 {
        again.unwrap_or_else(|| self.view.builds.fetch_add(1, Ordering::Relaxed))
    }
}
