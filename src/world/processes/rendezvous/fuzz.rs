//! Fuzzing of the rendezvous. Input is a list of acts of unknown processes, from the bytes of a
//! fuzzer (`fuzz/` in the repository) or from a property test.

mod script;

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use script::{me, message, read_header, script, Act, Sent, COUNTS};

use super::{address, connect, meet, welcomed, Hello, Peers, RankInfo};
use crate::backend::{MemoryHandle, MemorySpace};
use crate::world::processes::frame::{self, Frame, Kind};
use crate::world::processes::join_listener::{JoinOffer, JoinRequest};
use crate::world::processes::rebuild::AveragerList;
use crate::world::processes::wire_handshake::{Reader, WireHandshake};
use crate::world::Shown;

/// Feeds arbitrary bytes and files to the functions that receive them: those of a listener, of a
/// rank that waits for rank 0, or of a peer.
pub fn frames(data: &[u8]) {
    const LISTENER: (&[Kind], usize) = (&[Kind::Hello], 1);
    const PENDING: (&[Kind], usize) = (&[Kind::Welcome, Kind::Refuse], frame::MOST_FILES);
    const PEER: (&[Kind], usize) =
        (&[Kind::Handshake, Kind::Verdict, Kind::Abort, Kind::Ready, Kind::Exchange], 3);
    let Some((&how, data)) = data.split_first() else { return };
    let (kinds, most) = [LISTENER, PENDING, PEER][how as usize % 3];
    let (at_once, stays) = (how & 8 == 0, how & 16 != 0);
    let before = left();
    let me = me("a name", 1, 3);
    let (theirs, ours) = UnixStream::pair().expect("a pair of sockets");
    let write = || {
        let mut sent = Sent::default();
        for act in script(data) {
            sent.send(&act, &me, &theirs);
            if !at_once {
                std::thread::yield_now();
            }
        }
        if !stays {
            let _ = theirs.shutdown(std::net::Shutdown::Write);
        }
        sent
    };
    let read = || {
        let deadline = Instant::now() + Duration::from_millis(if stays { 1 } else { 5000 });
        let received = || frame::receive(&ours, kinds, most, deadline).ok();
        std::iter::from_fn(received).collect::<Vec<Frame>>()
    };
    let (sent, read) = std::thread::scope(|scope| match at_once {
        true => (write(), read()),
        false => {
            let writer = scope.spawn(write);
            let read = read();
            (writer.join().expect("it does not panic"), read)
        }
    });
    let mut rest = &sent.bytes[..];
    for frame in read {
        let (kind, files, bytes) = read_header(rest).expect("it was sent");
        assert!(kinds.contains(&frame.kind) && frame.kind as u8 == kind);
        assert!(frame.files.len() == files && files <= most);
        assert_eq!(frame.body, rest[20..20 + bytes]);
        rest = &rest[20 + bytes..];
        parse(&me, frame, how);
    }
    if let (Some((kind, 0, bytes)), false) = (read_header(rest), sent.with_files) {
        let is_right = kinds.iter().any(|&right| right as u8 == kind) && bytes <= rest.len() - 20;
        let was_late = stays && !at_once;
        assert!(
            !is_right || bytes > 4 << 10 || was_late,
            "a valid message was not received: {rest:?}"
        );
    }
    drop((theirs, ours));
    nothing_is_left(before);
}

/// Parses a message as its receiver does.
fn parse(me: &RankInfo, frame: Frame, how: u8) {
    match frame.kind {
        Kind::Hello => drop(frame.parse::<Hello>()),
        Kind::Welcome | Kind::Refuse => drop(welcomed(me, frame)),
        Kind::Handshake => {
            let wanted = [how & 32 != 0, how & 64 != 0, how & 128 != 0];
            let reader = Reader { rank: 0, space: &MemorySpace::Host, wanted };
            drop(WireHandshake::read(frame, 1).and_then(|unopened| unopened.open(reader)))
        }
        Kind::JoinRequest => drop(frame.parse::<JoinRequest>()),
        Kind::JoinOffer => drop(frame.parse::<JoinOffer>()),
        Kind::Ready => drop(frame.parse::<Vec<usize>>()),
        Kind::Reach => drop(frame.parse::<Option<MemoryHandle>>()),
        Kind::Averagers => drop(frame.parse::<AveragerList>()),
        Kind::Verdict => drop(frame.parse::<Option<String>>()),
        Kind::Exchange => drop(frame.parse::<Shown>()),
        Kind::Abort | Kind::Connect | Kind::Connected | Kind::JoinPending => {}
    }
}

/// Runs a rendezvous while unknown processes act as the script says. The first byte determines the
/// number of ranks.
pub fn rendezvous(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let before = left();
    play(2 + usize::from(how % 4 == 3), &script(data));
    nothing_is_left(before);
}

/// Checks that all ranks enter their world and no unknown process does. If an unknown process sends
/// a valid `Hello`, checks that all ranks end in time.
fn play(world_size: usize, script: &[Act]) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let is_quiet = !sends_hello(&name, script);
    let timeout = if is_quiet { Duration::from_secs(20) } else { Duration::from_millis(40) };
    let begin = Instant::now();
    let (results, clients) = std::thread::scope(|scope| {
        let name = &name;
        let join = |rank| scope.spawn(move || meet(&me(name, rank, world_size), timeout));
        let mut ranks = vec![join(0)];
        let mut clients = Clients {
            name,
            address: address(name, None).expect("a name"),
            all: vec![],
            current: 0,
        };
        for act in script {
            match act {
                Act::Join if ranks.len() < world_size => ranks.push(join(ranks.len())),
                act => clients.act(act, &|| ranks[0].is_finished()),
            }
        }
        ranks.extend((ranks.len()..world_size).map(join));
        let results: Vec<_> =
            ranks.into_iter().map(|rank| rank.join().expect("it does not panic")).collect();
        (results, clients)
    });
    if !is_quiet {
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        return;
    }
    let results: Vec<Peers> =
        results.into_iter().map(|peers| peers.expect("all ranks meet")).collect();
    for (one, other) in (0..world_size).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let stream = |from: usize, to: usize| -> &UnixStream {
            &results[from].peers[to].as_ref().expect("a peer").1.stream
        };
        let mut received = [0];
        let mut other_end = stream(other, one);
        other_end.set_read_timeout(Some(Duration::from_secs(5))).expect("a time");
        let mut this_end = stream(one, other);
        let sent = this_end.write(&[7]).and_then(|_| other_end.read_exact(&mut received));
        assert!(
            sent.is_ok() && received == [7],
            "ranks {one} and {other} do not receive from each other: {sent:?}"
        );
    }
    for mut client in clients.all.into_iter().flatten() {
        let mut answer = [0; 64];
        let received = client.set_nonblocking(true).and_then(|()| client.read(&mut answer));
        // Only a message of another version is answered.
        let is_refused = answer[..7] == frame::header((Kind::Refuse, 0, 0), 0, 0)[..7];
        assert!(!matches!(received, Ok(1..)) || is_refused, "an unknown process was answered");
    }
}

/// True if a script sends a valid `Hello`, provided the socket has room for it.
fn sends_hello(name: &str, script: &[Act]) -> bool {
    let (mut sent, mut current) = (vec![], 0);
    for act in script {
        match act {
            Act::Connect => {
                current = sent.len();
                sent.push(vec![]);
            }
            Act::Flood(count) => sent.extend(std::iter::repeat_n(vec![], (*count).into())),
            Act::Turn(to) if !sent.is_empty() => current = *to as usize % sent.len(),
            Act::Write { bytes, .. } if !sent.is_empty() => sent[current].extend_from_slice(bytes),
            Act::Send { kind, files: which, keep } if !sent.is_empty() => {
                let files = COUNTS[*which as usize & 7];
                sent[current].extend(message(&me(name, 1, 2), *kind, files, *keep));
            }
            _ => {}
        }
    }
    sent.iter().any(|sent| {
        let Some((kind, _, bytes)) = read_header(sent) else { return false };
        let body = sent.get(20..).and_then(|body| body.get(..bytes));
        kind == Kind::Hello as u8
            && body.is_some_and(|body| serde_json::from_slice::<Hello>(body).is_ok())
    })
}

/// Limit on connections of one script.
const MOST_CONNECTIONS: usize = 200;

struct Clients<'a> {
    name: &'a str,
    address: SocketAddr,
    /// Connections; `None` if one is closed or could not be made.
    all: Vec<Option<UnixStream>>,
    current: usize,
}

impl Clients<'_> {
    fn act(&mut self, act: &Act, is_over: &dyn Fn() -> bool) {
        match act {
            Act::Connect => {
                self.current = self.all.len();
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
            Act::Turn(to) if !self.all.is_empty() => self.current = *to as usize % self.all.len(),
            Act::Pause(tenths) => {
                std::thread::sleep(Duration::from_micros(100) * u32::from(*tenths))
            }
            Act::Close => drop(self.all.get_mut(self.current).and_then(Option::take)),
            act => {
                if let Some(Some(stream)) = self.all.get(self.current) {
                    Sent::default().send(act, &me(self.name, 1, 2), stream);
                }
            }
        }
    }

    /// Connects as soon as rank 0 listens and has room.
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

/// Checks that no file and no thread has leaked. Only a fuzzer's process runs nothing else at the
/// same time.
fn nothing_is_left(before: Left) {
    // Connections are received from on threads that end when they see them closed.
    let deadline = Instant::now() + Duration::from_secs(10);
    while cfg!(fuzzing) && left() != before {
        assert!(Instant::now() < deadline, "leaked: {:?}, before: {before:?}", left());
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
    use crate::world::processes::rendezvous::Welcome;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Acts without a valid `Hello`, but with many that nearly are one.
    fn act() -> impl Strategy<Value = Act> {
        let bytes = prop_oneof![
            vec(any::<u8>(), 0..100),
            vec(any::<u8>(), 5000),
            Just(b"PAVG\x05".to_vec())
        ];
        let files = prop_oneof![4 => Just(0), 1 => any::<u8>()];
        let half_a_hello =
            (files.clone(), 1u8..100).prop_map(|(files, keep)| Act::Send { kind: 0, files, keep });
        let other =
            (1u8..6, files.clone()).prop_map(|(kind, files)| Act::Send { kind, files, keep: 0 });
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
        // each case may take 20 s
        #![proptest_config(ProptestConfig {
            cases: 50, max_shrink_iters: 5, ..ProptestConfig::default()
        })]

        #[test]
        fn ranks_meet_whatever_unknown_processes_do(
            ranks in 2usize..5, script in vec(act(), 0..40)
        ) {
            play(ranks, &script);
        }

        #[test]
        fn bytes_for_the_fuzzer_do_no_harm(data in vec(any::<u8>(), 0..60)) {
            frames(&data);
            rendezvous(&data);
        }
    }

    /// A scripted message that its receiver cannot parse would fuzz nothing but the parser.
    #[test]
    fn scripted_messages_are_valid() {
        let me = me("a name", 1, 2);
        for kind in 0..6 {
            let (one, other) = UnixStream::pair().unwrap();
            (&one).write_all(&message(&me, kind, 0, 0)).unwrap();
            let kinds = [
                Kind::Hello,
                Kind::Welcome,
                Kind::Refuse,
                Kind::Handshake,
                Kind::Abort,
                Kind::Ready,
            ];
            let deadline = Instant::now() + Duration::from_secs(20);
            let frame = frame::receive(&other, &kinds, 0, deadline).unwrap();
            assert_eq!(frame.kind, kinds[kind as usize]);
            match frame.kind {
                Kind::Hello => drop(frame.parse::<Hello>().unwrap()),
                Kind::Welcome => drop(frame.parse::<Welcome>().unwrap()),
                Kind::Refuse => drop(frame.parse::<String>().unwrap()),
                Kind::Handshake => drop(WireHandshake::read(frame, 1).unwrap()),
                _ => {}
            }
        }
    }
}
