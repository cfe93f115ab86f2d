//! Host-side access to `PaControl`, the shared control block.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{PaBoard, PaControl, PA_ABORTED, PA_COMMITTED, PA_DEPARTED};
use crate::backend::Memory;

/// A failure that ended a world: the contents of `PaControl.abort` or `PaControl.failed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A `PaKind`.
    pub(crate) kind: u32,
    /// Ring position of the rank at fault. All positions in this file are ring positions.
    pub(crate) position: usize,
}

/// A `PaControl`. After construction the host writes single words only.
#[derive(Debug)]
pub(crate) struct Control {
    memory: Memory,
    /// Abort code that this host has written to a control block in device memory, which it can't
    /// read without waiting for the device.
    aborted: AtomicU32,
    /// Bits of the ranks that this host has recorded as departed.
    departed: AtomicU32,
}

impl Control {
    /// Size in bytes.
    pub(crate) const BYTES: usize = size_of::<PaControl>();

    /// Initialises the control block; averages are numbered from `epoch` + 1. `memory` is zeroed
    /// and accessible to every rank.
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
        Ok(Control { memory, aborted: AtomicU32::new(0), departed: AtomicU32::new(0) })
    }

    /// Control block that another process has initialised.
    #[cfg(processes)]
    pub(super) fn of(memory: Memory) -> Self {
        Control { memory, aborted: AtomicU32::new(0), departed: AtomicU32::new(0) }
    }

    #[cfg(processes)]
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Sets the abort word, unless it is set.
    pub(crate) fn abort(&self, position: usize) {
        self.poison(PA_ABORTED, position);
    }

    /// Aborts an average that this rank cannot complete. Unlike `leave`, this also ends the rank's
    /// own kernels, and states no more than is true while those run.
    pub(crate) fn give_up(&self, position: usize) {
        self.poison(PA_DEPARTED, position);
    }

    fn poison(&self, kind: u32, position: usize) {
        let code = kind << 8 | position as u32;
        let word = self.word(ABORT).unwrap_or(&self.aborted);
        // Release: a reader that sees the code also sees all writes before it.
        let first = word.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if let (true, Memory::Cuda(memory)) = (first, &self.memory) {
            // A device that can no longer be written to has failed its kernels, too.
            let _ = memory.write_word(ABORT, code);
        }
    }

    /// True if hosts record here which rank has completed an average: the memory must be accessible
    /// to the host.
    pub(crate) fn reports_completed(&self) -> bool {
        self.memory.host_pointer().is_some()
    }

    /// Records that this rank has completed an average. Peers then do not need the rank to complete
    /// theirs, so it may depart.
    pub(crate) fn completed(&self, position: usize, epoch: u32) {
        if let Some(completed) = self.word(of_board(position, offset_of!(PaBoard, completed))) {
            // Release: a reader that sees this store, or a later departure of the rank, also sees
            // the writes of the rank in the average.
            completed.store(epoch, Ordering::Release);
        }
    }

    /// Ranks that `position` waits for in its current average, and if they have not begun it.
    /// `None` if the host does not see that, or there is none. A hint for a notice, so the words
    /// are read one by one.
    pub(crate) fn awaited(&self, position: usize, world: usize) -> Option<(Vec<usize>, bool)> {
        let read =
            |position, word| Some(self.word(of_board(position, word))?.load(Ordering::Relaxed));
        let arrived = |position| read(position, offset_of!(PaBoard, arrived));
        let own = arrived(position)?;
        let ahead = |of: usize| arrived(of).map_or(0, |theirs| own.wrapping_sub(theirs) as i32);
        let is_behind = |&other: &usize| ahead(other) > 0;
        let missing: Vec<usize> = (0..world).filter(is_behind).collect();
        if !missing.is_empty() {
            return Some((missing, true));
        }
        // All are in it: the last in the chain of waits that begins here.
        let mut last = position;
        for _ in 0..world {
            let next = read(last, offset_of!(PaBoard, waiting_on))? & 0xff;
            match (next as usize).checked_sub(1) {
                Some(next) if next != position && next < world => last = next,
                _ => break,
            }
        }
        (last != position).then(|| (vec![last], false))
    }

    /// Records that this rank has departed.
    pub(crate) fn leave(&self, position: usize) {
        self.departed.fetch_or(1 << position, Ordering::AcqRel);
        let at = of_board(position, offset_of!(PaBoard, departed));
        match (self.word(at), &self.memory) {
            (Some(departed), _) => departed.store(1, Ordering::Release),
            (None, Memory::Cuda(memory)) => {
                let _ = memory.write_word(at, 1); // an error is ignored as in `poison`
            }
            (None, _) => unreachable!("the host has an address for all other memory"),
        }
    }

    /// True if this rank has departed, as far as the host can tell without asking a device.
    pub(crate) fn has_left(&self, position: usize) -> bool {
        let word = self.word(of_board(position, offset_of!(PaBoard, departed)));
        word.is_some_and(|departed| departed.load(Ordering::Acquire) != 0)
            || self.departed.load(Ordering::Acquire) & 1 << position != 0
    }

    /// The failure that ended this world, as far as the host can tell without asking a device. A
    /// failure in device memory is reported by the next average.
    pub(crate) fn failure(&self) -> Option<Failure> {
        // `failed` comes first: an abort that a failure caused must not hide the failure.
        let words = [self.word(FAILED), Some(self.word(ABORT).unwrap_or(&self.aborted))];
        let mut codes = words.into_iter().flatten().map(|word| word.load(Ordering::Acquire));
        let code = codes.find(|&code| code != 0)?;
        Some(Failure { kind: code >> 8, position: (code & 0xff) as usize })
    }

    /// A word of the block, if the host can access the memory.
    fn word(&self, at: usize) -> Option<&AtomicU32> {
        let start = self.memory.host_pointer()?;
        assert!(at + 4 <= Self::BYTES);
        // SAFETY: in bounds, aligned and borrowed with the memory; these words are accessed by
        // atomics only.
        Some(unsafe { AtomicU32::from_ptr(start.add(at).cast()) })
    }
}

/// Offset of a word of a rank's board.
fn of_board(position: usize, word: usize) -> usize {
    offset_of!(PaControl, board) + position * size_of::<PaBoard>() + word
}

const ABORT: usize = offset_of!(PaControl, abort);
const FAILED: usize = offset_of!(PaControl, failed);
