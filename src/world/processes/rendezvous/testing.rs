//! What `fuzz/` and its property tests need to act as ranks and as unknown processes: valid
//! messages, the functions that receive messages, and a rendezvous.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{address, connect, meet, welcomed, Hello, Origin, Peers, RankInfo, Welcome};
use crate::backend::MemorySpace;
use crate::device::Device;
use crate::world::exchange::Shown;
use crate::world::processes::identity::job::{Job, Known};
use crate::world::processes::member::wire_handshake::{Reader, WireHandshake};
use crate::world::processes::peers::host_info::HostInfo;
use crate::world::processes::wire::frame::{self, Frame, Kind};

pub use crate::world::processes::wire::listener::testing::set_hello_time;

/// A function that receives messages.
#[derive(Clone, Copy, Debug)]
pub enum Receiver {
    /// Rank 0's, of unknown processes.
    Listener,
    /// That of a rank that waits for rank 0.
    Waiting,
    /// That of a peer.
    Peer,
}

impl Receiver {
    fn kinds(self) -> &'static [Kind] {
        match self {
            Receiver::Listener => &[Kind::Hello],
            Receiver::Waiting => &[Kind::Welcome, Kind::Refuse],
            Receiver::Peer => {
                &[Kind::Handshake, Kind::Verdict, Kind::Abort, Kind::Ready, Kind::Exchange]
            }
        }
    }

    /// Most files of one message.
    pub fn most_files(self) -> usize {
        match self {
            Receiver::Listener => 1,
            Receiver::Waiting => frame::MOST_FILES,
            Receiver::Peer => 4,
        }
    }

    /// True if it takes messages of this kind.
    pub fn takes(self, kind: u8) -> bool {
        self.kinds().iter().any(|&taken| taken as u8 == kind)
    }

    /// Receives a message, or fails at `deadline`.
    pub fn receive(self, stream: &UnixStream, deadline: Instant) -> Option<Received> {
        frame::receive(stream, self.kinds(), self.most_files(), deadline).ok().map(Received)
    }
}

/// A message.
#[derive(Debug)]
pub struct Received(Frame);

impl Received {
    /// Number of its kind.
    pub fn kind(&self) -> u8 {
        self.0.kind as u8
    }

    /// Its JSON text.
    pub fn body(&self) -> &[u8] {
        &self.0.body
    }

    /// Number of its files.
    pub fn files(&self) -> usize {
        self.0.files.len()
    }

    /// Parses the message as its receiver does, which is `rank`. `wanted` is the memory of a
    /// handshake that the receiver opens. False for an invalid message.
    pub fn parse(self, rank: &Rank, wanted: [bool; 4]) -> bool {
        let frame = self.0;
        match frame.kind {
            Kind::Hello => frame.parse::<Hello>().is_ok(),
            Kind::Welcome => welcomed(&rank.0, frame).is_ok(),
            Kind::Refuse => frame.parse::<String>().is_ok() && welcomed(&rank.0, frame).is_err(),
            Kind::Handshake => {
                let reader = Reader { rank: 0, space: &MemorySpace::Host, wanted };
                let opened = WireHandshake::read(frame, 1);
                opened.and_then(|unopened| unopened.open(reader)).is_ok()
            }
            Kind::Ready => frame.parse::<Vec<usize>>().is_ok(),
            Kind::Verdict => frame.parse::<Option<String>>().is_ok(),
            Kind::Exchange => frame.parse::<Shown>().is_ok(),
            Kind::Abort => true,
            _ => unreachable!("no receiver takes it"),
        }
    }
}

/// A rank of a world.
#[derive(Clone, Debug)]
pub struct Rank(RankInfo);

impl Rank {
    /// Number of kinds that `message` makes.
    pub const KINDS: u8 = 6;

    /// A rank on a CPU, of the job that has this name.
    pub fn new(name: &str, rank: usize, world_size: usize) -> Rank {
        let host_info = HostInfo::unknown(Device::cpu());
        let job = Job::own(&Known::ByName, rank, None);
        let (name, source) = (name.into(), "made up".into());
        Rank(RankInfo { name, source, rank, world_size, host_info, job, refusal: None })
    }

    /// A valid message of a kind, which announces this number of files.
    pub fn message(&self, kind: u8, files: usize) -> Vec<u8> {
        let me = &self.0;
        let (kind, body) = match kind % Self::KINDS {
            0 => (Kind::Hello, serde_json::to_vec(&me.hello())),
            1 => {
                let host_infos = vec![me.host_info.clone(); 2];
                let welcome = Welcome { host_infos, origin: Origin::now(&me.job) };
                (Kind::Welcome, serde_json::to_vec(&welcome))
            }
            2 => (Kind::Refuse, serde_json::to_vec("no")),
            3 => {
                let memory = |bytes: usize| serde_json::json!({ "bytes": bytes, "handle": null });
                let handshake = serde_json::json!({
                    "refusal": null, "options": [["slots", "4"]], "tensors": ["tensor"],
                    "course": { "position": 0, "anchor": 0, "local_steps": 0 },
                    "admission": "None", "ordinal": null,
                    "memories": [memory(1), memory(4096), memory(4097), null],
                });
                (Kind::Handshake, serde_json::to_vec(&handshake))
            }
            4 => (Kind::Abort, Ok(b"null".to_vec())),
            _ => (Kind::Ready, Ok(b"[]".to_vec())),
        };
        let body = body.expect("plain data");
        [&frame::header((kind, 0, 0), body.len(), files)[..], &body].concat()
    }

    /// Connects to rank 0 of the world, or fails at once.
    pub fn connect(&self) -> io::Result<UnixStream> {
        connect(&address(&self.0.name, None).map_err(io::Error::other)?)
    }

    /// Meets the other ranks. Collective.
    pub fn meet(&self, timeout: Duration) -> Result<Met, String> {
        meet(&self.0, timeout).map(Met)
    }
}

/// A rank that has met the others.
#[derive(Debug)]
pub struct Met(Peers);

impl Met {
    /// The stream to another rank.
    pub fn stream(&self, rank: usize) -> &UnixStream {
        &self.0.peers[rank].as_ref().expect("another rank").1.stream
    }
}

/// True for a message that rank 0 takes for a rank's first one.
pub fn is_hello(kind: u8, body: &[u8]) -> bool {
    kind == Kind::Hello as u8 && serde_json::from_slice::<Hello>(body).is_ok()
}

/// True for an answer to a process of another version.
pub fn is_refusal(answer: &[u8]) -> bool {
    answer.starts_with(&frame::header((Kind::Refuse, 0, 0), 0, 0)[..7])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// A message that its receiver cannot parse would fuzz nothing but the parser.
    #[test]
    fn messages_of_all_kinds_are_valid() {
        let rank = Rank::new("a name", 1, 2);
        for kind in 0..Rank::KINDS {
            let (one, other) = UnixStream::pair().unwrap();
            (&one).write_all(&rank.message(kind, 0)).unwrap();
            let all = [Receiver::Listener, Receiver::Waiting, Receiver::Peer];
            let number = rank.message(kind, 0)[6];
            let receiver = all.into_iter().find(|receiver| receiver.takes(number)).unwrap();
            let deadline = Instant::now() + Duration::from_secs(20);
            let received = receiver.receive(&other, deadline).unwrap();
            assert_eq!(received.kind(), number);
            // A welcome and a handshake lack their files, which are not part of the message.
            let has_files = [Kind::Welcome as u8, Kind::Handshake as u8].contains(&number);
            match has_files {
                false => assert!(received.parse(&rank, [true; 4]), "{kind}"),
                true if number == Kind::Welcome as u8 => {
                    drop(received.0.parse::<Welcome>().unwrap())
                }
                true => drop(WireHandshake::read(received.0, 1).unwrap()),
            }
        }
    }
}
