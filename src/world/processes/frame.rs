//! Messages between processes: a header with version and view, a bounded JSON body, and file
//! descriptors.

use std::io::{self, Error, ErrorKind, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{de::DeserializeOwned, Serialize};

use crate::backend::limits::{why, Wanted};

/// Version of all messages. A message of another version is refused.
const VERSION: u16 = 3;
const MAGIC: [u8; 4] = *b"PAVG";
const HEADER: usize = 20;
/// Error kind: this process lacks file descriptors or memory for a message.
pub(super) const SHORT: ErrorKind = ErrorKind::QuotaExceeded;
/// Timeout of a wait without a deadline.
const LONG: Timespec = Timespec { tv_sec: 1 << 30, tv_nsec: 0 };
/// Error kind: the message has another version.
pub(super) const OTHER_VERSION: ErrorKind = ErrorKind::Unsupported;
/// Pause after `TOOMANYREFS`. The kernel limits the descriptors in flight of one user, except root,
/// to the number of files that a process may open; another process of this user must receive some
/// first.
const AT_LIMIT_PAUSE: Duration = Duration::from_millis(1);
/// Limit on files of one message. The kernel's own limit is 253.
pub(super) const MOST_FILES: usize = 64;

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Kind {
    /// Rank to rank 0: request to take part in the world.
    Hello = 1,
    /// Rank 0 to rank: descriptions of all ranks, with sockets to them.
    Welcome = 2,
    /// Rank 0 or member to any process: refusal, with the reason.
    Refuse = 3,
    /// The handshake of a rank that builds an averager.
    Handshake = 4,
    /// The sender has aborted its world.
    Abort = 5,
    /// The sender is ready for the next view of its world.
    Ready = 6,
    /// Joiner to join listener: request for a description of the world.
    JoinRequest = 7,
    /// Join listener to joiner: description of the world.
    JoinOffer = 8,
    /// Joiner to join listener: request to become a peer. The number is the joiner's id.
    Connect = 9,
    /// Member to joiner: the joiner is connected as a peer, or the reason why not.
    Connected = 10,
    /// Joiner to all members: request for admission after this view.
    JoinPending = 11,
    /// Result of the sender's test transfer to memory of the receiver's device.
    Reach = 12,
    /// The sender has all that it needs, or lacks something. Used at the end of a rendezvous and of
    /// a build.
    Verdict = 13,
    /// The averagers of the sender, before they are built again.
    Averagers = 14,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        use Kind::*;
        let met = [Handshake, Abort, Ready, JoinPending, Reach, Verdict, Averagers];
        let strangers = [Hello, Welcome, Refuse, JoinRequest, JoinOffer, Connect, Connected];
        met.into_iter().chain(strangers).find(|&kind| kind as u8 == byte)
    }

    /// Largest body in bytes. Small for messages of unknown senders.
    fn most(self) -> usize {
        match self {
            Kind::Hello | Kind::JoinRequest => 48 << 10,
            Kind::Connect => 4 << 10,
            Kind::Handshake => 64 << 20,
            _ => 64 << 10,
        }
    }
}

/// One message.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// The sender's view. Messages of earlier views are ignored.
    pub(super) view: u32,
    /// Tells messages of one kind and view apart.
    pub(super) number: u32,
    pub(super) body: Vec<u8>,
    pub(super) files: Vec<OwnedFd>,
    /// True if the files were lost because this process had no file descriptors.
    pub(super) is_short: bool,
}

pub(super) fn header(
    (kind, view, number): (Kind, u32, u32),
    bytes: usize,
    files: usize,
) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6] = kind as u8;
    header[7] = files as u8;
    header[8..12].copy_from_slice(&view.to_le_bytes());
    header[12..16].copy_from_slice(&number.to_le_bytes());
    header[16..20].copy_from_slice(&(bytes as u32).to_le_bytes());
    header
}

/// Sends a message, or fails at `deadline`. At most one thread at a time may send on a stream. On
/// `InvalidInput` nothing was sent.
pub(super) fn send(
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
pub(super) fn send_to_all(
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

/// Receives a message of one of `kinds` with at most `most_files` files, or fails at `deadline`.
pub(super) fn receive(
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
pub(super) fn short_of_files() -> String {
    let what = "receiving the file descriptors of a message";
    why(what, Wanted::Descriptor, rustix::io::Errno::MFILE)
}

/// Receives bytes. Returns their number, and true if a file was lost for want of a descriptor.
/// Takes only few files above `most_files`: many unknown senders together must not use up the
/// descriptors of this process.
fn receive_some(
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

impl Frame {
    pub(super) fn parse<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    const ALL: [Kind; 3] = [Kind::Hello, Kind::Handshake, Kind::Ready];

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_message_arrives_with_its_files_and_in_order() {
        let (one, other) = UnixStream::pair().unwrap();
        let body: Vec<u32> = (0..200_000).collect();
        let sender = std::thread::spawn(move || {
            send(&one, (Kind::Handshake, 3, 7), &body, &[one.as_fd(), one.as_fd()], soon())
                .unwrap();
            send(&one, (Kind::Ready, 4, 0), &"", &[], soon()).unwrap();
        });
        let frame = receive(&other, &ALL, 2, soon()).unwrap();
        assert_eq!(
            (frame.kind, frame.view, frame.number, frame.files.len()),
            (Kind::Handshake, 3, 7, 2)
        );
        assert_eq!(frame.parse::<Vec<u32>>().unwrap()[199_999], 199_999);
        assert_eq!(receive(&other, &ALL, 2, soon()).unwrap().kind, Kind::Ready);
        sender.join().unwrap();
        drop(frame);
        assert_eq!(receive(&other, &ALL, 2, soon()).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    /// A message reaches the peers that read. A peer that does not read is late, and delays no
    /// other.
    #[test]
    fn a_message_to_all_is_not_delayed_by_a_peer_that_does_not_read() {
        let pairs: Vec<_> = (0..3).map(|_| UnixStream::pair().unwrap()).collect();
        let body: Vec<u32> = (0..300_000).collect();
        let readers: Vec<_> = pairs[1..]
            .iter()
            .map(|(_, other)| {
                let other = other.try_clone().unwrap();
                std::thread::spawn(move || receive(&other, &ALL, 2, soon()).unwrap())
            })
            .collect();
        let streams: Vec<&UnixStream> = pairs.iter().map(|(one, _)| one).collect();
        let (mut ended, start) = (vec![], Instant::now());
        let deadline = start + Duration::from_millis(500);
        let files = [pairs[0].0.as_fd()];
        send_to_all(&streams, (Kind::Handshake, 1, 2), &body, &files, deadline, |index, result| {
            ended.push((index, result.is_ok(), start.elapsed()))
        })
        .unwrap();
        ended.sort();
        assert_eq!(
            ended.iter().map(|&(index, good, _)| (index, good)).collect::<Vec<_>>(),
            [(0, false), (1, true), (2, true)]
        );
        assert!(ended[0].2 >= Duration::from_millis(500) && ended[1].2 < ended[0].2, "{ended:?}");
        for reader in readers {
            let frame = reader.join().unwrap();
            assert_eq!((frame.number, frame.files.len()), (2, 1));
            assert_eq!(frame.parse::<Vec<u32>>().unwrap(), body);
        }
        let too_large = vec![0u8; 1 << 20];
        let nothing = |_, _| panic!("nothing is sent");
        let error = send_to_all(&streams, (Kind::Ready, 0, 0), &too_large, &[], deadline, nothing);
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_missing_or_incomplete_message_ends_at_the_deadline() {
        let (one, other) = UnixStream::pair().unwrap();
        (&one).write_all(&MAGIC).unwrap();
        let start = Instant::now();
        let error = receive(&other, &ALL, 2, start + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
        assert!(start.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_deadline_concerns_data_that_has_not_arrived() {
        let (one, other) = UnixStream::pair().unwrap();
        send(&one, (Kind::Ready, 0, 0), &vec![7; 1000], &[], soon()).unwrap();
        let past = Instant::now();
        assert_eq!(receive(&other, &ALL, 2, past).unwrap().parse::<Vec<u8>>().unwrap(), [7; 1000]);
        // A sender that is never silent is not received from for longer, either.
        (&one).write_all(&header((Kind::Hello, 0, 0), 4000, 0)).unwrap();
        let write = move || {
            while (&one).write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_micros(500));
            }
        };
        let writer = std::thread::spawn(write);
        let start = Instant::now();
        let error = receive(&other, &ALL, 2, start + Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        drop(other);
        writer.join().unwrap();
    }

    #[test]
    fn an_invalid_first_message_is_refused_unread() {
        let refused = |kind: Kind, bytes: u32, files: usize| {
            let (one, other) = UnixStream::pair().unwrap();
            let mut header = [0; HEADER];
            header[..4].copy_from_slice(&MAGIC);
            header[4] = VERSION as u8;
            header[6] = kind as u8;
            header[7] = files as u8;
            header[16..20].copy_from_slice(&bytes.to_le_bytes());
            let fds = vec![other.as_fd(); files];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(files == 0 || ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            for _ in 0..2 {
                sendmsg(&one, &[IoSlice::new(&header)], &mut ancillary, SendFlags::empty())
                    .unwrap();
            }
            let error = receive(&other, &[Kind::Hello], 1, soon()).unwrap_err().to_string();
            let mut taken = vec![];
            let _ = receive_some(&other, RecvFlags::empty(), &mut header, &mut taken, 1);
            assert!(taken.len() <= 4, "{}", taken.len()); // alignment leaves space for a few more
            error
        };
        assert!(refused(Kind::Hello, 1 << 20, 0).contains("above the size limit"));
        assert!(refused(Kind::Handshake, 1 << 20, 0).contains("of an unexpected kind"));
        assert!(refused(Kind::Hello, 2, 4).contains("too many files"));
        assert!(refused(Kind::Hello, 2, 253).contains("too many files"));
    }

    proptest! {
        #[test]
        fn garbage_is_an_error(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), valid in 0usize..8
        ) {
            // The first `valid` bytes of the header are valid.
            let right = [b'P', b'A', b'V', b'G', VERSION as u8, 0, Kind::Hello as u8, 0];
            for (byte, right) in bytes.iter_mut().zip(&right[..valid]) {
                *byte = *right;
            }
            let (one, other) = UnixStream::pair().unwrap();
            (&one).write_all(&bytes).unwrap();
            drop(one);
            if let Ok(frame) = receive(&other, &ALL, 2, soon()) {
                prop_assert!(bytes.starts_with(&MAGIC));
                let length = u32::from_le_bytes(bytes[16..20].try_into().unwrap());
                prop_assert_eq!(frame.body.len(), length as usize);
            }
        }
    }
}
