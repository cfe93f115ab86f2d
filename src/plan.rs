//! The plan of an average: its steps, with a commit mark, and the launches that run them. Pure
//! data, made of options alone.

use crate::abi::{
    PaKernel, PA_ANCHOR, PA_COMPARE, PA_DIRECT, PA_DIRECT_DELTA, PA_DIRECT_STEP, PA_REFERENCE,
    PA_RING, PA_RING_COMMIT, PA_RING_MIX, PA_RING_STEP, PA_RING_VOTE, PA_SAMPLE, PA_SCAN,
};

/// One step of an average.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Look at the own tensors for values that are not finite. Waits for no peer.
    Scan,
    /// Validate that all ranks request the same operation: the entry barrier.
    Agree,
    /// Sum this rank's shard. Writes no tensor.
    Reduce,
    /// Call the user's stage, and narrow what it leaves of this rank's shard.
    Stage,
    /// Decide that every rank writes, or none. Before it no tensor changes.
    Commit,
    /// Make the outer optimizer's step for this rank's shard. Nothing in it waits for a peer.
    Outer,
    /// Write the result to all tensors.
    Gather,
    /// Write a mixture of the result and of its former value to each tensor.
    Mix,
    /// Write the result less its former value to each tensor; in a coded plan, which leaves the
    /// tensors as they are, the result to the reference.
    Delta,
    /// Keep this rank's shard of the tensors as the outer optimizer's anchor.
    Anchor,
    /// Keep the result as the reference of coded averages.
    Reference,
    /// Keep a sample of the own values, for telemetry. Waits for no peer.
    Sample,
    /// Compare that sample with the new values. Waits for no peer.
    Compare,
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
    pub(crate) fn all_of(kernel: u32) -> Launch {
        Launch { kernel, segments: (0, 0) }
    }

    /// True if its kernel waits for all ranks to exit, since they write to the tensors of all.
    pub(crate) fn waits_for_exits(self) -> bool {
        [PA_DIRECT, PA_DIRECT_STEP, PA_DIRECT_DELTA].contains(&self.kernel)
    }

    /// True if a rank whose tensors are wrong takes part, to tell its peers.
    pub(crate) fn meets(self) -> bool {
        ![PA_SCAN, PA_ANCHOR, PA_REFERENCE, PA_SAMPLE, PA_COMPARE].contains(&self.kernel)
    }
}

/// The end of an average, after the reduce.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The mean is written to all tensors.
    Mean,
    /// The mean is written to all tensors, and becomes the outer optimizer's anchor.
    Anchor,
    /// The outer optimizer makes a step, and its result is written to all tensors.
    Step,
    /// The outer optimizer makes a step, and each rank mixes the result with its own values.
    Mix,
    /// The mean less a rank's own values is written to its tensors, which are copies.
    Delta,
    /// As `Delta`, with the outer optimizer's result in the place of the mean.
    StepDelta,
}

/// The plan of an averager's averages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    is_ring: bool,
    /// Kernel of the ring with a commit.
    ring: PaKernel,
    steps: Vec<Step>,
}

impl Plan {
    /// Plan of a ring or of a direct average. `all_or_nothing`: the commit follows the reduce, so
    /// that a failure up to the end of the reduce changes no tensor. A direct average writes while
    /// it reduces, so it commits when all ranks have agreed.
    pub(crate) fn new(
        is_ring: bool,
        all_or_nothing: bool,
        rejects_non_finite: bool,
        end: End,
    ) -> Plan {
        use Step::*;
        let mut steps = match (is_ring && all_or_nothing, rejects_non_finite) {
            (true, _) => vec![Agree, Reduce, Commit, Gather], // the reduce reads all tensors anyway
            (false, true) => vec![Scan, Agree, Commit, Reduce, Gather],
            (false, false) => vec![Agree, Commit, Reduce, Gather],
        };
        let gather = steps.len() - 1;
        match end {
            End::Mean => {}
            End::Anchor => steps.push(Anchor),
            End::Step => steps.insert(gather, Outer),
            End::Mix => {
                steps[gather] = Mix;
                steps.insert(gather, Outer);
            }
            End::Delta => steps[gather] = Delta,
            End::StepDelta => {
                steps[gather] = Delta;
                steps.insert(gather, Outer);
            }
        }
        Plan { is_ring, ring: PA_RING_COMMIT, steps }
    }

    /// The plan with the user's stage before the commit, if there is one. A plan with a stage is
    /// one of a ring that is all or nothing.
    pub(crate) fn with_stage(mut self, has_stage: bool) -> Plan {
        if has_stage && self.commits_late() {
            self.steps.insert(2, Step::Stage);
        }
        self
    }

    /// The plan of an averager with compression: of an average coded by this kernel, or, with
    /// `None`, of one in full whose result becomes the reference. A plan of a ring that is all or
    /// nothing.
    pub(crate) fn coded(mut self, kernel: Option<PaKernel>) -> Plan {
        match kernel {
            Some(kernel) => self.ring = kernel,
            None => self.steps.push(Step::Reference),
        }
        self
    }

    /// The same plan between the two steps of telemetry.
    pub(crate) fn sampled(mut self) -> Plan {
        self.steps.insert(0, Step::Sample);
        self.steps.push(Step::Compare);
        self
    }

    /// Launches of this plan in a world of this many ranks. Steps are fused into one launch, except
    /// for the sample, its comparison, the scan, the anchor, the reference and, by the ring, the
    /// outer step. Where `is_sequenced`, nothing may wait on a device: each segment is a launch of
    /// its own, and all ranks meet on the host before each.
    pub(crate) fn launches(&self, world: u32, is_sequenced: bool) -> Vec<Launch> {
        let has = |step| self.steps.contains(&step);
        let mut launches = vec![];
        if has(Step::Sample) {
            launches.push(Launch::all_of(PA_SAMPLE));
        }
        if has(Step::Scan) {
            launches.push(Launch::all_of(PA_SCAN));
        }
        match (self.is_ring, self.commits_late()) {
            (true, true) => launches.extend(self.segments(world, is_sequenced)),
            (true, false) => launches.push(Launch::all_of(PA_RING)),
            (false, _) if has(Step::Outer) => launches.push(Launch::all_of(PA_DIRECT_STEP)),
            (false, _) if has(Step::Delta) => launches.push(Launch::all_of(PA_DIRECT_DELTA)),
            (false, _) => launches.push(Launch::all_of(PA_DIRECT)),
        }
        if has(Step::Anchor) {
            launches.push(Launch::all_of(PA_ANCHOR));
        }
        if has(Step::Reference) {
            launches.push(Launch::all_of(PA_REFERENCE));
        }
        if has(Step::Compare) {
            launches.push(Launch::all_of(PA_COMPARE));
        }
        launches
    }

    /// True if no tensor is written before all ranks have their shard.
    fn commits_late(&self) -> bool {
        self.steps.windows(2).any(|steps| steps == [Step::Agree, Step::Reduce])
    }

    /// Launches of the ring with a commit. The outer step has a kernel of its own, which commits:
    /// in one with the ring it would cost the ring registers.
    fn segments(&self, world: u32, is_sequenced: bool) -> Vec<Launch> {
        let (commit, end) = (world + 1, 2 * world + 1);
        let cut = |kernel, first, end| -> Vec<Launch> {
            let of = |first, end| Launch { kernel, segments: (first, end) };
            match is_sequenced {
                true => (first..end).map(|at| of(at, at + 1)).collect(),
                false => vec![of(first, end)],
            }
        };
        let votes = Launch { kernel: PA_RING_VOTE, segments: (commit, commit) };
        let reduce = || cut(self.ring, 0, commit);
        let has = |step| self.steps.contains(&step);
        // A coded ring writes no difference, and gathers by its own kernel.
        let mixes = (has(Step::Mix) || has(Step::Delta)) && self.ring == PA_RING_COMMIT;
        let reduce = match has(Step::Stage) {
            true => [reduce(), vec![votes]].concat(),
            false if !has(Step::Outer) && !mixes => return cut(self.ring, 0, end),
            false => reduce(),
        };
        let gather = cut(if mixes { PA_RING_MIX } else { self.ring }, commit, end);
        if !has(Step::Outer) {
            return [reduce, gather].concat();
        }
        let step = Launch { kernel: PA_RING_STEP, segments: (commit, commit) };
        [reduce, vec![step], gather].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::PA_RING_INT8;
    use proptest::prelude::*;

    fn ends() -> impl Strategy<Value = End> {
        prop::sample::select(vec![
            End::Mean,
            End::Anchor,
            End::Step,
            End::Mix,
            End::Delta,
            End::StepDelta,
        ])
    }

    proptest! {
        #[test]
        fn plans_commit_once_before_any_tensor_is_written(
            is_ring: bool, all_or_nothing: bool, rejects: bool, end in ends(),
        ) {
            let all_or_nothing = all_or_nothing || end != End::Mean;
            let plan = Plan::new(is_ring, all_or_nothing, rejects, end);
            let at = |step| plan.steps.iter().position(|other| *other == step);
            for step in [Step::Agree, Step::Commit, Step::Reduce] {
                prop_assert_eq!(plan.steps.iter().filter(|other| **other == step).count(), 1);
            }
            let gathers = [Step::Gather, Step::Mix, Step::Delta].map(at);
            prop_assert_eq!(gathers.iter().flatten().count(), 1);
            let gather = gathers.into_iter().flatten().next();
            prop_assert_eq!(at(Step::Delta).is_some(), matches!(end, End::Delta | End::StepDelta));
            prop_assert!(at(Step::Agree) < at(Step::Commit) && at(Step::Commit) < gather);
            prop_assert!(at(Step::Agree) < at(Step::Reduce) && at(Step::Reduce) < gather);
            // A direct average has no shard of its own to keep until a later commit.
            prop_assert_eq!(at(Step::Reduce) < at(Step::Commit), is_ring && all_or_nothing);
            // Values are looked at before the commit, by a scan where the reduce comes after it.
            let scans = rejects && at(Step::Commit) < at(Step::Reduce);
            prop_assert_eq!(at(Step::Scan).is_some(), scans);
            prop_assert!(at(Step::Scan).is_none_or(|at| at == 0));
            // State changes once, after the commit, and before any tensor is written or after all.
            let steps = matches!(end, End::Step | End::Mix | End::StepDelta);
            prop_assert_eq!(at(Step::Outer).is_some(), steps);
            prop_assert!(at(Step::Outer).is_none_or(|at| Some(at + 1) == gather));
            prop_assert!(!steps || at(Step::Commit) < at(Step::Outer));
            prop_assert_eq!(at(Step::Anchor).is_some(), end == End::Anchor);
            prop_assert!(at(Step::Anchor).is_none_or(|at| at + 1 == plan.steps.len()));
        }

        #[test]
        fn launches_run_every_segment_once_and_in_order(
            is_ring: bool, all_or_nothing: bool, rejects: bool, world in 2u32..=16, host: bool,
            end in ends(),
        ) {
            let all_or_nothing = all_or_nothing || end != End::Mean;
            let plan = Plan::new(is_ring, all_or_nothing, rejects, end);
            let launches = plan.launches(world, host);
            let is = |at: usize, kernel| launches[at].kernel == kernel;
            prop_assert_eq!(is(0, PA_SCAN), plan.steps[0] == Step::Scan);
            prop_assert_eq!(is(launches.len() - 1, PA_ANCHOR), end == End::Anchor);
            let meeting: Vec<_> = launches.iter().filter(|launch| launch.meets()).collect();
            let mut next = 0;
            for launch in &meeting {
                prop_assert_eq!(launch.segments.0, next);
                next = launch.segments.1;
            }
            let splits = is_ring && all_or_nothing;
            prop_assert_eq!(next, if splits { 2 * world + 1 } else { 0 });
            let steps = matches!(end, End::Step | End::Mix | End::StepDelta);
            let step = meeting.iter().position(|launch| launch.kernel == PA_RING_STEP);
            prop_assert_eq!(step.is_some(), splits && steps);
            if let Some(step) = step {
                prop_assert_eq!(meeting[step].segments, (world + 1, world + 1));
            }
            let mixes = matches!(end, End::Mix | End::Delta | End::StepDelta);
            let gather = if mixes { PA_RING_MIX } else { PA_RING_COMMIT };
            prop_assert!(!splits || meeting[meeting.len() - 1].kernel == gather);
            let parts = if steps { 3 } else if mixes { 2 } else { 1 };
            let segments = if steps { next + 1 } else { next } as usize;
            prop_assert_eq!(meeting.len(), match (splits, host) {
                (false, _) => 1,
                (true, false) => parts,
                (true, true) => segments,
            });
            let direct = match end {
                _ if steps => PA_DIRECT_STEP,
                End::Delta => PA_DIRECT_DELTA,
                _ => PA_DIRECT,
            };
            prop_assert!(is_ring || meeting[0].kernel == direct);
        }

        /// The sample is kept before anything else, and compared after everything else.
        #[test]
        fn telemetry_adds_a_launch_at_each_end(
            is_ring: bool, all_or_nothing: bool, rejects: bool, world in 1u32..=16, host: bool,
            end in ends(),
        ) {
            let plan = Plan::new(is_ring, all_or_nothing || end != End::Mean, rejects, end);
            let mut expected = plan.launches(world, host);
            expected.insert(0, Launch::all_of(PA_SAMPLE));
            expected.push(Launch::all_of(PA_COMPARE));
            let sampled = plan.sampled().launches(world, host);
            prop_assert!(!sampled[0].meets() && !sampled[sampled.len() - 1].meets());
            prop_assert_eq!(sampled, expected);
        }

        /// A coded average has another kernel in the place of the ring's, and nothing else; one of
        /// a copy is launched as one in place. An average in full has one launch more.
        #[test]
        fn a_code_changes_the_kernel_of_the_ring(
            world in 2u32..=16, host: bool, end in ends(), telemetry: bool,
        ) {
            let end = if end == End::Mix { End::Step } else { end };
            let of = |end, kernel: Option<Option<PaKernel>>| {
                let plan = Plan::new(true, true, true, end);
                let plan = kernel.map_or(plan.clone(), |kernel| plan.coded(kernel));
                let plan = if telemetry { plan.sampled() } else { plan };
                plan.launches(world, host)
            };
            let mut expected = of(end, None);
            let compare = usize::from(telemetry);
            expected.insert(expected.len() - compare, Launch::all_of(PA_REFERENCE));
            prop_assert_eq!(of(end, Some(None)), expected);
            let in_place = match end {
                End::Delta => End::Mean,
                End::StepDelta => End::Step,
                end => end,
            };
            let mut expected = of(in_place, None);
            for launch in expected.iter_mut().filter(|launch| launch.kernel == PA_RING_COMMIT) {
                launch.kernel = PA_RING_INT8;
            }
            prop_assert_eq!(of(end, Some(Some(PA_RING_INT8))), expected);
        }

        /// The vote of a stage comes when the reduce has ended, and before any rank commits; all
        /// else is as without a stage.
        #[test]
        fn a_stage_votes_between_the_reduce_and_the_commit(
            is_ring: bool, all_or_nothing: bool, rejects: bool, world in 1u32..=16, host: bool,
            end in ends(),
        ) {
            let plan = Plan::new(is_ring, all_or_nothing, rejects, end).with_stage(true);
            let launches = plan.launches(world, host);
            let votes = |launch: &Launch| launch.kernel == PA_RING_VOTE;
            let count = launches.iter().filter(|launch| votes(launch)).count();
            prop_assert_eq!(count, usize::from(is_ring && all_or_nothing));
            if let Some(vote) = launches.iter().position(votes) {
                let commit = world + 1;
                prop_assert_eq!(launches[vote].segments, (commit, commit));
                let before = &launches[..vote];
                prop_assert!(before.iter().all(|launch| launch.kernel == PA_RING_COMMIT));
                prop_assert_eq!(before[vote - 1].segments.1, commit);
                let after = launches[vote + 1..].iter().filter(|launch| launch.meets());
                prop_assert!(after.clone().all(|launch| launch.segments.0 >= commit));
                let segments = before.iter().chain(after).filter(|l| l.segments.0 < l.segments.1);
                let next = segments.into_iter().try_fold(0, |next, launch| {
                    (launch.segments.0 == next).then_some(launch.segments.1)
                });
                prop_assert_eq!(next, Some(2 * world + 1));
            }
        }
    }
}
