//! Exchange of small messages between all ranks, on the hosts.

use std::time::Duration;

use super::{Communicator, Group};
use crate::error::Phase;
use crate::{Error, Result};

/// Identity of an exchange in its view, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ExchangeId {
    /// [`Agreement::number`](super::Agreement::number) of the averager.
    pub(crate) averager: u32,
    /// Number among the exchanges of the averager.
    pub(crate) number: u32,
}

/// The data that one rank shows all others in an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(processes, derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Shown {
    /// The call in words, which ranks compare.
    pub(crate) call: String,
    pub(crate) words: Vec<u64>,
}

/// Most words of a message.
pub(crate) const MOST_WORDS: usize = 1024;

/// The failure of a world, as that of an exchange.
pub(super) fn in_exchange(failure: Error) -> Error {
    match failure {
        Error::Aborted { rank, committed, .. } => {
            Error::Aborted { rank, phase: Phase::Exchange, committed }
        }
        failure => failure,
    }
}

/// Time between two looks for what sends no notification: ranks that have dropped an averager.
pub(super) const LOOK: Duration = Duration::from_millis(50);

impl Communicator {
    /// Shows a message to all ranks and returns the messages of all, by rank. Collective, for at
    /// most `timeout`. `has_left` tells whether a rank has dropped the averager.
    ///
    /// An error does not end the world; see [`fail`](Self::fail).
    pub(crate) fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>> {
        match &self.membership.group {
            Group::Threads(rank, threads) => {
                threads.all_gather(*rank, id, shown, timeout, has_left)
            }
            #[cfg(processes)]
            Group::Processes(processes) => processes.all_gather(id, shown, timeout, has_left),
        }
    }

    /// Ends the world for this rank, and for the others that are threads, after an exchange that
    /// only some ranks have completed.
    pub(crate) fn fail(&self, error: &Error) {
        match &self.membership.group {
            Group::Threads(rank, threads) => threads.fail(*rank, error),
            #[cfg(processes)]
            Group::Processes(processes) => drop(processes.fail(error.clone())),
        }
    }
}
