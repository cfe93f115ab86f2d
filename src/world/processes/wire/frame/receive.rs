//! Receiving of messages, from peers and from unknown processes.

use std::io::{self, Error, ErrorKind, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

use super::{Frame, Kind, HEADER, MAGIC, MOST_FILES, OTHER_VERSION, SHORT, VERSION};
use crate::backend::limits::{why, Wanted};

/// Receives a message of one of `kinds` with at most `most_files` files, or fails at `deadline`.
pub(crate) fn receive(
    stream: &UnixStream,
    kinds: &[Kind],
    most_files: usize,
    deadline: Instant,
) -> io::Result<Frame> {
    let (mut header, mut files, mut is_short) = ([0; HEADER], vec![], false);
    let mut got = 0;
    while got < HEADER {
        let flags = wait_at_most(stream, deadline)?;
        let (bytes, short) =
            receive_some(stream, flags, &mut header[got..], &mut files, most_files)?;
        got += bytes;
        is_short |= short;
    }
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    if header[..4] != MAGIC {
        return bad("not a message of param-averager");
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    if version != VERSION {
        let what = format!(
            "a message of version {version} instead of {VERSION}: use one version of \
                param-averager on every rank"
        );
        return Err(Error::new(OTHER_VERSION, what));
    }
    let Some(kind) = Kind::of(header[6]).filter(|kind| kinds.contains(kind)) else {
        return bad("a message of an unexpected kind");
    };
    if is_short {
        files.clear(); // no order tells which are missing
                       // A peer stays connected, so that this process can still tell it the reason.
        if ![Kind::Handshake, Kind::Reach].contains(&kind) {
            return Err(Error::new(SHORT, short_of_files()));
        }
    } else if files.len() != header[7] as usize {
        return bad("a message without its announced files");
    }
    let bytes = word(16) as usize;
    if bytes > kind.most() {
        return bad("a message above the size limit");
    }
    // The body grows as bytes arrive, so a header with a large size costs nothing.
    let (mut body, mut part) = (vec![], [0; 64 << 10]);
    while body.len() < bytes {
        let flags = wait_at_most(stream, deadline)?;
        let most = part.len().min(bytes - body.len());
        match rustix::net::recv(stream, &mut part[..most], flags) {
            Ok((0, _)) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => {
                // A message that does not fit in memory is an error.
                body.try_reserve(count)
                    .map_err(|_| Error::new(SHORT, "no memory for a message: free memory"))?;
                body.extend_from_slice(&part[..count]);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Frame { kind, view: word(8), number: word(12), body, files, is_short })
}

fn bad(what: &str) -> io::Result<Frame> {
    Err(Error::new(ErrorKind::InvalidData, what.to_owned()))
}

/// Flags of the next receive call. Data that has arrived is read even after the deadline, since
/// this process may have been stopped. Data that has not arrived is not waited for then, so a
/// sender of single bytes cannot extend the deadline.
fn wait_at_most(stream: &UnixStream, deadline: Instant) -> io::Result<RecvFlags> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Ok(RecvFlags::DONTWAIT);
    }
    stream.set_read_timeout(Some(left)).map(|()| RecvFlags::empty())
}

/// Error text for files that were lost for want of file descriptors.
pub(crate) fn short_of_files() -> String {
    let what = "receiving the file descriptors of a message";
    why(what, Wanted::Descriptor, rustix::io::Errno::MFILE)
}

/// Receives bytes. Returns their number, and true if a file was lost for want of a descriptor.
/// Takes only few files above `most_files`: many unknown senders together must not use up the
/// descriptors of this process.
pub(super) fn receive_some(
    stream: &UnixStream,
    flags: RecvFlags,
    into: &mut [u8],
    files: &mut Vec<OwnedFd>,
    most_files: usize,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES + 1))];
    let space = &mut space[..rustix::cmsg_space!(ScmRights(most_files + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let message = match recvmsg(stream, &mut [IoSliceMut::new(into)], &mut ancillary, flags) {
        Err(rustix::io::Errno::INTR) => return Ok((0, false)),
        message => message?,
    };
    for ancillary in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = ancillary {
            files.extend(received);
        }
    }
    if files.len() > most_files {
        return Err(Error::new(ErrorKind::InvalidData, "a message with too many files"));
    }
    match message.bytes {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        bytes => Ok((bytes, message.flags.contains(ReturnFlags::CTRUNC))),
    }
}
