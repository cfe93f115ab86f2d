//! Rank 0's side of the rendezvous: it waits until all ranks have arrived, and connects them to one
//! another.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::mpsc::{self, RecvTimeoutError, TrySendError};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};

use super::name::{self, Pending, TWO_JOBS};
use super::{is_early, Hello, Origin, Peers, RankInfo, Welcome, CAUSES, GRACE, REFUSING};
use crate::backend::limits::{why, Wanted};
use crate::notice::Notice;
use crate::world::processes::identity::job::Job;
use crate::world::processes::peers::connections::Connection;
use crate::world::processes::rendezvous::confirm::Confirmation;
use crate::world::processes::view_board::ViewBoard;
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::listener::{self, Listener};
use crate::world::processes::wire::private::Private;

/// Time to wait for a rank of this job after a process of another job has claimed that rank.
const FOREIGN_WAIT: Duration = Duration::from_secs(5);
/// Limit on remembered ranks, and on remembered jobs, of others.
const MOST_OTHERS: usize = 64;
/// Longest wait before other conditions than an arrival are checked.
const TICK: Duration = Duration::from_millis(100);

/// Meets the other ranks, which call `meet_rank_0`. Collective.
pub(super) fn meet(
    me: &RankInfo,
    address: &SocketAddr,
    deadline: Instant,
    timeout: Duration,
) -> Result<Peers, String> {
    let came = BTreeMap::new();
    RankZero {
        me,
        deadline,
        timeout,
        came,
        foreign_ranks: vec![],
        foreign_jobs: vec![],
        is_contested: false,
        refused: 0,
    }
    .meet(address)
}

struct RankZero<'a> {
    me: &'a RankInfo,
    deadline: Instant,
    timeout: Duration,
    came: BTreeMap<usize, Pending>,
    /// Ranks of other jobs that have arrived.
    foreign_ranks: Vec<ForeignRank>,
    /// Other jobs whose rank 0 has arrived, too.
    foreign_jobs: Vec<Job>,
    /// True if two processes claimed one rank.
    is_contested: bool,
    /// Number of ranks that were refused and got the reason.
    refused: usize,
}

#[derive(Debug)]
struct ForeignRank {
    rank: usize,
    job: Job,
    reason: String,
    until: Instant,
}

impl RankZero<'_> {
    fn meet(mut self, address: &SocketAddr) -> Result<Peers, String> {
        let listener = name::take(self.me, address, self.deadline, self.timeout)?;
        let (send, arrivals) = mpsc::sync_channel(listener::MOST);
        let (since, me) = (Instant::now(), Arc::new(self.me.clone()));
        let came = move |stream, mut frame: Frame| {
            let Ok(hello) = frame.parse::<Hello>() else { return };
            let process = frame.files.pop();
            match send.try_send(Pending { stream, hello, process }) {
                Ok(()) | Err(TrySendError::Full(_)) => {} // the process tries again
                Err(TrySendError::Disconnected(pending)) => {
                    pending.refuse_as_late(&name::begun(&me, &pending.hello, since))
                }
            }
        };
        let listener = Listener::open(listener, &[Kind::Hello], 1, came).map_err(|shut| {
            let reason = self.me.refusal.clone().unwrap_or_else(|| {
                format!(
                    "rank 0 can't start a thread to receive from the other ranks: {}",
                    shut.reason
                )
            });
            let until = self.deadline.min(Instant::now() + GRACE);
            shut.refuse(&[Kind::Hello], 1, self.me.world_size - 1, &reason, until);
            reason
        })?;
        // Descriptors in reserve, to report a shortage of descriptors with.
        let reserve = [(); 2].map(|()| pidfd_open(getpid(), PidfdFlags::empty()));
        let gathered = self.gather(&arrivals, &listener);
        drop(reserve);
        let result = gathered.and_then(|()| {
            self.connect_all().map_err(|reason| format!("rank 0 can't connect the ranks: {reason}"))
        });
        match result {
            // The listener answers later processes that the world has begun.
            Ok(peers) => Ok(Peers { held: Some(listener), ..peers }),
            Err(mut reason) => {
                if let Some(shortage) = listener
                    .shortage()
                    .filter(|shortage| !reason.contains(shortage) && !reason.contains("ulimit"))
                {
                    reason = format!("{reason}; {shortage}");
                }
                self.refuse_all(&arrivals, &listener, &reason);
                Err(reason)
            }
        }
    }

    /// Waits until all ranks have arrived.
    fn gather(
        &mut self,
        arrivals: &mpsc::Receiver<Pending>,
        listener: &Listener,
    ) -> Result<(), String> {
        if let Some(reason) = &self.me.refusal {
            return Err(reason.clone());
        }
        let mut notice = Notice::new(Some(0));
        while self.came.len() + 1 < self.me.world_size {
            if listener.is_stuck() {
                return Err(format!(
                    "rank 0 can't receive from the other ranks; {}",
                    listener.shortage().unwrap_or_default()
                ));
            }
            let now = Instant::now();
            let is_open = |foreign_rank: &&ForeignRank| {
                !self.came.contains_key(&foreign_rank.rank) && foreign_rank.until <= now
            };
            if let Some(foreign_rank) = self.foreign_ranks.iter().find(is_open) {
                return Err(foreign_rank.reason.clone());
            }
            notice.look(|| self.waiting());
            let left = self.deadline.saturating_duration_since(now);
            match arrivals.recv_timeout(left.min(TICK)) {
                Ok(pending) => self.admit(pending)?,
                Err(RecvTimeoutError::Timeout) if left > TICK => {}
                Err(RecvTimeoutError::Timeout) => return Err(self.missing()),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("the listening thread has ended".into())
                }
            }
        }
        Ok(())
    }

    /// Tells the reason to the ranks that have arrived or arrive soon.
    fn refuse_all(
        &mut self,
        arrivals: &mpsc::Receiver<Pending>,
        listener: &Listener,
        reason: &str,
    ) {
        let mut left = (self.me.world_size - 1).saturating_sub(self.came.len() + self.refused);
        // Closed first, so that other connections get these descriptors.
        std::mem::take(&mut self.came).values().for_each(|pending| pending.refuse(reason));
        // The error ends two jobs.
        left += if self.is_contested { self.me.world_size } else { 0 };
        let begin = Instant::now();
        while left > 0 {
            // The listener itself answers connections that can't be read.
            let grace =
                if self.me.refusal.is_some() && !listener.is_stuck() { REFUSING } else { GRACE };
            let patience =
                self.deadline.min(begin + grace).saturating_duration_since(Instant::now());
            match arrivals.recv_timeout(patience.min(TICK)) {
                // A rank of another job tries again after this process has ended, since its job may
                // have a world of its own.
                Ok(pending) if self.me.job.differs(&pending.hello.job).is_some() => {}
                Ok(pending) => {
                    pending.refuse(reason);
                    left -= 1;
                }
                Err(_) if patience <= TICK => return,
                Err(_) => {}
            }
        }
    }

    fn absent(&self) -> String {
        let missing = (1..self.me.world_size).filter(|rank| !self.came.contains_key(rank));
        missing.map(|rank| rank.to_string()).collect::<Vec<_>>().join(", ")
    }

    fn missing(&self) -> String {
        format!(
            "of the {} ranks of the world {:?}, these did not arrive within {:?}: {}; check that \
                they were started on this host with the same name (here {}); {CAUSES}",
            self.me.world_size,
            self.me.name,
            self.timeout,
            self.absent(),
            self.me.source
        )
    }

    fn waiting(&self) -> String {
        format!(
            "rank 0 of {} waits for ranks {} of the world {:?} (the name is {}): check that they \
                were started on this host with the same name, or set PARAM_AVERAGER_RENDEZVOUS to \
                one name on every rank; {CAUSES}",
            self.me.world_size,
            self.absent(),
            self.me.name,
            self.me.source
        )
    }

    fn admit(&mut self, pending: Pending) -> Result<(), String> {
        let (hello, mine) = (&pending.hello, self.me.hello());
        let (rank, name) = (hello.rank, &self.me.name);
        if hello.name != *name {
            // The hashes of two long names collide.
            pending
                .refuse(&format!("this socket belongs to the world {name:?}: choose another name"));
            return Ok(());
        }
        if let Some(differs) = mine.job.differs(&hello.job) {
            self.refuse_foreign(&pending, &differs);
            return Ok(());
        }
        let differs = [
            ("the crate version", &hello.crate_version, &mine.crate_version),
            ("the world size", &hello.world_size.to_string(), &mine.world_size.to_string()),
        ];
        let differs = differs.into_iter().find(|(_, theirs, ours)| theirs != ours);
        let claimant = match rank {
            0 => Some(&mine.job),
            rank => self
                .came
                .get(&rank)
                .filter(|claimant| !has_hung_up(&claimant.stream))
                .map(|v| &v.hello.job),
        };
        let refusal = if let Some(claimant) = claimant {
            self.is_contested = true;
            Some(format!(
                "two processes claim rank {rank} of the world {name:?}: {claimant} and {}: give \
                    each rank a number of its own, and each job its own MASTER_PORT or \
                    PARAM_AVERAGER_RENDEZVOUS",
                hello.job
            ))
        } else if let Some((what, theirs, ours)) = differs {
            Some(format!(
                "rank {rank} has {what} {theirs:?}, rank 0 has {ours:?}: start the same program \
                    with the same numbers on every rank"
            ))
        } else if rank >= self.me.world_size {
            Some(format!("a process claims rank {rank} of a world of {} ranks", self.me.world_size))
        } else {
            hello.refusal.clone().or_else(|| hello.host_info.refusal(rank, &mine.host_info))
        };
        match refusal {
            None => {
                self.came.insert(rank, pending);
                Ok(())
            }
            Some(reason) => {
                pending.refuse(&reason);
                self.refused += 1;
                Err(reason)
            }
        }
    }

    /// Refuses a rank of another job. If that job has a rank 0 of its own, this world begins
    /// without the rank. Otherwise the rank probably belongs to this world, which then fails after
    /// `FOREIGN_WAIT` instead of waiting for the timeout.
    fn refuse_foreign(&mut self, pending: &Pending, differs: &str) {
        let Hello { rank, job, world_size, .. } = &pending.hello;
        let reason = format!(
            "a process claims rank {rank} of the world {:?}, but seems to belong to another job \
                than rank 0: it is {job}, and rank 0 is {}: {differs}; {TWO_JOBS}",
            self.me.name, self.me.job
        );
        pending.refuse_as_foreign(&reason);
        // A rank that reports an error, or belongs to a larger world, does not stand for a rank of
        // this world.
        let is_one = pending.hello.refusal.is_none() && *world_size == self.me.world_size;
        let is_known = self.foreign_jobs.iter().any(|first| first.differs(job).is_none());
        if *rank == 0 {
            self.foreign_ranks.retain(|foreign_rank| foreign_rank.job.differs(job).is_some());
            if !is_known && self.foreign_jobs.len() < MOST_OTHERS {
                self.foreign_jobs.push(job.clone());
            }
        } else if is_one && !is_known && self.foreign_ranks.len() < MOST_OTHERS {
            let until = Instant::now() + FOREIGN_WAIT;
            self.foreign_ranks.push(ForeignRank { rank: *rank, job: job.clone(), reason, until });
        }
    }

    /// Sends every rank a socket to every other rank.
    fn connect_all(&mut self) -> Result<Peers, String> {
        let failed =
            |error: io::Error| why("making sockets for all ranks", Wanted::Descriptor, error);
        let size = self.me.world_size;
        let board = ViewBoard::new(size)?;
        // Keyed by (owner, peer).
        let mut sockets = BTreeMap::new();
        for (one, other) in (0..size).flat_map(|one| (one + 1..size).map(move |other| (one, other)))
        {
            let (left, right) = UnixStream::pair().map_err(failed)?;
            sockets.insert((one, other), Private::new(left));
            sockets.insert((other, one), Private::new(right));
        }
        let host_infos = (0..size).map(|rank| {
            self.came.get(&rank).map_or(&self.me.host_info, |v| &v.hello.host_info).clone()
        });
        let welcome =
            Welcome { host_infos: host_infos.collect(), origin: Origin::now(&self.me.job) };
        let own = pidfd_open(getpid(), PidfdFlags::empty()).ok();
        for (&rank, pending) in &self.came {
            let streams = sockets.range((rank, 0)..(rank + 1, 0)).map(|(_, stream)| stream.as_fd());
            let mut files = vec![board.file()];
            files.extend(streams);
            let processes = (0..size).filter(|&other| other != rank).map(|other| match other {
                0 => own.as_ref(),
                other => self.came[&other].process.as_ref(),
            });
            // Pidfds of all processes, or none.
            let processes: Option<Vec<&OwnedFd>> = processes.collect();
            files.extend(processes.unwrap_or_default().into_iter().map(AsFd::as_fd));
            match frame::send(
                &pending.stream,
                (Kind::Welcome, 0, 0),
                &welcome,
                &files,
                self.deadline,
            ) {
                Err(error) if !is_early(&error) => return Err(failed(error)),
                _ => {} // every peer detects the departure of that rank later
            }
        }
        let peers = welcome.host_infos.into_iter().enumerate().map(|(rank, host_info)| {
            let process = self.came.get_mut(&rank).and_then(|pending| pending.process.take());
            sockets.remove(&(0, rank)).map(|stream| (host_info, Connection { stream, process }))
        });
        let peers = peers.collect();
        let came = std::mem::take(&mut self.came)
            .into_iter()
            .map(|(rank, pending)| (rank, pending.stream));
        let confirmation = Confirmation::of_rank_0(came);
        Ok(Peers { board, peers, confirmation, origin: welcome.origin, held: None })
    }
}

/// True if the other end is closed. A rank sends nothing after its `Hello`.
fn has_hung_up(stream: &UnixStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let peeked = rustix::net::recv(stream, &mut [0; 1], rustix::net::RecvFlags::PEEK);
    let _ = stream.set_nonblocking(false);
    !matches!(peeked, Err(rustix::io::Errno::AGAIN))
}
