//! Probe of peer access between processes. As between devices of one process (see `peer`), only a
//! probe that does what the ring does shows that access works. It uses the kind of mapping that
//! mailboxes use.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::probe::{read, run, warm_up, Path, Place, SIZES};
use super::Context;
use crate::backend::{Memory, MemoryHandle, MemorySpace};

/// Contents of the first bytes of exported memory, until the first probe.
const GREETING: [u8; 16] = *b"param-averager p";

/// Paths that are probed, in this order.
const PATHS: [Path; 2] = [Path::Push, Path::Pull];

/// Device memory of this process for probes with one peer at a time.
#[derive(Debug)]
pub(crate) struct IpcProbe {
    context: Arc<Context>,
    memory: Memory,
}

/// Memory of a peer's probe.
#[derive(Debug)]
pub(crate) struct IpcPeer {
    memory: Memory,
}

/// One round of probes, which all ranks make in the same order: a path with an amount of data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Round {
    size: usize,
    path: Path,
}

impl Round {
    /// Rounds of each amount of data, in order.
    pub(crate) fn all() -> [[Round; 2]; SIZES.len()] {
        std::array::from_fn(|size| PATHS.map(|path| Round { size, path }))
    }
}

/// Result of a probe on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// True if all data arrived, in time.
    pub(crate) is_right: bool,
    /// True if more data would not take long.
    pub(crate) is_quick: bool,
}

impl IpcProbe {
    /// Exports as much memory as the largest probe needs, or as there is.
    pub(crate) fn new(context: &Arc<Context>) -> Result<IpcProbe, String> {
        let allocate = |size: &super::probe::Size| Memory::exportable(context, size.bytes());
        let mut all = SIZES.iter().rev().map(allocate);
        let mut memory = all.find(Result::is_ok).ok_or("there is no memory for the probe")??;
        memory.set(0, &GREETING)?;
        warm_up(context)?;
        Ok(IpcProbe { context: context.clone(), memory })
    }

    pub(crate) fn export(&self) -> (MemoryHandle, BorrowedFd<'_>) {
        self.memory.export().expect("exportable memory")
    }

    /// Opens a peer's memory. An error means that it can't be opened, or is not the peer's.
    pub(crate) fn open(&self, handle: &MemoryHandle, file: OwnedFd) -> Result<IpcPeer, String> {
        let memory = Memory::open(&MemorySpace::Cuda(self.context.clone()), handle, file)?;
        let mut found = [0; GREETING.len()];
        read(&self.context, memory.address(), &mut found)?;
        match found == GREETING {
            true => Ok(IpcPeer { memory }),
            false => Err("its memory holds something else".into()),
        }
    }

    /// True if this process's memory and the peer's hold the data of a round.
    pub(crate) fn has_room(&self, peer: &IpcPeer, round: Round) -> bool {
        self.memory.bytes().min(peer.memory.bytes()) >= SIZES[round.size].bytes()
    }

    /// Clears this process's memory for the next round. No probe may be running.
    pub(crate) fn clear(&mut self) -> Result<(), String> {
        self.memory.fill_from(0, 0)
    }

    /// Runs this side of a probe. The peer runs the other one at the same time; both have cleared
    /// their memory. `is_first` differs between the two.
    pub(crate) fn run(
        &self,
        peer: &IpcPeer,
        round: Round,
        is_first: bool,
    ) -> Result<Outcome, String> {
        let size = SIZES[round.size];
        let places = [&self.memory, &peer.memory].map(|memory| Place::at(memory.address(), size));
        let found = run(&self.context, round.path, size, places, is_first)?;
        Ok(Outcome { is_right: found.is_right, is_quick: found.goes_on() })
    }
}
