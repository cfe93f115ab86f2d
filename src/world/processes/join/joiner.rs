//! The joiner's side of joining a world: it connects to every member, and waits until they admit
//! it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};

use crate::abi::PA_MAX_WORLD;
use crate::backend::limits::{self, is_shortage, Wanted};
use crate::notice::Notice;
use crate::sync::lock;
use crate::world::processes::identity::credentials::{is_same_user, is_some_user, CAUSES};
use crate::world::processes::join::listener::{JoinOffer, JoinRequest, MOST_LISTENERS, PATIENCE};
use crate::world::processes::peers::connections::Connection;
use crate::world::processes::peers::host_info::{HostInfo, LocalDevice};
use crate::world::processes::peers::peer_set::{CurrentView, PeerSet};
use crate::world::processes::rendezvous::{address, connect, Origin};
use crate::world::processes::view_board::{View, ViewBoard};
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::private::Private;

/// Shortest pause between two attempts to find a world, or to reach a member that does not answer.
const AGAIN: Duration = Duration::from_millis(20);
/// Time that further listeners have to answer once a world has been found.
const FURTHER: Duration = Duration::from_millis(200);
/// Limit on worlds of one name that are over or unreachable.
const MOST_WORLDS: usize = 64;

/// Joins a world. Also returns its origin, and the number of other worlds of the name.
pub(crate) fn join(
    name: &str,
    own: LocalDevice,
    timeout: Duration,
) -> Result<(PeerSet, Origin, usize), String> {
    let deadline = crate::deadline::after(timeout);
    is_some_user()?;
    address(name, None)?; // refuses a name that is too long
    let mut lost = vec![];
    let mut notice = Notice::new(None);
    loop {
        let found =
            find(name, &own.host_info, &lost, deadline, &mut notice).map_err(
                |reason| match reason {
                    Some(reason) => reason,
                    None => format!(
                "no world of this name was found on this host within {timeout:?}: check that its \
                    ranks are running, and that they gave the same name; {CAUSES}"
            ),
                },
            )?;
        let Found { board, origin, others } = found;
        let nonce = board.nonce();
        match become_member(name, &own, board, (deadline, timeout), &mut notice) {
            Err(NotAdmitted::Lost) if lost.len() < MOST_WORLDS => lost.push(nonce),
            Err(NotAdmitted::Lost) => return Err("its ranks can't be reached".into()),
            Err(NotAdmitted::For(reason)) => {
                return Err(format!("{reason} (it is {})", origin.world(name, others)))
            }
            Ok(peer_set) => return Ok((peer_set, origin, others)),
        }
    }
}

/// Waits until the world of this view board admits this process.
fn become_member(
    name: &str,
    own: &LocalDevice,
    board: ViewBoard,
    (deadline, timeout): (Instant, Duration),
    notice: &mut Notice,
) -> Result<PeerSet, NotAdmitted> {
    let full = || NotAdmitted::For("it has no id left for a further process".into());
    let id = board.new_id().ok_or_else(full)?;
    let first = board.agreed();
    let peer_set = PeerSet::new(id, own.clone(), board, first);
    let (peers, listeners) = (BTreeSet::new(), BTreeMap::new());
    let mut joiner = Joiner {
        name,
        peer_set: &peer_set,
        peers,
        listeners,
        announced_in: None,
        last_connected: Instant::now(),
    };
    let view = CurrentView::new(joiner.wait(deadline, timeout, notice)?);
    peer_set.is_new.store(true, Ordering::Relaxed);
    peer_set.enter(&view);
    *lock(&peer_set.latest) = view;
    Ok(peer_set)
}

/// Reason why a process was not admitted.
enum NotAdmitted {
    /// No member can be reached any more.
    Lost,
    For(String),
}

struct Found {
    board: ViewBoard,
    origin: Origin,
    /// Number of further worlds of the name.
    others: usize,
}

/// Finds the first world of this name that answers, except those in `lost`. An error is `None` if
/// there is no such world.
fn find(
    name: &str,
    host_info: &HostInfo,
    lost: &[u64],
    deadline: Instant,
    notice: &mut Notice,
) -> Result<Found, Option<String>> {
    let (mut pause, mut why) = (AGAIN, None);
    loop {
        let (mut found, mut others) = (None::<Answer>, BTreeSet::new());
        for listener in 0..MOST_LISTENERS {
            let until =
                if found.is_some() { deadline.min(Instant::now() + FURTHER) } else { deadline };
            match (request(name, listener, host_info, until), &found) {
                (Ok(answer), _) if lost.contains(&answer.offer.nonce) => {}
                (Ok(answer), None) => found = Some(answer),
                (Ok(answer), Some(found)) if answer.offer.nonce != found.offer.nonce => {
                    others.insert(answer.offer.nonce);
                }
                (Err(Refused::For(reason)), None) => return Err(Some(reason)),
                (Err(Refused::NotThere(reason)), _) => why = reason.or(why),
                _ => {}
            }
        }
        if let Some(Answer { board, offer, .. }) = found {
            return Ok(Found { board, origin: offer.origin, others: others.len() });
        }
        if Instant::now() + pause > deadline {
            return Err(why);
        }
        notice.look(|| {
            format!(
                "a process looks for a world named {name:?} to join: check that its ranks are \
                    running on this host, and that they gave the same name; {CAUSES}"
            )
        });
        std::thread::sleep(pause);
        pause = (2 * pause).min(10 * AGAIN);
    }
}

/// The answer of a member's join listener.
struct Answer {
    stream: Private<UnixStream>,
    board: ViewBoard,
    offer: JoinOffer,
    process: Option<std::os::fd::OwnedFd>,
}

enum Refused {
    /// The listener does not exist, or gives no valid answer, for this reason.
    NotThere(Option<String>),
    For(String),
}

/// Asks a join listener for its world.
fn request(
    name: &str,
    listener: usize,
    host_info: &HostInfo,
    deadline: Instant,
) -> Result<Answer, Refused> {
    let deadline = deadline.min(Instant::now() + PATIENCE);
    let request = JoinRequest {
        crate_version: env!("CARGO_PKG_VERSION").into(),
        name: name.into(),
        host_info: host_info.clone(),
    };
    let ask_for_offer = || -> io::Result<_> {
        let stream =
            Private::new(connect(&address(name, Some(listener)).map_err(io::Error::other)?)?);
        is_same_user(&stream).map_err(io::Error::other)?;
        let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
        let files: Vec<_> = process.iter().map(AsFd::as_fd).collect();
        frame::send(&stream, (Kind::JoinRequest, 0, 0), &request, &files, deadline)?;
        let answer = frame::receive(&stream, &[Kind::JoinOffer, Kind::Refuse], 2, deadline)?;
        Ok((stream, answer))
    };
    let (stream, answer) = ask_for_offer().map_err(|error| match error.kind() {
        frame::SHORT => Refused::For(error.to_string()),
        _ if is_shortage(&error) => {
            Refused::For(limits::why("connecting to it", Wanted::Descriptor, error))
        }
        io::ErrorKind::InvalidData | frame::OTHER_VERSION | io::ErrorKind::Other => {
            Refused::NotThere(Some(error.to_string()))
        }
        _ => Refused::NotThere(None),
    })?;
    let failed = |what: String| Refused::For(format!("its answer: {what}"));
    if answer.kind == Kind::Refuse {
        return Err(Refused::For(answer.parse().unwrap_or_else(|error| error.to_string())));
    }
    let offer: JoinOffer = answer.parse().map_err(|error| failed(error.to_string()))?;
    let mut files = answer.files.into_iter();
    let board = files.next().ok_or_else(|| failed("no memory".into()))?;
    let board = ViewBoard::open(board).map_err(failed)?;
    Ok(Answer { stream, board, offer, process: files.next() })
}

/// A process that waits for admission.
struct Joiner<'a> {
    name: &'a str,
    peer_set: &'a PeerSet,
    /// Members that this process is connected to.
    peers: BTreeSet<usize>,
    /// Number of each member's listener, by id.
    listeners: BTreeMap<usize, usize>,
    /// The last view whose members were all sent `JoinPending`.
    announced_in: Option<u32>,
    /// Time at which a member was last connected.
    last_connected: Instant,
}

impl Joiner<'_> {
    /// Waits until a view has this process as a member.
    fn wait(
        &mut self,
        deadline: Instant,
        timeout: Duration,
        notice: &mut Notice,
    ) -> Result<View, NotAdmitted> {
        let connections = &self.peer_set.connections;
        loop {
            let agreed = connections.board.agreed();
            if agreed.members.contains(&self.peer_set.me) {
                return Ok(agreed);
            }
            let (view, members) = (agreed.number, &agreed.members);
            self.peer_set.lock().forget_before(view);
            let (mut unconnected, mut is_connected) = (None, false);
            for (rank, &member) in members.iter().enumerate() {
                if self.connect_to(member, deadline)? {
                    is_connected = true;
                } else {
                    unconnected.get_or_insert(rank);
                }
            }
            // Set after the members were asked: asking a member that is stopped takes as long as
            // `PATIENCE`.
            if is_connected {
                self.last_connected = Instant::now();
            }
            if self.last_connected.elapsed() > PATIENCE {
                // the world is over, or its listeners belong to another world now
                return Err(NotAdmitted::Lost);
            }
            if unconnected.is_none() && self.announced_in != Some(view) {
                for &member in members {
                    let told = (Kind::JoinPending, view, 0);
                    let _ = self.peer_set.send(member, told, &(), &[], deadline);
                    // a departed member is detected below
                }
                self.announced_in = Some(view);
            }
            if Instant::now() >= deadline {
                return Err(NotAdmitted::For(timeout_reason(unconnected, members.len(), timeout)));
            }
            notice.look(|| {
                let waits = timeout_reason(unconnected, members.len(), timeout);
                format!("a process still waits to join the world {:?}: {waits}", self.name)
            });
            let soon =
                deadline.min(Instant::now() + if unconnected.is_some() { AGAIN } else { PATIENCE });
            let departed = self.peer_set.wait(soon, |state| {
                let departed = members.iter().all(|member| state.departed.contains(member));
                (departed || connections.board.view() != view).then_some(departed)
            });
            if departed == Some(true) && connections.board.view() == view && !self.peers.is_empty()
            {
                return Err(NotAdmitted::For(
                    "the world has ended: all its ranks have left".into(),
                ));
            }
            if departed == Some(true) {
                std::thread::sleep(AGAIN); // no peer is left to wait for
            }
        }
    }

    /// True if this member is connected. Connects to it otherwise.
    fn connect_to(&mut self, member: usize, deadline: Instant) -> Result<bool, NotAdmitted> {
        let mut state = self.peer_set.lock();
        let has_departed = state.departed.contains(&member);
        if self.peers.contains(&member) {
            return Ok(!has_departed); // a member that has departed stays one until the view changes
        }
        if has_departed {
            // it closed the connection before it had added this process: try again
            state.forget(member);
        }
        drop(state);
        if !self.peer_set.lock().host_infos.contains_key(&member) {
            let Some(Answer { stream, offer, process, .. }) = self.ask(member, deadline)? else {
                return Ok(false);
            };
            let connect = (Kind::Connect, 0, self.peer_set.me as u32);
            if frame::send(&stream, connect, &(), &[], deadline).is_err() {
                return Ok(false);
            }
            let added = self.peer_set.connections.add(
                member,
                offer.host_info,
                Connection { stream, process },
            );
            added.map_err(|failed| NotAdmitted::For(failed.reason))?;
        }
        let soon = deadline.min(Instant::now() + PATIENCE);
        let answer = self.peer_set.wait(soon, |state| {
            let answer = state.take(member, (Kind::Connected, 0, 0));
            (answer.is_some() || state.departed.contains(&member)).then_some(answer)
        });
        let refusal = |frame: Frame| {
            frame.parse::<Option<String>>().unwrap_or_else(|error| Some(error.to_string()))
        };
        let answer = answer.map(|answer| answer.map(refusal));
        if let Some(Some(Some(reason))) = answer {
            let rank = self
                .peer_set
                .connections
                .board
                .agreed()
                .members
                .iter()
                .position(|&other| other == member);
            return Err(NotAdmitted::For(format!("its rank {} {reason}", rank.unwrap_or(member))));
        }
        let answer = answer.map(|answer| answer.is_some());
        if answer == Some(true) {
            self.peers.insert(member);
        }
        Ok(answer == Some(true))
    }

    /// Sends a `JoinRequest` to a member, whose listener's number may be unknown. `None`: no
    /// answer.
    fn ask(&mut self, member: usize, deadline: Instant) -> Result<Option<Answer>, NotAdmitted> {
        let nonce = self.peer_set.connections.board.nonce();
        let host_info = self.peer_set.lock().host_infos[&self.peer_set.me].clone();
        let (known, mut refusal) = (self.listeners.get(&member).copied(), None);
        for listener in
            known.into_iter().chain((0..MOST_LISTENERS).filter(|listener| Some(*listener) != known))
        {
            // The listener of a connected member belongs to that member while it lives.
            let is_there = |peer: &&usize| !self.peer_set.lock().departed.contains(peer);
            if self
                .peers
                .iter()
                .filter(is_there)
                .any(|peer| self.listeners.get(peer) == Some(&listener))
            {
                continue;
            }
            match request(self.name, listener, &host_info, deadline) {
                Ok(answer) if answer.offer.nonce == nonce => {
                    self.listeners.insert(answer.offer.id, listener);
                    if answer.offer.id == member {
                        return Ok(Some(answer));
                    }
                }
                Ok(_) | Err(Refused::NotThere(_)) => {} // another world of this name, or no world
                Err(Refused::For(reason)) => refusal = Some(reason),
            }
        }
        refusal.map_or(Ok(None), |reason| Err(NotAdmitted::For(reason)))
    }
}

/// The reason for a timeout.
fn timeout_reason(unconnected: Option<usize>, ranks: usize, timeout: Duration) -> String {
    if let Some(rank) = unconnected {
        return format!(
            "its rank {rank} did not answer within {timeout:?}: the rank may be stopped, or have \
                no listener because of another world of this name or too few file descriptors"
        );
    }
    if ranks == PA_MAX_WORLD as usize {
        return format!(
            "it has {ranks} ranks, which is the limit, and none has left within {timeout:?}"
        );
    }
    format!(
        "its {ranks} ranks admitted no process within {timeout:?}: LocalSgd admits one after an \
            average that is due, ParamAverager::admit_joiner where it is called"
    )
}
