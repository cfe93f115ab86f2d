//! Overlap: averages that are made while training goes on, and averages of a fragment of the model
//! at a time.
//!
//! [`Builder::overlap`](crate::Builder::overlap) takes an [`Overlap`](crate::Overlap);
//! [`LocalSgd`](crate::LocalSgd) is used as without one:
//!
//! ```
//! use param_averager::{
//!     Action, Communicator, Device, LocalSgd, Overlap, ParamAverager, Result, Schedule,
//! };
//!
//! fn train(communicator: Communicator) -> Result<f32> {
//!     let mut model = vec![10.0f32; 1000];
//!     let builder = ParamAverager::builder(communicator).overlap(Overlap::default().delay(2));
//!     let mut sgd = LocalSgd::new(builder.build(&mut model)?, Schedule::every(8));
//!     let mut averages = 0;
//!     for _batch in 0..100 {
//!         model.iter_mut().for_each(|weight| *weight -= 0.01 * *weight);
//!         match sgd.step(&mut model)? {
//!             Action::Started { ends_in } => assert_eq!(ends_in, 2), // training goes on
//!             Action::Averaged(_) => averages += 1,                   // two steps later
//!             _ => {}
//!         }
//!     }
//!     sgd.finish(&mut model)?; // all ranks have one model
//!     assert_eq!(averages, 12);
//!     Ok(model[0])
//! }
//!
//! let models = Communicator::run(&[Device::cpu(); 2], train)?;
//! assert_eq!(models[0], models[1]);
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # What a step does
//! Of H steps between two averages, with P fragments, delay τ and share α:
//!
//! | step | what `LocalSgd::step` does | returns |
//! |---|---|---|
//! | ⌊(p + 1)·H/P⌋ of a round | copies fragment p, s ← w, and starts the average of s | `Started` |
//! | τ steps later | waits for it, and w ← w + (1 − α)·(θ − s) | `Averaged` |
//! | others | nothing | `Counted` |
//!
//! θ is the mean of all ranks' s, or the result of the [outer optimizer](super::outer)'s step from
//! it. The rule keeps what a rank has learnt since the copy (torchft and MaxText replace it: w ←
//! α·w + (1 − α)·θ; the two are the same for τ = 0). With τ = 0 nothing is copied, and with P = 1
//! besides it is plain Local SGD. The names and defaults are torchft's and MaxText's: 1 fragment, τ
//! 0, α 0.
//!
//! Fragments are parts of neighbouring tensors, of about as many bytes each. Each has its own due
//! step, weights, and part of the outer optimizer's state. With
//! [compression](super::compression), which is for the same slow links, each has its own reference
//! and residuals, too: Streaming DiLoCo with 8 bits for an element where the paper has 4.
//! [`sync`](crate::LocalSgd::sync), [`finish`](crate::LocalSgd::finish), a recovery, the steps of a
//! warm-up, and the average after which a process joins are of the whole model, and training waits.
//! [`flush`](crate::LocalSgd::flush) adds a result before its time, for an evaluation or a
//! checkpoint. [`done`](crate::LocalSgd::done) and schedules that adapt H are refused. A schedule
//! that does not fit is an error at its first due average: where ranks have different schedules, on
//! all of them ([`Error::SchedulesDiffer`](crate::Error::SchedulesDiffer) where it fits).
//!
//! # States, and what can go wrong
//!
//! | state of an average of a copy | a failure here | w |
//! |---|---|---|
//! | copied; not all ranks have come | the error of `step` τ steps later, on every rank | unchanged |
//! | summing, before the commit | the same | unchanged |
//! | committed; results are written to s, or to the reference of a code | the ranks that are left have made the outer step, or none has; a rank whose s is incomplete gets the error | unchanged |
//! | done; not added yet | nothing that happens to peers; the rank's own tensors, which can't be lent or have changed, are its own error | unchanged, or all of it added |
//!
//! So an error leaves every tensor as training has left it, whatever its phase (but for
//! [`Error::AfterAverage`](crate::Error::AfterAverage), after the addition). Steps of an average
//! that failed belong to the next one. A NaN in the tensors stays one, whatever is added, also on a
//! rank of weight 0: it takes an average in place to replace it.
//! [`recover`](crate::LocalSgd::recover) drops an average that is under way. 1,260 kills of
//! processes whose averages are of copies, with a velocity: no wrong element, no step that some
//! ranks had made and others not (`benches/record/2026-11-30-overlap`).
//!
//! # What it costs, and when it is worth it
//! Memory: one copy of the largest fragment. Time: the copy, which reads and writes it once, and
//! the addition, which reads two and writes one. **On CPUs that share a memory this is as much as a
//! direct average itself moves**, so overlap hides what an average waits for, and not what it
//! moves: use it where ranks wait for one another (uneven steps), or between processes by the ring,
//! or where the link is slow. Measured on two cores, with 64 MiB: where steps leave the cores idle,
//! overlap cost a trainer 2.0 times what a direct average costs it, and 0.4 times what the ring
//! costs it; where steps compute, 4.1 and 1.9 times. With 8 MiB and a peer that is 40 ms late, it
//! cost 0.05 times (`cargo bench --bench overlap`, `benches/record/2026-11-30-overlap`). An average
//! on CPUs computes on threads of its own meanwhile, as many as it has
//! [channels](crate::Builder::channels): a trainer whose steps need all cores loses that time.
//!
//! On CUDA devices the copy and the addition are kernels on the trainer's stream, in its order, and
//! the average runs on a stream of this crate's own; later work of the trainer's stream waits for
//! the copy only. Its blocks share the device with the trainer's kernels: fewer
//! [channels](crate::Builder::channels) leave it more of the device and make the average longer,
//! which the delay hides. 8 to 16 channels are enough for a PCIe link by reckoning (32 KiB in
//! flight each); no GPU has measured it. Threads on devices meet when an average starts; processes
//! that share a device without MPS, or whose devices have no stream memory operations, wait for one
//! another in it, so that little or nothing is hidden.
//! A captured stream is refused.
//!
//! In accuracy, a delay of 1 and 4 of H = 16 steps cost candle's digits nothing that 5 seeds show,
//! with the mean; with SlowMo on data that differ between ranks it took away what SlowMo gains, and
//! fragments and α cost 1 to 7 points there. On a small transformer, whose loss of 2.20 was still
//! falling, a delay of 1 cost 0.01 and one of 4 cost 0.05; fragments cost nothing:
//! `benches/record/2026-11-30-overlap`.
//!
//! By hand, outside of a schedule: [`start_overlapped`](crate::ParamAverager::start_overlapped) and
//! [`finish_overlapped`](crate::ParamAverager::finish_overlapped).
