//! Outer optimizers: which one when, their formulas, and the state of both optimizers.
//!
//! Plain Local SGD replaces the parameters by their mean w̄. An outer optimizer
//! ([`Builder::outer`](crate::Builder::outer)) keeps the outer parameters θ, the result of the last
//! average. It takes the difference to the mean, Δ = θ − w̄, as a gradient, and makes a step of its
//! own from θ.
//!
//! | [`Outer`](crate::Outer) | step | used by, and with which H |
//! |---|---|---|
//! | `mean()`, the default | θ ← w̄ | FedAvg, Accelerate (8); no state, nothing to tune |
//! | `sgd(lr)` | θ ← θ − lr · Δ | SparseLoCo (30), with lr 1 and later 0.65 |
//! | `momentum(lr, mu)` | v ← μ · v + Δ, θ ← θ − lr · v | FedAvgM, for data that differ between ranks |
//! | `slow_momentum(alpha, beta)` | u ← β · u + Δ / γ, θ ← θ − α · γ · u, with a constant γ | torchdistx's SlowMo (48) |
//! | `nesterov(lr, mu)` | v ← μ · v + Δ, θ ← θ − lr · (Δ + μ · v) | DiLoCo (500) and MaxText (36) with AdamW inside, MuLoCo (30) with Muon |
//! | `adam(lr, beta1, beta2, tau)` | m ← β₁ · m + (1 − β₁) · Δ, s ← β₂ · s + (1 − β₂) · Δ², θ ← θ − lr · m / (√s + τ) | FedAdam, for parameters whose Δ differ much in size; Flower's are 0.1, 0.9, 0.99, 1e-9 |
//! | `ease(alpha)` | w ← (1 − α) · w + α · w̄ | EASGD; flodl's α is 0.5 |
//! | any, with `.keeping(alpha)` | w ← α · w + (1 − α) · θ | partial mixing; torchft and MaxText have α = 0 unless set |
//!
//! | preset | is |
//! |---|---|
//! | [`diloco`](crate::Outer::diloco) | `nesterov(0.7, 0.9)` |
//! | [`maxtext`](crate::Outer::maxtext) | `nesterov(0.3, 0.9)` |
//! | [`muloco`](crate::Outer::muloco) | `nesterov(0.9, 0.8)` |
//! | [`slowmo`](crate::Outer::slowmo) | `slow_momentum(1.0, 0.5)` |
//!
//! Begin with the mean, and change to an outer optimizer where H is large. Momentum adds up to
//! 1 / (1 − μ) times a Δ that stays the same, and takes as many averages to get there: a run of
//! fewer averages gains little from it. On digits, with 21 averages, none of four was more than 0.1
//! points better than the mean on mixed data, and all four were 6 to 15 points better where each
//! rank had its own labels; on text, with 33 averages of mixed data, all four had a higher loss
//! than the mean: `benches/record/2026-11-29-outer`.
//!
//! ```
//! use param_averager::{Communicator, Device, LocalSgd, Outer, ParamAverager, Result, Schedule};
//!
//! fn train(communicator: Communicator) -> Result<f32> {
//!     let mut model = vec![10.0f32; 1000];
//!     let builder = ParamAverager::builder(communicator).outer(Outer::diloco());
//!     let mut sgd = LocalSgd::new(builder.build(&mut model)?, Schedule::every(4));
//!     for _batch in 0..100 {
//!         model.iter_mut().for_each(|weight| *weight -= 0.01 * *weight); // an inner step
//!         sgd.step(&mut model)?;
//!     }
//!     sgd.finish(&mut model)?;
//!     Ok(model[0])
//! }
//!
//! let models = Communicator::run(&[Device::cpu(); 2], train)?;
//! assert_eq!(models[0], models[1]); // the same bits
//! // The mean alone would be where the steps lead, 10 · 0.99¹⁰⁰ = 3.66. Momentum goes farther.
//! assert!(models[0] < 3.0);
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # State of the outer optimizer
//! Each rank keeps θ and v for its n-th part of the parameters: 8 bytes for each element, divided
//! by n (torchft keeps all 8 on every rank). For models of f16 and bf16, θ is a master copy in f32,
//! so that small steps add up.
//!
//! | event | θ | velocity and moments |
//! |---|---|---|
//! | `build` | the values that `build` gives the tensors | 0 |
//! | an average, by the schedule or by hand; also in a world of one rank | makes a step | make a step |
//! | [`broadcast`](crate::ParamAverager::broadcast) | the values that it gives the tensors | stay |
//! | an average that fails with an error that is not fatal | stays | stay |
//! | a rank is lost | the mean of the first average after the recovery | stay; 0 in the part of the lost rank ([`Report::lost_state`](crate::Report::lost_state)), unless ranks share their states |
//! | a process joins | the values that all ranks have then | stay, divided anew |
//!
//! With [`Builder::share_outer_state`](crate::Builder::share_outer_state), for processes, each
//! rank's state lies in memory of the host that the next rank of the ring maps. It outlives the
//! rank, and the averages after a recovery go on with the whole velocity. It takes no more memory
//! but that of a lost rank, until the first step after a recovery. On CPUs averages do nothing more
//! for it. On CUDA devices the state is no longer in memory of the device, and each outer step goes
//! over the device's link to the host, for N parameters, n ranks and k numbers of state for each
//! (θ and v: 2; with Adam 3):
//!
//! | bytes of a rank | of f16, bf16, f32 | of f64 |
//! |---|---|---|
//! | of the device, saved | 4 · k · N/n | 8 · k · N/n |
//! | to the device in a step, and as many from it | 4 · k · N/n | 8 · k · N/n |
//! | from the device in an average that gives θ (`build`, `broadcast`) | 4 · N/n | 8 · N/n |
//!
//! OpenDiLoCo has its outer optimizer in memory of the host, too. These cases are left:
//!
//! | ranks that are lost | velocity and moments |
//! |---|---|
//! | one, between averages or in one that is not committed | stay |
//! | one, in an average that is committed | stay; where its step was not made or half made, its part is that before the step, number by number; on devices tested in simulation only |
//! | several, none of them next to another one in the ring | stay |
//! | a rank and the next one of the ring, before the first step without the first of them | 0 in the first one's part |
//! | one, from [`LocalSgd::load`](crate::LocalSgd::load) to the first step after it | 0 in its part, if its peers have loaded, too: all ranks load, or none |
//!
//! A state that is [saved](crate::LocalSgd::save) between a recovery by hand and the next average
//! lacks the lost rank's part, and can't be loaded: save after that average.
//!
//! A NaN that one average lets through stays in v for good. With
//! [`reject_non_finite`](crate::Builder::reject_non_finite), the ring's default, it is refused; for
//! the direct average, which is also that of the only rank left, set it.
//!
//! [`keeping`](crate::Outer::keeping) makes the ranks differ after an average, until
//! [`sync`](crate::LocalSgd::sync) or [`finish`](crate::LocalSgd::finish) gives all of them θ.
//! [`done`](crate::LocalSgd::done) is refused. Averages by hand mix, too. When a process joins, all
//! ranks get the mean.
//!
//! # A stage of one's own
//! [`Builder::stage`](crate::Builder::stage) calls a function of the program with the rank's
//! [`Shard`](crate::Shard) of the mean: an optimizer of one's own, a filter, a check. It
//! is called after the sum and before the commit, in f32 (f64 for f64), and costs S/n of time on
//! each rank. What it leaves in the shard is what all ranks get. This one moves each element by
//! 0.25 at most, and refuses means that are too far from 0:
//!
//! ```
//! use param_averager::{Communicator, Device, Error, ParamAverager, Shard, Values, Veto};
//!
//! /// Values, and the layout of the shard that they belong to.
//! #[derive(Default)]
//! struct Kept { values: Vec<f32>, layout: Option<u32> }
//!
//! /// The values of the last average, and those of the next one until it is committed.
//! #[derive(Default)]
//! struct Limit { last: Kept, next: Kept }
//!
//! impl Limit {
//!     fn step(&mut self, shard: &mut Shard<'_>) -> Result<(), Veto> {
//!         if shard.was_committed() {
//!             std::mem::swap(&mut self.last, &mut self.next);
//!         }
//!         // After a recovery or a join this rank has other elements.
//!         let begins = shard.sets_values() || self.last.layout != Some(shard.layout());
//!         self.next.layout = Some(shard.layout());
//!         self.next.values.resize(shard.len(), 0.0);
//!         for part in shard.parts() {
//!             let Values::F32(values) = part.values else {
//!                 return Err(Veto::new(format!("{} has no f32", part.name)));
//!             };
//!             for (i, value) in values.iter_mut().enumerate() {
//!                 if !begins {
//!                     let last = self.last.values[part.at + i];
//!                     *value = value.clamp(last - 0.25, last + 0.25);
//!                 }
//!                 if value.abs() > 100.0 {
//!                     let place = format!("element {} of {}", part.first + i, part.name);
//!                     return Err(Veto::new(format!("{place} is {value}")));
//!                 }
//!                 self.next.values[part.at + i] = *value;
//!             }
//!         }
//!         Ok(())
//!     }
//! }
//!
//! Communicator::run(&[Device::cpu(); 2], |communicator| {
//!     let mut model = vec![1.0f32; 1000];
//!     let mut limit = Limit::default();
//!     let builder = ParamAverager::builder(communicator).stage(move |shard| limit.step(shard));
//!     let mut averager = builder.build(&mut model)?; // the stage has seen 1.0
//!     model.fill(3.0);
//!     averager.average(&mut model)?;
//!     assert_eq!(model, [1.25; 1000]);
//!     Ok::<_, Error>(())
//! })?;
//! # Ok::<(), Error>(())
//! ```
//!
//! On CUDA devices [`Builder::device_stage`](crate::Builder::device_stage) calls a function that
//! has the device addresses of these values in a [`DeviceShard`](crate::DeviceShard), and a stream.
//! It enqueues its work there and returns: nothing waits on the host. This one keeps a tensor at
//! zero, by a call of the driver:
//!
//! ```no_run
//! # #[cfg(feature = "cuda")] {
//! use cudarc::driver::sys;
//! use param_averager::{Communicator, Device, DeviceShard, Dtype, ParamAverager, Veto};
//!
//! fn stage(shard: &mut DeviceShard<'_>) -> Result<(), Veto> {
//!     if shard.sets_values() {
//!         return Ok(()); // what the ranks begin with stays as it is
//!     }
//!     for part in shard.parts().filter(|part| part.name == "frozen") {
//!         let width = if part.dtype == Dtype::F64 { 8 } else { 4 };
//!         // SAFETY: the values of a part, on the shard's stream.
//!         unsafe {
//!             sys::cuMemsetD8Async(part.pointer, 0, width * part.len, shard.stream().cast())
//!         }
//!         .result()?;
//!     }
//!     Ok(())
//! }
//!
//! Communicator::run(&[Device::cuda(0), Device::cuda(1)], |communicator| {
//!     let builder = ParamAverager::builder(communicator);
//!     // SAFETY: the stage's work uses the values of its shard alone, on the shard's stream.
//!     let builder = unsafe { builder.device_stage(stage) };
//!     // builder.build(&mut params)? …
//!     # drop(builder);
//!     Ok::<_, param_averager::Error>(())
//! })?;
//! # }
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! | event | the stage |
//! |---|---|
//! | an average, also in a world of one rank, unless a mean is not finite where that is rejected | is called once on each rank; on a device also where a mean is not finite, and in averages that fail later |
//! | `build`, `broadcast`, `LocalSgd::recover`, a process joins | is called with [`sets_values`](crate::Shard::sets_values): it may look, and must change nothing |
//! | it returns a [`Veto`](crate::Veto), panics, or leaves a value that is not finite | no tensor changes; [`Error::StageVetoed`](crate::Error::StageVetoed) with the reason on every rank; the world lives |
//! | its stream is being captured for a CUDA graph | is not called: [`Error::InvalidOption`](crate::Error::InvalidOption) |
//! | the average fails after its call | [`was_committed`](crate::Shard::was_committed) is false at its next call: state is as before |
//! | a rank is lost, or a process joins | [`layout`](crate::Shard::layout) is another number, and the parts are others |
//! | an [`outer`](crate::Builder::outer) optimizer is set, too | comes first; the outer step is made from what it leaves |
//!
//! # State of the inner optimizer
//! The averager changes the tensors that it is passed, and nothing else: the state of the inner
//! optimizer is the trainer's choice. Systems differ:
//!
//! | policy | done by | here |
//! |---|---|---|
//! | keep: each rank goes on with its own moments | DiLoCo, torchft, MaxText, prime | nothing to do; the default |
//! | average | hivemind; DES-LOC with a longer period for each moment | a second averager over the moments, without an outer optimizer, from [`Start::Own`](crate::Start::Own), in a `LocalSgd` with a period of its own |
//! | reset after an average | flodl with Nesterov, diloco-rs | zero them when [`Action::report`](crate::Action::report) is `Some` |
//!
//! Each is a line or two of the trainer. Periods of moments are in steps, as in DES-LOC, where they
//! are multiples of the parameters':
//!
//! ```
//! use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule, Start};
//!
//! #[derive(Clone, Copy)]
//! enum Inner { Keep, Average, Reset }
//!
//! fn train(communicator: Communicator, inner: Inner) -> Result<f32> {
//!     let target = communicator.rank() as f32;
//!     let (mut weights, mut moments) = (vec![0.0f32; 100], vec![0.0f32; 100]);
//!     let builder = ParamAverager::builder(communicator.clone());
//!     let mut sgd = LocalSgd::new(builder.build(&mut weights)?, Schedule::every(2));
//!     let builder = ParamAverager::builder(communicator).start_from(Start::Own);
//!     let mut second = LocalSgd::new(builder.build(&mut moments)?, Schedule::every(6));
//!     for _batch in 0..12 {
//!         for (weight, moment) in weights.iter_mut().zip(&mut moments) {
//!             *moment = 0.9 * *moment + (*weight - target); // momentum, a loss of each rank's own
//!             *weight -= 0.01 * *moment;
//!         }
//!         let action = sgd.step(&mut weights)?;
//!         match inner {
//!             Inner::Keep => {}
//!             Inner::Average => drop(second.step(&mut moments)?),
//!             Inner::Reset => if action.report().is_some() { moments.fill(0.0) },
//!         }
//!     }
//!     Ok(moments[0])
//! }
//!
//! let run = |inner| Communicator::run(&[Device::cpu(); 2], move |rank| train(rank, inner));
//! let [keep, average, reset] = [Inner::Keep, Inner::Average, Inner::Reset].map(run);
//! let (keep, average) = (keep?, average?);
//! assert!(keep[0] != keep[1] && average[0] == average[1]);
//! assert_eq!(reset?, [0.0; 2]);
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! After a rank was lost, both are recovered, in the same order on every rank: see
//! [`LocalSgd::recover`](crate::LocalSgd::recover).
//!
//! Momentum that is kept moves a rank on in its direction before the average. Heavy momentum has
//! cost accuracy that way (tensorflow/tensorflow issue 11581, pytorch/pytorch issue 59699): average
//! or reset it then.
//!
//! Buffers, such as the running statistics of batch normalisation, must not get an outer step:
//! momentum can make a variance negative. Average them by an averager of their own with
//! [`Outer::mean`](crate::Outer::mean). Integer counters stay local: a list with one is an error
//! that names the tensor, from the adapters of candle and burn, and does not compile for slices.
