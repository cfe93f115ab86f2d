//! Joining: a process enters a world that is training, and gets its model.
//!
//! # The joiner
//! [`Communicator::join`](crate::Communicator::join) takes the name that the members'
//! [`rendezvous`](crate::Communicator::rendezvous) returns, or that `PARAM_AVERAGER_RENDEZVOUS`
//! gave them. It waits until the members admit the process, as the last rank. Building the averager
//! then gives its tensors a copy of rank 0's, bit for bit, and
//! [`LocalSgd::position`](crate::LocalSgd::position) tells how far its peers are. The members wait
//! for it, a minute at most, so whatever takes long (loading data, compiling) comes before `join`.
//! It builds the averagers that they have, in the same order. Which world it has entered is in
//! [`Communicator::world`](crate::Communicator::world).
//!
//! ```no_run
//! use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};
//!
//! fn main() -> Result<()> {
//!     let mut model = vec![vec![0.0f32; 1000]];
//!     let communicator = Communicator::join("my-run", Device::cpu())?;
//!     let averager = ParamAverager::builder(communicator).build(&mut model)?;
//!     // The model is now the one that the members train.
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     for _step in sgd.position()..10_000 {
//!         // train_step(&mut model);
//!         sgd.step(&mut model)?;
//!     }
//!     sgd.finish(&mut model)?;
//!     Ok(())
//! }
//! ```
//!
//! # The members
//! [`LocalSgd::step`](crate::LocalSgd::step) admits a process after the next average that is due
//! (on a CUDA stream after the second one, and after none while a rank is
//! [`done`](crate::LocalSgd::done)), and returns [`Action::Admitted`](crate::Action::Admitted);
//! [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner) does it for averages by
//! hand, where [`Report::join_pending`](crate::Report::join_pending) says that a process waits. The
//! members' models stay as they are, bit for bit; but where an outer optimizer lets ranks
//! [keep a share](crate::Outer::keeping), all ranks get the mean. The state of an
//! [outer optimizer](super::outer) is divided anew, and the joiner gets its part. If the joiner's
//! model differs, or the process
//! dies on the way, the members go on without it, and the attempt uses nothing up.
//! `examples/join.rs` is a program that does both.
