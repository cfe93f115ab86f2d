//! How the processes of a world find one another: rank 0 listens on an abstract Unix socket, which leaves nothing behind, and
//! hands every rank a socket to every other.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{getpid, getuid, pidfd_open, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::frame::{self, Frame, Kind};
use super::home::Home;
use crate::backend::Shared;

/// Strangers that may be half way through their first message at once.
const MOST_STRANGERS: usize = 64;
/// How long one may take for it.
const HELLO: Duration = Duration::from_secs(2);
/// How long ranks that come late are told why there is no world.
const GRACE: Duration = Duration::from_secs(1);
/// How long a rank that can't take part tries to tell others so: those that were started when it was.
const PARTING: Duration = Duration::from_secs(10);
/// Between two tries to reach rank 0.
const AGAIN: Duration = Duration::from_millis(2);
/// Bytes of the page that all processes of a world share.
pub(super) const PAGE: usize = 4096;

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
    pub(super) page: Shared,
    /// By rank.
    pub(super) homes: Vec<Home>,
    /// By rank; none for this one.
    pub(super) peers: Vec<Option<Met>>,
}

/// Collective. An error says what is wrong and what to do. Who can't take part says so to those that come
/// soon.
pub(super) fn meet(me: &Me, timeout: Duration) -> Result<Crew, String> {
    let timeout = if me.refusal.is_some() { timeout.min(PARTING) } else { timeout };
    let deadline = Instant::now() + timeout;
    let address = address(&me.name)?;
    match me.rank {
        0 => Host { me, deadline, timeout, came: BTreeMap::new() }.meet(&address),
        _ => visit(me, &address, deadline, timeout),
    }
}

/// No file: it goes with the process that listens. A name that is too long is cut, and told from others by its hash.
fn address(name: &str) -> Result<SocketAddr, String> {
    let mut short = name.to_owned();
    if name.len() > 64 {
        // FNV-1a, the same everywhere. Names that collide are told apart by the hello.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        short = format!("{}…{hash:016x}", name.chars().take(10).collect::<String>());
    }
    SocketAddr::from_abstract_name(format!("param-averager/{}/{short}", getuid().as_raw()))
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

/// Whoever is at the other end of an abstract socket: its name is free to all, this user's processes are to be trusted.
fn is_same_user(stream: &UnixStream) -> Result<(), String> {
    let peer = rustix::net::sockopt::socket_peercred(stream).map_err(|error| error.to_string())?;
    if peer.uid == getuid() {
        return Ok(());
    }
    Err(format!(
        "it belongs to user {}, not to user {}: choose another name for this world",
        peer.uid.as_raw(),
        getuid().as_raw()
    ))
}

// ---- ranks 1 … ---------------------------------------------------------------------------------------------------

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
fn connect(address: &SocketAddr) -> io::Result<UnixStream> {
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
    let page = Shared::open(files.next().ok_or_else(missing)?, PAGE)?;
    let mut peers = vec![];
    for rank in 0..me.world_size {
        peers.push(if rank == me.rank {
            None
        } else {
            let stream = UnixStream::from(files.next().ok_or_else(missing)?);
            Some(Met { stream, process: None })
        });
    }
    // Those without a process of their own have none for anybody.
    for peer in peers.iter_mut().flatten() {
        peer.process = files.next();
    }
    match welcome.homes.len() == me.world_size {
        true => Ok(Crew { page, homes: welcome.homes, peers }),
        false => Err("rank 0's answer lacks homes of ranks".into()),
    }
}

// ---- rank 0 ------------------------------------------------------------------------------------------------------

struct Host<'a> {
    me: &'a Me,
    deadline: Instant,
    timeout: Duration,
    came: BTreeMap<usize, Visitor>,
}

#[derive(Debug)]
struct Visitor {
    stream: UnixStream,
    hello: Hello,
    process: Option<OwnedFd>,
}

impl Host<'_> {
    fn meet(mut self, address: &SocketAddr) -> Result<Crew, String> {
        let listener = self.listen(address)?;
        let (send, visitors) = mpsc::sync_channel(MOST_STRANGERS);
        let (closed, short) = (AtomicBool::new(false), Arc::new(AtomicBool::new(false)));
        std::thread::scope(|scope| {
            let door = std::thread::Builder::new().name("rendezvous".into());
            let accept = || doorkeeper(&listener, send, &closed, &short);
            let opened = door.spawn_scoped(scope, accept).map(|_| ());
            let result = opened.map_err(|error| format!("can't start a thread: {error}"));
            let result = result.and_then(|()| self.gather(&visitors)).and_then(|()| self.introduce());
            let result = result.map_err(|reason| match short.load(Ordering::Relaxed) {
                true => format!("{reason}; rank 0 has run out of file descriptors: raise ulimit -n"),
                false => reason,
            });
            if let Err(reason) = &result {
                self.refuse_all(&visitors, reason);
            }
            // The doorkeeper's accept then fails, if it does not for want of descriptors.
            closed.store(true, Ordering::Relaxed);
            let _ = rustix::net::shutdown(&listener, rustix::net::Shutdown::Both);
            result
        })
    }

    fn listen(&self, address: &SocketAddr) -> Result<UnixListener, String> {
        loop {
            match UnixListener::bind_addr(address) {
                Ok(listener) => return Ok(listener),
                // A world of that name may be about to begin or to end.
                Err(error)
                    if error.kind() == ErrorKind::AddrInUse && Instant::now() + AGAIN < self.deadline =>
                {
                    std::thread::sleep(AGAIN);
                }
                Err(error) => {
                    return Err(format!(
                        "the name {:?}: {error}; another rank 0 has it: end that, or give this world a name of its own",
                        self.me.name
                    ))
                }
            }
        }
    }

    /// Until every rank has come.
    fn gather(&mut self, visitors: &mpsc::Receiver<Visitor>) -> Result<(), String> {
        if let Some(reason) = &self.me.refusal {
            return Err(reason.clone());
        }
        while self.came.len() + 1 < self.me.world_size {
            let left = self.deadline.saturating_duration_since(Instant::now());
            match visitors.recv_timeout(left) {
                Ok(visitor) => self.admit(visitor)?,
                Err(RecvTimeoutError::Timeout) => return Err(self.missing()),
                Err(RecvTimeoutError::Disconnected) => return Err("the listening thread has ended".into()),
            }
        }
        Ok(())
    }

    /// Tells those that came, and those that come now.
    fn refuse_all(&mut self, visitors: &mpsc::Receiver<Visitor>, reason: &str) {
        // What can't be sent goes to one that has gone.
        let refuse = |stream: &UnixStream| {
            drop(frame::send(stream, (Kind::Refuse, 0, 0), &reason, &[], Instant::now() + GRACE))
        };
        self.came.values().for_each(|visitor| refuse(&visitor.stream));
        let mut left = (self.me.world_size - 1).saturating_sub(self.came.len());
        let grace = if self.me.refusal.is_some() { PARTING } else { GRACE };
        let until = self.deadline.min(Instant::now() + grace);
        while left > 0 {
            let Ok(visitor) = visitors.recv_timeout(until.saturating_duration_since(Instant::now())) else {
                return;
            };
            refuse(&visitor.stream);
            left -= 1;
        }
    }

    fn missing(&self) -> String {
        let missing = (1..self.me.world_size).filter(|rank| !self.came.contains_key(rank));
        let missing: Vec<String> = missing.map(|rank| rank.to_string()).collect();
        format!(
            "of the {} ranks of the world {:?}, these did not come within {:?}: {}; see that they were started, on this host",
            self.me.world_size,
            self.me.name,
            self.timeout,
            missing.join(", ")
        )
    }

    fn admit(&mut self, visitor: Visitor) -> Result<(), String> {
        let (hello, mine) = (&visitor.hello, self.me.hello());
        let rank = hello.rank;
        let differs = [
            ("the crate version", &hello.crate_version, &mine.crate_version),
            ("the world", &hello.name, &mine.name),
            ("the world size", &hello.world_size.to_string(), &mine.world_size.to_string()),
        ];
        let differs = differs.into_iter().find(|(_, theirs, ours)| theirs != ours);
        let refusal = if let Some((what, theirs, ours)) = differs {
            Some(format!(
                "rank {rank} has {what} {theirs:?}, rank 0 {ours:?}: start every rank of the same program, with the same numbers"
            ))
        } else if rank == 0 || rank >= self.me.world_size {
            Some(format!("two processes say that they are rank {rank} of {}", self.me.world_size))
        } else if self.came.get(&rank).is_some_and(|earlier| !has_hung_up(&earlier.stream)) {
            Some(format!("two processes say that they are rank {rank}: give each a rank of its own"))
        } else {
            hello.refusal.clone().or_else(|| hello.home.refusal(rank, &mine.home))
        };
        match refusal {
            None => {
                self.came.insert(rank, visitor);
                Ok(())
            }
            Some(reason) => {
                // It may have gone.
                let _ =
                    frame::send(&visitor.stream, (Kind::Refuse, 0, 0), &reason, &[], Instant::now() + GRACE);
                Err(reason)
            }
        }
    }

    /// Gives every rank a socket to every other.
    fn introduce(&mut self) -> Result<Crew, String> {
        let failed = |error: io::Error| format!("can't make sockets for all ranks: {error}; raise ulimit -n");
        let page = Shared::new(PAGE)?;
        let size = self.me.world_size;
        // By whose it is, and to whom it leads.
        let mut sockets = BTreeMap::new();
        for (one, other) in (0..size).flat_map(|one| (one + 1..size).map(move |other| (one, other))) {
            let (left, right) = UnixStream::pair().map_err(failed)?;
            sockets.insert((one, other), left);
            sockets.insert((other, one), right);
        }
        let others = self.came.values().map(|visitor| visitor.hello.home.clone()); // in the order of ranks
        let welcome = Welcome { homes: std::iter::once(self.me.home.clone()).chain(others).collect() };
        let own = pidfd_open(getpid(), PidfdFlags::empty()).ok();
        for (&rank, visitor) in &self.came {
            let streams = sockets.range((rank, 0)..(rank + 1, 0)).map(|(_, stream)| stream.as_fd());
            let mut files = vec![page.file()];
            files.extend(streams);
            let processes = (0..size).filter(|&other| other != rank).map(|other| match other {
                0 => own.as_ref(),
                other => self.came[&other].process.as_ref(),
            });
            // All, or none.
            let processes: Option<Vec<&OwnedFd>> = processes.collect();
            files.extend(processes.unwrap_or_default().into_iter().map(AsFd::as_fd));
            match frame::send(&visitor.stream, (Kind::Welcome, 0, 0), &welcome, &files, self.deadline) {
                Err(error) if !is_early(&error) => return Err(failed(error)),
                _ => {} // one that has gone is found out by all, as a peer
            }
        }
        let peers = (0..size).map(|rank| {
            let process = self.came.get_mut(&rank).and_then(|visitor| visitor.process.take());
            sockets.remove(&(0, rank)).map(|stream| Met { stream, process })
        });
        Ok(Crew { page, homes: welcome.homes, peers: peers.collect() })
    }
}

/// Of file descriptors.
fn is_short(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// Whether the other end is closed: nobody says anything after its hello.
fn has_hung_up(stream: &UnixStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let peeked = rustix::net::recv(stream, &mut [0; 1], rustix::net::RecvFlags::PEEK);
    let _ = stream.set_nonblocking(false);
    !matches!(peeked, Err(rustix::io::Errno::AGAIN))
}

/// Lets in who says hello in time: each on a thread of its own, so that nobody keeps others waiting, and not too many.
fn doorkeeper(
    listener: &UnixListener,
    send: SyncSender<Visitor>,
    closed: &AtomicBool,
    short: &Arc<AtomicBool>,
) {
    let inside = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {
                continue
            }
            // No descriptors left: those inside give some back, or the rendezvous times out.
            Err(error) if is_short(&error) && !closed.load(Ordering::Relaxed) => {
                short.store(true, Ordering::Relaxed);
                std::thread::sleep(AGAIN);
                continue;
            }
            Err(_) => return,
        };
        if is_same_user(&stream).is_err() || inside.load(Ordering::Relaxed) >= MOST_STRANGERS {
            continue;
        }
        inside.fetch_add(1, Ordering::Relaxed);
        let (send, leaving, short) = (send.clone(), inside.clone(), short.clone());
        let receive = move || {
            let hello = frame::receive(&stream, &[Kind::Hello], 1, Instant::now() + HELLO);
            leaving.fetch_sub(1, Ordering::Relaxed);
            let mut frame = match hello {
                Ok(frame) => frame,
                Err(error) if error.kind() == frame::SHORT => return short.store(true, Ordering::Relaxed),
                Err(_) => return,
            };
            let Ok(hello) = frame.parse::<Hello>() else { return };
            let process = frame.files.pop();
            let _ = send.try_send(Visitor { stream, hello, process }); // it comes again
        };
        if std::thread::Builder::new().name("hello".into()).spawn(receive).is_err() {
            inside.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
