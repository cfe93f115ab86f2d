//! What ranks show one another when they build an averager, and whether it goes together.

use std::sync::Arc;

use super::Control;
use crate::backend::Memory;
use crate::{Error, Result};

/// How a process that joins gets its model from the members of its world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(target_os = "linux", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Admission {
    /// This rank is the one that joined, or none has.
    None,
    /// A copy of rank 0's. The tensors of all members stay as they are, bit for bit.
    Copy,
    /// The mean over all members, which they take, too: some of them may hold half of an average.
    Mean,
}

/// What a rank shows the others when it builds an averager.
#[derive(Clone, Debug)]
pub(crate) struct Handshake {
    /// Fault that this rank has found itself: then no rank builds.
    pub(crate) refusal: Option<Error>,
    /// What must be the same on every rank, by the builder's name for it.
    pub(crate) options: Vec<(String, String)>,
    /// A line for each tensor: name, dtype and size.
    pub(crate) tensors: Vec<String>,
    /// Where its schedule stands, after a recovery.
    pub(crate) schedule_position: u64,
    /// How this rank lets a process in by its first average.
    pub(crate) admission: Admission,
    /// Which averager of the world it is, if it is built anew: others may be like it.
    pub(crate) ordinal: Option<String>,
    /// What the previous rank of the ring writes: the inbox, after its `filled` counters.
    pub(crate) inbox: Option<Arc<Memory>>,
    /// What the next one writes: `drained` counters.
    pub(crate) credits: Option<Arc<Memory>>,
    /// Rank 0's: the notice boards of all ranks.
    pub(crate) control: Option<Arc<Control>>,
}

/// What the ranks of one averager have in common.
#[derive(Debug)]
pub(crate) struct Agreement {
    pub(crate) control: Arc<Control>,
    /// Every rank's.
    pub(crate) handshakes: Vec<Handshake>,
    /// See `Handshake`; the same on all.
    pub(crate) ordinal: Option<String>,
}

impl Agreement {
    /// Result where no rank refuses and all ranks show the same.
    pub(super) fn of(handshakes: Vec<Handshake>) -> Result<Agreement> {
        Agreement::check(&handshakes)?;
        let reason = "it shows no notice boards".to_owned();
        let control =
            handshakes[0].control.clone().ok_or(Error::PeerBuildFailed { rank: 0, reason })?;
        let ordinal = handshakes.iter().find_map(|handshake| handshake.ordinal.clone());
        Ok(Agreement { control, handshakes, ordinal })
    }

    /// Checks that handshakes go together, whatever memory comes with them. The same on every rank.
    pub(super) fn check(handshakes: &[Handshake]) -> Result<()> {
        let refusal = handshakes.iter().find_map(|handshake| handshake.refusal.clone());
        // One that has none yet goes with every other.
        let mut known = handshakes
            .iter()
            .enumerate()
            .filter_map(|(rank, handshake)| Some((rank, handshake.ordinal.as_ref()?)));
        let first = known.next().map(|(_, ordinal)| ordinal.clone());
        let other =
            known.find(|(_, ordinal)| first.as_ref() != Some(ordinal)).map(|(rank, ordinal)| {
                let show = |ordinal: &String| format!("the averager that was number {ordinal}");
                Error::OptionsDiffer {
                    rank,
                    found: show(ordinal),
                    expected: first.as_ref().map(show).unwrap_or_default(),
                }
            });
        let disagreement = || {
            (1..handshakes.len())
                .find_map(|rank| disagreement(rank, &handshakes[0], &handshakes[rank]))
        };
        refusal.or(other).or_else(disagreement).map_or(Ok(()), Err)
    }
}

fn disagreement(rank: usize, first: &Handshake, handshake: &Handshake) -> Option<Error> {
    let show = |(name, value): &(String, String)| format!("{name} = {value}");
    if let Some((ours, theirs)) = first.options.iter().zip(&handshake.options).find(|(a, b)| a != b)
    {
        return Some(Error::OptionsDiffer { rank, found: show(theirs), expected: show(ours) });
    }
    if let Some((ours, theirs)) = first.tensors.iter().zip(&handshake.tensors).find(|(a, b)| a != b)
    {
        return Some(Error::LayoutsDiffer { rank, found: theirs.clone(), expected: ours.clone() });
    }
    if first.options.len() != handshake.options.len() {
        let count = |handshake: &Handshake| format!("{} options", handshake.options.len());
        return Some(Error::OptionsDiffer {
            rank,
            found: count(handshake),
            expected: count(first),
        });
    }
    let count = |handshake: &Handshake| format!("{} tensors", handshake.tensors.len());
    (first.tensors.len() != handshake.tensors.len()).then(|| Error::LayoutsDiffer {
        rank,
        found: count(handshake),
        expected: count(first),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averagers_that_are_built_anew_go_with_those_that_they_were() {
        let handshake = |ordinal: Option<&str>| Handshake {
            refusal: None,
            options: vec![],
            tensors: vec![],
            schedule_position: 0,
            admission: Admission::None,
            ordinal: ordinal.map(str::to_owned),
            inbox: None,
            credits: None,
            control: None,
        };
        let of = |ordinals: [Option<&str>; 3]| Agreement::of(ordinals.map(handshake).into());
        // A process that joined has none yet.
        for ordinals in [[Some("0"), None, Some("1")], [None, Some("0"), Some("1")]] {
            assert!(
                matches!(of(ordinals), Err(Error::OptionsDiffer { rank: 2, .. })),
                "{:?}",
                of(ordinals)
            );
        }
        // What is left to find wrong is that rank 0 shows no notice boards.
        for ordinals in [[Some("0"), Some("0"), None], [None; 3]] {
            assert!(
                matches!(of(ordinals), Err(Error::PeerBuildFailed { rank: 0, .. })),
                "{:?}",
                of(ordinals)
            );
        }
    }
}
