//! Wire form of a handshake. Memory is sent as a file and a handle.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::{Memory, MemoryHandle, MemorySpace, Unopened as Fault};
use crate::schedule::Course;
use crate::world::control::Control;
use crate::world::handshake::{Admission, Handshake};
use crate::world::processes::wire::frame::{short_of_files, Frame};
use crate::{Error, Result};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WireHandshake {
    refusal: Option<String>,
    options: Vec<(String, String)>,
    tensors: Vec<String>,
    course: Course,
    admission: Admission,
    ordinal: Option<String>,
    digest: Option<u64>,
    /// Handles of inbox, credits, control block and state, as far as they exist.
    memories: [Option<MemoryHandle>; 4],
}

/// The rank that opens the memory of a handshake.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    pub(crate) rank: usize,
    pub(crate) space: &'a MemorySpace,
    /// True for inbox, credits, control block and state if the reader uses them.
    pub(crate) wanted: [bool; 4],
}

impl WireHandshake {
    pub(crate) fn of(handshake: &Handshake) -> (WireHandshake, Vec<BorrowedFd<'_>>) {
        let memories = [
            handshake.inbox.as_deref(),
            handshake.credits.as_deref(),
            handshake.control.as_ref().map(|c| c.memory()),
            handshake.state.as_deref(),
        ];
        let mut files = vec![];
        let memories = memories.map(|memory| {
            let (handle, file) = memory.and_then(Memory::export)?;
            files.push(file);
            Some(handle)
        });
        let wire = WireHandshake {
            refusal: handshake.refusal.as_ref().map(Error::to_string),
            options: handshake.options.clone(),
            tensors: handshake.tensors.clone(),
            course: handshake.course,
            admission: handshake.admission,
            ordinal: handshake.ordinal.clone(),
            digest: handshake.digest,
            memories,
        };
        (wire, files)
    }

    /// Parses the handshake of rank `rank`. Its memory is still to be opened.
    pub(crate) fn read(frame: Frame, rank: usize) -> Result<Unopened> {
        let refuse = |reason: String| Error::PeerBuildFailed { rank, reason };
        let wire: WireHandshake = frame
            .parse()
            .map_err(|error| refuse(format!("its handshake can't be parsed: {error}")))?;
        let handshake = Handshake {
            refusal: wire.refusal.map(|reason| refuse(of_itself(reason, rank))),
            options: wire.options,
            tensors: wire.tensors,
            course: wire.course,
            admission: wire.admission,
            ordinal: wire.ordinal,
            digest: wire.digest,
            is_unreached: false, // processes build for the ring
            neighbours: [0; 2],
            inbox: None,
            credits: None,
            control: None,
            state: None,
        };
        Ok(Unopened {
            rank,
            handshake,
            memories: wire.memories,
            files: frame.files,
            is_short: frame.is_short,
        })
    }
}

/// A handshake whose memory has not been opened.
#[derive(Debug)]
pub(crate) struct Unopened {
    pub(crate) rank: usize,
    pub(crate) handshake: Handshake,
    memories: [Option<MemoryHandle>; 4],
    files: Vec<OwnedFd>,
    is_short: bool,
}

impl Unopened {
    /// Opens the memory that the reader wants. An error names the rank at fault: the owner, if the
    /// memory is invalid, or the reader, if it lacks a resource.
    pub(crate) fn open(self, reader: Reader<'_>) -> Result<Handshake> {
        let Unopened { rank, mut handshake, memories, files, is_short } = self;
        let refuse = |reason: String| Error::PeerBuildFailed { rank, reason };
        let mut files = files.into_iter();
        let mut open = |index: usize, space: &MemorySpace| -> Result<Option<Memory>> {
            let Some(handle) = &memories[index] else { return Ok(None) };
            if is_short {
                return Err(Error::SharedMemory { rank: reader.rank, reason: short_of_files() });
            }
            let file =
                files.next().ok_or_else(|| refuse("a file of its memory is missing".into()))?;
            if !reader.wanted[index] {
                return Ok(None);
            }
            let opened = Memory::open(space, handle, file).map(Some);
            opened.map_err(|unopened| match unopened {
                Fault::Wrong(reason) => refuse(reason),
                Fault::Short(reason) => {
                    let reason = format!("opening memory of rank {rank}: {reason}");
                    Error::SharedMemory { rank: reader.rank, reason }
                }
            })
        };
        handshake.inbox = open(0, reader.space)?.map(Arc::new);
        handshake.credits = open(1, reader.space)?.map(Arc::new);
        handshake.control = open(2, reader.space)?.map(|memory| Arc::new(Control::of(memory)));
        // No kernel of this rank reads it.
        handshake.state = open(3, &MemorySpace::Host)?.map(Arc::new);
        Ok(handshake)
    }
}

/// An error text of a rank without the rank's name, for use inside of an error that names the rank.
pub(crate) fn of_itself(reason: String, rank: usize) -> String {
    match reason.strip_prefix(&format!("rank {rank}")) {
        Some(rest) if rest.starts_with(": ") => rest[2..].into(),
        Some(rest) if rest.starts_with(' ') => format!("it{rest}"),
        _ => reason,
    }
}
