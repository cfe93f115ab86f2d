//! The identity of a process: its user, the processes that started it, its job, and the rank that
//! its launcher gave it.

pub(crate) mod ancestry;
pub(crate) mod credentials;
pub(crate) mod job;
pub(crate) mod launcher;
