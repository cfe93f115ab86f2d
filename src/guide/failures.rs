//! Failures: errors, the state of the tensors, recovery, and bounded waits.
//!
//! # What an error tells
//!
//! | question | answer |
//! |---|---|
//! | What has to be mended? | [`Error::kind`](crate::Error::kind): the call, a difference between ranks, a peer, a device, or the environment |
//! | Can this averager go on? | [`Error::is_fatal`](crate::Error::is_fatal). `false`: mend and call again. `true`: recover, or build a new world |
//! | What do my tensors hold? | [`Error::tensors`](crate::Error::tensors): unchanged, the mean, a mixture, or unknown |
//! | What was it, and where? | the variant and its text: rank, tensor, phase, and what to do |
//! | What caused it? | [`source`](std::error::Error::source) of errors that follow from others |
//!
//! [`guide::hosts`](super::hosts) has the failures of several hosts.
//!
//! Up to the commit of an average, the error is the same on every rank and no rank's tensors have
//! changed. If a rank stops after the commit, each element on the other ranks is its own value or
//! the average's result (`committed: true`,
//! [`TensorState::MayBeMixed`](crate::TensorState::MayBeMixed)); an average among the ranks that
//! are left makes them agree again.
//!
//! ```
//! use param_averager::{Communicator, Device, Error, ErrorKind, ParamAverager, TensorState};
//!
//! let mut world = Communicator::from_devices(&[Device::cpu(), Device::cpu()])?.into_iter();
//! let (first, second) = (world.next().unwrap(), world.next().unwrap());
//! let leaves = std::thread::spawn(move || {
//!     let mut model = vec![1.0f32; 100];
//!     ParamAverager::builder(second).build(&mut model).map(drop) // builds, and leaves
//! });
//! let mut model = vec![0.0f32; 100];
//! let mut averager = ParamAverager::builder(first).build(&mut model)?;
//! leaves.join().unwrap()?;
//!
//! let error = averager.average(&mut model).unwrap_err();
//! assert!(matches!(error, Error::PeerLost { rank: 1, .. }));
//! assert_eq!((error.kind(), error.is_fatal()), (ErrorKind::Peer, true));
//! assert_eq!(error.tensors(), TensorState::Unchanged);
//! assert_eq!(model, [0.0; 100]);
//! # Ok::<(), Error>(())
//! ```
//!
//! # Recovery
//! For ranks that are processes: after a fatal error all ranks that are left call
//! [`LocalSgd::recover`](crate::LocalSgd::recover) (or
//! [`ParamAverager::recover`](crate::ParamAverager::recover), or
//! [`Communicator::recover`](crate::Communicator::recover)). They agree on the members, whichever
//! rank was lost, also if another one is lost meanwhile, number themselves anew, and build the
//! averager again. A process with several averagers recovers each, in any order. Threads of one
//! process build a new world. `examples/recover.rs` is a program that does it. The state of an
//! [outer optimizer](super::outer) is carried over, except for the part of the lost rank, or with
//! [`share_outer_state`](crate::Builder::share_outer_state) all of it in most cases.
//!
//! ```no_run
//! use param_averager::{LocalSgd, Result};
//!
//! fn train(sgd: &mut LocalSgd, params: &mut Vec<Vec<f32>>) -> Result<()> {
//!     for _batch in 0..1000 {
//!         // train_step(params);
//!         if let Err(error) = sgd.step(params) {
//!             eprintln!("{error}"); // such as: rank 3 has left the world …
//!             if !error.is_fatal() {
//!                 return Err(error); // mend what it says
//!             }
//!             sgd.recover(params)?; // goes on among the ranks that are left
//!         }
//!     }
//!     sgd.finish(params)?;
//!     Ok(())
//! }
//! ```
//!
//! # How a loss is seen
//! A process that ends, in whatever way, is seen at once by every other one (pidfd and socket):
//! they get [`Error::PeerLost`](crate::Error::PeerLost), whichever rank they are waiting for, and
//! within milliseconds also while a third one is stopped. A process that is only stopped
//! (`SIGSTOP`, a debugger, a machine that swaps) is late: [`Error::Timeout`](crate::Error::Timeout)
//! names it, and if it wakes up after the others went on, it gets
//! [`Error::Excluded`](crate::Error::Excluded). A thread that panics leaves, and its peers get
//! `PeerLost`; nothing is averaged on unwind. An [`AbortHandle`](crate::AbortHandle) ends every
//! wait from any thread.
//!
//! # Waits
//! A wait for a peer ends after the builder's [`timeout`](crate::Builder::timeout), 10 minutes
//! unless set. On CUDA devices this is the wait for a rank to come; within kernels the limit is
//! [`device_timeout`](crate::Builder::device_timeout). One exception: once the direct average has
//! begun to write, ranks wait for one another without a limit, since a peer may still be writing
//! into their tensors; unless it departs, or its device fails and this rank waits in a call of the
//! averager or of `Pending`, which sees that. A wait for a stream, a
//! [`graph_outcome`](crate::ParamAverager::graph_outcome) among them, ends when a rank of that
//! device departs.
//!
//! # What else can happen
//!
//! | what happens | what you get |
//! |---|---|
//! | tensors are passed in another order, or under other names, than at `build` | [`Error::LayoutChanged`](crate::Error::LayoutChanged) on every rank, and no tensor changes: no layer is averaged with another one |
//! | ranks have different numbers of batches | each calls [`LocalSgd::done`](crate::LocalSgd::done) after its last one, and takes part until all are done |
//! | an [outer](super::outer) optimizer is set | the result of its step stands in the place of the mean, and a value that is the same on all ranks may change; with `keeping` the ranks differ after an average |
//! | [`compression`](super::compression) is set | the mean is off by at most n / 254 of the largest difference in its block; after averages in place ranks hold the same bits |
//! | a [`stage`](crate::Builder::stage) refuses an average, or panics | [`Error::StageVetoed`](crate::Error::StageVetoed) with its reason on every rank; no rank's tensors change, and the world lives |
//!
//! # Limits of the system
//! If a rank meets a limit while ranks start, build, recover or join, every rank gets the same
//! typed error at once, with the rank, the limit, its value and how to raise it; no signal, no
//! abort. The limits are memory, file size, descriptors, threads, locked memory, mappings, pids
//! (`ulimit -v`, `-f`, `-n`, `-u`, `-l`, `vm.max_map_count`, `pids.max`), and a sandbox without
//! `memfd_create`. A process that joins and meets one leaves, and the others go on. Averages on
//! CPUs allocate nothing, so they meet none; but the first one after a recovery or a join can,
//! where an outer optimizer's state is divided anew.
//!
//! Two cases can't be reported. Rank 0 with fewer than 3 free descriptors has no socket to tell the
//! others by, which wait until their timeout. The memory limit of a container or machine is
//! enforced by a kill when pages are touched.
