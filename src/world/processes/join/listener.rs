//! Join listener of a process, by which joiners find its world and connect to it.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{getpid, pidfd_open, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::backend::limits::thread;
use crate::world::processes::peers::connections::{Connection, Connections};
use crate::world::processes::peers::host_info::HostInfo;
use crate::world::processes::rendezvous::{address, Origin};
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::listener;
use crate::world::processes::wire::private::Private;
use crate::world::world_id::WorldId;

/// Number of join listeners that the worlds of one name share. Larger than a world, so that each
/// rank finds a free one.
pub(crate) const MOST_LISTENERS: usize = 64;
/// Limit on joiners that wait at one listener.
const MOST_JOINERS: usize = 16;
/// Limit on departed joiners that a member remembers, so that the departure of a joiner that is
/// just being admitted is known.
const MOST_DEPARTED: usize = 64;
/// Pause between two attempts to bind a listener.
const AGAIN: Duration = Duration::from_millis(200);
/// Time for one message.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// First message of a joiner.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinRequest {
    pub(crate) crate_version: String,
    pub(crate) name: String,
    pub(crate) host_info: HostInfo,
}

/// Answer of a member, sent with the view board of the world.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JoinOffer {
    /// Id of the member that this listener belongs to.
    pub(crate) id: usize,
    pub(crate) host_info: HostInfo,
    /// Identifies the world among those of its name.
    pub(crate) nonce: u64,
    pub(crate) origin: Origin,
}

/// A join listener, open until it is dropped.
#[derive(Debug)]
pub(crate) struct JoinListener {
    world: WorldId,
    _closes: mpsc::Sender<()>,
    /// Rank 0's rendezvous listener, which holds the name of the world and answers later processes.
    _held: Option<listener::Listener>,
}

impl JoinListener {
    /// Opens the listener in the background. Failure to bind is not an error: the world runs, but
    /// cannot be joined until a number or a descriptor is free.
    pub(crate) fn open(
        name: &str,
        origin: Origin,
        me: usize,
        connections: &Arc<Connections>,
        held: Option<listener::Listener>,
    ) -> JoinListener {
        let (closes, is_closed) = mpsc::channel();
        let (connections, name_of_world, world) =
            (connections.clone(), name.to_owned(), origin.world(name, 0));
        let open = move || {
            let listener = bind(&name_of_world, me)?;
            let (connections, name_of_world, origin) =
                (connections.clone(), name_of_world.clone(), origin.clone());
            let serve_joiner = move |stream, request| {
                serve(&name_of_world, &origin, me, &connections, stream, request)
            };
            listener::Listener::open(listener, &[Kind::JoinRequest], 1, serve_joiner)
                .map_err(|shut| shut.reason)
        };
        // Repeated until it succeeds, since descriptors may become free.
        let run = move || loop {
            let open = open();
            match is_closed.recv_timeout(if open.is_ok() { Duration::MAX } else { AGAIN }) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        };
        // Without a thread, this process cannot be joined.
        let _ = thread("listener".into(), 256 << 10, run);
        JoinListener { world, _closes: closes, _held: held }
    }

    /// Sets the number of other worlds of the name.
    pub(crate) fn with_others(mut self, others: usize) -> JoinListener {
        self.world.others = others;
        self
    }

    pub(crate) fn world(&self) -> &WorldId {
        &self.world
    }
}

/// Binds the first free address of this name, starting at the number of `id`.
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

/// Answers a joiner and adds it as a peer. An invalid or missing message closes the connection.
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
        return; // this process is not a member any more
    }
    let refusal = if said.crate_version != version {
        Some(format!(
            "its ranks use crate version {version}, this process {}: use one version",
            said.crate_version
        ))
    } else if said.name != name {
        Some(format!("the name of the world at this address is {name:?}: choose another name"))
    // the hashes of two long names collide
    } else if said.host_info.gpu.is_some() != own.gpu.is_some() {
        Some(format!(
            "its ranks are on {}, this process is on {}: give every rank the same kind of device",
            own.device, said.host_info.device
        ))
    } else if connections.lock().outsiders(&connections.board.agreed().members).len()
        >= MOST_JOINERS
    {
        Some(format!("{MOST_JOINERS} processes wait to join already: try again later"))
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
    let offer = JoinOffer {
        id: me,
        host_info: own,
        nonce: connections.board.nonce(),
        origin: origin.clone(),
    };
    if frame::send(&stream, (Kind::JoinOffer, 0, 0), &offer, &files, deadline).is_err() {
        return;
    }
    let Ok(connect) = frame::receive(&stream, &[Kind::Connect], 0, deadline) else { return };
    let id = connect.number as usize;
    if host_info(id).is_some() {
        return;
    }
    connections.lock().forget_departed(&connections.board.agreed().members, MOST_DEPARTED);
    let connection = Connection { stream, process: request.files.pop() };
    // The joiner may have departed.
    let _ = match connections.add(id, said.host_info, connection) {
        Ok(()) => connections.send(id, (Kind::Connected, 0, 0), &None::<String>, &[], deadline),
        Err(unheard) => {
            let reason = Some(&unheard.reason);
            frame::send(unheard.stream(), (Kind::Connected, 0, 0), &reason, &[], deadline)
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::world::processes::identity::job::{Job, Known};
    use crate::world::processes::rendezvous::connect;
    use crate::world::processes::view_board::ViewBoard;

    #[test]
    fn refusals_name_both_sides() {
        let name = format!("refusals-{}", std::process::id());
        let host_info = HostInfo::unknown(Device::cpu());
        let board = ViewBoard::new(1).unwrap();
        let connections = Arc::new(Connections::new(board, 0, host_info.clone()));
        let origin = Origin::now(&Job::own(&Known::ByName, 0, None));
        let _listener = JoinListener::open(&name, origin, 0, &connections, None);
        let deadline = Instant::now() + Duration::from_secs(20);
        let refusal = |crate_version: &str, called: &str| -> String {
            let stream = loop {
                match connect(&address(&name, Some(0)).unwrap()) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(Instant::now() < deadline, "{error}"),
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            let (crate_version, name) = (crate_version.into(), called.into());
            let request = JoinRequest { crate_version, name, host_info: host_info.clone() };
            frame::send(&stream, (Kind::JoinRequest, 0, 0), &request, &[], deadline).unwrap();
            frame::receive(&stream, &[Kind::Refuse], 0, deadline).unwrap().parse().unwrap()
        };
        let own = env!("CARGO_PKG_VERSION");
        let versions = format!("its ranks use crate version {own}, this process 9.9.9");
        assert!(refusal("9.9.9", &name).contains(&versions));
        assert!(refusal(own, "another name").contains(&format!("is {name:?}")));
    }
}
