//! Exchange of an id by TCP: host 0's rank serves it to the ranks of its number on other hosts.
//!
//! A client sends its `Hello`. When all hosts have come, each gets the id, and in the case of a
//! mistake all get its text, as they do if host 0 has no id. Host 0 reads and writes nothing that
//! can block: a connection that stays silent, or is closed, delays no other. A client waits for a
//! connection within its limit; a look-up of host 0's name takes as long as the system lets it.

#[cfg(test)]
mod tests;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::hello::{Hello, OTHER_VERSION};
use super::library::RawId;
use crate::hosts::{HostsError, HostsLimit};

/// Variable of the first port, that of rank 0.
const PORT: &str = "PARAM_AVERAGER_HOSTS_PORT";
/// Variables of torchrun.
const ADDRESS: &str = "MASTER_ADDR";
const MASTER_PORT: &str = "MASTER_PORT";

/// First bytes of an answer. The length of a text of refusal follows, and the text, or 0 and the
/// id.
const ANSWER: [u8; 8] = *b"pahosta1";
const HEAD: usize = ANSWER.len() + 4;
const LONGEST: usize = 1 << 12;

/// Time for a connection to be made, or to say its `Hello`.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time for clients to come, if host 0 has no id for them.
const REFUSING: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);
/// Connections that have said nothing, at most. The oldest are closed; a client comes again.
const SILENT: usize = 64;

/// Address that ids are served at, for the ranks of one number.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Place {
    address: String,
    port: u16,
}

/// A connection to host 0's rank, from `arrived`, and what it has sent.
struct Client {
    stream: TcpStream,
    arrived: Instant,
    said: Vec<u8>,
}

impl Place {
    /// The place that environment variables name, for this rank's number.
    pub(super) fn find(get: impl Fn(&str) -> Option<String>, rank: usize) -> Result<Place, String> {
        let set = |name| get(name).filter(|value| !value.trim().is_empty());
        let Some(address) = set(ADDRESS) else {
            return Err(format!(
                "{ADDRESS} is not set, where host 0 serves the ids of NCCL's communicators: set \
                 it to an address of host 0 on all ranks, or pass ids to NcclHosts::new"
            ));
        };
        let (name, next) = match set(PORT) {
            Some(_) => (PORT, 0),
            None => (MASTER_PORT, 1),
        };
        let Some(value) = set(name) else {
            return Err(format!(
                "neither {PORT} nor {MASTER_PORT} is set: set {PORT} to the first of as many free \
                 ports of host 0 as a host has ranks, on all ranks"
            ));
        };
        let port = value.trim().parse::<u16>().ok().filter(|&port| port > 0);
        let port = port.and_then(|port| u16::try_from(usize::from(port) + next + rank).ok());
        let wrong = || format!("{name} is {value:?}, which leaves no port for rank {rank}");
        port.map(|port| Place { address: address.trim().into(), port }).ok_or_else(wrong)
    }

    /// Listens, at every address of this host.
    pub(super) fn listen(&self) -> Result<TcpListener, String> {
        let all: [SocketAddr; 2] =
            [(Ipv6Addr::UNSPECIFIED, self.port).into(), (Ipv4Addr::UNSPECIFIED, self.port).into()];
        let listener = TcpListener::bind(&all[..]).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        listener.map_err(|error| {
            format!(
                "host 0 can't listen at port {}, to serve NCCL's ids: {error}; set {PORT} to the \
                 first of as many free ports as a host has ranks, on all ranks",
                self.port
            )
        })
    }

    /// Asks host 0's rank for the id, again until it is there.
    pub(super) fn ask(&self, own: &Hello, limit: &HostsLimit<'_>) -> Result<RawId, HostsError> {
        let Place { address, port } = self;
        let mut reason = "no time was left".to_owned();
        loop {
            limit.check().map_err(|_| {
                let reason = format!(
                    "host 0 does not give NCCL's id at {address}:{port} ({reason}): see whether \
                     it runs, whether {ADDRESS} is its address and whether the port is open; or \
                     raise the communicator's `timeout`"
                );
                HostsError::new(Some(0), reason)
            })?;
            reason = match self.ask_once(own, limit) {
                Ok(Ok(id)) => return Ok(id),
                Ok(Err(refusal)) => return Err(HostsError::new(Some(0), refusal)),
                Err(reason) => reason,
            };
            sleep(limit.rest(50 * PAUSE));
        }
    }

    /// The id, or a refusal; or why there was no answer.
    fn ask_once(
        &self,
        own: &Hello,
        limit: &HostsLimit<'_>,
    ) -> Result<Result<RawId, String>, String> {
        let late = |_| "it has not answered".to_owned();
        let text = |error: std::io::Error| error.to_string();
        let all = (self.address.as_str(), self.port).to_socket_addrs().map_err(text)?;
        let mut made = Err("the name has no address".to_owned());
        for address in all {
            made = connect(address, limit.rest(PATIENCE)).map_err(text);
            if made.is_ok() || limit.check().is_err() {
                break;
            }
        }
        let mut stream = made?;
        limit.check().map_err(late)?;
        stream.write_all(&own.bytes()).map_err(text)?;
        let mut said = vec![];
        loop {
            let is_open = read(&stream, &mut said, HEAD + LONGEST);
            if !ANSWER.starts_with(&said[..said.len().min(ANSWER.len())]) {
                return Ok(Err(format!(
                    "another program listens at {}:{}: set {PORT} to the first of as many free \
                     ports of host 0 as a host has ranks, on all ranks",
                    self.address, self.port
                )));
            }
            if let Some((head, rest)) = said.split_first_chunk::<HEAD>() {
                let length = u32::from_le_bytes(head[ANSWER.len()..].try_into().expect("4 bytes"));
                let id: Option<&RawId> = rest.try_into().ok();
                match (length as usize, id) {
                    (0, Some(id)) => return Ok(Ok(*id)),
                    (1.., _) if rest.len() >= length as usize => {
                        return Ok(Err(String::from_utf8_lossy(rest).into_owned()));
                    }
                    _ => {}
                }
            }
            if !is_open {
                return Err("it has closed the connection".into());
            }
            limit.check().map_err(late)?;
            sleep(PAUSE);
        }
    }
}

/// A connection that does not block.
fn connect(address: SocketAddr, within: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, within.max(PAUSE))?;
    if stream.local_addr()? == stream.peer_addr()? {
        // Nothing listens, and the system has given the client the very port that it asks.
        return Err(ErrorKind::ConnectionRefused.into());
    }
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// Serves the id to the ranks of all other hosts, or the reason why there is none.
pub(super) fn serve(
    listener: TcpListener,
    own: &Hello,
    id: Result<&RawId, &String>,
    limit: &HostsLimit<'_>,
) -> Result<(), HostsError> {
    let answer = match id {
        Ok(id) => [&ANSWER[..], &[0; 4], id].concat(),
        Err(problem) => refusal(&format!("host 0 has no NCCL id: {problem}")),
    };
    let begin = Instant::now();
    let mut silent: Vec<Client> = vec![];
    let mut hosts: Vec<Option<TcpStream>> = (0..own.hosts).map(|_| None).collect();
    loop {
        for _ in 0..SILENT {
            let Ok((stream, _)) = listener.accept() else { break };
            if stream.set_nonblocking(true).is_ok() {
                silent.push(Client { stream, arrived: Instant::now(), said: vec![] });
            }
        }
        for mut client in std::mem::take(&mut silent) {
            let is_open = read(&client.stream, &mut client.said, Hello::BYTES);
            if Hello::is_of_other_version(&client.said) {
                refuse(&mut client.stream, &format!("this host {OTHER_VERSION}"));
                continue;
            }
            if client.said.len() < Hello::BYTES {
                if is_open && client.arrived.elapsed() < PATIENCE {
                    silent.push(client);
                }
                continue;
            }
            let Some(hello) = Hello::of(&client.said) else { continue }; // another program
            if hello.run != own.run {
                let text = "host 0 belongs to another run of the launcher: give each run ports of \
                            its own";
                refuse(&mut client.stream, text);
                continue;
            }
            let place = hosts.get(hello.host).filter(|_| hello.host > 0);
            let mistake = hello.differs(own).or_else(|| match place {
                Some(place) if place.as_ref().is_none_or(|stream| !is_alive(stream)) => None,
                _ => Some("has come twice: give each host a number of its own".into()),
            });
            let Some(mistake) = mistake else {
                hosts[hello.host] = Some(client.stream);
                continue;
            };
            let text = format!("host {} {mistake}", hello.host);
            let connected = hosts.iter_mut().flatten();
            connected.chain([&mut client.stream]).for_each(|stream| refuse(stream, &text));
            return Err(HostsError::new(Some(hello.host), text));
        }
        silent.drain(..silent.len().saturating_sub(SILENT));
        for place in &mut hosts {
            place.take_if(|stream| !is_alive(stream)); // another process may come in its place
        }
        let missing = (1..own.hosts).filter(|&host| hosts[host].is_none());
        let missing: Vec<usize> = missing.collect();
        if missing.is_empty() || (id.is_err() && begin.elapsed() >= REFUSING) {
            break;
        }
        if limit.check().is_err() {
            if id.is_err() {
                break; // those that are here are told
            }
            let reason = format!(
                "hosts {missing:?} have not come for NCCL's id: see whether they run, and reach \
                 {ADDRESS}; or raise the communicator's `timeout`"
            );
            hosts.iter_mut().flatten().for_each(|stream| refuse(stream, &reason));
            return Err(HostsError::new(missing.first().copied(), reason));
        }
        sleep(PAUSE);
    }
    let mut result = Ok(());
    for (host, stream) in hosts.iter_mut().enumerate() {
        // A connection that takes nothing, with nothing sent on it before, is lost.
        let sent = stream.as_mut().map_or(Ok(()), |stream| stream.write_all(&answer));
        result = result.and(sent.map_err(|error| {
            HostsError::new(Some(host), format!("host {host} has not taken NCCL's id: {error}"))
        }));
    }
    result
}

/// Reads what is there, up to `most` bytes in all. False if the connection is closed.
fn read(mut stream: &TcpStream, said: &mut Vec<u8>, most: usize) -> bool {
    let mut buffer = [0; 512];
    while said.len() < most {
        let room = buffer.len().min(most - said.len());
        match stream.read(&mut buffer[..room]) {
            Ok(0) => return false,
            Ok(bytes) => said.extend(&buffer[..bytes]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == ErrorKind::WouldBlock,
        }
    }
    true
}

/// True if a client that has said its `Hello` still waits.
fn is_alive(stream: &TcpStream) -> bool {
    read(stream, &mut vec![], 1)
}

fn refusal(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(LONGEST)];
    [&ANSWER[..], &(text.len() as u32).to_le_bytes(), text].concat()
}

fn refuse(stream: &mut TcpStream, text: &str) {
    read(stream, &mut vec![], LONGEST); // unread bytes would reset the connection
    let _ = stream.write_all(&refusal(text)); // or it sees a closed connection
}
