//! The handshake: the data that ranks exchange and compare when they build an averager.

use std::sync::Arc;

use super::control::Control;
use crate::backend::{cuda, Meeting, Memory};
use crate::schedule::Course;
use crate::{Error, Result};

/// Way in which a joiner gets its model from the members of its world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(processes, derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Admission {
    /// This rank is the joiner, or the view has no joiner.
    None,
    /// The joiner copies the tensors of rank 0. The tensors of all members keep their bits.
    Copy,
    /// The joiner and all members take the mean over the members. Needed after a failure, when the
    /// tensors of some members may hold half of an average.
    Mean,
}

/// The data that a rank shows its peers when it builds an averager.
#[derive(Clone, Debug)]
pub(crate) struct Handshake {
    /// Fault that this rank has found in its own arguments. No rank builds then.
    pub(crate) refusal: Option<Error>,
    /// Options that must be equal on all ranks, as (name, value).
    pub(crate) options: Vec<(String, String)>,
    /// One line per tensor: name, dtype and size.
    pub(crate) tensors: Vec<String>,
    /// Course of a `LocalSgd`, after a recovery or for a joiner.
    pub(crate) course: Course,
    /// Way in which this rank transfers the model to a joiner, in its first average.
    pub(crate) admission: Admission,
    /// Ordinal of an averager that is built again, to tell it from averagers with the same layout.
    pub(crate) ordinal: Option<String>,
    /// Digest of the tensors' values, if ranks compare them.
    pub(crate) digest: Option<u64>,
    /// True if other devices can't access this rank's tensors, as the direct average does. Ranks
    /// then build for the ring.
    pub(crate) is_unreached: bool,
    /// Bytes that the inbox of the next rank of the ring has by this rank's options, and those of
    /// the previous one's credits. Not sent.
    pub(crate) neighbours: [usize; 2],
    /// Memory for the previous rank of the ring: `filled` counters, which it writes, then slots,
    /// unless they are at its end.
    pub(crate) inbox: Option<Arc<Memory>>,
    /// Memory for the next rank of the ring: `drained` counters, which it writes, then slots, if
    /// they are at this end.
    pub(crate) credits: Option<Arc<Memory>>,
    /// Memory that the next rank of the ring reads after this one was lost: the outer optimizer's
    /// state.
    pub(crate) state: Option<Arc<Memory>>,
    /// The control block of all ranks. Provided by rank 0.
    pub(crate) control: Option<Arc<Control>>,
}

/// The result of an exchange of handshakes.
#[derive(Debug)]
pub(crate) struct Agreement {
    pub(crate) control: Arc<Control>,
    /// Handshakes of all ranks, by rank.
    pub(crate) handshakes: Vec<Arc<Handshake>>,
    /// Ordinal of the averager, the same on every rank; see `Handshake`.
    pub(crate) ordinal: Option<String>,
    /// Number of the build in its view, the same on every rank.
    pub(crate) number: u32,
    /// Meetings of ranks on devices that are threads of one process.
    pub(crate) calls: Meeting<cuda::Part>,
    pub(crate) launches: Meeting<cuda::Launched>,
}

impl Agreement {
    /// Returns the agreement, unless a rank refuses or two ranks differ.
    pub(super) fn of(handshakes: Vec<Arc<Handshake>>) -> Result<Agreement> {
        Agreement::check(&handshakes)?;
        let reason = "its handshake has no control block".to_owned();
        let control =
            handshakes[0].control.clone().ok_or(Error::PeerBuildFailed { rank: 0, reason })?;
        let ordinal = handshakes.iter().find_map(|handshake| handshake.ordinal.clone());
        let world = handshakes.len();
        let (calls, launches) = (Meeting::new(world), Meeting::new(world));
        Ok(Agreement { control, handshakes, ordinal, number: 0, calls, launches })
    }

    /// An agreement of no rank.
    #[cfg(test)]
    pub(super) fn of_none(control: Arc<Control>) -> Agreement {
        let (calls, launches) = (Meeting::new(0), Meeting::new(0));
        Agreement { control, handshakes: vec![], ordinal: None, number: 0, calls, launches }
    }

    /// True if the averager is built again: it has an ordinal on some rank.
    pub(crate) fn is_again(&self) -> bool {
        self.handshakes.iter().any(|handshake| handshake.ordinal.is_some())
    }

    /// Compares handshakes, except their memory. The result is the same on every rank.
    pub(super) fn check(handshakes: &[Arc<Handshake>]) -> Result<()> {
        let refusal = handshakes.iter().find_map(|handshake| handshake.refusal.clone());
        // A rank without an ordinal agrees with every other.
        let mut known = handshakes
            .iter()
            .enumerate()
            .filter_map(|(rank, handshake)| Some((rank, handshake.ordinal.as_ref()?)));
        let first = known.next().map(|(_, ordinal)| ordinal.clone());
        let other =
            known.find(|(_, ordinal)| first.as_ref() != Some(ordinal)).map(|(rank, ordinal)| {
                let show = |ordinal: &String| format!("the averager built as number {ordinal}");
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
    fn ordinals_of_averagers_built_again_must_agree() {
        let handshake = |ordinal: Option<&str>| {
            Arc::new(Handshake {
                refusal: None,
                options: vec![],
                tensors: vec![],
                course: Course::default(),
                admission: Admission::None,
                ordinal: ordinal.map(str::to_owned),
                digest: None,
                is_unreached: false,
                neighbours: [0; 2],
                inbox: None,
                credits: None,
                state: None,
                control: None,
            })
        };
        let of = |ordinals: [Option<&str>; 3]| Agreement::of(ordinals.map(handshake).into());
        // A joiner has no ordinal yet.
        for ordinals in [[Some("0"), None, Some("1")], [None, Some("0"), Some("1")]] {
            assert!(
                matches!(of(ordinals), Err(Error::OptionsDiffer { rank: 2, .. })),
                "{:?}",
                of(ordinals)
            );
        }
        // The ordinals agree; the missing control block of rank 0 is the only fault left.
        for ordinals in [[Some("0"), Some("0"), None], [None; 3]] {
            assert!(
                matches!(of(ordinals), Err(Error::PeerBuildFailed { rank: 0, .. })),
                "{:?}",
                of(ordinals)
            );
        }
    }
}
