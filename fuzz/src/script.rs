//! Acts of unknown processes, decoded from bytes.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use param_averager::__testing::rendezvous::Rank;

/// An act of an unknown process, or of a rank.
#[derive(Clone, Debug)]
pub enum Act {
    /// Opens a connection, which the following acts use.
    Connect,
    /// Opens this many connections that send nothing.
    Flood(u8),
    /// Returns to an earlier connection, by its number modulo their count.
    Turn(u8),
    /// Sends bytes, with the files that `files` encodes.
    Write {
        files: u8,
        bytes: Vec<u8>,
    },
    /// Sends a valid message of a kind, or its first bytes.
    Send {
        kind: u8,
        files: u8,
        keep: u8,
    },
    /// Sleeps for this many tenths of a millisecond.
    Pause(u8),
    Close,
    /// Starts the next rank of the world.
    Join,
}

/// Decodes bytes to acts. Every byte string is a valid script.
pub(super) fn script(mut data: &[u8]) -> Vec<Act> {
    let mut acts = vec![];
    let byte = |data: &mut &[u8]| {
        let (&first, rest) = data.split_first()?;
        *data = rest;
        Some(first)
    };
    while let Some(act) = byte(&mut data) {
        let mut next = || byte(&mut data).unwrap_or(0);
        acts.push(match act % 8 {
            0 => Act::Connect,
            1 => {
                let (files, most) = (if act & 8 != 0 { next() } else { 0 }, next() as usize);
                let (bytes, rest) = data.split_at(most.min(data.len()));
                data = rest;
                Act::Write { files, bytes: bytes.into() }
            }
            2 => Act::Send { kind: next(), files: next(), keep: next() },
            3 => Act::Close,
            4 => Act::Turn(next()),
            5 => Act::Pause(next() % 32),
            6 => Act::Flood(next() % 80),
            _ => Act::Join,
        });
    }
    acts
}

/// Numbers of files in a message: none, few, the limit of this crate and one more, the kernel's
/// limit.
pub(super) const COUNTS: [usize; 8] = [0, 1, 2, 3, 31, 64, 65, 253];

/// Makes the files that `files` encodes by number and type.
fn files(files: u8, own: BorrowedFd<'_>) -> Vec<OwnedFd> {
    let count = COUNTS[files as usize & 7];
    let file = || match files >> 3 & 3 {
        0 => std::fs::File::open("/dev/null").ok().map(OwnedFd::from),
        1 => own.try_clone_to_owned().ok(),
        2 => memory(4096).ok(),
        _ => std::io::pipe().ok().map(|(read, _)| read.into()),
    };
    let Some(file) = (count > 0).then(file).flatten() else { return vec![] };
    (0..count).filter_map(|_| file.try_clone().ok()).collect()
}

/// Memory that can't shrink or grow, as ranks share it.
fn memory(bytes: u64) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{fcntl_add_seals, ftruncate, memfd_create, MemfdFlags, SealFlags};
    let file = memfd_create("fuzz", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Sends as much as there is room for without blocking. Returns the number of bytes.
fn write(stream: &UnixStream, bytes: &[u8], files: &[OwnedFd]) -> usize {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    assert!(files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut ancillary, flags).unwrap_or(0)
}

/// The message of `Act::Send`.
pub(super) fn message(rank: &Rank, kind: u8, files: usize, keep: u8) -> Vec<u8> {
    let mut message = rank.message(kind, files);
    message.truncate(if keep == 0 { usize::MAX } else { keep.into() });
    message
}

/// Header of a message, by the format that `frame` documents: kind, files and bytes of the body.
pub(super) fn read_header(bytes: &[u8]) -> Option<(u8, usize, usize)> {
    let header = bytes.get(..20)?;
    let right = header.starts_with(b"PAVG\x07\x00");
    right.then(|| {
        (
            header[6],
            header[7].into(),
            u32::from_le_bytes([16, 17, 18, 19].map(|at| header[at])) as usize,
        )
    })
}

/// Bytes that were sent on a connection.
#[derive(Default)]
pub(super) struct Sent {
    pub(super) bytes: Vec<u8>,
    pub(super) with_files: bool,
}

impl Sent {
    /// Performs an act that sends something.
    pub(super) fn send(&mut self, act: &Act, me: &Rank, stream: &UnixStream) {
        let (bytes, files) = match act {
            Act::Write { files: which, bytes } => (bytes.clone(), files(*which, stream.as_fd())),
            Act::Send { kind, files: which, keep } => {
                let files = files(*which, stream.as_fd());
                (message(me, *kind, files.len(), *keep), files)
            }
            _ => return,
        };
        self.with_files |= !files.is_empty();
        self.bytes.extend_from_slice(&bytes[..write(stream, &bytes, &files)]);
    }
}
