//! Going on after a failure, among the ranks that are left.

use super::ParamAverager;
use crate::error::Stage;
use crate::{Error, Parameters, Result};

impl ParamAverager {
    /// Collective among the ranks that are left, after an error that [is fatal](Error::is_fatal): builds the averager anew, with
    /// the same options, for the ranks that call it within the builder's `timeout` and are not gone; see
    /// [`Communicator::recover`](crate::Communicator::recover). Ranks are numbered anew. If another is lost on the way, the rest goes on
    /// without it. The next average is the mean over them, and makes them agree where some tensors were half written.
    ///
    /// Does nothing if the averager has not failed. After an error that says nothing of this rank being left out, it can be called again.
    pub fn recover<P: Parameters + ?Sized>(&mut self, params: &mut P) -> Result<()> {
        self.recover_at(params, 0).map(drop)
    }

    /// The same with this rank's place in its schedule. Returns the one farthest on of all ranks: some may have been done with the
    /// average that failed for others, and have gone on to the next.
    pub(crate) fn recover_at<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        position: u64,
    ) -> Result<u64> {
        if self.failed.is_none() && self.agreement.control.failure().is_none() {
            return Ok(position);
        }
        // Whatever was enqueued ends by itself: its world has failed.
        let _ = self.own.engine.finish();
        self.options.schedule_position = position;
        loop {
            // Kept also where what follows fails: the next call begins from there.
            self.options.communicator = self.options.communicator.recover(self.timeout)?;
            match self.options.clone().build(params) {
                Ok(averager) => {
                    *self = averager;
                    let positions = self.agreement.cards.iter().map(|card| card.schedule_position);
                    return Ok(positions.max().unwrap_or(position));
                }
                // A rank that was there a moment ago: each round is without one more.
                Err(
                    Error::PeerLost { stage: Stage::Build, .. } | Error::Timeout { stage: Stage::Build, .. },
                ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
