//! A process that joins a world that has begun: it becomes a peer of every member, and waits until they let it in.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};

use super::door::{Inside, Knock, PATIENCE};
use super::frame::{self, Kind};
use super::home::{Home, Own};
use super::links::{Generation, Links};
use super::page::{Decision, Page, MOST_IDS};
use super::rendezvous::{address, connect, Met};
use super::strangers::is_same_user;
use crate::abi::PA_MAX_WORLD;

/// Between two looks for a world that is not there yet, or for a member that does not answer.
const AGAIN: Duration = Duration::from_millis(20);
/// Worlds of this name that are over or out of reach. More there will hardly be.
const MOST_WORLDS: usize = 64;

/// Until it is let in.
pub(super) fn join(name: &str, own: Own, timeout: Duration) -> Result<Links, String> {
    let deadline = crate::deadline::after(timeout);
    let mut lost = vec![];
    loop {
        let page = find(name, &own.home, &lost, deadline).map_err(|reason| match reason {
            Some(reason) => reason,
            None => format!(
                "no such world was to be found on this host within {timeout:?}: see that its ranks are running, and that they gave the \
                 same name"
            ),
        })?;
        let nonce = page.nonce();
        match enter(name, &own, page, deadline, timeout) {
            Err(Outside::Lost) if lost.len() < MOST_WORLDS => lost.push(nonce),
            Err(Outside::Lost) => return Err("its ranks are not to be reached".into()),
            Err(Outside::For(reason)) => return Err(reason),
            Ok(links) => return Ok(links),
        }
    }
}

/// Until the world of this page lets it in.
fn enter(name: &str, own: &Own, page: Page, deadline: Instant, timeout: Duration) -> Result<Links, Outside> {
    let full = || Outside::For(format!("it has had {MOST_IDS} processes, and can't have more"));
    let id = page.new_id().ok_or_else(full)?;
    let first = page.decision();
    let links = Links::new(id, own.clone(), page, first);
    let mut guest =
        Guest { name, links: &links, peers: BTreeSet::new(), said_for: None, reached: Instant::now() };
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

/// The page of the first world of this name that answers, but for those that were lost. `None`: there is none.
fn find(name: &str, home: &Home, lost: &[u64], deadline: Instant) -> Result<Page, Option<String>> {
    let (mut pause, mut why) = (AGAIN, None);
    loop {
        for id in 0..MOST_IDS {
            match knock(name, id, home, deadline) {
                Ok((_, page, ..)) if lost.contains(&page.nonce()) => {}
                Ok((_, page, ..)) => return Ok(page),
                Err(Refused::For(reason)) => return Err(Some(reason)),
                Err(Refused::NotThere(reason)) => why = reason.or(why),
            }
        }
        if Instant::now() + pause > deadline {
            return Err(why);
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(10 * AGAIN);
    }
}

enum Refused {
    /// Nobody answers at that door, or nobody that is understood, for this reason.
    NotThere(Option<String>),
    For(String),
}

/// What is behind a door.
fn knock(
    name: &str,
    id: usize,
    home: &Home,
    deadline: Instant,
) -> Result<(UnixStream, Page, Inside, Option<std::os::fd::OwnedFd>), Refused> {
    let deadline = deadline.min(Instant::now() + PATIENCE);
    let knock =
        Knock { crate_version: env!("CARGO_PKG_VERSION").into(), name: name.into(), home: home.clone() };
    let asked = || -> io::Result<_> {
        let stream = connect(&address(name, Some(id)).map_err(io::Error::other)?)?;
        is_same_user(&stream).map_err(io::Error::other)?;
        let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
        let files: Vec<_> = process.iter().map(AsFd::as_fd).collect();
        frame::send(&stream, (Kind::Knock, 0, 0), &knock, &files, deadline)?;
        let answer = frame::receive(&stream, &[Kind::Inside, Kind::Refuse], 2, deadline)?;
        Ok((stream, answer))
    };
    let (stream, answer) = asked().map_err(|error| match error.kind() {
        frame::SHORT => Refused::For(error.to_string()),
        io::ErrorKind::InvalidData | io::ErrorKind::Other => Refused::NotThere(Some(error.to_string())),
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
    Ok((stream, page, inside, files.next()))
}

/// On its way in.
struct Guest<'a> {
    name: &'a str,
    links: &'a Links,
    /// Members that hear it.
    peers: BTreeSet<usize>,
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
            let mut silent = None;
            for (rank, &member) in members.iter().enumerate() {
                if self.is_peer(member, deadline)? {
                    self.reached = Instant::now();
                } else {
                    silent.get_or_insert(rank);
                }
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
        let common = &self.links.common;
        if !self.links.lock().homes.contains_key(&member) {
            let home = self.links.lock().homes[&self.links.me].clone();
            let (stream, inside, process) = match knock(self.name, member, &home, deadline) {
                Ok((stream, _, inside, process)) => (stream, inside, process),
                Err(Refused::NotThere(_)) => return Ok(false),
                Err(Refused::For(reason)) => return Err(Outside::For(reason)),
            };
            if inside.nonce != common.page.nonce() || inside.id != member {
                return Ok(false); // it is of another world of this name
            }
            let enter = (Kind::Enter, 0, self.links.me as u32);
            if frame::send(&stream, enter, &(), &[], deadline).is_err() {
                return Ok(false);
            }
            let added = common.add(member, inside.home, Met { stream, process });
            added.map_err(|error| Outside::For(format!("can't listen to peers: {error}")))?;
        }
        let soon = deadline.min(Instant::now() + PATIENCE);
        let came = self.links.wait(soon, |state| {
            let came = state.take(member, (Kind::Entered, 0, 0)).is_some();
            (came || state.gone.contains(&member)).then_some(came)
        });
        if came == Some(true) {
            self.peers.insert(member);
        }
        Ok(came == Some(true))
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
