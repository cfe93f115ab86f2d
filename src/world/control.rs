//! The host's hand in `PaControl`, the notice boards that all ranks of an averager share.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Region;
use crate::abi::{PaControl, PA_ABORTED, PA_COMMITTED};

/// A failure that ended a world: what `PaControl.abort` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A `PaKind`.
    pub(crate) kind: u32,
    pub(crate) rank: usize,
}

/// A `PaControl`. After construction the host writes single words of it, atomically.
#[derive(Debug)]
pub(crate) struct Control(Region);

impl Control {
    /// As it is before the first average; averages are numbered from `epoch` + 1.
    pub(crate) fn new(epoch: u32) -> Self {
        let control = Control(Region::new(size_of::<PaControl>()));
        // SAFETY: zeroed, which is a valid PaControl, and nobody else has it yet.
        let boards = unsafe { &mut *control.0.as_ptr::<PaControl>() };
        boards.decision = u64::from(epoch) << 32 | u64::from(PA_COMMITTED << 8);
        for board in &mut boards.board {
            board.arrived = epoch;
            board.vote = epoch.wrapping_mul(2);
            board.left = epoch.wrapping_mul(2);
        }
        control
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.address()
    }

    /// Poisons this control, unless it already is.
    pub(crate) fn abort(&self, rank: usize) {
        let code = PA_ABORTED << 8 | rank as u32;
        // Release: who sees the abort sees what came before it.
        let _ = self.abort_word().compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Says that this rank never comes again.
    pub(crate) fn leave(&self, rank: usize) {
        let control = self.0.as_ptr::<PaControl>();
        // SAFETY: in bounds and aligned; this word is accessed by atomics only.
        unsafe { AtomicU32::from_ptr(&raw mut (*control).board[rank].gone) }.store(1, Ordering::Release);
    }

    /// The failure that ended this world, if one did.
    pub(crate) fn failure(&self) -> Option<Failure> {
        match self.abort_word().load(Ordering::Acquire) {
            0 => None,
            code => Some(Failure { kind: code >> 8, rank: (code & 0xff) as usize }),
        }
    }

    fn abort_word(&self) -> &AtomicU32 {
        let control = self.0.as_ptr::<PaControl>();
        // SAFETY: in bounds and aligned; this word is accessed by atomics only.
        unsafe { AtomicU32::from_ptr(&raw mut (*control).abort) }
    }
}
