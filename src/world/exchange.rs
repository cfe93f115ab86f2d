//! Exchange of small messages between all ranks, on the hosts.

use super::gather::{Call, Silence, Why};
use crate::error::Phase;
use crate::{notice, Error};

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

/// The error of an exchange. A rank whose messages can't be received is lost for this one.
pub(super) fn missing(silence: Silence, call: &Call<'_>) -> Error {
    let rank = silence.rank;
    let is_unreadable = matches!(silence.why, Why::Unreadable(_));
    match silence.error(call) {
        Error::SharedMemory { reason, .. } if is_unreadable => {
            notice::warn(Some(call.rank), &reason);
            Error::PeerLost { rank, phase: Phase::Exchange, committed: false }
        }
        error => in_exchange(error),
    }
}
