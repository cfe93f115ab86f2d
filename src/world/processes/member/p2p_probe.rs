//! Probe of peer access between processes. Each rank tests its access to the device memory of every
//! other, before anything is built.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use serde::{de::DeserializeOwned, Deserialize, Serialize};

use super::Member;
use crate::backend::cuda::{peer, IpcPeer, IpcProbe, Round};
use crate::backend::proximity::PeerAccess;
use crate::backend::MemoryHandle;
use crate::error::Phase;
use crate::world::gather::{Call, Silence, Why};
use crate::world::processes::wire::frame::{Frame, Kind};

/// First message of a rank.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Opening {
    /// Memory for probes. `None` without CUDA IPC.
    handle: Option<MemoryHandle>,
    /// Device. Between ranks on one device there is no link to probe.
    uuid: String,
    /// False if `PARAM_AVERAGER_P2P=0` forbids access to other devices.
    is_allowed: bool,
}

/// Knowledge of one rank about its access to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Found {
    /// Memory can't be opened.
    Closed,
    /// Access is not allowed on one of the two ranks.
    Forbidden,
    /// All data arrived so far.
    Right,
    /// Data were wrong or late.
    Wrong,
}

/// State that all ranks learn after each round.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// By rank.
    found: Vec<Found>,
    /// Probes that this rank has run in this round.
    probes: u32,
    /// True if all of them were quick, so that more data may follow.
    is_quick: bool,
}

/// Probes peer access between all members of a view. Collective. Does nothing on CPUs.
///
/// ```text
///  rank A                               rank B
///  exports its memory         ────────▶ opens it
///  for each amount of data and path, in turns in which each rank has one partner at most:
///      clears its memory      ────────▶
///      runs a kernel          ◀───────▶ runs a kernel at the same time: data, then flags
///  says what it found         ────────▶ all ranks
/// ```
///
/// The same steps run in the opposite direction at the same time. More data follow while all probes
/// are quick.
pub(crate) fn find(member: &Member, timeout: Duration) -> Result<(), String> {
    let own = member.peer_set.host_infos().own().clone();
    let call = member.call("test peer access", Phase::Build, timeout);
    let (size, me) = (call.size, call.rank);
    let Some(context) = own.context().filter(|_| size > 1) else { return Ok(()) };
    let mut exchange = Exchange { member, call, number: 0 };
    let mut probe = IpcProbe::new(context).ok();
    let (handle, file) = probe.as_ref().map(IpcProbe::export).unzip();
    let uuid = own.host_info.gpu.as_ref().map(|gpu| gpu.identity.uuid.clone()).unwrap_or_default();
    let opening = Opening { handle, uuid, is_allowed: peer::is_allowed() };
    let mut found = vec![Found::Closed; size];
    let mut is_same = vec![false; size];
    let mut peers: Vec<Option<IpcPeer>> = (0..size).map(|_| None).collect();
    for (rank, frame) in exchange.all_gather(&opening, file.as_slice())? {
        let theirs: Opening = parse(rank, &frame)?;
        is_same[rank] = theirs.uuid == opening.uuid;
        let is_allowed = theirs.is_allowed && opening.is_allowed;
        if !is_same[rank] && !is_allowed {
            found[rank] = Found::Forbidden;
        } else if let (Some(handle), Some(file), Some(probe)) =
            (theirs.handle, frame.files.into_iter().next(), &probe)
        {
            peers[rank] = probe.open(&handle, file).ok();
            found[rank] = if peers[rank].is_some() { Found::Right } else { Found::Closed };
        }
    }
    let mut all = exchange.states(State { found: found.clone(), probes: 0, is_quick: true })?;
    for rounds in Round::all() {
        for round in rounds {
            let (mut probes, mut is_quick) = (0, true);
            for turn in 0..turns(size) {
                let partner = partner(size, me, turn)
                    .filter(|&rank| !is_same[rank] && access(&all, me, rank).works());
                if let (Some(probe), Some(_)) = (&mut probe, partner) {
                    probe.clear()?;
                }
                exchange.all_gather(&(), &[])?; // both memories are clear
                let Some(rank) = partner else { continue };
                let (Some(probe), Some(peer)) = (&probe, &peers[rank]) else { continue };
                if !probe.has_room(peer, round) {
                    is_quick = false;
                    continue;
                }
                let outcome = probe.run(peer, round, me < rank).ok();
                probes += 1;
                if !outcome.is_some_and(|outcome| outcome.is_right) {
                    found[rank] = Found::Wrong;
                }
                // A pair that has failed is not probed again: it keeps no other from more data.
                is_quick &= outcome.is_none_or(|outcome| !outcome.is_right || outcome.is_quick);
            }
            all = exchange.states(State { found: found.clone(), probes, is_quick })?;
        }
        // Ranks that are all on one device have nothing to probe.
        if all.iter().all(|state| state.probes == 0) || !all.iter().all(|state| state.is_quick) {
            break;
        }
    }
    for (one, other) in (0..size).flat_map(|one| (0..one).map(move |other| (one, other))) {
        let (mut peers, ids) = (member.peer_set.host_infos(), member.ids());
        peers.know(ids[one], ids[other], access(&all, one, other));
    }
    Ok(())
}

/// Access between two ranks, by what both have found.
fn access(all: &[State], one: usize, other: usize) -> PeerAccess {
    let of = |one: usize, other: usize| all[one].found.get(other).copied();
    let both = [of(one, other).unwrap_or(Found::Closed), of(other, one).unwrap_or(Found::Closed)];
    match () {
        () if both.contains(&Found::Forbidden) => PeerAccess::Disabled,
        () if both.contains(&Found::Closed) => PeerAccess::Unsupported,
        () if both.contains(&Found::Wrong) => PeerAccess::Broken,
        () => PeerAccess::Verified,
    }
}

/// Number of turns in which each two of `size` ranks are partners once.
fn turns(size: usize) -> usize {
    size.next_multiple_of(2) - 1
}

/// Partner of a rank in a turn: the ranks but the last one stand in a circle that is folded, and
/// turns by one; the rank at the fold is the partner of the last one, or has none.
fn partner(size: usize, rank: usize, turn: usize) -> Option<usize> {
    let last = turns(size); // no rank has this number if `size` is odd
    let partner = match rank == last {
        // The rank that is its own image in the circle: twice its number is the turn's.
        true => (0..last).find(|rank| 2 * rank % last == turn).expect("`last` is odd"),
        false => match (turn + last - rank) % last {
            image if image == rank => last,
            image => image,
        },
    };
    (partner < size).then_some(partner)
}

struct Exchange<'a> {
    member: &'a Member,
    call: Call<'a>,
    /// Number of the next messages.
    number: u32,
}

impl Exchange<'_> {
    /// States of all ranks, by rank.
    fn states(&mut self, own: State) -> Result<Vec<State>, String> {
        let frames = self.all_gather(&own, &[])?;
        let none = || State { found: vec![], probes: 0, is_quick: true };
        let mut states: Vec<State> = (0..self.call.size).map(|_| none()).collect();
        for (rank, frame) in frames {
            states[rank] = parse(rank, &frame)?;
        }
        states[self.call.rank] = own;
        Ok(states)
    }

    /// Sends a message to every other rank, and receives one from each.
    fn all_gather(
        &mut self,
        message: &impl Serialize,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<(usize, Frame)>, String> {
        let key = (Kind::Reach, self.number);
        self.number += 1;
        let frames = self.member.all_gather(&self.call, key, message, files);
        let frames = frames.map_err(|Silence { rank, why }| {
            let why = match why {
                Why::Unreadable(reason) => {
                    format!("sends messages that can't be received: {reason}")
                }
                Why::Lost => "has left".into(),
                Why::Aborted => "has aborted".into(),
                Why::Late => "did not answer in time".into(),
                Why::Failed(error) => format!("was not heard: {error}"),
            };
            format!("test of peer access between ranks: rank {rank} {why}")
        })?;
        let came = frames.into_iter().enumerate();
        Ok(came.filter_map(|(rank, frame)| Some((rank, frame?))).collect())
    }
}

fn parse<T: DeserializeOwned>(rank: usize, frame: &Frame) -> Result<T, String> {
    frame.parse().map_err(|error| format!("the message of rank {rank} can't be parsed: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_two_ranks_are_partners_once() {
        for size in 2..=16 {
            let mut met = vec![vec![0; size]; size];
            for turn in 0..turns(size) {
                for (rank, met) in met.iter_mut().enumerate() {
                    let Some(other) = partner(size, rank, turn) else { continue };
                    assert_eq!(partner(size, other, turn), Some(rank), "{size}, {turn}");
                    met[other] += 1;
                }
            }
            for (rank, met) in met.iter().enumerate() {
                let once = |other| usize::from(other != rank);
                assert!(met.iter().enumerate().all(|(other, &n)| n == once(other)), "{size}");
            }
        }
    }

    #[test]
    fn access_is_what_both_ranks_have_found() {
        use Found::{Closed, Forbidden, Right, Wrong};
        let access = |ours, theirs| {
            let state = |found| State { found, probes: 0, is_quick: true };
            super::access(&[state(vec![Right, ours]), state(vec![theirs, Right])], 0, 1)
        };
        assert_eq!(access(Right, Right), PeerAccess::Verified);
        assert_eq!(access(Right, Wrong), PeerAccess::Broken);
        assert_eq!(access(Closed, Right), PeerAccess::Unsupported);
        assert_eq!(access(Right, Forbidden), PeerAccess::Disabled);
    }
}
