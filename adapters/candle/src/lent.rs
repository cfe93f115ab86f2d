//! Storages that are lent now: the second loan of one is an error, not a wait for the first one.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use param_averager::LendError;

use crate::{Named, VarParams};

/// Addresses of all storages that are lent in this process.
static LENT: Mutex<BTreeSet<usize>> = Mutex::new(BTreeSet::new());

fn lent() -> MutexGuard<'static, BTreeSet<usize>> {
    // Nothing panics while it is locked, out of memory aside.
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Entry of all variables of one loan, until it is dropped.
pub(crate) struct Entry<'p>(&'p VarParams);

impl<'p> Entry<'p> {
    pub(crate) fn new(params: &'p VarParams) -> Result<Self, LendError> {
        let mut lent = lent();
        if let Some(Named { name, .. }) = params.locking().find(|it| lent.contains(&it.storage)) {
            return Err(LendError::new(format!(
                "the variable `{name}` is lent to another average at this time: give every rank a \
                 VarMap of its own, and average it with one averager at a time"
            )));
        }
        lent.extend(params.locking().map(|it| it.storage));
        Ok(Entry(params))
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut lent = lent();
        for each in &self.0.vars {
            lent.remove(&each.storage);
        }
    }
}
