//! Messages between processes: a header with version and view, a bounded JSON body, and file
//! descriptors.

mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;

use serde::de::DeserializeOwned;

pub(crate) use receive::{receive, short_of_files};
pub(crate) use send::{send, send_to_all};

/// Version of all messages. A message of another version is refused.
const VERSION: u16 = 7;
const MAGIC: [u8; 4] = *b"PAVG";
const HEADER: usize = 20;
/// Error kind: this process lacks file descriptors or memory for a message.
pub(crate) const SHORT: ErrorKind = ErrorKind::QuotaExceeded;
/// Error kind: the message has another version.
pub(crate) const OTHER_VERSION: ErrorKind = ErrorKind::Unsupported;
/// Limit on files of one message. The kernel's own limit is 253.
pub(crate) const MOST_FILES: usize = 64;

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Kind {
    /// Rank to rank 0: request to take part in the world.
    Hello = 1,
    /// Rank 0 to rank: descriptions of all ranks, with sockets to them.
    Welcome = 2,
    /// Rank 0 or member to any process: refusal, with the reason.
    Refuse = 3,
    /// The handshake of a rank that builds an averager.
    Handshake = 4,
    /// The sender has aborted its world.
    Abort = 5,
    /// The sender is ready for the next view of its world.
    Ready = 6,
    /// Joiner to join listener: request for a description of the world.
    JoinRequest = 7,
    /// Join listener to joiner: description of the world.
    JoinOffer = 8,
    /// Joiner to join listener: request to become a peer. The number is the joiner's id.
    Connect = 9,
    /// Member to joiner: the joiner is connected as a peer, or the reason why not.
    Connected = 10,
    /// Joiner to all members: request for admission after this view.
    JoinPending = 11,
    /// Result of the sender's test transfer to memory of the receiver's device.
    Reach = 12,
    /// The sender has all that it needs, or lacks something. Used at the end of a rendezvous and of
    /// a build.
    Verdict = 13,
    /// The averagers of the sender, before they are built again.
    Averagers = 14,
    /// A small message in an exchange of all members.
    Exchange = 15,
}

impl Kind {
    fn of(byte: u8) -> Option<Kind> {
        use Kind::*;
        let of_peers = [Handshake, Abort, Ready, JoinPending, Reach, Verdict, Averagers, Exchange];
        let before = [Hello, Welcome, Refuse, JoinRequest, JoinOffer, Connect, Connected];
        of_peers.into_iter().chain(before).find(|&kind| kind as u8 == byte)
    }

    /// Largest body in bytes. Small for messages of unknown senders.
    fn most(self) -> usize {
        match self {
            Kind::Hello | Kind::JoinRequest => 48 << 10,
            Kind::Connect => 4 << 10,
            Kind::Handshake => 64 << 20,
            _ => 64 << 10,
        }
    }
}

/// One message.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    /// The sender's view. Messages of earlier views are ignored.
    pub(crate) view: u32,
    /// Tells messages of one kind and view apart.
    pub(crate) number: u32,
    pub(crate) body: Vec<u8>,
    pub(crate) files: Vec<OwnedFd>,
    /// True if the files were lost because this process had no file descriptors.
    pub(crate) is_short: bool,
}

pub(crate) fn header(
    (kind, view, number): (Kind, u32, u32),
    bytes: usize,
    files: usize,
) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6] = kind as u8;
    header[7] = files as u8;
    header[8..12].copy_from_slice(&view.to_le_bytes());
    header[12..16].copy_from_slice(&number.to_le_bytes());
    header[16..20].copy_from_slice(&(bytes as u32).to_le_bytes());
    header
}

impl Frame {
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> io::Result<T> {
        Ok(serde_json::from_slice(&self.body)?)
    }
}
