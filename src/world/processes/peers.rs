//! The peers of a process: connections to them, what they have said, where they run, and the view
//! that they are members of.

pub(crate) mod connections;
pub(crate) mod host_info;
pub(crate) mod peer_set;
pub(crate) mod state;
