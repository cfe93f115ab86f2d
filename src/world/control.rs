//! Host-side access to the blocks that all ranks share: `PaControl`, which kernels write, and
//! `PaHost`, which hosts write.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{
    PaBoard, PaControl, PaHost, PaRecord, PA_ABORTED, PA_COMMITTED, PA_DEPARTED, PA_FLAG_DONE,
    PA_FLAG_UNNEEDED, PA_FLAG_WEIGHTED, PA_MAX_WORLD,
};
use crate::backend::{Arrivals, Failure, Memory, World};

/// Weight of the ranks that have met for an average.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MetWeight {
    /// Sum of their weights.
    pub(crate) sum: f64,
    /// True if ranks with news have passed weights, or the first rank where none has news.
    pub(crate) is_weighted: bool,
    /// True if any has something to average.
    pub(crate) is_needed: bool,
}

/// A `PaControl` and its `PaHost`. After construction the host writes single words only.
#[derive(Debug)]
pub(crate) struct Control {
    memory: Memory,
    /// The `PaHost`, in memory of the host. `None`: it follows the `PaControl` in `memory`.
    host: Option<Memory>,
}

impl Control {
    /// Size of both blocks in bytes.
    pub(crate) const BYTES: usize = size_of::<PaControl>() + size_of::<PaHost>();
    /// Size of the `PaHost` alone.
    pub(crate) const HOST_BYTES: usize = size_of::<PaHost>();

    /// Initialises the blocks; averages are numbered from `epoch` + 1. `memory` is zeroed,
    /// accessible to every rank, and has room for both blocks. Where the host can't access it,
    /// `host` is memory of the host for the `PaHost`.
    pub(crate) fn new(
        mut memory: Memory,
        mut host: Option<Memory>,
        epoch: u32,
    ) -> Result<Self, String> {
        let mut first: PaControl = bytemuck::Zeroable::zeroed();
        first.decision = u64::from(epoch) << 32 | u64::from(PA_COMMITTED << 8);
        for board in &mut first.board {
            board.arrived = epoch;
            board.vote = epoch.wrapping_mul(2);
            board.exited = epoch.wrapping_mul(2);
        }
        let words =
            PaHost { completed: [epoch; PA_MAX_WORLD as usize], ..bytemuck::Zeroable::zeroed() };
        memory.set(0, bytemuck::bytes_of(&first))?;
        let (to, at) = match &mut host {
            Some(host) => (host, 0),
            None => (&mut memory, size_of::<PaControl>()),
        };
        to.set(at, bytemuck::bytes_of(&words))?;
        Ok(Control { memory, host })
    }

    /// Blocks that another process has initialised.
    #[cfg(processes)]
    pub(super) fn of(memory: Memory) -> Self {
        Control { memory, host: None }
    }

    #[cfg(processes)]
    pub(super) fn memory(&self) -> &Memory {
        &self.memory
    }

    pub(crate) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// Address of the `PaHost`, for the kernels.
    pub(crate) fn host_address(&self) -> u64 {
        match &self.host {
            Some(host) => host.address(),
            None => self.memory.address() + size_of::<PaControl>() as u64,
        }
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

    /// Ends the world after this rank's kernels have: `position` is at fault.
    pub(crate) fn lose(&self, position: usize) {
        self.poison(PA_DEPARTED, position);
    }

    fn poison(&self, kind: u32, position: usize) {
        let code = kind << 8 | position as u32;
        // Release: a reader that sees the code also sees all writes before it.
        let word = self.host_word(offset_of!(PaHost, abort));
        let _ = word.compare_exchange(0, code, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Records that this rank has completed an average. Peers then do not need the rank to complete
    /// theirs, so it may depart.
    pub(crate) fn completed(&self, position: usize, epoch: u32) {
        // Release: a reader that sees this store, or a later departure of the rank, also sees the
        // writes of the rank in the average.
        let word = self.host_word(offset_of!(PaHost, completed) + 4 * position);
        word.store(epoch, Ordering::Release);
    }

    fn called(&self, position: usize) -> &AtomicU32 {
        self.host_word(offset_of!(PaHost, called) + 4 * position)
    }

    /// Ranks that `position` waits for in its current average, and if they have not begun it.
    /// `None` if the host does not see that, or there is none. A hint for a notice, so the words
    /// are read one by one.
    pub(crate) fn awaited(&self, position: usize, world: usize) -> Option<(Vec<usize>, bool)> {
        let read =
            |position, word| Some(self.word(of_board(position, word))?.load(Ordering::Relaxed));
        let called = |position| Some(self.called(position).load(Ordering::Relaxed));
        let arrived = |position| read(position, offset_of!(PaBoard, arrived));
        let counts: [&dyn Fn(usize) -> Option<u32>; 2] = [&called, &arrived];
        for count in counts {
            let own = count(position)?;
            let ahead = |of: usize| count(of).map_or(0, |theirs| own.wrapping_sub(theirs) as i32);
            let missing: Vec<usize> = (0..world).filter(|&other| ahead(other) > 0).collect();
            if !missing.is_empty() {
                return Some((missing, true));
            }
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

    /// Weight of all ranks in the average that they have met for, as kernels count it (`weight_of`
    /// in `kernels/barriers.h`). `None` where the host can't read it, which is never with a link to
    /// other hosts.
    pub(crate) fn weight(&self, epoch: u32, world: usize) -> Option<MetWeight> {
        let start = self.memory.host_pointer()?;
        let at = offset_of!(PaBoard, record) + (epoch & 1) as usize * size_of::<PaRecord>();
        // Flags and weight of a rank. Other fields change until the vote.
        let record = |position: usize| {
            // SAFETY: in bounds and aligned. A rank has written both before it came to the meeting,
            // and writes them again after the next one only.
            unsafe {
                let record = start.add(of_board(position, at)).cast::<PaRecord>();
                ((&raw const (*record).flags).read(), (&raw const (*record).weight).read())
            }
        };
        const WITHOUT_NEWS: u32 = PA_FLAG_DONE | PA_FLAG_UNNEEDED;
        let has_news = |(flags, _): &(u32, f64)| flags & WITHOUT_NEWS == 0;
        let news = (0..world).map(record).find(has_news).unwrap_or_else(|| record(0));
        let is_weighted = news.0 & PA_FLAG_WEIGHTED != 0;
        let needs_weight = is_weighted && has_news(&news);
        let counts = |(flags, _): &(u32, f64)| !needs_weight || flags & PA_FLAG_WEIGHTED != 0;
        let counted = (0..world).map(record).filter(counts).map(|(_, weight)| weight);
        let sum = counted.filter(|weight| *weight > 0.0).sum();
        let is_needed = (0..world).map(record).any(|(flags, _)| flags & PA_FLAG_UNNEEDED == 0);
        Some(MetWeight { sum, is_weighted, is_needed })
    }

    /// The failure that a host has found. Kernels then report the same.
    pub(crate) fn found_by_a_host(&self) -> Option<u32> {
        let code = self.host_word(offset_of!(PaHost, abort)).load(Ordering::Acquire);
        (code != 0).then_some(code >> 8)
    }

    /// Records that this rank has departed.
    pub(crate) fn leave(&self, position: usize) {
        self.host_word(offset_of!(PaHost, departed)).fetch_or(1 << position, Ordering::AcqRel);
    }

    /// True if this rank has departed.
    pub(crate) fn has_left(&self, position: usize) -> bool {
        let departed = self.host_word(offset_of!(PaHost, departed)).load(Ordering::Acquire);
        departed & 1 << position != 0
    }

    /// True if this rank has departed before it has completed an average.
    pub(crate) fn has_lost(&self, position: usize, epoch: u32) -> bool {
        // `completed` was last written before `departed`, which is acquired first.
        self.has_left(position) && {
            let completed = self.host_word(offset_of!(PaHost, completed) + 4 * position);
            (completed.load(Ordering::Relaxed).wrapping_sub(epoch) as i32) < 0
        }
    }

    /// The failure that ended this world, as far as the host can tell without asking a device. A
    /// failure in device memory is reported by the next average.
    pub(crate) fn failure(&self) -> Option<Failure> {
        // `failed` comes first: an abort that a failure caused must not hide the failure.
        let failed = self.word(offset_of!(PaControl, failed));
        let words = [failed, Some(self.host_word(offset_of!(PaHost, abort)))];
        let mut codes = words.into_iter().flatten().map(|word| word.load(Ordering::Acquire));
        let code = codes.find(|&code| code != 0)?;
        Some(Failure { kind: code >> 8, position: (code & 0xff) as usize })
    }

    /// A word of the `PaControl`, if the host can access the memory.
    fn word(&self, at: usize) -> Option<&AtomicU32> {
        let start = self.memory.host_pointer()?;
        assert!(at + 4 <= size_of::<PaControl>());
        // SAFETY: in bounds, aligned and borrowed with the memory; these words are accessed by
        // atomics only.
        Some(unsafe { AtomicU32::from_ptr(start.add(at).cast()) })
    }

    /// A word of the `PaHost`.
    fn host_word(&self, at: usize) -> &AtomicU32 {
        let (memory, before) = match &self.host {
            Some(host) => (host, 0),
            None => (&self.memory, size_of::<PaControl>()),
        };
        let start = memory.host_pointer().expect("it is in memory of the host");
        assert!(at + 4 <= size_of::<PaHost>());
        // SAFETY: as for `word`.
        unsafe { AtomicU32::from_ptr(start.add(before + at).cast()) }
    }
}

impl World for Control {
    fn count_call(&self, position: usize) {
        self.called(position).fetch_add(1, Ordering::Relaxed);
    }

    fn failure(&self) -> Option<Failure> {
        self.failure()
    }

    fn has_left(&self, position: usize) -> bool {
        self.has_left(position)
    }

    fn poison(&self, failure: Failure) {
        self.poison(failure.kind, failure.position);
    }

    fn depart(&self, position: usize) {
        self.leave(position);
    }
}

impl Arrivals for Control {
    fn arrived(&self, position: usize) -> &AtomicU32 {
        self.host_word(offset_of!(PaHost, arrived) + 4 * position)
    }

    fn arrived_address(&self, position: usize) -> u64 {
        self.host_address() + (offset_of!(PaHost, arrived) + 4 * position) as u64
    }
}

/// Offset of a word of a rank's board.
fn of_board(position: usize, word: usize) -> usize {
    offset_of!(PaControl, board) + position * size_of::<PaBoard>() + word
}
