//! Sending of messages, to one peer or to several at once.

use std::io::{self, Error, ErrorKind, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Serialize;

use super::{header, Kind, HEADER, MOST_FILES};

/// Timeout of a wait without a deadline.
const LONG: Timespec = Timespec { tv_sec: 1 << 30, tv_nsec: 0 };
/// Pause after `TOOMANYREFS`. The kernel limits the descriptors in flight of one user, except root,
/// to the number of files that a process may open; another process of this user must receive some
/// first.
const AT_LIMIT_PAUSE: Duration = Duration::from_millis(1);

/// Sends a message, or fails at `deadline`. At most one thread at a time may send on a stream. On
/// `InvalidInput` nothing was sent.
pub(crate) fn send(
    stream: &UnixStream,
    key: (Kind, u32, u32),
    body: &impl Serialize,
    files: &[BorrowedFd<'_>],
    deadline: Instant,
) -> io::Result<()> {
    let (header, body) = encode(key, body, files)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() {
        assert!(
            ancillary.push(SendAncillaryMessage::ScmRights(files)),
            "there is space for so many"
        );
    }
    let patience =
        || deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_write_timeout(Some(patience()))?;
    let sent = loop {
        match sendmsg(stream, &[IoSlice::new(&header)], &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::TOOMANYREFS) if Instant::now() < deadline => {
                std::thread::sleep(AT_LIMIT_PAUSE)
            }
            sent => break sent?,
        }
    };
    let mut stream = stream;
    stream.write_all(&header[sent..])?;
    for part in body.chunks(64 << 10) {
        stream.set_write_timeout(Some(patience()))?;
        stream.write_all(part)?;
    }
    Ok(())
}

fn encode(
    key: (Kind, u32, u32),
    body: &impl Serialize,
    files: &[BorrowedFd<'_>],
) -> io::Result<([u8; HEADER], Vec<u8>)> {
    let body = serde_json::to_vec(body)?;
    if body.len() > key.0.most() || files.len() > MOST_FILES {
        let what =
            format!("a message of {} bytes and {} files is too large", body.len(), files.len());
        return Err(Error::new(ErrorKind::InvalidInput, what));
    }
    Ok((header(key, body.len(), files.len()), body))
}

/// Sends a message on several streams at once, on this thread, so that a peer that does not read
/// delays no other. Calls `ended` with the index and the result of each stream, by `deadline` at
/// the latest. On an error nothing was sent.
pub(crate) fn send_to_all(
    streams: &[&UnixStream],
    key: (Kind, u32, u32),
    body: &impl Serialize,
    files: &[BorrowedFd<'_>],
    deadline: Instant,
    mut ended: impl FnMut(usize, io::Result<()>),
) -> io::Result<()> {
    let (header, body) = encode(key, body, files)?;
    let all = HEADER + body.len();
    // Index of the stream, and bytes sent.
    let mut left: Vec<(usize, usize)> = (0..streams.len()).map(|index| (index, 0)).collect();
    loop {
        let mut is_at_limit = false;
        left.retain_mut(|(index, sent)| loop {
            match send_some(streams[*index], [&header, &body], *sent, files) {
                Ok(bytes) => *sent += bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(rustix::io::Errno::TOOMANYREFS) => {
                    is_at_limit = true;
                    return true;
                }
                Err(error) => {
                    ended(*index, Err(error.into()));
                    return false;
                }
            }
            if *sent == all {
                ended(*index, Ok(()));
                return false;
            }
        });
        let patience = deadline.saturating_duration_since(Instant::now());
        if left.is_empty() || patience.is_zero() {
            left.iter().for_each(|&(index, _)| ended(index, Err(ErrorKind::TimedOut.into())));
            return Ok(());
        }
        if is_at_limit {
            std::thread::sleep(AT_LIMIT_PAUSE.min(patience)); // `poll` would return at once
            continue;
        }
        let mut watched: Vec<PollFd<'_>> =
            left.iter().map(|&(index, _)| PollFd::new(streams[index], PollFlags::OUT)).collect();
        // A wait that fails or is interrupted only repeats the loop.
        let _ = poll(&mut watched, Some(&patience.try_into().unwrap_or(LONG)));
    }
}

/// Sends as much of a message as a stream takes without blocking, from byte `sent` on. The files go
/// with the first byte.
fn send_some(
    stream: &UnixStream,
    [header, body]: [&[u8]; 2],
    sent: usize,
    files: &[BorrowedFd<'_>],
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if sent == 0 && !files.is_empty() {
        assert!(
            ancillary.push(SendAncillaryMessage::ScmRights(files)),
            "there is space for so many"
        );
    }
    let rest = [&header[sent.min(HEADER)..], &body[sent.saturating_sub(HEADER)..]];
    sendmsg(
        stream,
        &rest.map(IoSlice::new),
        &mut ancillary,
        SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    )
}
