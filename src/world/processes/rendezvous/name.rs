//! The name of a world: rank 0 takes it, and answers later processes that want it.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::{
    connect, greet, is_early, is_late, Hello, RankInfo, Restart, AGAIN, BEGUN, FOREIGN, GRACE,
};
use crate::backend::limits::{why, Wanted};
use crate::notice::Notice;
use crate::world::processes::identity::ancestry::Process;
use crate::world::processes::identity::credentials::Credentials;
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::listener::{self, Listener};
use crate::world::processes::wire::private::Private;

/// Time that a process holding the name has for one answer, and in all. A process that is ending
/// has no such limit.
const ANSWER: Duration = Duration::from_millis(500);
const SILENCE: Duration = Duration::from_secs(5);

/// Advice for two jobs with one name.
pub(super) const TWO_JOBS: &str =
    "if they are one job, set PARAM_AVERAGER_RENDEZVOUS to one name on \
    every rank, or, where the program gives the name, call CommunicatorBuilder::job; if they are \
    two jobs, give each its own MASTER_PORT or PARAM_AVERAGER_RENDEZVOUS";

/// A rank that has sent its `Hello`.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) stream: Private<UnixStream>,
    pub(super) hello: Hello,
    pub(super) process: Option<OwnedFd>,
}

impl Pending {
    pub(super) fn refuse(&self, reason: &str) {
        self.answer(0, reason);
    }

    /// Refuses a rank of another job, which may have a rank 0 of its own.
    pub(super) fn refuse_as_foreign(&self, reason: &str) {
        self.answer(FOREIGN, reason);
    }

    /// Refuses a process that comes after the world has begun. It may try again.
    pub(super) fn refuse_as_late(&self, reason: &str) {
        self.answer(BEGUN, reason);
    }

    fn answer(&self, number: u32, reason: &str) {
        // The rank may have departed.
        let _ = frame::send(
            &self.stream,
            (Kind::Refuse, 0, number),
            &reason,
            &[],
            Instant::now() + GRACE,
        );
    }
}

/// Takes the name. Fails if another process holds it.
pub(super) fn take(
    me: &RankInfo,
    address: &SocketAddr,
    deadline: Instant,
    timeout: Duration,
) -> Result<UnixListener, String> {
    let name = &me.name;
    let (mut silent, mut notice) = (None, Notice::new(Some(me.rank)));
    let mut restart = Restart::default();
    loop {
        match UnixListener::bind_addr(address) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => {
                return Err(why(
                    &format!("listening on the name {name:?}"),
                    Wanted::Descriptor,
                    error,
                ))
            }
        }
        if Instant::now() >= deadline {
            return Err(format!("the name {name:?} was in use for all of {:?}", timeout));
        }
        let until = deadline.min(Instant::now() + ANSWER);
        let holder = connect(address).map(Private::new);
        let pid = holder.as_ref().ok().and_then(|holder| Credentials::of(holder).ok()?.pid);
        match holder.and_then(|holder| greet(me, &holder, until, &mut notice)) {
            Ok(frame) if restart.waits_for(&frame, deadline) => continue,
            Ok(frame) if frame.kind == Kind::Refuse => {
                let reason = frame.parse().unwrap_or_else(|error: io::Error| error.to_string());
                tell_own_ranks(me, address, deadline, &reason);
                return Err(reason);
            }
            Ok(_) => {
                return Err(format!(
                    "the name {name:?} is held by a process that is not a rank: end that process, \
                        or choose another name"
                ))
            }
            // A world of that name has just ended, or is about to begin.
            Err(error) if is_early(&error) => {}
            Err(error) if is_late(&error) => {
                // A process that ends frees its memory before it closes its sockets, which takes
                // long for much memory.
                let is_ending = pid.and_then(Process::of).is_some_and(|process| process.is_ending);
                let since = *silent.get_or_insert_with(Instant::now);
                if !is_ending && since.elapsed() > SILENCE {
                    let pid = pid.map_or("a process of another PID namespace".into(), |pid| {
                        format!("process {pid}")
                    });
                    return Err(format!(
                        "two processes claim rank 0 of the world {name:?}: its name, {}, is held \
                            by {pid}, which does not answer: end that process, or give this world \
                            a name of its own by PARAM_AVERAGER_RENDEZVOUS",
                        me.source
                    ));
                }
            }
            Err(error) => return Err(format!("the process that holds the name {name:?}: {error}")),
        }
        std::thread::sleep(AGAIN);
    }
}

/// Tells the other ranks of this job, which wait for this rank, in case the process that holds the
/// name ends soon.
fn tell_own_ranks(me: &RankInfo, address: &SocketAddr, deadline: Instant, reason: &str) {
    let until = deadline.min(Instant::now() + GRACE);
    let mut left = me.world_size - 1;
    while left > 0 && Instant::now() < until {
        std::thread::sleep(AGAIN);
        let Ok(listener) = UnixListener::bind_addr(address) else { continue };
        let (send, arrivals) = mpsc::sync_channel(listener::MOST);
        let (job, size) = (me.job.clone(), me.world_size);
        let refuse_own = move |stream, frame: Frame| {
            let hello = frame.parse::<Hello>();
            // Ranks of another job try again after this process has ended.
            let is_mine = |hello: &Hello| {
                (1..size).contains(&hello.rank) && job.differs(&hello.job).is_none()
            };
            if let Some(hello) = hello.ok().filter(is_mine) {
                let _ = send.try_send(Pending { stream, hello, process: None });
            }
        };
        let Ok(_listener) = Listener::open(listener, &[Kind::Hello], 1, refuse_own) else { return };
        while let Ok(pending) =
            arrivals.recv_timeout(until.saturating_duration_since(Instant::now()))
        {
            pending.refuse(reason);
            left -= 1;
            if left == 0 {
                return;
            }
        }
    }
}

/// The answer to a process that arrives after all ranks.
pub(super) fn begun(me: &RankInfo, hello: &Hello, since: Instant) -> String {
    let differs = me.job.differs(&hello.job);
    let seconds = since.elapsed().as_secs();
    let how = match (&differs, hello.rank) {
        (Some(differs), _) => format!("{differs}; {TWO_JOBS}"),
        (None, 0) => "end that process, or give this job its own MASTER_PORT or \
            PARAM_AVERAGER_RENDEZVOUS"
            .into(),
        (None, rank) => format!(
            "the world has a rank {rank} already: check whether this process was started twice, or \
                use Communicator::join to join the world"
        ),
    };
    format!(
        "two processes claim rank {} of the world {:?}, which began {seconds} s ago: its rank 0 is \
            {}; this process is {}: {how}",
        hello.rank, me.name, me.job, hello.job
    )
}
