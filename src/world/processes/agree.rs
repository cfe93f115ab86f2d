//! How ranks that are processes build an averager together: each shows its card to all others, opens the memory that it needs of
//! theirs, and says whether it could. What one rank refuses or lacks, all of them are told.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::frame::{Frame, Kind};
use super::peers::{Ring, State};
use super::shown::{of_itself, Reader, Shown};
use super::{Processes, JOINING};
use crate::backend::Memory;
use crate::deadline;
use crate::error::Stage;
use crate::world::{Agreement, Card, Control};
use crate::{Error, Result};

/// What all that is said about one averager is said by: the generation, and which of its averagers it is.
type Number = (u32, u32);

impl Processes {
    /// Collective, as `Hub::agree`. An error of one rank's card, or of what it opens, is every rank's.
    pub(in crate::world) fn agree(&self, card: Card, timeout: Duration) -> Result<Arc<Agreement>> {
        let number = (self.number(), self.generation.builds.fetch_add(1, Ordering::Relaxed));
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        // A process that joined is to be here soon: the others have a model to train.
        let timeout = if self.has_joined() { timeout.min(JOINING) } else { timeout };
        let deadline = deadline::after(timeout);
        let (body, files) = Shown::of(&card);
        self.tell(Kind::Card, number, &body, &files, deadline)?;
        let frames = self.hear(Kind::Card, number, deadline, timeout, |_, frame| Ok(frame))?;
        let opened = self.open(frames, &card);
        let verdict = self.verdict(number, opened.as_ref().err(), deadline, timeout);
        let cards = opened.and_then(|cards| verdict.map(|()| cards))?; // this rank's own error first
        let mut agreement = Agreement::of(cards)?;
        agreement.ordinal.get_or_insert_with(|| format!("{} of generation {}", number.1, number.0));
        let agreement = Arc::new(agreement);
        self.links.watch(&agreement, self.ring());
        match self.failure() {
            Some(failure) => Err(failure), // aborted meanwhile
            None => Ok(agreement),
        }
    }

    /// All cards, by rank, with the memory that this rank uses.
    fn open(&self, frames: Vec<(usize, Frame)>, own: &Card) -> Result<Vec<Card>> {
        let bytes = |memory: &Option<Arc<Memory>>| memory.as_ref().map(|memory| memory.bytes());
        let mut cards = vec![own.clone(); self.members().len()];
        for (rank, frame) in frames {
            let [inbox, credits, control] = self.wanted(rank);
            let reader = Reader {
                rank: self.rank(),
                site: self.places.site(self.rank()),
                wanted: [inbox, credits, control],
            };
            let theirs = Shown::read(frame, rank, reader)?;
            let right = (!inbox || bytes(&theirs.inbox) == bytes(&own.inbox))
                && (!credits || bytes(&theirs.credits) == bytes(&own.credits))
                && (!control
                    || theirs.control.as_ref().is_some_and(|c| c.memory().bytes() == Control::BYTES));
            // Cards that do not go together are told by what differs.
            if !right && Agreement::of(vec![own.clone(), theirs.clone()]).is_ok() {
                let reason = "its memory is not of the size that its options make it".into();
                return Err(Error::PeerRefused { rank, reason });
            }
            cards[rank] = theirs;
        }
        Ok(cards)
    }

    /// Collective: tells all others whether this rank could open what it needs, and hears whether they could. The first refusal
    /// that comes is enough.
    fn verdict(
        &self,
        number: Number,
        own: Option<&Error>,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<()> {
        let said = own.map(|error| of_itself(error.to_string(), self.rank()));
        self.tell(Kind::Verdict, number, &said, &[], deadline)?;
        let refused = |rank, frame: Frame| match frame.parse::<Option<String>>() {
            Ok(None) => Ok(()),
            Ok(Some(reason)) => Err(Error::PeerRefused { rank, reason }),
            Err(error) => {
                Err(Error::PeerRefused { rank, reason: format!("its verdict is not understood: {error}") })
            }
        };
        self.hear(Kind::Verdict, number, deadline, timeout, refused).map(drop)
    }

    /// Says something to every other rank.
    fn tell(
        &self,
        kind: Kind,
        (generation, number): Number,
        body: &impl serde::Serialize,
        files: &[std::os::fd::BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        let sent = self.links.send_to_all(self.others(), (kind, generation, number), body, files, deadline);
        let failed =
            |error: std::io::Error| Error::SharedMemory { rank: self.rank(), reason: error.to_string() };
        sent.map_err(|error| self.fail(failed(error)))
    }

    /// What every other rank says, by rank, as it comes. What `take` refuses is told at once, whoever else is waited for.
    fn hear<T>(
        &self,
        kind: Kind,
        (generation, number): Number,
        deadline: Instant,
        timeout: Duration,
        take: impl Fn(usize, Frame) -> Result<T>,
    ) -> Result<Vec<(usize, T)>> {
        let key = (kind, generation, number);
        let peers = || self.members().iter().copied().enumerate().filter(|&(_, peer)| peer != self.links.me);
        let mut missing: Vec<(usize, usize)> = peers().collect();
        let mut heard = vec![];
        while !missing.is_empty() {
            let came = self.links.wait(deadline, |state| {
                let said: Vec<_> =
                    missing.iter().filter_map(|&(rank, peer)| Some((rank, state.take(peer, key)?))).collect();
                if !said.is_empty() {
                    return Some(Ok(said));
                }
                missing.iter().find_map(|&(rank, peer)| self.silence(rank, peer, state)).map(Err)
            });
            let late =
                || Error::Timeout { rank: missing[0].0, timeout, stage: Stage::Build, committed: false };
            let said = came.unwrap_or_else(|| Err(late())).map_err(|error| self.fail(error))?;
            for (rank, frame) in said {
                missing.retain(|&(other, _)| other != rank);
                heard.push((rank, take(rank, frame)?));
            }
        }
        Ok(heard)
    }

    /// Why a peer that has not said it yet will not, if that is so.
    fn silence(&self, rank: usize, peer: usize, state: &State) -> Option<Error> {
        let stage = Stage::Build;
        let aborts = |peer: &usize| state.aborts(*peer, self.number());
        if let Some(rank) = self.members().iter().position(aborts) {
            return Some(Error::Aborted { rank, stage, committed: false });
        }
        if let Some(failure) = self.failure() {
            return Some(failure);
        }
        match state.trouble.get(&peer) {
            Some(reason) => {
                let reason = format!("what rank {rank} says can't be understood: {reason}");
                Some(Error::SharedMemory { rank: self.rank(), reason })
            }
            None if state.is_lost(peer, self.number()) => {
                Some(Error::PeerLost { rank, stage, committed: false })
            }
            None => None,
        }
    }

    /// Whether the inbox, the credits and the control of this rank are used here.
    fn wanted(&self, rank: usize) -> [bool; 3] {
        let (own, world) = (self.places.position(self.rank()), self.members().len());
        let position = self.places.position(rank);
        [position == (own + 1) % world, (position + 1) % world == own, rank == 0]
    }

    fn ring(&self) -> Ring {
        let peers = self.places.order().iter().map(|&rank| self.members()[rank]);
        Ring { generation: self.number(), peers: peers.collect() }
    }
}
