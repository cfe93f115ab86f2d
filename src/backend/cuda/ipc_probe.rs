//! Probe of peer access between processes. As between devices of one process (see `peer`), only
//! transferred bytes show that access works. The probe uses the kind of mapping that mailboxes use.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::peer::{probe, WORDS};
use super::{Context, DeviceMemory};
use crate::backend::{Memory, MemoryHandle, MemorySpace};

/// Size of one part in bytes.
const PART: usize = WORDS as usize * 4;

/// Device memory of this process for the probe: one part that all peers read, and one part per peer
/// that this peer writes.
#[derive(Debug)]
pub(crate) struct IpcProbe {
    context: Arc<Context>,
    memory: Memory,
}

impl IpcProbe {
    pub(crate) fn new(context: &Arc<Context>, peers: usize) -> Result<IpcProbe, String> {
        let memory = Memory::exportable(context, (1 + peers) * PART)?;
        probe(context, memory.address(), 0, 0)?;
        Ok(IpcProbe { context: context.clone(), memory })
    }

    pub(crate) fn export(&self) -> (MemoryHandle, BorrowedFd<'_>) {
        self.memory.export().expect("exportable memory")
    }

    /// Tests access from another process: true if the bytes it reads are right. Also writes the
    /// part that the owner then checks. An error means that the memory can't be opened.
    pub(crate) fn test(
        context: &Arc<Context>,
        handle: &MemoryHandle,
        file: OwnedFd,
        peer: usize,
    ) -> Result<bool, String> {
        let memory = Memory::open(&MemorySpace::Cuda(context.clone()), handle, file)?;
        if memory.bytes() < (peer + 2) * PART {
            return Err(format!("the memory has only {} bytes", memory.bytes()));
        }
        let is_right = is_there(context, memory.address(), 0)?;
        probe(context, part(&memory, peer), seed(peer), 0)?;
        Ok(is_right)
    }

    /// True if the bytes that a peer has written are right.
    pub(crate) fn was_written(&self, peer: usize) -> Result<bool, String> {
        is_there(&self.context, part(&self.memory, peer), seed(peer))
    }
}

fn part(memory: &Memory, peer: usize) -> u64 {
    memory.address() + ((1 + peer) * PART) as u64
}

fn seed(peer: usize) -> u32 {
    1 + peer as u32
}

fn is_there(context: &Arc<Context>, memory: u64, seed: u32) -> Result<bool, String> {
    let differs = DeviceMemory::new(context, 4)?;
    probe(context, memory, seed, differs.address())?;
    let mut word = [1; 4];
    differs.read(0, &mut word)?;
    Ok(word == [0; 4])
}
