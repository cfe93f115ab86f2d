//! The host's hand in `PaControl`, the notice boards that all ranks of an averager share.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{PaBoard, PaControl, PA_ABORTED, PA_COMMITTED, PA_DEPARTED};
use crate::backend::Memory;

/// A failure that ended a world: what `PaControl.abort` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A `PaKind`.
    pub(crate) kind: u32,
    /// By its position in the ring, as for everything in here.
    pub(crate) position: usize,
}

/// A `PaControl`. After construction the host writes single words of it.
#[derive(Debug)]
pub(crate) struct Control {
    memory: Memory,
    /// What the host wrote to an abort word that it can't look at without asking a device.
    aborted: AtomicU32,
}

impl Control {
    /// What it takes.
    pub(crate) const BYTES: usize = size_of::<PaControl>();

    /// As it is before the first average; averages are numbered from `epoch` + 1. `memory` is
    /// zeroed, and every rank can use it.
    pub(crate) fn new(mut memory: Memory, epoch: u32) -> Result<Self, String> {
        let mut first: PaControl = bytemuck::Zeroable::zeroed();
        first.decision = u64::from(epoch) << 32 | u64::from(PA_COMMITTED << 8);
        for board in &mut first.board {
            board.arrived = epoch;
            board.vote = epoch.wrapping_mul(2);
            board.exited = epoch.wrapping_mul(2);
            board.completed = epoch;
        }
        memory.set(0, bytemuck::bytes_of(&first))?;
        Ok(Control { memory, aborted: AtomicU32::new(0) })
    }

    /// One that another process made.
    #[cfg(target_os = "linux")]
    pub(super) fn of(memory: Memory) -> Self {
        Control { memory, aborted: AtomicU32::new(0) }
    }

    #[cfg(target_os = "linux")]
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Poisons this control, unless it already is.
    pub(crate) fn abort(&self, position: usize) {
        self.poison(PA_ABORTED, position);
    }

    /// The same for an average that this rank can't bring to its end. Unlike `leave`, it ends this
    /// rank's own kernels, too, and says nothing that is not true while they run.
    pub(crate) fn give_up(&self, position: usize) {
        self.poison(PA_DEPARTED, position);
    }

    fn poison(&self, kind: u32, position: usize) {
        let code = kind << 8 | position as u32;
        let word = self.word(ABORT).unwrap_or(&self.aborted);
        // Release: a reader that sees it also sees what came before it.
        let first = word.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if let (true, Memory::Cuda(memory)) = (first, &self.memory) {
            // A device that can't be written to any more has failed its kernels, too.
            let _ = memory.say(ABORT, code);
        }
    }

    /// Whether hosts say here when a rank is through with an average: where they find the memory.
    pub(crate) fn reports_completed(&self) -> bool {
        self.memory.host_pointer().is_some()
    }

    /// Says that this rank is through with an average, so that it may go: its peers then need it no
    /// more to bring theirs to its end.
    pub(crate) fn completed(&self, position: usize, epoch: u32) {
        if let Some(completed) = self.word(of_board(position, offset_of!(PaBoard, completed))) {
            // Release: a reader that sees it, or finds this rank departed after it, sees what the
            // rank wrote in the average.
            completed.store(epoch, Ordering::Release);
        }
    }

    /// Says that this rank never comes again.
    pub(crate) fn leave(&self, position: usize) {
        let at = of_board(position, offset_of!(PaBoard, departed));
        match (self.word(at), &self.memory) {
            (Some(departed), _) => departed.store(1, Ordering::Release),
            (None, Memory::Cuda(memory)) => {
                let _ = memory.say(at, 1); // as in `abort`
            }
            (None, _) => unreachable!("the host finds all other memory"),
        }
    }

    /// The failure that ended this world, if the host can know of one without asking a device:
    /// one's own is told by its next average.
    pub(crate) fn failure(&self) -> Option<Failure> {
        // In this order: a rank that aborts because of a failure does not hide the failure.
        let words = [self.word(FAILED), Some(self.word(ABORT).unwrap_or(&self.aborted))];
        let mut codes = words.into_iter().flatten().map(|word| word.load(Ordering::Acquire));
        let code = codes.find(|&code| code != 0)?;
        Some(Failure { kind: code >> 8, position: (code & 0xff) as usize })
    }

    /// A word of it, where the host finds it.
    fn word(&self, at: usize) -> Option<&AtomicU32> {
        let start = self.memory.host_pointer()?;
        assert!(at + 4 <= Self::BYTES);
        // SAFETY: in bounds, aligned and borrowed with the memory; these words are accessed by
        // atomics only.
        Some(unsafe { AtomicU32::from_ptr(start.add(at).cast()) })
    }
}

/// Where a rank's board has a word.
fn of_board(position: usize, word: usize) -> usize {
    offset_of!(PaControl, board) + position * size_of::<PaBoard>() + word
}

const ABORT: usize = offset_of!(PaControl, abort);
const FAILED: usize = offset_of!(PaControl, failed);
