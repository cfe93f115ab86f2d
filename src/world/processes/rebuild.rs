//! Building all averagers of a world again, in an order that all processes agree on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::frame::Kind;
use super::ProcessBootstrap;
use crate::error::Phase;
use crate::sync::lock;
use crate::world::{Communicator, Rebuild, BUILD};
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
    pub(super) fn register_averager(&self, averager: Weak<dyn Rebuild>) {
        let mut all = lock(&self.member.peer_set.averagers.all);
        all.retain(|averager| averager.strong_count() > 0);
        all.push(averager);
    }

    /// Builds the averagers again; see `Elastic::rebuild`. Each process sends all others the
    /// ordinals of its averagers. Those that every process has are built, in the order of their
    /// ordinals.
    pub(super) fn rebuild_all(
        &self,
        communicator: &Communicator,
        averages: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let (member, averagers) = (&self.member, &self.member.peer_set.averagers);
        let mut built_in = lock(&averagers.built_in);
        if *built_in == Some(member.number()) {
            return Ok(());
        }
        let ours = averagers.alive();
        let own = AveragerList {
            all: ours.keys().cloned().collect(),
            averages: averages.map(str::to_owned),
        };
        member.failure().map_or(Ok(()), Err)?;
        let call = member.call(BUILD, Phase::Build, timeout);
        let frames = member.all_gather(&call, (Kind::Averagers, 0), &own, &[]);
        let frames = frames.map_err(|silence| silence.error(&call));
        let mut theirs = vec![own; call.size];
        for (rank, frame) in frames.inspect_err(|e| member.fail(e))?.into_iter().enumerate() {
            let Some(frame) = frame else { continue };
            theirs[rank] = frame
                .parse()
                .map_err(|error| {
                    let reason = format!("its list of averagers can't be parsed: {error}");
                    Error::PeerBuildFailed { rank, reason }
                })
                .inspect_err(|error| member.fail(error))?;
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
        *built_in = Some(member.number());
        Ok(())
    }

    /// The number of a build.
    pub(super) fn number_of_build(&self, again: Option<u32>) -> u32 {
        again.unwrap_or_else(|| self.member.view.builds.fetch_add(1, Ordering::Relaxed))
    }
}
