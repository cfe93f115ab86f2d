//! Joining a running world: the joiner's side, and that of the members.

pub(crate) mod joiner;
pub(crate) mod listener;
