//! Join listener of a process: where late processes find its world and become its peers.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};
use serde::{Deserialize, Serialize};

use super::frame::{self, Frame, Kind};
use super::host_info::HostInfo;
use super::listener;
use super::peers::Connections;
use super::private::Private;
use super::rendezvous::{address, Connection, Origin};
use crate::backend::limits::thread;
use crate::world::WorldId;

/// Doors that the worlds of one name have together: more than a world has ranks, so that each of
/// its ranks finds a free one.
pub(super) const MOST_LISTENERS: usize = 64;
/// Processes that may wait at one listener.
const MOST_GUESTS: usize = 16;
/// Processes that came and went which a member remembers, so that one of them that is let in at
/// this moment is known to be gone.
const MOST_GONE: usize = 64;
/// Pause between two tries to bind a listener.
const AGAIN: Duration = Duration::from_millis(200);
/// How long either side has for one message.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// What a process that wants to join says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinRequest {
    pub(super) crate_version: String,
    pub(super) name: String,
    pub(super) host_info: HostInfo,
}

/// What it is answered, with the page of the world.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JoinOffer {
    /// Member that this listener belongs to.
    pub(super) id: usize,
    pub(super) host_info: HostInfo,
    /// Of the world, which may not be the only one of its name.
    pub(super) nonce: u64,
    pub(super) origin: Origin,
}

/// Open until it is dropped.
#[derive(Debug)]
pub(super) struct JoinListener {
    world: WorldId,
    _closes: mpsc::Sender<()>,
    /// Rank 0's of the first view: the name of the world, and answers for those that want it.
    _held: Option<listener::Listener>,
}

impl JoinListener {
    /// A world that can't have one yet, for want of descriptors, is a world all the same: nobody
    /// joins it meanwhile.
    pub(super) fn open(
        name: &str,
        origin: Origin,
        me: usize,
        connections: &Arc<Connections>,
        held: Option<listener::Listener>,
    ) -> JoinListener {
        let (closes, is_closed) = mpsc::channel();
        let (connections, called, world) =
            (connections.clone(), name.to_owned(), origin.world(name, 0));
        let open = move || {
            let listener = bind(&called, me)?;
            let (connections, called, origin) =
                (connections.clone(), called.clone(), origin.clone());
            let came =
                move |stream, request| serve(&called, &origin, me, &connections, stream, request);
            listener::Listener::open(listener, &[Kind::JoinRequest], 1, came)
                .map_err(|shut| shut.reason)
        };
        // Tried until it succeeds: descriptors may be free again.
        let keep = move || loop {
            let open = open();
            match is_closed.recv_timeout(if open.is_ok() { Duration::MAX } else { AGAIN }) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        };
        // Without a thread this process can't be joined.
        let _ = thread("listener".into(), 256 << 10, keep);
        JoinListener { world, _closes: closes, _held: held }
    }

    /// With how many other worlds of the name this process found.
    pub(super) fn beside(mut self, others: usize) -> JoinListener {
        self.world.others = others;
        self
    }

    /// Of the world.
    pub(super) fn name(&self) -> &str {
        &self.world.name
    }

    pub(super) fn world(&self) -> &WorldId {
        &self.world
    }
}

/// Binds the first free address of this name, beginning with the one of this id's number.
fn bind(name: &str, id: usize) -> Result<UnixListener, String> {
    let mut last = String::new();
    for number in (0..MOST_LISTENERS).map(|number| (id + number) % MOST_LISTENERS) {
        match UnixListener::bind_addr(&address(name, Some(number))?) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// Makes a process that asks to join a peer. An invalid or missing message drops the connection.
fn serve(
    name: &str,
    origin: &Origin,
    me: usize,
    connections: &Arc<Connections>,
    stream: Private<UnixStream>,
    mut request: Frame,
) {
    let deadline = Instant::now() + PATIENCE;
    let Ok(said) = request.parse::<JoinRequest>() else { return };
    let host_info = |id: usize| connections.lock().host_infos.get(&id).cloned();
    let Some(own) = host_info(me) else { return };
    let version = env!("CARGO_PKG_VERSION");
    if connections.has_left() || !connections.board.agreed().members.contains(&me) {
        return; // its world goes on without it
    }
    let refusal = if said.crate_version != version {
        Some(format!("it is of crate version {}, this process of {version}", said.crate_version))
    } else if said.name != name {
        Some(format!("it is called {name:?}")) // the hashes of two long names are the same
    } else if said.host_info.gpu.is_some() != own.gpu.is_some() {
        Some(format!(
            "its ranks are on {}, this process is on {}",
            own.device, said.host_info.device
        ))
    } else if connections.lock().outsiders(&connections.board.agreed().members).len() >= MOST_GUESTS
    {
        Some(format!("{MOST_GUESTS} processes wait for it already"))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        let _ = frame::send(&stream, (Kind::Refuse, 0, 0), &refusal, &[], deadline);
        return;
    }
    let process = pidfd_open(getpid(), PidfdFlags::empty()).ok();
    let files: Vec<_> =
        [connections.board.file()].into_iter().chain(process.iter().map(AsFd::as_fd)).collect();
    let inside = JoinOffer {
        id: me,
        host_info: own,
        nonce: connections.board.nonce(),
        origin: origin.clone(),
    };
    if frame::send(&stream, (Kind::JoinOffer, 0, 0), &inside, &files, deadline).is_err() {
        return;
    }
    let Ok(enter) = frame::receive(&stream, &[Kind::Connect], 0, deadline) else { return };
    let id = enter.number as usize;
    if host_info(id).is_some() {
        return;
    }
    connections.lock().forget_gone(&connections.board.agreed().members, MOST_GONE);
    let met = Connection { stream, process: request.files.pop() };
    // It may be gone.
    let _ = match connections.add(id, said.host_info, met) {
        Ok(()) => connections.send(id, (Kind::Connected, 0, 0), &None::<String>, &[], deadline),
        Err(unheard) => {
            let reason = Some(&unheard.reason);
            frame::send(unheard.stream(), (Kind::Connected, 0, 0), &reason, &[], deadline)
        }
    };
}
