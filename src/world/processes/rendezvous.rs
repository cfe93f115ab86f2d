//! Rendezvous of the processes of a world. Rank 0 listens on an abstract Unix socket, which leaves
//! no file behind, and sends every rank a socket to every other. Rank 0 keeps the socket, and so
//! the name, for as long as it is in the world. This file holds the common part and the side of
//! ranks 1 and above.

pub(crate) mod confirm;
mod host;
mod name;
#[cfg(feature = "__testing")]
pub mod testing;

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{getpid, pidfd_open, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::backend::limits::{why, Wanted};
use crate::hash::fnv1a;
use crate::notice::Notice;
use crate::world::processes::identity::credentials::{
    is_same_user, is_some_user, user_of_the_name, CAUSES,
};
use crate::world::processes::identity::job::Job;
use crate::world::processes::peers::connections::Connection;
use crate::world::processes::peers::host_info::HostInfo;
use crate::world::processes::view_board::ViewBoard;
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::listener;
use crate::world::processes::wire::private::Private;
use crate::world::world_id::WorldId;
use confirm::Confirmation;

/// Time in which a rank that can't take part tries to tell the other ranks, which were started when
/// it was.
const REFUSING: Duration = Duration::from_secs(10);
/// Pause between two attempts to reach rank 0.
const AGAIN: Duration = Duration::from_millis(2);
/// Time in which late ranks are told why there is no world.
const GRACE: Duration = Duration::from_secs(2);
/// Time in which a process that was refused by a world of its name tries again: the former run of
/// a job that is started again may need a moment to end.
const RESTART: Duration = Duration::from_secs(2);
/// Pause between two of these attempts.
const RESTART_PAUSE: Duration = Duration::from_millis(50);
/// Number of a `Kind::Refuse` from a rank 0 that belongs to another job than the refused process.
const FOREIGN: u32 = 1;
/// Number of a `Kind::Refuse` from the rank 0 of a world that has begun.
const BEGUN: u32 = 2;
/// Longest name in bytes. The short messages to unknown processes have room for it.
pub(crate) const MOST_NAME: usize = 1024;
/// Characters of a reason that a first message has room for.
const MOST_REASON: usize = 1200;

/// First message of a rank to rank 0.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Hello {
    crate_version: String,
    name: String,
    rank: usize,
    world_size: usize,
    host_info: HostInfo,
    job: Job,
    /// The reason why this rank can't take part. The world does not begin then.
    refusal: Option<String>,
}

/// Answer of rank 0 to every other rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Welcome {
    /// Host information of all ranks, by rank.
    host_infos: Vec<HostInfo>,
    origin: Origin,
}

/// Rank 0 of the first view, which identifies the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Origin {
    pub(crate) job: Job,
    /// Time at which all ranks had arrived, in milliseconds of Unix time.
    since: u64,
}

impl Origin {
    /// Origin of a world whose ranks have all arrived now.
    pub(crate) fn now(job: &Job) -> Origin {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Origin { job: job.clone(), since: since.as_millis().try_into().unwrap_or(u64::MAX) }
    }

    /// Identity of the world for the user; `others` is the number of other worlds of the name.
    pub(crate) fn world(&self, name: &str, others: usize) -> WorldId {
        WorldId {
            name: name.into(),
            process: self.job.process(),
            pid: self.job.pid(),
            job: self.job.name(),
            since: UNIX_EPOCH.checked_add(Duration::from_millis(self.since)).unwrap_or(UNIX_EPOCH),
            others,
        }
    }
}

/// Data about this process that it brings to the rendezvous.
#[derive(Clone, Debug)]
pub(crate) struct RankInfo {
    pub(crate) name: String,
    /// Source of the name, for messages.
    pub(crate) source: String,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    pub(crate) host_info: HostInfo,
    pub(crate) job: Job,
    /// The reason why this rank can't take part.
    pub(crate) refusal: Option<String>,
}

/// Result of a rendezvous.
#[derive(Debug)]
pub(crate) struct Peers {
    pub(crate) board: ViewBoard,
    /// Connections by rank; `None` for this rank.
    pub(crate) peers: Vec<Option<(HostInfo, Connection)>>,
    /// Streams to rank 0 for the last step of the rendezvous.
    pub(crate) confirmation: Confirmation,
    pub(crate) origin: Origin,
    /// Listener of rank 0, which holds the name and answers later processes.
    pub(crate) held: Option<listener::Listener>,
}

/// Meets the other ranks. Collective. An error says what is wrong and what to do. A rank that can't
/// take part tells the ranks that arrive soon.
pub(crate) fn meet(me: &RankInfo, timeout: Duration) -> Result<Peers, String> {
    let timeout = if me.refusal.is_some() { timeout.min(REFUSING) } else { timeout };
    let deadline = crate::deadline::after(timeout);
    is_some_user()?;
    let address = address(&me.name, None)?;
    match me.rank {
        0 => host::meet(me, &address, deadline, timeout),
        _ => meet_rank_0(me, &address, deadline, timeout),
    }
}

/// Abstract socket address of rank 0's rendezvous listener (`None`) or of join listener `listener`.
/// The address is free when its process ends. Names longer than 64 bytes are truncated and suffixed
/// with an FNV-1a hash.
pub(crate) fn address(name: &str, listener: Option<usize>) -> Result<SocketAddr, String> {
    if name.len() > MOST_NAME {
        return Err(format!(
            "the name of the world has {} bytes, but the limit is {MOST_NAME}: choose a shorter \
                name",
            name.len()
        ));
    }
    let mut short = name.to_owned();
    if name.len() > 64 {
        // `Hello` carries the whole name, which tells colliding names apart.
        short =
            format!("{}…{:016x}", name.chars().take(10).collect::<String>(), fnv1a(name.bytes()));
    }
    let uid = user_of_the_name();
    let socket = match listener {
        None => format!("param-averager/{uid}/{short}"),
        Some(number) => format!("param-averager-join/{uid}/{short}/{number}"),
    };
    SocketAddr::from_abstract_name(socket)
        .map_err(|error| format!("the name of the world, {name:?}: {error}"))
}

impl RankInfo {
    fn hello(&self) -> Hello {
        let cut = |reason: &String| reason.chars().take(MOST_REASON).collect();
        Hello {
            crate_version: env!("CARGO_PKG_VERSION").into(),
            name: self.name.clone(),
            rank: self.rank,
            world_size: self.world_size,
            host_info: self.host_info.clone(),
            job: self.job.clone(),
            refusal: self.refusal.as_ref().map(cut),
        }
    }
}

fn meet_rank_0(
    me: &RankInfo,
    address: &SocketAddr,
    deadline: Instant,
    timeout: Duration,
) -> Result<Peers, String> {
    let failed = |error: io::Error| {
        why(&format!("rank 0 of the world {:?}", me.name), Wanted::Descriptor, error)
    };
    let mut notice = Notice::new(Some(me.rank));
    let mut restart = Restart::default();
    loop {
        let greeted = connect(address).map(Private::new).and_then(|stream| {
            let answer = greet(me, &stream, deadline, &mut notice).inspect_err(|error| {
                if error.kind() == frame::SHORT {
                    confirm::refuse(&stream, &error.to_string());
                }
            });
            Ok((answer?, stream))
        });
        match greeted {
            Ok((frame, _)) if restart.waits_for(&frame, deadline) => {}
            Ok((frame, stream)) => {
                let is_foreign =
                    frame.kind == Kind::Refuse && [FOREIGN, BEGUN].contains(&frame.number);
                let mut peers = welcomed(me, frame).inspect_err(|reason| {
                    confirm::refuse(&stream, reason);
                    if is_foreign {
                        tell_own_rank_0(me, address, reason);
                    }
                })?;
                peers.confirmation = Confirmation::of_other_rank(stream);
                return Ok(peers);
            }
            // No process listens yet, or any more, or the listener is at its limit.
            Err(error) if is_early(&error) && Instant::now() < deadline => {
                notice.look(|| waiting(me));
                std::thread::sleep(AGAIN);
            }
            Err(error) if is_early(&error) || is_late(&error) => {
                return Err(format!(
                    "rank 0 of the world {:?} was not found on this host within {timeout:?}, or \
                        did not answer: check that it was started, and that every rank gives the \
                        same name (here {}), or set PARAM_AVERAGER_RENDEZVOUS to one name on every \
                        rank; {CAUSES}",
                    me.name, me.source
                ))
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Wait for a world of the same name to end.
#[derive(Debug, Default)]
struct Restart {
    /// Time of the first refusal by such a world.
    since: Option<Instant>,
}

impl Restart {
    /// True if this answer is the refusal of a world that has begun and may end soon. Pauses then:
    /// the caller tries again.
    fn waits_for(&mut self, answer: &Frame, deadline: Instant) -> bool {
        if answer.kind != Kind::Refuse || answer.number != BEGUN {
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        let again = Instant::now() + RESTART_PAUSE;
        let waits = again < deadline.min(since + RESTART);
        if waits {
            std::thread::sleep(RESTART_PAUSE);
        }
        waits
    }
}

/// Tells rank 0 of this job, which may take the name later and would wait for this rank. It may
/// itself be waiting for the former holder of the name to end.
fn tell_own_rank_0(me: &RankInfo, address: &SocketAddr, reason: &str) {
    const PAUSE: Duration = Duration::from_millis(20);
    let refused = RankInfo { refusal: Some(reason.into()), ..me.clone() };
    let until = Instant::now() + RESTART + GRACE;
    let mut notice = Notice::new(Some(me.rank));
    while Instant::now() < until {
        std::thread::sleep(PAUSE);
        let answer = connect(address).map(Private::new);
        let answer = answer.and_then(|stream| greet(&refused, &stream, until, &mut notice));
        if answer.is_ok_and(|answer| answer.kind == Kind::Refuse && answer.number == 0) {
            return;
        }
    }
}

fn waiting(me: &RankInfo) -> String {
    if me.rank == 0 {
        return format!(
            "rank 0 waits for the name {:?} ({}): the process that holds the name is about to end",
            me.name, me.source
        );
    }
    format!(
        "rank {} of {} waits for rank 0 of the world {:?} (the name is {}): check that rank 0 was \
            started on this host with the same name, or set PARAM_AVERAGER_RENDEZVOUS to one name \
            on every rank; {CAUSES}",
        me.rank, me.world_size, me.name, me.source
    )
}

/// Sends a `Hello` to the listening process, and waits for the answer.
fn greet(
    me: &RankInfo,
    stream: &UnixStream,
    deadline: Instant,
    notice: &mut Notice,
) -> io::Result<Frame> {
    is_same_user(stream).map_err(io::Error::other)?;
    let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
    let files: Vec<_> = process.iter().map(AsFd::as_fd).collect();
    frame::send(stream, (Kind::Hello, 0, 0), &me.hello(), &files, deadline)?;
    while !notice.is_told()
        && !is_readable(stream, deadline.min(notice.at()))?
        && Instant::now() < deadline
    {
        notice.look(|| waiting(me));
    }
    frame::receive(stream, &[Kind::Welcome, Kind::Refuse], frame::MOST_FILES, deadline)
}

fn is_readable(stream: &UnixStream, until: Instant) -> io::Result<bool> {
    let left = until.saturating_duration_since(Instant::now());
    let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&left)) {
        Err(rustix::io::Errno::INTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}

/// Connects without blocking on a listener whose backlog is full.
pub(crate) fn connect(address: &SocketAddr) -> io::Result<UnixStream> {
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
    matches!(
        error.kind(),
        ConnectionRefused | NotFound | ConnectionReset | UnexpectedEof | BrokenPipe
    )
}

fn is_late(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock)
}

fn welcomed(me: &RankInfo, frame: Frame) -> Result<Peers, String> {
    let failed = |error: io::Error| format!("rank 0's answer: {error}");
    if frame.kind == Kind::Refuse {
        return Err(frame.parse::<String>().map_err(failed)?);
    }
    let Welcome { host_infos, origin } = frame.parse().map_err(failed)?;
    let mut files = frame.files.into_iter();
    let missing = || "rank 0's answer lacks file descriptors: raise ulimit -n".to_owned();
    let board = ViewBoard::open(files.next().ok_or_else(missing)?)?;
    if host_infos.len() != me.world_size {
        return Err(format!(
            "rank 0's answer describes {} ranks instead of {}",
            host_infos.len(),
            me.world_size
        ));
    }
    let mut peers = vec![];
    for (rank, host_info) in host_infos.into_iter().enumerate() {
        peers.push(if rank == me.rank {
            None
        } else {
            let stream = Private::new(UnixStream::from(files.next().ok_or_else(missing)?));
            Some((host_info, Connection { stream, process: None }))
        });
    }
    // Pidfds follow the sockets, either all or none.
    for (_, peer) in peers.iter_mut().flatten() {
        peer.process = files.next();
    }
    Ok(Peers { board, peers, confirmation: Confirmation::default(), origin, held: None })
}
