//! Saving a `LocalSgd` and loading it again.

use super::{LocalSgd, MOST_STEPS};
use crate::averager::OUTER_SECTION;
use crate::error::StateError;
use crate::saved::{Reader, Sections, Writer};
use crate::schedule::{Agreed, Course};
use crate::{Error, Result};

/// Section that every state has.
const COURSE: &str = "course";

/// Content of the section: the state of `LocalSgd` itself.
#[derive(Clone, Debug, PartialEq)]
struct Saved {
    rank: usize,
    world_size: usize,
    layout: Layout,
    schedule: (String, [u64; 5]),
    course: Course,
    later: Option<Agreed>,
    rate: Option<f64>,
    applied: u64,
    averages: u64,
    since_average: u64,
    samples: Option<f64>,
}

/// The tensors that a state belongs to.
#[derive(Clone, Debug, PartialEq)]
struct Layout {
    tensors: u64,
    bytes: u64,
    digest: u64,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Layout { tensors, bytes, digest } = self;
        write!(f, "{tensors} tensors of {bytes} bytes (names, dtypes and sizes {digest:016x})")
    }
}

impl Saved {
    fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        let Layout { tensors, bytes, digest } = self.layout;
        let Course { position, anchor, local_steps } = self.course;
        to.u32(self.rank as u32);
        to.u32(self.world_size as u32);
        to.words(&[tensors, bytes, digest]);
        to.text(&self.schedule.0);
        to.words(&self.schedule.1);
        to.words(&[position, anchor, local_steps]);
        to.u8(self.later.is_some().into());
        if let Some(Agreed { measured: [first, second], sent, rate }) = self.later {
            to.words(&[first, second, sent].map(f64::to_bits));
            to.optional(rate);
        }
        to.optional(self.rate);
        to.words(&[self.applied, self.averages, self.since_average]);
        to.optional(self.samples);
        to.0
    }

    fn from_bytes(bytes: &[u8]) -> Option<Saved> {
        let mut from = Reader(bytes);
        let saved = Saved {
            rank: from.u32()? as usize,
            world_size: from.u32()? as usize,
            layout: Layout { tensors: from.u64()?, bytes: from.u64()?, digest: from.u64()? },
            schedule: (
                from.text()?.to_owned(),
                [from.u64()?, from.u64()?, from.u64()?, from.u64()?, from.u64()?],
            ),
            course: Course { position: from.u64()?, anchor: from.u64()?, local_steps: from.u64()? },
            later: match from.u8()? {
                0 => None,
                _ => Some(Agreed {
                    measured: [from.f64()?, from.f64()?],
                    sent: from.f64()?,
                    rate: from.optional()?,
                }),
            },
            rate: from.optional()?,
            applied: from.u64()?,
            averages: from.u64()?,
            since_average: from.u64()?,
            samples: from.optional()?,
        };
        let Course { position, anchor, local_steps } = saved.course;
        let is_weight = |samples: f64| samples >= 0.0 && samples.is_finite();
        let counts = [saved.applied, saved.averages, saved.since_average];
        let is_possible = position <= MOST_STEPS
            && counts.iter().all(|&count| count <= MOST_STEPS)
            && anchor <= position
            && local_steps > 0
            && saved.samples.is_none_or(is_weight);
        (from.0.is_empty() && is_possible).then_some(saved)
    }
}

impl LocalSgd {
    /// State of this rank's Local SGD, for a checkpoint: the position, the steps since the last
    /// average, and the schedule's decisions; with a version and a checksum. The parameters, and
    /// the state of the rank's own optimizer, are saved beside it by the caller.
    ///
    /// All ranks save after the same step: each its own state and its own parameters, or, after
    /// [`sync`](Self::sync), rank 0 those of all. With an [outer optimizer](crate::Outer) every
    /// rank saves its state, which holds the rank's shard of the optimizer's. Waits for an average
    /// that was enqueued, whose error is that of the next call. Of several fragments, all count
    /// after `load` with the steps and samples of the one that has most; after `sync` none has any.
    ///
    /// # Errors
    /// As [`ParamAverager::average`](crate::ParamAverager::average), if a part of the state can't
    /// be read from a device. [`Error::InvalidOption`] if an average of a copy is under way; call
    /// [`flush`](Self::flush) first.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        if self.flight.is_some() {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "save",
                found: "an average of a copy that is under way".into(),
                expected: "LocalSgd::flush before",
            });
        }
        let mut sections = Sections::default();
        sections.push(COURSE, true, self.saved().to_bytes());
        if let Some(outer) = self.averager().save_outer()? {
            sections.push(OUTER_SECTION, true, outer);
        }
        Ok(sections.to_bytes())
    }

    /// Goes on from a state that [`save`](Self::save) has returned, with the parameters that were
    /// saved with it. All ranks load states of the same step, before their first step. The number
    /// of ranks may have changed if the state was saved after [`sync`](Self::sync).
    ///
    /// In a process that [joined](crate::Communicator::join) it changes nothing, since its peers
    /// tell the place. [`Builder::start_from`](crate::Builder::start_from) decides if the ranks
    /// keep the parameters that they have loaded: to go on between two averages, build with
    /// [`Start::Own`](crate::Start::Own), or, with an [outer optimizer](crate::Outer), put the
    /// rank's parameters into the tensors after the build.
    ///
    /// # Errors
    /// [`Error::InvalidState`] on this rank, which has changed nothing: bytes that are no state,
    /// have changed or are cut off, and states of another format, model, schedule, optimizer or
    /// rank.
    pub fn load(&mut self, state: &[u8]) -> Result<()> {
        self.load_all(&[state])
    }

    /// As [`load`](Self::load), from the states that all ranks have saved: for an
    /// [outer optimizer](crate::Outer) where the number of ranks or of channels has changed since,
    /// and with it the shards. Everything but the optimizer's state is taken from the state that
    /// this rank has saved, or else from the first one.
    ///
    /// # Errors
    /// As [`load`](Self::load). [`StateError::MissingShards`] if a state is missing.
    pub fn load_all<S: AsRef<[u8]>>(&mut self, states: &[S]) -> Result<()> {
        let rank = self.rank();
        self.load_checked(states).map_err(|cause| Error::InvalidState { rank, cause })
    }

    fn load_checked<S: AsRef<[u8]>>(&mut self, states: &[S]) -> Result<(), StateError> {
        let own = self.saved();
        let is_own = |saved: &Saved| (saved.rank, saved.world_size) == (own.rank, own.world_size);
        let (mut all, mut outer) = (vec![], vec![]);
        for state in states {
            let mut sections = Sections::from_bytes(state.as_ref())?;
            let missing = || StateError::MissingSection { tag: COURSE.into() };
            let content = sections.take(COURSE).ok_or_else(missing)?;
            all.push(Saved::from_bytes(&content).ok_or(StateError::Corrupt)?);
            outer.extend(sections.take(OUTER_SECTION));
            sections.end()?;
        }
        let chosen = all.iter().find(|saved| is_own(saved)).or(all.first());
        let found = chosen.ok_or(StateError::NotAState)?.clone();
        let of_course = |saved: &&Saved| saved.course != found.course;
        if let Some(other) = all.iter().find(of_course) {
            let [found, expected] = [other.course, found.course].map(|course| course.position);
            return Err(StateError::OtherStep { found, expected });
        }
        if found.layout != own.layout {
            let (found, expected) = (found.layout.to_string(), own.layout.to_string());
            return Err(StateError::OtherLayout { found, expected });
        }
        if found.schedule.1 != own.schedule.1 {
            let (found, expected) = (found.schedule.0, own.schedule.0);
            return Err(StateError::OtherSchedule { found, expected });
        }
        if found.since_average > 0 && !is_own(&found) {
            let Saved { rank, world_size, since_average, .. } = found;
            return Err(StateError::OtherRank { found: rank, world_size, steps: since_average });
        }
        self.drop_flight(); // of the parameters before
        if !self.averager.has_joined() {
            self.averager().load_outer(&outer)?;
            self.take_course(found.course);
            self.decisions.restore(found.later);
            self.measured.rate = found.rate;
            self.applied = found.applied;
            self.averages = found.averages;
            self.since.restore(found.since_average, found.samples);
            self.averager.assume_mixed();
        }
        Ok(())
    }

    fn saved(&mut self) -> Saved {
        let [tensors, bytes, digest] = self.averager().layout();
        let layout = Layout { tensors, bytes, digest };
        let schedule = self.schedule();
        Saved {
            rank: self.rank(),
            world_size: self.world_size(),
            layout,
            schedule: (schedule.to_string(), schedule.words()),
            course: self.decisions.course,
            later: self.decisions.later(),
            rate: self.measured.rate,
            applied: self.applied,
            averages: self.averages,
            since_average: self.since.steps(None),
            samples: self.since.samples(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::fnv1a;

    fn saved(samples: Option<f64>, later: Option<Agreed>) -> Saved {
        Saved {
            rank: 1,
            world_size: 3,
            layout: Layout { tensors: 2, bytes: 40, digest: 0x1234 },
            schedule: ("budget(2)".into(), [3, 2f64.to_bits(), 0, 5, 9]),
            course: Course { position: 70, anchor: 60, local_steps: 7 },
            later,
            rate: Some(0.1),
            applied: 65,
            averages: 8,
            since_average: 4,
            samples,
        }
    }

    const LATER: Agreed = Agreed { measured: [0.5, 0.25], sent: 80.0, rate: None };

    #[test]
    fn everything_comes_back() {
        for saved in [saved(None, None), saved(Some(6.5), Some(LATER))] {
            let bytes = saved.to_bytes();
            assert_eq!(Saved::from_bytes(&bytes), Some(saved));
            for length in 0..bytes.len() {
                assert_eq!(Saved::from_bytes(&bytes[..length]), None, "{length}");
            }
            assert_eq!(Saved::from_bytes(&[&bytes[..], &[0]].concat()), None);
        }
    }

    #[test]
    fn what_no_rank_has_is_not_loaded() {
        let good = saved(None, None);
        let course = |position, anchor, local_steps| Saved {
            course: Course { position, anchor, local_steps },
            ..good.clone()
        };
        let bad = [
            course(70, 60, 0),
            course(70, 71, 7),
            course(u64::MAX, 60, 7),
            saved(Some(-1.0), None),
            saved(Some(f64::NAN), None),
        ];
        for saved in bad {
            assert_eq!(Saved::from_bytes(&saved.to_bytes()), None, "{saved:?}");
        }
    }

    /// States that this version has saved are loaded by later ones: where this test fails, the
    /// format needs another version, and the former one is to be read all the same.
    #[test]
    fn the_format_has_not_changed() {
        let mut sections = Sections::default();
        sections.push(COURSE, true, saved(Some(6.5), Some(LATER)).to_bytes());
        let bytes = sections.to_bytes();
        assert_eq!((bytes.len(), fnv1a(bytes)), (236, 0x3fd3_eba1_9a89_9914));
    }
}
