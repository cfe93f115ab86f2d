//! The plan of an average: its steps, with a commit mark, and the launches that run them. Pure
//! data, made of options alone.

use crate::abi::{PA_DIRECT, PA_RING, PA_RING_COMMIT, PA_SCAN};

/// One step of an average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Look at the own tensors for values that are not finite. Waits for no peer.
    Scan,
    /// Validate that all ranks request the same operation: the entry barrier.
    Agree,
    /// Sum this rank's shard. Writes no tensor.
    Reduce,
    /// Decide that every rank writes, or none. Before it no tensor changes.
    Commit,
    /// Write the mean to all tensors.
    Gather,
}

/// One launch of a kernel, which runs one or several steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// A `PaKernel`.
    pub(crate) kernel: u32,
    /// Segments of `PA_RING_COMMIT`: the first one, and the one after the last.
    pub(crate) segments: (u32, u32),
}

impl Launch {
    fn all_of(kernel: u32) -> Launch {
        Launch { kernel, segments: (0, 0) }
    }

    /// True if a rank whose tensors are wrong takes part, to tell its peers.
    pub(crate) fn meets(self) -> bool {
        self.kernel != PA_SCAN
    }
}

/// The plan of an averager's averages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    is_ring: bool,
    steps: Vec<Step>,
}

impl Plan {
    /// Plan of a ring or of a direct average. `all_or_nothing`: the commit follows the reduce, so
    /// that a failure up to the end of the reduce changes no tensor. A direct average writes while
    /// it reduces, so it commits when all ranks have agreed.
    pub(crate) fn new(is_ring: bool, all_or_nothing: bool, rejects_non_finite: bool) -> Plan {
        use Step::*;
        let steps = match (is_ring && all_or_nothing, rejects_non_finite) {
            (true, _) => vec![Agree, Reduce, Commit, Gather], // the reduce reads all tensors anyway
            (false, true) => vec![Scan, Agree, Commit, Reduce, Gather],
            (false, false) => vec![Agree, Commit, Reduce, Gather],
        };
        Plan { is_ring, steps }
    }

    /// Launches of this plan in a world of this many ranks. Steps are fused into one launch. Where
    /// `is_sequenced`, nothing may wait on a device: each segment is a launch of its own, and all
    /// ranks meet on the host before each.
    pub(crate) fn launches(&self, world: u32, is_sequenced: bool) -> Vec<Launch> {
        let segments = 2 * world + 1;
        let commits_late = self.steps[..2] == [Step::Agree, Step::Reduce];
        let of = |first, end| Launch { kernel: PA_RING_COMMIT, segments: (first, end) };
        match (self.is_ring, commits_late) {
            (true, true) if is_sequenced => (0..segments).map(|at| of(at, at + 1)).collect(),
            (true, true) => vec![of(0, segments)],
            (is_ring, _) => {
                let scan = self.steps.first().filter(|step| **step == Step::Scan);
                let kernel = if is_ring { PA_RING } else { PA_DIRECT };
                let scan = scan.map(|_| Launch::all_of(PA_SCAN));
                scan.into_iter().chain([Launch::all_of(kernel)]).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn plans_commit_once_before_any_tensor_is_written(
            is_ring: bool, all_or_nothing: bool, rejects: bool, world in 2u32..=16, host: bool,
        ) {
            let plan = Plan::new(is_ring, all_or_nothing, rejects);
            let at = |step| plan.steps.iter().position(|other| *other == step);
            for step in [Step::Agree, Step::Commit, Step::Reduce, Step::Gather] {
                prop_assert_eq!(plan.steps.iter().filter(|other| **other == step).count(), 1);
            }
            prop_assert!(at(Step::Agree) < at(Step::Commit) && at(Step::Commit) < at(Step::Gather));
            prop_assert!(at(Step::Agree) < at(Step::Reduce) && at(Step::Reduce) < at(Step::Gather));
            // A direct average has no shard of its own to keep until a later commit.
            prop_assert_eq!(at(Step::Reduce) < at(Step::Commit), is_ring && all_or_nothing);
            // Values are looked at before the commit, by a scan where the reduce comes after it.
            let scans = rejects && at(Step::Commit) < at(Step::Reduce);
            prop_assert_eq!(at(Step::Scan).is_some(), scans);
            prop_assert!(at(Step::Scan).is_none_or(|at| at == 0));

            let launches = plan.launches(world, host);
            prop_assert_eq!(launches[0].kernel == PA_SCAN, at(Step::Scan).is_some());
            let meeting: Vec<_> = launches.iter().filter(|launch| launch.meets()).collect();
            let mut next = 0;
            for launch in &meeting {
                prop_assert_eq!(launch.kernel, meeting[0].kernel);
                prop_assert_eq!(launch.segments.0, next);
                next = launch.segments.1;
            }
            let splits = is_ring && all_or_nothing;
            prop_assert_eq!(next, if splits { 2 * world + 1 } else { 0 });
            prop_assert_eq!(meeting.len(), if splits && host { next as usize } else { 1 });
        }
    }
}
