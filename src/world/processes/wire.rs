//! Messages on sockets: their form, their sending and receiving, and the accept loop for messages
//! of unknown processes.

pub(crate) mod exchange;
pub(crate) mod frame;
pub(crate) mod listener;
pub(crate) mod private;
