//! Building all averagers of a world again, in an order that all processes agree on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Member;
use crate::error::Phase;
use crate::sync::lock;
use crate::world::bootstrap::{Bootstrap, BUILD};
use crate::world::processes::wire::frame::Kind;
use crate::{Error, Result};

/// First build number of averagers that are built again. Larger than any number of a first build.
const AGAIN: u32 = 1 << 31;

/// Message of a process before it builds its averagers again.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AveragerList {
    /// Ordinals of the sender's averagers.
    all: BTreeSet<String>,
    /// Ordinal of the averager that the sender averages next, if any.
    averages: Option<String>,
}

impl Member {
    /// Builds the averagers again; see `Elastic::rebuild`. Each process sends all others the
    /// ordinals of its averagers. Those that every process has are built, in the order of their
    /// ordinals.
    pub(crate) fn rebuild(
        &self,
        own: &Arc<dyn Bootstrap>,
        averages: Option<&str>,
        timeout: Duration,
    ) -> Result<()> {
        let averagers = &self.peer_set.averagers;
        let mut built_in = lock(&averagers.built_in);
        if *built_in == Some(self.number()) {
            return Ok(());
        }
        let ours = averagers.alive();
        let list = AveragerList {
            all: ours.keys().cloned().collect(),
            averages: averages.map(str::to_owned),
        };
        self.failure().map_or(Ok(()), Err)?;
        let call = self.call(BUILD, Phase::Build, timeout);
        let frames = self.all_gather(&call, (Kind::Averagers, 0), &list, &[]);
        let frames = frames.map_err(|silence| silence.error(&call));
        let mut theirs = vec![list; call.size];
        for (rank, frame) in frames.inspect_err(|e| self.fail(e))?.into_iter().enumerate() {
            let Some(frame) = frame else { continue };
            theirs[rank] = frame
                .parse()
                .map_err(|error| {
                    let reason = format!("its list of averagers can't be parsed: {error}");
                    Error::PeerBuildFailed { rank, reason }
                })
                .inspect_err(|error| self.fail(error))?;
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
                (Some(averager), None) => averager.rebuild(own, AGAIN + index as u32)?,
                (Some(averager), Some(rank)) => averager.refuse(own, rank),
                (None, _) => {} // the other ranks refuse it, since this process has dropped it
            }
        }
        *built_in = Some(self.number());
        Ok(())
    }
}
