//! Test of peer access between processes. Each rank tests its access to the device memory of every
//! other, before anything is built.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use serde::{de::DeserializeOwned, Serialize};

use super::frame::{Frame, Kind};
use super::peer_set::{CurrentView, PeerSet};
use crate::backend::cuda::{IpcProbe, PeerAccess};
use crate::backend::MemoryHandle;

/// Numbers of the messages, in order.
const HANDLE: u32 = 0;
const TESTED: u32 = 1;
const FOUND: u32 = 2;

/// Result of a test: `None` if memory can't be opened, otherwise true if the transferred bytes are
/// intact.
type Found = Option<bool>;

/// Tests peer access between all members of a view. Collective. Does nothing on CPUs.
///
/// ```text
///  one                                           other
///  writes to memory that it exports     ────────▶ opens it, reads, and writes there, too
///  looks for what the other has written ◀─────── whether it could
///  what it found                       ────────▶ everybody
/// ```
///
/// The same steps run in the opposite direction at the same time.
pub(super) fn find(
    peer_set: &PeerSet,
    view: &CurrentView,
    deadline: Instant,
) -> Result<(), String> {
    let (view, members) = (view.number(), view.members());
    let context = peer_set.host_infos().own().context().cloned();
    let Some(context) = context.filter(|_| members.len() > 1) else { return Ok(()) };
    let me =
        members.iter().position(|&peer| peer == peer_set.me).ok_or("this rank is not a member")?;
    let exchange = Exchange { peer_set, view, members, deadline };
    // `None` without CUDA IPC.
    let probe = IpcProbe::new(&context, members.len()).ok();
    let (handle, file) = probe.as_ref().map(IpcProbe::export).unzip();
    let frames = exchange.all_gather(HANDLE, |_| handle.clone(), file.as_slice())?;
    let mut tested: Vec<Found> = vec![None; members.len()];
    for (rank, frame) in frames {
        let handle: Option<MemoryHandle> = exchange.parse(rank, &frame)?;
        let opened = handle.zip(frame.files.into_iter().next());
        tested[rank] =
            opened.and_then(|(handle, file)| IpcProbe::test(&context, &handle, file, me).ok());
    }
    let mut found: Vec<Found> = vec![None; members.len()];
    for (rank, frame) in exchange.all_gather(TESTED, |rank| tested[rank], &[])? {
        let theirs: Found = exchange.parse(rank, &frame)?;
        if let (Some(probe), Some(ours), Some(theirs)) = (&probe, tested[rank], theirs) {
            found[rank] = Some(ours && theirs && probe.was_written(rank)?);
        }
    }
    let mut all: Vec<Vec<Found>> = vec![vec![]; members.len()];
    for (rank, frame) in exchange.all_gather(FOUND, |_| found.clone(), &[])? {
        all[rank] = exchange.parse(rank, &frame)?;
    }
    all[me] = found;
    let of = |one: usize, other: usize| all[one].get(other).copied().flatten();
    for (one, other) in (0..members.len()).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let access = match (of(one, other), of(other, one)) {
            (Some(true), Some(true)) => PeerAccess::Verified,
            (None, _) | (_, None) => PeerAccess::Unsupported,
            _ => PeerAccess::Broken,
        };
        peer_set.host_infos().know(members[one], members[other], access);
    }
    Ok(())
}

struct Exchange<'a> {
    peer_set: &'a PeerSet,
    view: u32,
    members: &'a [usize],
    deadline: Instant,
}

impl Exchange<'_> {
    /// Sends a message to every other rank, and receives one from each.
    fn all_gather<T: Serialize>(
        &self,
        number: u32,
        message: impl Fn(usize) -> T,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<(usize, Frame)>, String> {
        let key = (Kind::Reach, self.view, number);
        let others = || {
            self.members.iter().copied().enumerate().filter(|&(_, peer)| peer != self.peer_set.me)
        };
        for (rank, peer) in others() {
            // A departed peer is detected below.
            let _ = self.peer_set.send(peer, key, &message(rank), files, self.deadline);
        }
        let receive = |(rank, peer): (usize, usize)| {
            let came = self.peer_set.wait(self.deadline, |state| {
                if let Some(frame) = state.take(peer, key) {
                    return Some(Ok((rank, frame)));
                }
                let reason = match state.unreadable.get(&peer) {
                    Some(reason) => format!("sends messages that can't be received: {reason}"),
                    None if state.is_lost(peer, self.view) => "has left".into(),
                    None if state.aborts(peer, self.view) => "has aborted".into(),
                    None => return None,
                };
                Some(Err(format!("test of peer access between ranks: rank {rank} {reason}")))
            });
            let late =
                || format!("test of peer access between ranks: rank {rank} did not answer in time");
            came.unwrap_or_else(|| Err(late()))
        };
        others().map(receive).collect()
    }

    fn parse<T: DeserializeOwned>(&self, rank: usize, frame: &Frame) -> Result<T, String> {
        frame
            .parse()
            .map_err(|error| format!("the message of rank {rank} can't be parsed: {error}"))
    }
}
