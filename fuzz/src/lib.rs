//! Fuzzing of the rendezvous. Input is a list of acts of unknown processes, from the bytes of a
//! fuzzer (`fuzz_targets/`) or from a property test (`tests/processes/unknown.rs`).

mod script;

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use param_averager::__testing::rendezvous::{
    is_hello, is_refusal, set_hello_time, Met, Rank, Received, Receiver,
};
pub use script::Act;
use script::{message, read_header, script, Sent, COUNTS};

/// Time that an unknown process has for its first message: short, so that runs are.
const HELLO: Duration = Duration::from_millis(50);

/// Feeds arbitrary bytes and files to the functions that receive them: those of a listener, of a
/// rank that waits for rank 0, or of a peer.
pub fn frames(data: &[u8]) {
    let Some((&how, data)) = data.split_first() else { return };
    let receiver = [Receiver::Listener, Receiver::Waiting, Receiver::Peer][how as usize % 3];
    let (at_once, stays) = (how & 8 == 0, how & 16 != 0);
    let before = left();
    let me = Rank::new("a name", 1, 3);
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
        let received = || receiver.receive(&ours, deadline);
        std::iter::from_fn(received).collect::<Vec<Received>>()
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
    for received in read {
        let (kind, files, bytes) = read_header(rest).expect("it was sent");
        assert!(receiver.takes(kind) && received.kind() == kind);
        assert!(received.files() == files && files <= receiver.most_files());
        assert_eq!(received.body(), &rest[20..20 + bytes]);
        rest = &rest[20 + bytes..];
        let (inbox, of_previous, control) = (how & 32 != 0, how & 64 != 0, how & 128 != 0);
        let _ = received.parse(&me, [inbox, of_previous, control, of_previous]);
    }
    if let (Some((kind, 0, bytes)), false) = (read_header(rest), sent.with_files) {
        let is_right = receiver.takes(kind) && bytes <= rest.len() - 20;
        let was_late = stays && !at_once;
        assert!(
            !is_right || bytes > 4 << 10 || was_late,
            "a valid message was not received: {rest:?}"
        );
    }
    drop((theirs, ours));
    nothing_is_left(before);
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
pub fn play(world_size: usize, script: &[Act]) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    set_hello_time(HELLO);
    let name = format!("fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let is_quiet = !sends_hello(&name, script);
    let timeout = if is_quiet { Duration::from_secs(20) } else { Duration::from_millis(40) };
    let begin = Instant::now();
    let (results, clients) = std::thread::scope(|scope| {
        let name = &name;
        let join = |rank| scope.spawn(move || Rank::new(name, rank, world_size).meet(timeout));
        let mut ranks = vec![join(0)];
        let unknown = Rank::new(name, 1, 2);
        let mut clients = Clients { unknown, all: vec![], current: 0 };
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
    let results: Vec<Met> = results.into_iter().map(|met| met.expect("all ranks meet")).collect();
    for (one, other) in (0..world_size).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let stream = |from: usize, to: usize| results[from].stream(to);
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
        let is_right = !matches!(received, Ok(1..)) || is_refusal(&answer);
        assert!(is_right, "an unknown process was answered");
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
                sent[current].extend(message(&Rank::new(name, 1, 2), *kind, files, *keep));
            }
            _ => {}
        }
    }
    sent.iter().any(|sent| {
        let Some((kind, _, bytes)) = read_header(sent) else { return false };
        let body = sent.get(20..).and_then(|body| body.get(..bytes));
        body.is_some_and(|body| is_hello(kind, body))
    })
}

/// Limit on connections of one script.
const MOST_CONNECTIONS: usize = 200;

struct Clients {
    /// Role that they claim.
    unknown: Rank,
    /// Connections; `None` if one is closed or could not be made.
    all: Vec<Option<UnixStream>>,
    current: usize,
}

impl Clients {
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
                    Sent::default().send(act, &self.unknown, stream);
                }
            }
        }
    }

    /// Connects as soon as rank 0 listens and has room.
    fn connect(&self, is_over: &dyn Fn() -> bool) -> Option<UnixStream> {
        let patience = Instant::now() + Duration::from_millis(20);
        while !is_over() && Instant::now() < patience {
            match self.unknown.connect() {
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
