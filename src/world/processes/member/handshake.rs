//! Building an averager across processes. Each rank shows its handshake to all others, opens their
//! memory that it needs, and tells its verdict. A refusal or shortage of one rank is an error on
//! every rank.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::{Member, JOINING};
use crate::backend::{limits, Memory};
use crate::error::Phase;
use crate::world::bootstrap::BUILD;
use crate::world::control::Control;
use crate::world::gather::Call;
use crate::world::handshake::{Agreement, Handshake};
use crate::world::placement::Placement;
use crate::world::processes::member::wire_handshake::{of_itself, Reader, Unopened, WireHandshake};
use crate::world::processes::wire::frame::{Frame, Kind};
use crate::{Error, Result};

impl Member {
    /// Exchanges handshakes and opens the memory of peers; see `Bootstrap::agree`. An error in one
    /// handshake, or in opening its memory, is an error on every rank. `again` is the build number
    /// of an averager that is built again.
    pub(crate) fn agree(
        &self,
        placement: &Placement,
        handshake: Handshake,
        again: Option<u32>,
        timeout: Duration,
    ) -> Result<Agreement> {
        let number = again.unwrap_or_else(|| self.view.builds.fetch_add(1, Ordering::Relaxed));
        self.failure().map_or(Ok(()), Err)?;
        // The members of a view with a joiner have a model to train, so they wait for it briefly.
        let timeout =
            if self.view.agreed.joined.is_some() { timeout.min(JOINING) } else { timeout };
        let call = self.call(BUILD, Phase::Build, timeout);
        let (body, files) = WireHandshake::of(&handshake);
        let frames = self.all_gather(&call, (Kind::Handshake, number), &body, &files);
        let frames: Vec<Option<Frame>> =
            frames.map_err(|silence| silence.error(&call)).inspect_err(|e| self.fail(e))?;
        // Parsing allocates many small pieces, and a small allocation that fails aborts the
        // process. So memory for handshakes larger than this rank's own is tested first.
        let bytes: usize = frames.iter().flatten().map(|frame| frame.body.len()).sum();
        if let Err(reason) = limits::spare(4 * bytes) {
            let error = Error::Memory { rank: call.rank, reason };
            return Err(self.verdict(&call, number, Some(&error)).err().unwrap_or(error));
        }
        let unopened = frames.into_iter().enumerate();
        let unopened = unopened.filter_map(|(rank, frame)| Some(WireHandshake::read(frame?, rank)));
        let unopened = unopened.collect::<Result<Vec<Unopened>>>();
        let unopened = unopened.inspect_err(|error| self.fail(error))?;
        let own = Arc::new(handshake);
        let mut handshakes = vec![own; call.size];
        for unopened in &unopened {
            handshakes[unopened.rank] = Arc::new(unopened.handshake.clone());
        }
        Agreement::check(&handshakes)?; // the same on every rank, so that none waits for a verdict
        let opened = self.open(placement, unopened, handshakes);
        let verdict = self.verdict(&call, number, opened.as_ref().err());
        let mut agreement = Agreement::of(verdict.and(opened)?)?;
        agreement.number = number;
        agreement.ordinal.get_or_insert_with(|| format!("{number} of view {}", self.number()));
        Ok(agreement)
    }

    /// All handshakes, by rank, with the memory that this rank uses.
    fn open(
        &self,
        placement: &Placement,
        unopened: Vec<Unopened>,
        mut handshakes: Vec<Arc<Handshake>>,
    ) -> Result<Vec<Arc<Handshake>>> {
        let bytes = |memory: &Option<Arc<Memory>>| memory.as_ref().map(|memory| memory.bytes());
        let own = handshakes[self.rank()].clone();
        for unopened in unopened {
            let rank = unopened.rank;
            let wanted @ [inbox, credits, control, state] = self.wanted(placement, rank);
            let theirs = unopened.open(Reader {
                rank: self.rank(),
                space: placement.space(self.rank()),
                wanted,
            })?;
            let is_of = |memory, bytes_of_options| {
                bytes(memory) == own.inbox.as_ref().map(|_| bytes_of_options)
            };
            let right = (!inbox || is_of(&theirs.inbox, own.neighbours[0]))
                && (!credits || is_of(&theirs.credits, own.neighbours[1]))
                && (!state || bytes(&theirs.state) == bytes(&own.state))
                && (!control
                    || theirs
                        .control
                        .as_ref()
                        .is_some_and(|c| c.memory().bytes() == Control::BYTES));
            if !right {
                let reason = "the size of its memory does not match its options".into();
                return Err(Error::PeerBuildFailed { rank, reason });
            }
            handshakes[rank] = Arc::new(theirs);
        }
        Ok(handshakes)
    }

    /// Tells all others whether this rank could open what it needs, and receives their verdicts.
    /// Collective. Of several refusals, every rank reports that of the lowest rank.
    fn verdict(&self, call: &Call<'_>, number: u32, own: Option<&Error>) -> Result<()> {
        let rank = call.rank;
        let verdict = own.map(|error| of_itself(error.to_string(), rank));
        let kind = (Kind::Verdict, number);
        let refuses = own.is_some();
        let frames = self.all_gather_until(call, kind, (&verdict, &[]), refuses, &|_| false);
        let frames = frames.map_err(|silence| silence.error(call));
        let mut verdicts: Vec<Option<Error>> = vec![];
        for (rank, frame) in frames.inspect_err(|e| self.fail(e))?.into_iter().enumerate() {
            let refusal = frame.and_then(|frame| {
                let unread = |error| Some(format!("its verdict can't be parsed: {error}"));
                frame.parse::<Option<String>>().unwrap_or_else(unread)
            });
            verdicts.push(refusal.map(|reason| Error::PeerBuildFailed { rank, reason }));
        }
        verdicts[rank] = own.cloned();
        verdicts.into_iter().flatten().next().map_or(Ok(()), Err)
    }

    /// True for the inbox, the credits, the control block and the state of `rank` if this rank uses
    /// them.
    fn wanted(&self, placement: &Placement, rank: usize) -> [bool; 4] {
        let (own, world) = (placement.position(self.rank()), self.ids().len());
        let position = placement.position(rank);
        let is_previous = (position + 1) % world == own;
        [position == (own + 1) % world, is_previous, rank == 0, is_previous]
    }
}
