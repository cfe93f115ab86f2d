//! A process that joins a world that has begun: it becomes a peer of every member, and waits until they let it in.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};

use super::credentials::{is_same_user, is_some_user, CAUSES};
use super::door::{Inside, Knock, DOORS, PATIENCE};
use super::frame::{self, Frame, Kind};
use super::home::{Home, Own};
use super::links::{Generation, Links};
use super::page::{Decision, Page};
use super::private::Private;
use super::rendezvous::{address, connect, Met, Origin};
use crate::abi::PA_MAX_WORLD;
use crate::backend::limits::{self, is_shortage, Wanted};

/// Between two looks for a world that is not there yet, or for a member that does not answer.
const AGAIN: Duration = Duration::from_millis(20);
/// How long a further door has to say which world is behind it.
const GLANCE: Duration = Duration::from_millis(200);
/// Worlds of this name that are over or out of reach. More there will hardly be.
const MOST_WORLDS: usize = 64;

/// Until it is let in. With how many other worlds of the name there were.
pub(super) fn join(name: &str, own: Own, timeout: Duration) -> Result<(Links, Origin, usize), String> {
    let deadline = crate::deadline::after(timeout);
    is_some_user()?;
    address(name, None)?; // refuses a name that is too long
    let mut lost = vec![];
    loop {
        let found = find(name, &own.home, &lost, deadline).map_err(|reason| match reason {
            Some(reason) => reason,
            None => format!(
                "no such world was to be found on this host within {timeout:?}: see that its ranks are running, and that they gave the \
                 same name; {CAUSES}"
            ),
        })?;
        let Found { page, origin, others } = found;
        let nonce = page.nonce();
        match enter(name, &own, page, deadline, timeout) {
            Err(Outside::Lost) if lost.len() < MOST_WORLDS => lost.push(nonce),
            Err(Outside::Lost) => return Err("its ranks are not to be reached".into()),
            Err(Outside::For(reason)) => {
                return Err(format!("{reason} (it is {})", origin.world(name, others)))
            }
            Ok(links) => return Ok((links, origin, others)),
        }
    }
}

/// Until the world of this page lets it in.
fn enter(name: &str, own: &Own, page: Page, deadline: Instant, timeout: Duration) -> Result<Links, Outside> {
    let full = || Outside::For("more processes have come to it than it has numbers for".into());
    let id = page.new_id().ok_or_else(full)?;
    let first = page.decision();
    let links = Links::new(id, own.clone(), page, first);
    let (peers, doors) = (BTreeSet::new(), BTreeMap::new());
    let mut guest = Guest { name, links: &links, peers, doors, said_for: None, reached: Instant::now() };
    let generation = Generation::new(guest.wait(deadline, timeout)?);
    links.is_new.store(true, Ordering::Relaxed);
    links.enter(&generation);
    *links.latest.lock().unwrap_or_else(PoisonError::into_inner) = generation;
    Ok(links)
}

/// Why a process is not let in.
enum Outside {
    /// No member is to be reached any more.
    Lost,
    For(String),
}

struct Found {
    page: Page,
    origin: Origin,
    /// Further worlds of the name.
    others: usize,
}

/// The first world of this name that answers, but for those that were lost. `None`: there is none.
fn find(name: &str, home: &Home, lost: &[u64], deadline: Instant) -> Result<Found, Option<String>> {
    let (mut pause, mut why) = (AGAIN, None);
    loop {
        let (mut found, mut others) = (None::<Answer>, BTreeSet::new());
        for door in 0..DOORS {
            let until = if found.is_some() { deadline.min(Instant::now() + GLANCE) } else { deadline };
            match (knock(name, door, home, until), &found) {
                (Ok(answer), _) if lost.contains(&answer.inside.nonce) => {}
                (Ok(answer), None) => found = Some(answer),
                (Ok(answer), Some(found)) if answer.inside.nonce != found.inside.nonce => {
                    others.insert(answer.inside.nonce);
                }
                (Err(Refused::For(reason)), None) => return Err(Some(reason)),
                (Err(Refused::NotThere(reason)), _) => why = reason.or(why),
                _ => {}
            }
        }
        if let Some(Answer { page, inside, .. }) = found {
            return Ok(Found { page, origin: inside.origin, others: others.len() });
        }
        if Instant::now() + pause > deadline {
            return Err(why);
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(10 * AGAIN);
    }
}

/// Of a member, at its door.
struct Answer {
    stream: Private<UnixStream>,
    page: Page,
    inside: Inside,
    process: Option<std::os::fd::OwnedFd>,
}

enum Refused {
    /// Nobody answers at that door, or nobody that is understood, for this reason.
    NotThere(Option<String>),
    For(String),
}

/// What is behind a door.
fn knock(name: &str, door: usize, home: &Home, deadline: Instant) -> Result<Answer, Refused> {
    let deadline = deadline.min(Instant::now() + PATIENCE);
    let knock =
        Knock { crate_version: env!("CARGO_PKG_VERSION").into(), name: name.into(), home: home.clone() };
    let asked = || -> io::Result<_> {
        let stream = Private::new(connect(&address(name, Some(door)).map_err(io::Error::other)?)?);
        is_same_user(&stream).map_err(io::Error::other)?;
        let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
        let files: Vec<_> = process.iter().map(AsFd::as_fd).collect();
        frame::send(&stream, (Kind::Knock, 0, 0), &knock, &files, deadline)?;
        let answer = frame::receive(&stream, &[Kind::Inside, Kind::Refuse], 2, deadline)?;
        Ok((stream, answer))
    };
    let (stream, answer) = asked().map_err(|error| match error.kind() {
        frame::SHORT => Refused::For(error.to_string()),
        _ if is_shortage(&error) => Refused::For(limits::why("coming to it", Wanted::Descriptor, error)),
        io::ErrorKind::InvalidData | frame::OTHER_VERSION | io::ErrorKind::Other => {
            Refused::NotThere(Some(error.to_string()))
        }
        _ => Refused::NotThere(None),
    })?;
    let failed = |what: String| Refused::For(format!("what it answers: {what}"));
    if answer.kind == Kind::Refuse {
        return Err(Refused::For(answer.parse().unwrap_or_else(|error| error.to_string())));
    }
    let inside: Inside = answer.parse().map_err(|error| failed(error.to_string()))?;
    let mut files = answer.files.into_iter();
    let page = files.next().ok_or_else(|| failed("no memory".into()))?;
    let page = Page::open(page).map_err(failed)?;
    Ok(Answer { stream, page, inside, process: files.next() })
}

/// On its way in.
struct Guest<'a> {
    name: &'a str,
    links: &'a Links,
    /// Members that hear it.
    peers: BTreeSet<usize>,
    /// Where members' doors were, by id.
    doors: BTreeMap<usize, usize>,
    /// The generation whose members were all told that it waits.
    said_for: Option<u32>,
    /// When a member last was.
    reached: Instant,
}

impl Guest<'_> {
    /// Until a generation has it as a member.
    fn wait(&mut self, deadline: Instant, timeout: Duration) -> Result<Decision, Outside> {
        let common = &self.links.common;
        loop {
            let decision = common.page.decision();
            if decision.members.contains(&self.links.me) {
                return Ok(decision);
            }
            let (generation, members) = (decision.generation, &decision.members);
            self.links.lock().forget_before(generation);
            let (mut silent, mut is_heard) = (None, false);
            for (rank, &member) in members.iter().enumerate() {
                if self.is_peer(member, deadline)? {
                    is_heard = true;
                } else {
                    silent.get_or_insert(rank);
                }
            }
            // Asking a member that is stopped takes as long as all of them may be silent.
            if is_heard {
                self.reached = Instant::now();
            }
            if self.reached.elapsed() > PATIENCE {
                return Err(Outside::Lost); // that world is over, or these doors are another's
            }
            if silent.is_none() && self.said_for != Some(generation) {
                for &member in members {
                    let told = (Kind::Waiting, generation, 0);
                    let _ = self.links.send(member, told, &(), &[], deadline); // who is gone is found out below
                }
                self.said_for = Some(generation);
            }
            if Instant::now() >= deadline {
                return Err(Outside::For(why(silent, members.len(), timeout)));
            }
            let soon = deadline.min(Instant::now() + if silent.is_some() { AGAIN } else { PATIENCE });
            let gone = self.links.wait(soon, |state| {
                let gone = members.iter().all(|member| state.gone.contains(member));
                (gone || common.page.generation() != generation).then_some(gone)
            });
            if gone == Some(true) && common.page.generation() == generation && !self.peers.is_empty() {
                return Err(Outside::For("it has come to its end meanwhile: all its ranks are gone".into()));
            }
            if gone == Some(true) {
                std::thread::sleep(AGAIN); // there is nobody to wait for
            }
        }
    }

    /// Whether this member hears it. Asks it to, if it does not.
    fn is_peer(&mut self, member: usize, deadline: Instant) -> Result<bool, Outside> {
        let mut state = self.links.lock();
        let is_gone = state.gone.contains(&member);
        if self.peers.contains(&member) {
            return Ok(!is_gone); // until the others have recovered
        }
        if is_gone {
            state.forget(member); // it hung up before it knew this process: once more
        }
        drop(state);
        if !self.links.lock().homes.contains_key(&member) {
            let Some(Answer { stream, inside, process, .. }) = self.ask(member, deadline)? else {
                return Ok(false);
            };
            let enter = (Kind::Enter, 0, self.links.me as u32);
            if frame::send(&stream, enter, &(), &[], deadline).is_err() {
                return Ok(false);
            }
            let added = self.links.common.add(member, inside.home, Met { stream, process });
            added.map_err(|unheard| Outside::For(unheard.reason))?;
        }
        let soon = deadline.min(Instant::now() + PATIENCE);
        let came = self.links.wait(soon, |state| {
            let came = state.take(member, (Kind::Entered, 0, 0));
            (came.is_some() || state.gone.contains(&member)).then_some(came)
        });
        let refusal =
            |frame: Frame| frame.parse::<Option<String>>().unwrap_or_else(|error| Some(error.to_string()));
        let came = came.map(|came| came.map(refusal));
        if let Some(Some(Some(reason))) = came {
            let rank = self.links.common.page.decision().members.iter().position(|&other| other == member);
            return Err(Outside::For(format!("its rank {} {reason}", rank.unwrap_or(member))));
        }
        let came = came.map(|came| came.is_some());
        if came == Some(true) {
            self.peers.insert(member);
        }
        Ok(came == Some(true))
    }

    /// Knocks at the door of a member, wherever it is. `None`: it does not answer.
    fn ask(&mut self, member: usize, deadline: Instant) -> Result<Option<Answer>, Outside> {
        let nonce = self.links.common.page.nonce();
        let home = self.links.lock().homes[&self.links.me].clone();
        let (known, mut why) = (self.doors.get(&member).copied(), None);
        for door in known.into_iter().chain((0..DOORS).filter(|door| Some(*door) != known)) {
            // Those of peers are theirs for as long as they are there.
            let is_there = |peer: &&usize| !self.links.lock().gone.contains(peer);
            if self.peers.iter().filter(is_there).any(|peer| self.doors.get(peer) == Some(&door)) {
                continue;
            }
            match knock(self.name, door, &home, deadline) {
                Ok(answer) if answer.inside.nonce == nonce => {
                    self.doors.insert(answer.inside.id, door);
                    if answer.inside.id == member {
                        return Ok(Some(answer));
                    }
                }
                Ok(_) | Err(Refused::NotThere(_)) => {} // of another world of this name, or of none
                Err(Refused::For(reason)) => why = Some(reason),
            }
        }
        why.map_or(Ok(None), |why| Err(Outside::For(why)))
    }
}

/// The time is over: what it was waited for.
fn why(silent: Option<usize>, ranks: usize, timeout: Duration) -> String {
    if let Some(rank) = silent {
        return format!(
            "its rank {rank} did not answer within {timeout:?}: it may be stopped, or have no door, which another world of this name or \
             too few file descriptors keep it from having"
        );
    }
    if ranks == PA_MAX_WORLD as usize {
        return format!(
            "it has {ranks} ranks, which is all that it can have, and none has left within {timeout:?}"
        );
    }
    format!(
        "its {ranks} ranks let nobody in within {timeout:?}: LocalSgd does after an average that is due, ParamAverager::admit where it is \
         called"
    )
}
