//! Outer optimizers: which one when, their formulas, and what becomes of optimizer state.
//!
//! Plain Local SGD replaces the parameters by their mean w̄. An outer optimizer takes the way that
//! the ranks went since their last average, Δ = θ − w̄, for a gradient, and makes a step of its own
//! from the parameters θ that all had then ([`Builder::outer`](crate::Builder::outer)).
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
//! fewer averages gains little from it.
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
//! | `build` | what `build` gives the tensors | 0 |
//! | an average, by the schedule or by hand; also alone | makes a step | make a step |
//! | [`broadcast`](crate::ParamAverager::broadcast) | what it gives the tensors | stay |
//! | an average that fails with an error that is not fatal | stays | stay |
//! | a rank is lost | the mean of the first average after the recovery | stay; 0 in the part of the lost rank ([`Report::lost_state`](crate::Report::lost_state)) |
//! | a process joins | what the ranks have then | stay, divided anew |
//!
//! A NaN that one average lets through stays in v for good. The ring refuses it by default; for the
//! direct average set [`reject_non_finite`](crate::Builder::reject_non_finite).
//!
//! With [`keeping`](crate::Outer::keeping) the ranks differ after an average, until
//! [`sync`](crate::LocalSgd::sync) or [`finish`](crate::LocalSgd::finish) gives all of them θ. A
//! rank can't be [`done`](crate::LocalSgd::done) before the others then. Averages by hand mix, too.
//! When a process joins, all ranks get the mean.
//!
//! # State of the inner optimizer
//! The averager sees what it is passed, so that the state of the inner optimizer is the trainer's
//! choice. Systems differ:
//!
//! | policy | done by | here |
//! |---|---|---|
//! | keep: each rank goes on with its own moments | DiLoCo, torchft, MaxText, prime | nothing to do; the default |
//! | average | hivemind; DES-LOC with a longer period for each moment | a second averager over the moments, without an outer optimizer, from [`Start::Own`](crate::Start::Own), in a `LocalSgd` with a period of its own |
//! | reset after an average | flodl with Nesterov, diloco-rs | zero them when [`Action::report`](crate::Action::report) is `Some` |
//!
//! Momentum that is kept pulls a rank on to where it went before the average. Under heavy momentum
//! that has cost accuracy (tensorflow/tensorflow issue 11581, pytorch/pytorch issue 59699): average
//! or reset it then.
//!
//! Buffers, such as the running statistics of batch normalisation, are no place for an outer step:
//! momentum can make a variance negative. Average them by an averager of their own with
//! [`Outer::mean`](crate::Outer::mean). Integer counters stay local: a list with one is an error
//! that names the tensor, from the adapters of candle and burn, and does not compile for slices.
