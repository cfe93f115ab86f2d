//! What the kernels' status records say, as a result.

use std::time::Instant;

use super::table::Problem;
use super::{Outcome, ParamAverager};
use crate::abi::*;
use crate::error::Stage;
use crate::world::Failure;
use crate::{Error, Result};

impl ParamAverager {
    /// The channels' status records. Between launches only.
    pub(super) fn ended(&self) -> impl Iterator<Item = PaChannel> + '_ {
        self.own.engine.ended().iter().copied()
    }

    /// What they say of an average that began at `start`, if that is known.
    pub(super) fn outcome(&mut self, start: Option<Instant>) -> Result<Outcome> {
        let committed = self.ended().any(|status| status.committed != 0);
        let Some(status) = self.ended().max_by_key(|status| (status.outcome != PA_COMMITTED, status.outcome))
        else {
            unreachable!("there is a channel")
        };
        let position = status.peer as usize;
        let rank = self.ring_order()[position];
        let problem = Problem { tensor: status.detail, found: status.found };
        let error = match status.outcome {
            PA_COMMITTED => return Ok(Outcome::Averaged(self.report(start))),
            PA_UNNEEDED => return Ok(Outcome::Unneeded),
            PA_NON_FINITE => self.non_finite(rank, status.detail),
            PA_LAYOUT => self.table.error(rank, problem),
            PA_SCHEDULE => Error::SchedulesDiffer { rank },
            PA_WEIGHTING => Error::WeightingDiffers { rank },
            PA_BAD_WEIGHT => Error::Weight { rank, weight: f64::from_bits(status.found) },
            PA_NO_WEIGHT => Error::NoWeight,
            // PA_OPEN: told to leave without a word, by a test.
            PA_OPEN => {
                self.fatal(Failure { kind: PA_LEFT, position: self.position() }, Stage::Exit, committed)
            }
            kind => self.fatal(Failure { kind, position }, stage(status.where_), committed),
        };
        if error.is_fatal() {
            self.failed = Some(error.clone());
        }
        Err(error)
    }

    fn non_finite(&self, rank: usize, bad: u64) -> Error {
        let (bucket, element) = ((bad - 1) >> 56, (bad - 1) & ((1 << 56) - 1));
        let (tensor, element) = self.table.buckets[bucket as usize].locate(element);
        Error::NonFinite { rank, tensor: self.table.describe(tensor), element }
    }

    pub(super) fn fatal(&self, failure: Failure, stage: Stage, committed: bool) -> Error {
        let Failure { kind, position } = failure;
        let rank = self.ring_order()[position];
        match kind {
            PA_TIMEOUT => Error::Timeout { rank, timeout: self.timeout, stage, committed },
            PA_ABORTED => Error::Aborted { rank, stage, committed },
            _ => Error::PeerLost { rank, stage, committed },
        }
    }
}

fn stage(at: u32) -> Stage {
    match at {
        PA_AT_MEET => Stage::Meet,
        PA_AT_REDUCE => Stage::Reduce,
        PA_AT_COMMIT => Stage::Commit,
        PA_AT_GATHER => Stage::Gather,
        _ => Stage::Exit,
    }
}
