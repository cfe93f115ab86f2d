//! The host's hand in `PaControl`, the notice boards that all ranks of an averager share.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{PaBoard, PaControl, PA_ABORTED, PA_COMMITTED};
use crate::backend::{Memory, Site};

/// A failure that ended a world: what `PaControl.abort` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A `PaKind`.
    pub(crate) kind: u32,
    pub(crate) rank: usize,
}

/// A `PaControl`. After construction the host writes single words of it.
#[derive(Debug)]
pub(crate) struct Control {
    memory: Memory,
    /// What the host wrote to an abort word that it can't look at without asking a device.
    aborted: AtomicU32,
}

impl Control {
    /// As it is before the first average; averages are numbered from `epoch` + 1.
    pub(crate) fn new(site: &Site, epoch: u32) -> Result<Self, String> {
        let mut first: PaControl = bytemuck::Zeroable::zeroed();
        first.decision = u64::from(epoch) << 32 | u64::from(PA_COMMITTED << 8);
        for board in &mut first.board {
            board.arrived = epoch;
            board.vote = epoch.wrapping_mul(2);
            board.left = epoch.wrapping_mul(2);
        }
        let mut memory = Memory::new(site, size_of::<PaControl>())?;
        memory.set(0, bytemuck::bytes_of(&first))?;
        Ok(Control { memory, aborted: AtomicU32::new(0) })
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Poisons this control, unless it already is.
    pub(crate) fn abort(&self, rank: usize) {
        let code = PA_ABORTED << 8 | rank as u32;
        // Release: who sees the abort sees what came before it.
        let first = self.abort_word().compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire).is_ok();
        let Memory::Cuda(memory) = &self.memory else { return };
        // The kernels' word may hold a failure of theirs. If one arrives between the look and the write, ranks that have
        // written already may name one of the two and the rest the other; before that, the decision word is what counts.
        // A device that can't be written to any more has failed its kernels, too.
        let (at, mut word) = (offset_of!(PaControl, abort), [0; 4]);
        if first && memory.read(at, &mut word).is_ok() && word == [0; 4] {
            let _ = memory.say(at, code);
        }
    }

    /// Says that this rank never comes again.
    pub(crate) fn leave(&self, rank: usize) {
        let at = offset_of!(PaControl, board) + rank * size_of::<PaBoard>() + offset_of!(PaBoard, gone);
        match &self.memory {
            // SAFETY: in bounds and aligned; this word is accessed by atomics only.
            Memory::Host(region) => unsafe { AtomicU32::from_ptr(region.as_ptr::<u8>().add(at).cast()) }
                .store(1, Ordering::Release),
            Memory::Cuda(memory) => {
                let _ = memory.say(at, 1); // as in `abort`
            }
        }
    }

    /// The failure that ended this world, if the host can know of one without asking a device: one's own is told by its
    /// next average.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let code = [Some(self.abort_word()), self.failed_word()].into_iter().flatten();
        let code = code.map(|word| word.load(Ordering::Acquire)).find(|&code| code != 0)?;
        Some(Failure { kind: code >> 8, rank: (code & 0xff) as usize })
    }

    fn failed_word(&self) -> Option<&AtomicU32> {
        let Memory::Host(region) = &self.memory else { return None };
        let control = region.as_ptr::<PaControl>();
        // SAFETY: in bounds and aligned; this word is accessed by atomics only.
        Some(unsafe { AtomicU32::from_ptr(&raw mut (*control).failed) })
    }

    fn abort_word(&self) -> &AtomicU32 {
        match &self.memory {
            Memory::Host(region) => {
                let control = region.as_ptr::<PaControl>();
                // SAFETY: in bounds and aligned; this word is accessed by atomics only.
                unsafe { AtomicU32::from_ptr(&raw mut (*control).abort) }
            }
            Memory::Cuda(_) => &self.aborted,
        }
    }
}
