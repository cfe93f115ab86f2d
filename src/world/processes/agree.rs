//! Building an averager across processes. Each rank shows its handshake to all others, opens their
//! memory that it needs, and tells its verdict. A refusal or shortage of one rank is an error on
//! every rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::{Frame, Kind};
use super::peer_state::{Ring, State};
use super::wire_handshake::{of_itself, Reader, Unopened, WireHandshake};
use super::{ProcessBootstrap, JOINING};
use crate::backend::{limits, Memory};
use crate::deadline;
use crate::error::Phase;
use crate::notice::Notice;
use crate::world::{waits_for_call, Agreement, Control, Handshake, BUILD};
use crate::{Error, Result};

/// Number of a build in messages: the view, and the build number in that view.
type Number = (u32, u32);

/// Time to wait for further ranks after one has refused.
const SOON: Duration = Duration::from_millis(300);

impl ProcessBootstrap {
    /// Exchanges handshakes and opens the memory of peers. Collective, as `ThreadBootstrap::agree`.
    /// An error in one handshake, or in opening its memory, is an error on every rank. `again` is
    /// the build number of an averager that is built again.
    pub(in crate::world) fn agree(
        &self,
        handshake: Handshake,
        again: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>> {
        let number = (self.number(), self.number_of_build(again));
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        // The members of a view with a joiner have a model to train, so they wait for it briefly.
        let timeout = if self.has_joined() { timeout.min(JOINING) } else { timeout };
        let deadline = deadline::after(timeout);
        let (body, files) = WireHandshake::of(&handshake);
        self.send_to_others(Kind::Handshake, number, &body, &files, deadline)?;
        let frames =
            self.receive_from_others(Kind::Handshake, number, deadline, timeout, false, |_| false)?;
        // Parsing allocates many small pieces, and a small allocation that fails aborts the
        // process. So memory for handshakes larger than this rank's own is tested first.
        let bytes: usize = frames.iter().map(|(_, frame)| frame.body.len()).sum();
        if let Err(reason) = limits::spare(4 * bytes) {
            let error = Error::Memory { rank: self.rank(), reason };
            return Err(self
                .verdict(number, Some(&error), deadline, timeout)
                .err()
                .unwrap_or(error));
        }
        let unopened = frames.into_iter().map(|(rank, frame)| WireHandshake::read(frame, rank));
        let unopened =
            unopened.collect::<Result<Vec<Unopened>>>().map_err(|error| self.fail(error))?;
        let mut handshakes = vec![handshake.clone(); self.members().len()];
        unopened.iter().for_each(|unopened| handshakes[unopened.rank] = unopened.handshake.clone());
        Agreement::check(&handshakes)?; // the same on every rank, so that none waits for a verdict
        let opened = self.open(unopened, handshakes);
        let verdict = self.verdict(number, opened.as_ref().err(), deadline, timeout);
        let handshakes = verdict.and(opened)?;
        let mut agreement = Agreement::of(handshakes)?;
        agreement.number = number.1;
        agreement.ordinal.get_or_insert_with(|| format!("{} of view {}", number.1, number.0));
        let agreement = Arc::new(agreement);
        self.peer_set.watch(&agreement, self.ring());
        match self.failure() {
            Some(failure) => Err(failure), // aborted meanwhile
            None => Ok(agreement),
        }
    }

    /// All handshakes, by rank, with the memory that this rank uses.
    fn open(
        &self,
        unopened: Vec<Unopened>,
        mut handshakes: Vec<Handshake>,
    ) -> Result<Vec<Handshake>> {
        let bytes = |memory: &Option<Arc<Memory>>| memory.as_ref().map(|memory| memory.bytes());
        let own = handshakes[self.rank()].clone();
        for unopened in unopened {
            let rank = unopened.rank;
            let wanted @ [inbox, credits, control] = self.wanted(rank);
            let theirs = unopened.open(Reader {
                rank: self.rank(),
                space: self.placement.space(self.rank()),
                wanted,
            })?;
            let right = (!inbox || bytes(&theirs.inbox) == bytes(&own.inbox))
                && (!credits || bytes(&theirs.credits) == bytes(&own.credits))
                && (!control
                    || theirs
                        .control
                        .as_ref()
                        .is_some_and(|c| c.memory().bytes() == Control::BYTES));
            if !right {
                let reason = "the size of its memory does not match its options".into();
                return Err(Error::PeerBuildFailed { rank, reason });
            }
            handshakes[rank] = theirs;
        }
        Ok(handshakes)
    }

    /// Tells all others whether this rank could open what it needs, and receives their verdicts.
    /// Collective. Of several refusals, every rank reports that of the lowest rank.
    fn verdict(
        &self,
        number: Number,
        own: Option<&Error>,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<()> {
        let verdict = own.map(|error| of_itself(error.to_string(), self.rank()));
        self.send_to_others(Kind::Verdict, number, &verdict, &[], deadline)?;
        let is_refusal = |frame: &Frame| frame.body != b"null";
        let frames = self.receive_from_others(
            Kind::Verdict,
            number,
            deadline,
            timeout,
            own.is_some(),
            is_refusal,
        )?;
        let refused =
            frames.into_iter().filter(|(_, frame)| is_refusal(frame)).map(|(rank, frame)| {
                let reason = frame
                    .parse()
                    .unwrap_or_else(|error| format!("its verdict can't be parsed: {error}"));
                (rank, Error::PeerBuildFailed { rank, reason })
            });
        let own = own.map(|error| (self.rank(), error.clone()));
        refused.chain(own).min_by_key(|&(rank, _)| rank).map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Sends a message to every other rank.
    pub(super) fn send_to_others(
        &self,
        kind: Kind,
        (view, number): Number,
        body: &impl serde::Serialize,
        files: &[std::os::fd::BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let sent =
            self.peer_set.send_to_all(self.others(), (kind, view, number), body, files, deadline);
        let failed = |error: std::io::Error| Error::SharedMemory {
            rank: self.rank(),
            reason: error.to_string(),
        };
        sent.map_err(|error| self.fail(failed(error)))
    }

    /// Receives the message of this kind and number from every other rank. After a refusal, by this
    /// rank or another, further messages are waited for briefly, and may be missing.
    pub(super) fn receive_from_others(
        &self,
        kind: Kind,
        (view, number): Number,
        mut deadline: Instant,
        timeout: Duration,
        mut is_refused: bool,
        refuses: impl Fn(&Frame) -> bool,
    ) -> Result<Vec<(usize, Frame)>> {
        let key = (kind, view, number);
        let peers = self.members().iter().copied().enumerate();
        let mut missing: Vec<(usize, usize)> =
            peers.filter(|&(_, peer)| peer != self.peer_set.me).collect();
        let mut received = vec![];
        let mut notice = Notice::new(Some(self.rank()));
        loop {
            if is_refused {
                deadline = deadline.min(Instant::now() + SOON);
            }
            let Some(&(first, _)) = missing.first() else { return Ok(received) };
            let absent: Vec<usize> = missing.iter().map(|&(rank, _)| rank).collect();
            let waiting = |_: &State| waits_for_call(self.rank(), &absent, BUILD, timeout);
            let came = self.peer_set.wait_and_tell(deadline, &mut notice, waiting, |state| {
                let new: Vec<(usize, Frame)> = missing
                    .iter()
                    .filter_map(|&(rank, peer)| Some((rank, state.take(peer, key)?)))
                    .collect();
                let reason_for_silence = || {
                    missing.iter().find_map(|&(rank, peer)| {
                        self.reason_for_silence(rank, peer, state, Phase::Build)
                    })
                };
                if new.is_empty() {
                    reason_for_silence().map(Err)
                } else {
                    Some(Ok(new))
                }
            });
            let late =
                || Error::Timeout { rank: first, timeout, phase: Phase::Build, committed: false };
            let new = match came.unwrap_or_else(|| Err(late())) {
                Ok(new) => new,
                Err(_) if is_refused => return Ok(received),
                Err(error) => return Err(self.fail(error)),
            };
            missing.retain(|(rank, _)| new.iter().all(|(other, _)| other != rank));
            is_refused |= new.iter().any(|(_, frame)| refuses(frame));
            received.extend(new);
        }
    }

    /// The reason why no message will come from a peer, if there is one.
    pub(super) fn reason_for_silence(
        &self,
        rank: usize,
        peer: usize,
        state: &State,
        phase: Phase,
    ) -> Option<Error> {
        let aborts = |peer: &usize| state.aborts(*peer, self.number());
        if let Some(rank) = self.members().iter().position(aborts) {
            return Some(Error::Aborted { rank, phase, committed: false });
        }
        if let Some(failure) = self.failure() {
            return Some(failure);
        }
        match state.unreadable.get(&peer) {
            Some(reason) => {
                let reason = format!("messages of rank {rank} can't be received: {reason}");
                Some(Error::SharedMemory { rank: self.rank(), reason })
            }
            None if state.is_lost(peer, self.number()) => {
                Some(Error::PeerLost { rank, phase, committed: false })
            }
            None => None,
        }
    }

    /// True for the inbox, the credits and the control block of `rank` if this rank uses them.
    fn wanted(&self, rank: usize) -> [bool; 3] {
        let (own, world) = (self.placement.position(self.rank()), self.members().len());
        let position = self.placement.position(rank);
        [position == (own + 1) % world, (position + 1) % world == own, rank == 0]
    }

    fn ring(&self) -> Ring {
        let peers = self.placement.order().iter().map(|&rank| self.members()[rank]);
        Ring { view: self.number(), peers: peers.collect() }
    }
}
