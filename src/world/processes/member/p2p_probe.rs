//! Test of peer access between processes. Each rank tests its access to the device memory of every
//! other, before anything is built.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde::{de::DeserializeOwned, Serialize};

use super::Member;
use crate::backend::cuda::IpcProbe;
use crate::backend::proximity::PeerAccess;
use crate::backend::MemoryHandle;
use crate::error::Phase;
use crate::world::gather::{Call, Silence, Why};
use crate::world::processes::wire::frame::{Frame, Kind};

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
///  rank A                               rank B
///  writes its exported memory ────────▶ opens it, reads it, and writes a part of its own
///  checks that part           ◀──────── reports whether the bytes were right
///  reports the result         ────────▶ all ranks
/// ```
///
/// The same steps run in the opposite direction at the same time.
pub(crate) fn find(member: &Member, timeout: Duration) -> Result<(), String> {
    let context = member.peer_set.host_infos().own().context().cloned();
    let call = member.call("test peer access", Phase::Build, timeout);
    let Some(context) = context.filter(|_| call.size > 1) else { return Ok(()) };
    // `None` without CUDA IPC.
    let probe = IpcProbe::new(&context, call.size).ok();
    let (handle, file) = probe.as_ref().map(IpcProbe::export).unzip();
    let frames = all_gather(member, &call, HANDLE, &handle, file.as_slice())?;
    let mut tested: Vec<Found> = vec![None; call.size];
    for (rank, frame) in frames {
        let handle: Option<MemoryHandle> = parse(rank, &frame)?;
        let opened = handle.zip(frame.files.into_iter().next());
        tested[rank] = opened
            .and_then(|(handle, file)| IpcProbe::test(&context, &handle, file, call.rank).ok());
    }
    let mut found: Vec<Found> = vec![None; call.size];
    for (rank, frame) in all_gather(member, &call, TESTED, &tested, &[])? {
        let theirs: Vec<Found> = parse(rank, &frame)?;
        let theirs = theirs.get(call.rank).copied().flatten();
        if let (Some(probe), Some(ours), Some(theirs)) = (&probe, tested[rank], theirs) {
            found[rank] = Some(ours && theirs && probe.was_written(rank)?);
        }
    }
    let mut all: Vec<Vec<Found>> = vec![vec![]; call.size];
    for (rank, frame) in all_gather(member, &call, FOUND, &found, &[])? {
        all[rank] = parse(rank, &frame)?;
    }
    all[call.rank] = found;
    let of = |one: usize, other: usize| all[one].get(other).copied().flatten();
    for (one, other) in (0..call.size).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let access = match (of(one, other), of(other, one)) {
            (Some(true), Some(true)) => PeerAccess::Verified,
            (None, _) | (_, None) => PeerAccess::Unsupported,
            _ => PeerAccess::Broken,
        };
        member.peer_set.host_infos().know(member.ids()[one], member.ids()[other], access);
    }
    Ok(())
}

/// One step of the test: the messages of all other ranks.
fn all_gather(
    member: &Member,
    call: &Call<'_>,
    step: u32,
    message: &impl Serialize,
    files: &[BorrowedFd<'_>],
) -> Result<impl Iterator<Item = (usize, Frame)>, String> {
    let frames = member.all_gather(call, (Kind::Reach, step), message, files);
    let frames = frames.map_err(|Silence { rank, why }| {
        let why = match why {
            Why::Unreadable(reason) => format!("sends messages that can't be received: {reason}"),
            Why::Lost => "has left".into(),
            Why::Aborted => "has aborted".into(),
            Why::Late => "did not answer in time".into(),
            Why::Failed(error) => format!("was not heard: {error}"),
        };
        format!("test of peer access between ranks: rank {rank} {why}")
    })?;
    Ok(frames.into_iter().enumerate().filter_map(|(rank, frame)| Some((rank, frame?))))
}

fn parse<T: DeserializeOwned>(rank: usize, frame: &Frame) -> Result<T, String> {
    frame.parse().map_err(|error| format!("the message of rank {rank} can't be parsed: {error}"))
}
