//! Rank 0: waits until every rank has come, and makes them known to one another.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};

use super::{is_early, Crew, Hello, Me, Met, Welcome, AGAIN, PARTING};
use crate::backend::limits::{why, Wanted};
use crate::world::processes::confirm::Confirmation;
use crate::world::processes::frame::{self, Frame, Kind};
use crate::world::processes::page::Page;
use crate::world::processes::strangers::{self, Door};

/// How long ranks that come late are told why there is no world.
const GRACE: Duration = Duration::from_secs(1);

/// Collective, with `visit` of all others.
pub(super) fn meet(
    me: &Me,
    address: &SocketAddr,
    deadline: Instant,
    timeout: Duration,
) -> Result<Crew, String> {
    Host { me, deadline, timeout, came: BTreeMap::new() }.meet(address)
}

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
        let (send, visitors) = mpsc::sync_channel(strangers::MOST);
        let came = move |stream, mut frame: Frame| {
            let Ok(hello) = frame.parse::<Hello>() else { return };
            let process = frame.files.pop();
            let _ = send.try_send(Visitor { stream, hello, process }); // it comes again
        };
        let door = Door::open(listener, &[Kind::Hello], 1, came);
        let door = door.map_err(|error| format!("can't start a thread: {error}"))?;
        let result = self.gather(&visitors).and_then(|()| self.introduce());
        result.map_err(|mut reason| {
            if door.was_short() {
                reason.push_str("; rank 0 has run out of file descriptors: raise ulimit -n");
            }
            self.refuse_all(&visitors, &reason);
            reason
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
        let failed = |error: io::Error| why("making sockets for all ranks", Wanted::Descriptor, error);
        let size = self.me.world_size;
        let page = Page::new(size)?;
        // By whose it is, and to whom it leads.
        let mut sockets = BTreeMap::new();
        for (one, other) in (0..size).flat_map(|one| (one + 1..size).map(move |other| (one, other))) {
            let (left, right) = UnixStream::pair().map_err(failed)?;
            sockets.insert((one, other), left);
            sockets.insert((other, one), right);
        }
        let homes =
            (0..size).map(|rank| self.came.get(&rank).map_or(&self.me.home, |v| &v.hello.home).clone());
        let welcome = Welcome { homes: homes.collect() };
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
        let peers = welcome.homes.into_iter().enumerate().map(|(rank, home)| {
            let process = self.came.get_mut(&rank).and_then(|visitor| visitor.process.take());
            sockets.remove(&(0, rank)).map(|stream| (home, Met { stream, process }))
        });
        let peers = peers.collect();
        let came = std::mem::take(&mut self.came).into_iter().map(|(rank, visitor)| (rank, visitor.stream));
        Ok(Crew { page, peers, confirmation: Confirmation::of_rank_0(came) })
    }
}

/// Whether the other end is closed: nobody says anything after its hello.
fn has_hung_up(stream: &UnixStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let peeked = rustix::net::recv(stream, &mut [0; 1], rustix::net::RecvFlags::PEEK);
    let _ = stream.set_nonblocking(false);
    !matches!(peeked, Err(rustix::io::Errno::AGAIN))
}
