//! Reductions of a few numbers, and barriers, on the hosts.

use std::time::Duration;

use super::ParamAverager;
use crate::schedule::{place, Course};
use crate::world::{ExchangeId, Shown, MOST_WORDS};
use crate::{Error, Result};

/// Function that [`all_reduce_scalars`](ParamAverager::all_reduce_scalars) computes of all ranks'
/// values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// The sum, added in the order of ranks.
    Sum,
    /// The sum divided by the number of ranks.
    Mean,
    /// The largest value; NaN if there is any.
    Max,
}

impl ParamAverager {
    /// Replaces each value by the sum, the mean or the maximum of all ranks' values, such as losses
    /// and numbers of tokens or samples. Collective, on the hosts: up to 1,024 values; for tensors
    /// there is [`average`](Self::average). Every rank gets the same bits.
    ///
    /// # Errors
    /// On every rank, with no value changed: [`Error::CallsDiffer`] if ranks pass another number of
    /// values or another reduction, [`Error::InvalidOption`] for too many values. As for an
    /// average, the builder's `timeout` bounds the wait, and a rank that is late, gone or aborted
    /// is a fatal error. A rank that averages instead is a rank that is late.
    pub fn all_reduce_scalars(&mut self, values: &mut [f64], reduction: Reduction) -> Result<()> {
        let call = format!("all_reduce_scalars of {} values, {reduction:?}", values.len());
        let words = if values.len() > MOST_WORDS { &[] } else { &*values };
        let words = words.iter().map(|value| value.to_bits()).collect();
        let all = self.exchange(Shown { call, words })?;
        if values.len() > MOST_WORDS {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "values",
                found: format!("{} numbers", values.len()),
                expected: "1,024 at most: average tensors instead",
            });
        }
        for (index, value) in values.iter_mut().enumerate() {
            let column =
                all.iter().filter_map(|shown| shown.words.get(index)).copied().map(f64::from_bits);
            *value = match reduction {
                Reduction::Sum => column.sum(),
                Reduction::Mean => column.sum::<f64>() / all.len() as f64,
                Reduction::Max => column.fold(f64::NEG_INFINITY, |most, value| {
                    if value > most || value.is_nan() {
                        value
                    } else {
                        most
                    }
                }),
            };
        }
        Ok(())
    }

    /// Waits until all ranks have called it. Collective. Ranks need no barrier around an average,
    /// which is one.
    ///
    /// # Errors
    /// As [`all_reduce_scalars`](Self::all_reduce_scalars).
    pub fn barrier(&mut self) -> Result<()> {
        self.exchange(Shown { call: "barrier".into(), words: vec![] }).map(drop)
    }

    /// Shows a message to all ranks that make the same call.
    pub(super) fn exchange(&mut self, shown: Shown) -> Result<Vec<Shown>> {
        self.check_world()?; // an average of a copy may be under way
        if self.world_size() == 1 {
            return Ok(vec![shown]);
        }
        let number = self.exchanges.wrapping_mul(2);
        self.exchanges = self.exchanges.wrapping_add(1);
        let all = self.all_gather(number, shown, self.timeout);
        let all = all.inspect_err(|error| self.give_up(error))?;
        let differs = (1..all.len()).find(|&rank| all[rank].call != all[0].call);
        match differs {
            None => Ok(all),
            Some(rank) => Err(Error::CallsDiffer {
                rank,
                reference: 0,
                found: all[rank].call.clone(),
                expected: all[0].call.clone(),
            }),
        }
    }

    /// Ends the world after an error of this rank in an exchange: peers may have all messages by
    /// now, or wait for this rank.
    pub(super) fn give_up(&mut self, error: &Error) {
        self.agreement.control.give_up(self.position());
        self.communicator.fail(error);
        self.failed.get_or_insert_with(|| error.clone());
        self.stage.iter().for_each(|stage| stage.abort(&error.to_string()));
    }

    /// Shows all ranks a text about an average of this epoch, after all of them have learnt that it
    /// has failed: why it was made, since their reasons differ, or why a stage has refused it.
    /// Returns each rank's text, and whether it was `done`. `None` if a rank does not look at the
    /// outcome soon.
    pub(super) fn all_reasons(&self, epoch: u32, reason: String) -> Option<Vec<(String, bool)>> {
        /// Longest wait: an average that was enqueued may have its outcome looked at much later.
        const SOON: Duration = Duration::from_secs(5);
        let number = epoch.wrapping_mul(2) | 1;
        let is_done = self.call.place == place::DONE;
        let shown = Shown { call: reason, words: vec![is_done.into()] };
        let all = self.all_gather(number, shown, SOON.min(self.timeout)).ok()?;
        Some(all.into_iter().map(|shown| (shown.call, shown.words.contains(&1))).collect())
    }

    /// Course of the ranks that are farthest on; all of them are `done`.
    pub(crate) fn farthest(&mut self, course: Course) -> Result<Course> {
        let words = vec![course.position, course.anchor, course.local_steps];
        let all = self.exchange(Shown { call: place::call(place::DONE), words })?;
        let courses = all.iter().filter_map(|shown| {
            let &[position, anchor, local_steps] = &shown.words[..] else { return None };
            Some(Course { position, anchor, local_steps })
        });
        Ok(Course::farthest(courses.chain([course])))
    }

    fn all_gather(&self, number: u32, shown: Shown, timeout: Duration) -> Result<Vec<Shown>> {
        let id = ExchangeId { averager: self.agreement.number, number };
        let placement = self.communicator.placement();
        let control = &self.agreement.control;
        let has_left = |rank| control.has_left(placement.position(rank));
        self.communicator.all_gather(id, shown, timeout, &has_left)
    }
}
