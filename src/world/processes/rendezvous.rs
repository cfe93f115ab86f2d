//! How the processes of a world find one another: rank 0 listens on an abstract Unix socket, which leaves nothing behind, and
//! hands every rank a socket to every other. Here is what all have in common, and the way of ranks 1 … to rank 0.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod host;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use rustix::process::{getpid, getuid, pidfd_open, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::frame::{self, Frame, Kind};
use super::home::Home;
use super::page::Page;
use super::strangers::is_same_user;

/// How long a rank that can't take part tries to tell others so: those that were started when it was.
const PARTING: Duration = Duration::from_secs(10);
/// Between two tries to reach rank 0.
const AGAIN: Duration = Duration::from_millis(2);

/// What a rank tells rank 0.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    crate_version: String,
    name: String,
    rank: usize,
    world_size: usize,
    home: Home,
    /// Why it can't take part: then nobody begins.
    refusal: Option<String>,
}

/// What rank 0 tells everybody.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Welcome {
    /// By rank.
    homes: Vec<Home>,
}

/// What this process brings.
#[derive(Clone, Debug)]
pub(super) struct Me {
    pub(super) name: String,
    pub(super) rank: usize,
    pub(super) world_size: usize,
    pub(super) home: Home,
    /// Why it can't take part.
    pub(super) refusal: Option<String>,
}

/// A peer: a socket, and what tells when its process ends, if the kernel has such a thing.
#[derive(Debug)]
pub(super) struct Met {
    pub(super) stream: UnixStream,
    pub(super) process: Option<OwnedFd>,
}

/// What comes of it.
#[derive(Debug)]
pub(super) struct Crew {
    pub(super) page: Page,
    /// By rank; none for this one.
    pub(super) peers: Vec<Option<(Home, Met)>>,
}

/// Collective. An error says what is wrong and what to do. Who can't take part says so to those that come
/// soon.
pub(super) fn meet(me: &Me, timeout: Duration) -> Result<Crew, String> {
    let timeout = if me.refusal.is_some() { timeout.min(PARTING) } else { timeout };
    let deadline = crate::deadline::after(timeout);
    let address = address(&me.name, None)?;
    match me.rank {
        0 => host::meet(me, &address, deadline, timeout),
        _ => visit(me, &address, deadline, timeout),
    }
}

/// Of rank 0, or of the door of the process of this id. No file: it goes with the process that listens. A name that is too long is cut, and told from others by its hash.
pub(super) fn address(name: &str, door: Option<usize>) -> Result<SocketAddr, String> {
    let mut short = name.to_owned();
    if name.len() > 64 {
        // FNV-1a, the same everywhere. Names that collide are told apart by the hello.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        short = format!("{}…{hash:016x}", name.chars().take(10).collect::<String>());
    }
    let uid = getuid().as_raw();
    let socket = match door {
        None => format!("param-averager/{uid}/{short}"),
        Some(id) => format!("param-averager-door/{uid}/{short}/{id}"),
    };
    SocketAddr::from_abstract_name(socket)
        .map_err(|error| format!("the name of the world, {name:?}: {error}"))
}

impl Me {
    fn hello(&self) -> Hello {
        Hello {
            crate_version: env!("CARGO_PKG_VERSION").into(),
            name: self.name.clone(),
            rank: self.rank,
            world_size: self.world_size,
            home: self.home.clone(),
            refusal: self.refusal.clone(),
        }
    }
}

fn visit(me: &Me, address: &SocketAddr, deadline: Instant, timeout: Duration) -> Result<Crew, String> {
    let failed = |error: io::Error| format!("rank 0 of the world {:?}: {error}", me.name);
    loop {
        let tried = connect(address).and_then(|stream| {
            is_same_user(&stream).map_err(io::Error::other)?;
            let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
            let files: Vec<_> = process.iter().map(AsFd::as_fd).collect();
            frame::send(&stream, (Kind::Hello, 0, 0), &me.hello(), &files, deadline)?;
            frame::receive(&stream, &[Kind::Welcome, Kind::Refuse], frame::MOST_FILES, deadline)
        });
        match tried {
            Ok(frame) => return welcomed(me, frame),
            // Nobody listens yet, or no longer, or has its hands full.
            Err(error) if is_early(&error) && Instant::now() < deadline => std::thread::sleep(AGAIN),
            Err(error) if is_early(&error) || is_late(&error) => {
                return Err(format!(
                    "rank 0 of the world {:?} was not to be found on this host within {timeout:?}, or did not answer: see that it was \
                     started, and that every rank gives the same name, which PARAM_AVERAGER_RENDEZVOUS can set",
                    me.name
                ))
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Without waiting where somebody listens and lets nobody in.
pub(super) fn connect(address: &SocketAddr) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let name = address.as_abstract_name().expect("made of one");
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &SocketAddrUnix::new_abstract_name(name)?) {
        Err(rustix::io::Errno::AGAIN) => return Err(ErrorKind::ConnectionRefused.into()),
        connected => connected?,
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

fn is_early(error: &io::Error) -> bool {
    use ErrorKind::*;
    matches!(error.kind(), ConnectionRefused | NotFound | ConnectionReset | UnexpectedEof | BrokenPipe)
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn welcomed(me: &Me, frame: Frame) -> Result<Crew, String> {
    let failed = |error: io::Error| format!("rank 0's answer: {error}");
    if frame.kind == Kind::Refuse {
        return Err(frame.parse::<String>().map_err(failed)?);
    }
    let welcome: Welcome = frame.parse().map_err(failed)?;
    let mut files = frame.files.into_iter();
    let missing = || "rank 0's answer lacks file descriptors: raise ulimit -n".to_owned();
    let page = Page::open(files.next().ok_or_else(missing)?)?;
    if welcome.homes.len() != me.world_size {
        return Err(format!("rank 0's answer is about {} ranks, not {}", welcome.homes.len(), me.world_size));
    }
    let mut peers = vec![];
    for (rank, home) in welcome.homes.into_iter().enumerate() {
        peers.push(if rank == me.rank {
            None
        } else {
            let stream = UnixStream::from(files.next().ok_or_else(missing)?);
            Some((home, Met { stream, process: None }))
        });
    }
    // Those without a process of their own have none for anybody.
    for (_, peer) in peers.iter_mut().flatten() {
        peer.process = files.next();
    }
    Ok(Crew { page, peers })
}
