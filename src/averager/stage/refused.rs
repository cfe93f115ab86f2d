//! Errors of averages that a rank's stage, or its exchange with other hosts, has refused.

use super::{RankStage, Refusal};
use crate::abi::{PaStatus, PA_DEPARTED, PA_LEFT};
use crate::averager::ParamAverager;
use crate::backend::Failure;
use crate::error::Phase;
use crate::Error;

impl ParamAverager {
    /// Notes how the last average with a call of the stage has ended, which is known.
    pub(in crate::averager) fn note_stage(&mut self) {
        let committed = self.ended().any(|status| status.committed != 0);
        self.stage.iter_mut().for_each(|stage| stage.ended(committed));
    }

    /// Error of an average that the stage of `rank` has refused.
    pub(in crate::averager) fn vetoed(&self, rank: usize, status: PaStatus) -> Error {
        const LEFT: u64 = PA_LEFT as u64; // bindgen takes the highest bit for a sign
        if status.detail & LEFT != 0 {
            let (tensor, element) = self.place_of_bad(status.detail ^ LEFT);
            let reason = format!(
                "its function has left a value that is not finite, or too large for its dtype, in \
                 {tensor}, element {element}"
            );
            return Error::StageVetoed { rank, reason };
        }
        // A failure of this host's world ends the exchange with other hosts, and its votes can be
        // counted before its kernels see it.
        if let Some(error) = self.failure_with_hosts(status.epoch) {
            return error;
        }
        // All ranks get here, and tell one another their reasons: a record has room for a number.
        let own = match self.stage.as_ref().and_then(|stage| stage.refusal.as_ref()) {
            Some(Refusal::Veto(veto)) => Some(veto.to_string()),
            Some(Refusal::Hosts(error)) => Some(error.to_string()),
            Some(Refusal::Unneeded) | None => None,
        };
        let shown = shortened(own.clone().unwrap_or_default());
        let is_shown = self.world_size() > 1;
        let all = is_shown.then(|| self.all_reasons(status.epoch, shown)).flatten();
        // A failure that has come since ends the exchange of reasons.
        if let Some(error) = self.failure_with_hosts(status.epoch).filter(|_| all.is_none()) {
            return error;
        }
        if let Some(error) = self.stage.as_ref().and_then(RankStage::error_of_hosts) {
            return error;
        }
        let told = all.map(|mut all| all.swap_remove(rank).0);
        match (told, own) {
            (Some(told), _) if rank != self.rank() && !told.is_empty() => {
                Error::StageVetoed { rank, reason: told }
            }
            (_, Some(own)) => Error::StageVetoed { rank: self.rank(), reason: own },
            (_, None) => {
                let reason = "that rank's own error has the reason".into();
                Error::StageVetoed { rank, reason }
            }
        }
    }

    /// Error of this host's world, whose ranks exchange with other hosts, if it has failed, or has
    /// lost a rank that has not completed this average.
    fn failure_with_hosts(&self, epoch: u32) -> Option<Error> {
        self.options.hosts.as_ref()?;
        let control = &self.agreement.control;
        let is_lost = |&peer: &usize| peer != self.position() && control.has_lost(peer, epoch);
        let lost = || (0..self.world_size()).find(is_lost);
        let lost = || lost().map(|position| Failure { kind: PA_DEPARTED, position });
        let failure = control.failure().or_else(lost)?;
        Some(self.fatal(failure, Phase::Commit, false))
    }
}

/// Beginning of a text that is too long for a message to all ranks.
fn shortened(mut text: String) -> String {
    const MOST: usize = 1000;
    if let Some((end, _)) = text.char_indices().find(|(at, _)| *at >= MOST) {
        text.truncate(end);
        text += " …";
    }
    text
}
