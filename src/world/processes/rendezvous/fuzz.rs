//! What a stranger can do, as bytes that a fuzzer makes up (`fuzz/` in the repository) or acts that a property test does, and
//! what must come of it all the same.

use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{address, connect, meet, welcomed, Crew, Hello, Me, Welcome};
use crate::backend::{Offer, Shared, Site};
use crate::world::processes::door::{Inside, Knock};
use crate::world::processes::frame::{self, Frame, Kind};
use crate::world::processes::home::Home;
use crate::world::processes::shown::{Reader, Shown};
use crate::world::Device;

/// An act of a stranger, or of a rank.
#[derive(Clone, Debug)]
pub(super) enum Act {
    /// One more connection, the one of the acts that follow.
    Connect,
    /// So many more that say nothing.
    Flood(u8),
    /// Back to this one, of those that there are.
    Turn(u8),
    /// Bytes, with the files that `files` makes.
    Write {
        files: u8,
        bytes: Vec<u8>,
    },
    /// A message of a kind, as it should be, or its first bytes.
    Say {
        kind: u8,
        files: u8,
        keep: u8,
    },
    /// In tenths of a millisecond.
    Pause(u8),
    Close,
    /// The next rank of the world comes.
    Join,
}

/// What bytes stand for. All do for something.
fn script(mut data: &[u8]) -> Vec<Act> {
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
            2 => Act::Say { kind: next(), files: next(), keep: next() },
            3 => Act::Close,
            4 => Act::Turn(next()),
            5 => Act::Pause(next() % 32),
            6 => Act::Flood(next() % 80),
            _ => Act::Join,
        });
    }
    acts
}

fn me(name: &str, rank: usize, world_size: usize) -> Me {
    Me { name: name.into(), rank, world_size, home: Home::unknown(Device::cpu()), refusal: None }
}

/// Files that a message has: none, few, the most that there may be, the most that the kernel passes on.
const COUNTS: [usize; 8] = [0, 1, 2, 3, 31, 64, 65, 253];

/// So many of them, and what they are.
fn files(files: u8, own: BorrowedFd<'_>) -> Vec<OwnedFd> {
    let count = COUNTS[files as usize & 7];
    let file = || match files >> 3 & 3 {
        0 => std::fs::File::open("/dev/null").ok().map(OwnedFd::from),
        1 => own.try_clone_to_owned().ok(),
        2 => Shared::new(4096).ok()?.file().try_clone_to_owned().ok(),
        _ => std::io::pipe().ok().map(|(read, _)| read.into()),
    };
    let Some(file) = (count > 0).then(file).flatten() else { return vec![] };
    (0..count).filter_map(|_| file.try_clone().ok()).collect()
}

/// As much of it as there is room for; who is not there any more hears nothing. Returns how much that was.
fn write(stream: &UnixStream, bytes: &[u8], files: &[OwnedFd]) -> usize {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    assert!(files.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(stream, &[std::io::IoSlice::new(bytes)], &mut ancillary, flags).unwrap_or(0)
}

/// What `Act::Say` says.
fn message(me: &Me, kind: u8, files: usize, keep: u8) -> Vec<u8> {
    let json = |body: serde_json::Result<Vec<u8>>| body.expect("plain data");
    let (kind, body) = match kind % 6 {
        0 => (Kind::Hello, json(serde_json::to_vec(&me.hello()))),
        1 => (Kind::Welcome, json(serde_json::to_vec(&Welcome { homes: vec![me.home.clone(); 2] }))),
        2 => (Kind::Refuse, json(serde_json::to_vec("no"))),
        3 => {
            let memory = |bytes: usize| serde_json::json!({ "bytes": bytes, "handle": null });
            let shown = serde_json::json!({
                "refusal": null, "options": [["slots", "4"]], "tensors": ["tensor"], "schedule_position": 0,
                "admits": false, "ordinal": null, "memories": [memory(1), memory(4096), memory(4097)],
            });
            (Kind::Card, json(serde_json::to_vec(&shown)))
        }
        4 => (Kind::Abort, b"null".to_vec()),
        _ => (Kind::Ready, b"null".to_vec()),
    };
    let mut message = frame::header((kind, 0, 0), body.len(), files).to_vec();
    message.extend(body);
    message.truncate(if keep == 0 { usize::MAX } else { keep.into() });
    message
}

/// The header of a message that begins so, as it is written down in `frame`: its kind, files and bytes of body.
fn read_header(bytes: &[u8]) -> Option<(u8, usize, usize)> {
    let header = bytes.get(..20)?;
    let right = header.starts_with(b"PAVG\x01\x00");
    right.then(|| {
        (header[6], header[7].into(), u32::from_le_bytes([16, 17, 18, 19].map(|at| header[at])) as usize)
    })
}

/// What was said on a connection, as far as there was room.
#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    with_files: bool,
}

impl Said {
    /// Does what an act says, if it is one that says something.
    fn say(&mut self, act: &Act, me: &Me, stream: &UnixStream) {
        let (bytes, files) = match act {
            Act::Write { files: which, bytes } => (bytes.clone(), files(*which, stream.as_fd())),
            Act::Say { kind, files: which, keep } => {
                let files = files(*which, stream.as_fd());
                (message(me, *kind, files.len(), *keep), files)
            }
            _ => return,
        };
        self.with_files |= !files.is_empty();
        self.bytes.extend_from_slice(&bytes[..write(stream, &bytes, &files)]);
    }
}

/// Arbitrary bytes and files, to the very functions that read them: of a stranger, of a rank 0, or of a peer.
pub fn frames(data: &[u8]) {
    const DOOR: (&[Kind], usize) = (&[Kind::Hello], 1);
    const VISITOR: (&[Kind], usize) = (&[Kind::Welcome, Kind::Refuse], frame::MOST_FILES);
    const PEER: (&[Kind], usize) = (&[Kind::Card, Kind::Abort, Kind::Ready], 3);
    let Some((&how, data)) = data.split_first() else { return };
    let (kinds, most) = [DOOR, VISITOR, PEER][how as usize % 3];
    let (at_once, stays) = (how & 8 == 0, how & 16 != 0);
    let before = left();
    let me = me("a name", 1, 3);
    let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
    let write = || {
        let mut said = Said::default();
        for act in script(data) {
            said.say(&act, &me, &theirs);
            if !at_once {
                std::thread::yield_now();
            }
        }
        if !stays {
            let _ = theirs.shutdown(std::net::Shutdown::Write);
        }
        said
    };
    let read = || {
        let deadline = Instant::now() + Duration::from_millis(if stays { 1 } else { 5000 });
        let received = || frame::receive(&ours, kinds, most, deadline).ok();
        std::iter::from_fn(received).collect::<Vec<Frame>>()
    };
    let (said, read) = std::thread::scope(|scope| match at_once {
        true => (write(), read()),
        false => {
            let writer = scope.spawn(write);
            let read = read();
            (writer.join().expect("it does not panic"), read)
        }
    });
    let mut rest = &said.bytes[..];
    for frame in read {
        let (kind, files, bytes) = read_header(rest).expect("it was sent");
        assert!(kinds.contains(&frame.kind) && frame.kind as u8 == kind);
        assert!(frame.files.len() == files && files <= most);
        assert_eq!(frame.body, rest[20..20 + bytes]);
        rest = &rest[20 + bytes..];
        parse(&me, frame, how);
    }
    if let (Some((kind, 0, bytes)), false) = (read_header(rest), said.with_files) {
        let is_right = kinds.iter().any(|&right| right as u8 == kind) && bytes <= rest.len() - 20;
        let was_late = stays && !at_once;
        assert!(!is_right || bytes > 4 << 10 || was_late, "what is right was not understood: {rest:?}");
    }
    drop((theirs, ours));
    nothing_is_left(before);
}

/// What whoever receives it does next.
fn parse(me: &Me, frame: Frame, how: u8) {
    match frame.kind {
        Kind::Hello => drop(frame.parse::<Hello>()),
        Kind::Welcome | Kind::Refuse => drop(welcomed(me, frame)),
        Kind::Card => {
            let wanted = [how & 32 != 0, how & 64 != 0, how & 128 != 0];
            drop(Shown::read(frame, 1, Reader { rank: 0, site: &Site::Host, wanted }))
        }
        Kind::Knock => drop(frame.parse::<Knock>()),
        Kind::Inside => drop(frame.parse::<Inside>()),
        Kind::Ready => drop(frame.parse::<Vec<usize>>()),
        Kind::Reach => drop(frame.parse::<Option<Offer>>()),
        Kind::Abort | Kind::Enter | Kind::Entered | Kind::Waiting => {}
    }
}

/// A world whose ranks meet while strangers do as they like; the first byte says how many ranks.
pub fn rendezvous(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let before = left();
    play(2 + usize::from(how % 4 == 3), &script(data));
    nothing_is_left(before);
}

/// All ranks get into their world, and no stranger does; unless one of them says that he is a rank, in so many words: then
/// all ranks at least end in time.
pub(super) fn play(world_size: usize, script: &[Act]) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let is_quiet = !says_hello(&name, script);
    let timeout = if is_quiet { Duration::from_secs(20) } else { Duration::from_millis(40) };
    let begin = Instant::now();
    let (crews, strangers) = std::thread::scope(|scope| {
        let name = &name;
        let join = |rank| scope.spawn(move || meet(&me(name, rank, world_size), timeout));
        let mut ranks = vec![join(0)];
        let mut strangers =
            Strangers { name, address: address(name, None).expect("a name"), all: vec![], turn: 0 };
        for act in script {
            match act {
                Act::Join if ranks.len() < world_size => ranks.push(join(ranks.len())),
                act => strangers.act(act, &|| ranks[0].is_finished()),
            }
        }
        ranks.extend((ranks.len()..world_size).map(join));
        let crews: Vec<_> = ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect();
        (crews, strangers)
    });
    if !is_quiet {
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        return;
    }
    let crews: Vec<Crew> = crews.into_iter().map(|crew| crew.expect("all ranks meet")).collect();
    for (one, other) in (0..world_size).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let stream = |from: usize, to: usize| &crews[from].peers[to].as_ref().expect("a peer").1.stream;
        let mut heard = [0];
        let mut at_the_other_end = stream(other, one);
        at_the_other_end.set_read_timeout(Some(Duration::from_secs(5))).expect("a time");
        let said = stream(one, other).write(&[7]).and_then(|_| at_the_other_end.read_exact(&mut heard));
        assert!(said.is_ok() && heard == [7], "ranks {one} and {other} do not hear each other: {said:?}");
    }
    for mut stranger in strangers.all.into_iter().flatten() {
        let heard = stranger.set_nonblocking(true).and_then(|()| stranger.read(&mut [0; 64]));
        assert!(!matches!(heard, Ok(1..)), "a stranger was answered");
    }
}

/// Whether one says that he is a rank, were there room for all that he says.
fn says_hello(name: &str, script: &[Act]) -> bool {
    let (mut said, mut turn) = (vec![], 0);
    for act in script {
        match act {
            Act::Connect => {
                turn = said.len();
                said.push(vec![]);
            }
            Act::Flood(count) => said.extend(std::iter::repeat_n(vec![], (*count).into())),
            Act::Turn(to) if !said.is_empty() => turn = *to as usize % said.len(),
            Act::Write { bytes, .. } if !said.is_empty() => said[turn].extend_from_slice(bytes),
            Act::Say { kind, files: which, keep } if !said.is_empty() => {
                let files = COUNTS[*which as usize & 7];
                said[turn].extend(message(&me(name, 1, 2), *kind, files, *keep));
            }
            _ => {}
        }
    }
    said.iter().any(|said| {
        let Some((kind, _, bytes)) = read_header(said) else { return false };
        let body = said.get(20..).and_then(|body| body.get(..bytes));
        kind == Kind::Hello as u8 && body.is_some_and(|body| serde_json::from_slice::<Hello>(body).is_ok())
    })
}

/// Of all strangers of a script.
const MOST_CONNECTIONS: usize = 200;

struct Strangers<'a> {
    name: &'a str,
    address: SocketAddr,
    /// Connections; none where one is closed, or could not be had.
    all: Vec<Option<UnixStream>>,
    turn: usize,
}

impl Strangers<'_> {
    fn act(&mut self, act: &Act, is_over: &dyn Fn() -> bool) {
        match act {
            Act::Connect => {
                self.turn = self.all.len();
                self.all.push(self.connect(is_over));
            }
            Act::Flood(count) => {
                for _ in 0..(*count).into() {
                    if self.all.len() >= MOST_CONNECTIONS {
                        break;
                    }
                    self.all.push(self.connect(is_over));
                }
            }
            Act::Turn(to) if !self.all.is_empty() => self.turn = *to as usize % self.all.len(),
            Act::Pause(tenths) => std::thread::sleep(Duration::from_micros(100) * u32::from(*tenths)),
            Act::Close => drop(self.all.get_mut(self.turn).and_then(Option::take)),
            act => {
                if let Some(Some(stream)) = self.all.get(self.turn) {
                    Said::default().say(act, &me(self.name, 1, 2), stream);
                }
            }
        }
    }

    /// Once somebody listens, and while there is room.
    fn connect(&self, is_over: &dyn Fn() -> bool) -> Option<UnixStream> {
        let patience = Instant::now() + Duration::from_millis(20);
        while !is_over() && Instant::now() < patience {
            match connect(&self.address) {
                Ok(stream) => return Some(stream),
                Err(_) => std::thread::sleep(Duration::from_micros(20)),
            }
        }
        None
    }
}

/// Where nothing else happens in the process meanwhile, as it does beside other tests.
fn nothing_is_left(before: Left) {
    // Strangers are heard on threads that end when they see them gone.
    let deadline = Instant::now() + Duration::from_secs(10);
    while cfg!(fuzzing) && left() != before {
        assert!(Instant::now() < deadline, "{:?}, there were {before:?}", left());
        std::thread::sleep(Duration::from_micros(50));
    }
}

#[derive(Debug, PartialEq)]
struct Left {
    files: u64,
    threads: u64,
}

fn left() -> Left {
    let of = |folder| std::fs::metadata(folder).expect("/proc");
    let files = match of("/proc/self/fd").len() {
        0 => std::fs::read_dir("/proc/self/fd").expect("/proc").count() as u64, // before Linux 6.2
        files => files,
    };
    Left { files, threads: of("/proc/self/task").nlink() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Of strangers who never say that they are a rank, but much that is nearly that.
    fn act() -> impl Strategy<Value = Act> {
        let bytes = prop_oneof![vec(any::<u8>(), 0..100), vec(any::<u8>(), 5000), Just(b"PAVG\x01".to_vec())];
        let files = prop_oneof![4 => Just(0), 1 => any::<u8>()];
        let half_a_hello =
            (files.clone(), 1u8..100).prop_map(|(files, keep)| Act::Say { kind: 0, files, keep });
        let other = (1u8..6, files.clone()).prop_map(|(kind, files)| Act::Say { kind, files, keep: 0 });
        prop_oneof![
            5 => Just(Act::Connect),
            1 => any::<u8>().prop_map(Act::Flood),
            1 => any::<u8>().prop_map(Act::Turn),
            3 => (files, bytes).prop_map(|(files, bytes)| Act::Write { files, bytes }),
            3 => half_a_hello,
            2 => other,
            2 => (0u8..50).prop_map(Act::Pause),
            1 => Just(Act::Close),
            1 => Just(Act::Join),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn ranks_meet_whatever_strangers_do(ranks in 2usize..5, script in vec(act(), 0..40)) {
            play(ranks, &script);
        }

        #[test]
        fn bytes_for_the_fuzzer_do_no_harm(data in vec(any::<u8>(), 0..60)) {
            frames(&data);
            rendezvous(&data);
        }
    }
}
