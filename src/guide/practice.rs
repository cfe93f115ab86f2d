//! Local SGD in practice: which H, the learning rate, optimizer state, data, and when not to.
//!
//! # Which H
//! H local steps between averages cost one average. With S bytes of parameters, n ranks, links of B
//! bytes/s and steps of t seconds, a ring moves 2·S·(n − 1)/n bytes over each link, so averages
//! take the share p of the steps' time for
//!
//! > H ≥ 2·S·(n − 1)/n / B / (p · t)
//!
//! 124 million parameters in f32 (S = 496 MB) on two GPUs over PCIe 4.0 x8 (B ≈ 13 GB/s) take 38
//! ms. With steps of 200 ms and p = 0.05, flodl's default, H is 4; over 10 Gbit/s Ethernet, 40.
//! Better than computing is measuring:
//! [`Report::suggested_local_steps`](crate::Report::suggested_local_steps) does it from an average
//! that was made.
//!
//! ```
//! use std::time::Duration;
//! use param_averager::{Communicator, Device, ParamAverager, Result};
//!
//! let steps = Communicator::run(&[Device::cpu(); 2], |communicator| -> Result<u64> {
//!     let mut model = vec![0.0f32; 100_000];
//!     let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
//!     let report = averager.average(&mut model)?;
//!     // Ranks measure different times, and need one H: rank 0's, or the largest.
//!     let mut h = [report.suggested_local_steps(Duration::from_millis(5), 0.05) as f64];
//!     averager.all_reduce_scalars(&mut h, param_averager::Reduction::Max)?;
//!     Ok(h[0] as u64)
//! })?;
//! assert!(steps[0] >= 1 && steps[0] == steps[1]);
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! [`Schedule::overhead`](crate::Schedule::overhead) measures and chooses H by itself, throughout
//! the training: all ranks have the same H, from the times of the slowest one.
//! [`Schedule::budget`](crate::Schedule::budget) limits the bytes per second instead. For accuracy,
//! [`Schedule::quadratic`](crate::Schedule::quadratic) averages less often as the learning rate
//! falls, and [`Schedule::divergence`](crate::Schedule::divergence) more often when the ranks'
//! parameters move too far from their mean.
//!
//! Where some ranks are nearer to one another than to the rest, groups of them may average more
//! often than all ranks: [`Schedule::hierarchical`](crate::Schedule::hierarchical) has the rule of
//! PyTorch's `HierarchicalModelAverager`. Each group is a world of its own, and so is that of all
//! ranks; ranks that are processes join theirs by
//! [`Communicator::builder`](crate::Communicator::builder), with a name for each group. On several
//! hosts [`Hierarchy`](crate::Hierarchy) does it in one world.
//!
//! ```
//! use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};
//!
//! fn train((pair, all): (Communicator, Communicator)) -> Result<f32> {
//!     let (rank, mut model) = (all.rank() as f32, vec![0.0f32; 100]);
//!     let [often, rarely] = Schedule::hierarchical([2, 8]);
//!     let averager = ParamAverager::builder(pair).build(&mut model)?;
//!     let mut pair = LocalSgd::new(averager, often); // after steps 2, 4, 6, 10, …
//!     let averager = ParamAverager::builder(all).build(&mut model)?;
//!     let mut all = LocalSgd::new(averager, rarely); // after steps 8, 16, …
//!     for _ in 0..15 {
//!         model.iter_mut().for_each(|weight| *weight += rank); // an inner step
//!         pair.step(&mut model)?;
//!         all.step(&mut model)?;
//!     }
//!     all.finish(&mut model)?;
//!     Ok(model[0])
//! }
//!
//! let cpus = [Device::cpu(); 4];
//! let pairs = [Communicator::from_devices(&cpus[..2])?, Communicator::from_devices(&cpus[2..])?];
//! let all = Communicator::from_devices(&cpus)?;
//! let worlds = pairs.into_iter().flatten().zip(all);
//! let threads: Vec<_> =
//!     worlds.map(|worlds| std::thread::spawn(move || train(worlds))).collect();
//! for thread in threads {
//!     assert_eq!(thread.join().unwrap()?, 15.0 * 1.5); // the mean of all ranks
//! }
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! Accelerate's default is 8. A larger H saves nothing more once averages are a few percent of the
//! time, and lets the ranks' models drift apart, the more the higher the learning rate. On mixed
//! data, H up to 64 cost a perceptron that had converged nothing that could be measured, 4 ranks on
//! scikit-learn's digits. A character transformer far from convergence was behind after the same
//! number of steps: its loss was 2 % higher with H = 8 and 8 % with H = 64, and after four times as
//! many steps 1 % lower and 2 % higher (README and its records have all).
//! Averages are worth more while the loss falls fast:
//! [`Schedule::after_warmup`](crate::Schedule::after_warmup).
//!
//! # Learning rate
//! Each rank's optimizer sees its own batch, so its learning rate is that of one rank with that
//! batch. With n ranks, n times as many samples go into each step of the mean: after the same
//! number of samples there are n times fewer steps, as with an n times larger batch in synchronous
//! training, and the same rules apply (a linear or a square-root increase of SGD's learning rate
//! with a warm-up; little or none for Adam).
//!
//! # Optimizer state
//! Momentum and Adam's moments stay local, which is what Accelerate's `LocalSGD` does, and works:
//! each rank goes on with moments of its own after an average. To average them as well, pass them
//! as further tensors, or to an averager of their own
//! ([`start_from(Start::Own)`](crate::Start::Own)) with a period of their own; with an outer
//! optimizer to one of their own only, since further tensors get its step, too. With SGD with
//! momentum and a large H, resetting the momentum after an average is an alternative. The page on
//! [outer optimizers](super::outer) has the policies by name, and the systems that have each.
//!
//! # Buffers
//! Running statistics of batch normalisation are no parameters, and differ between ranks. Pass them
//! as tensors, which averages them (with an outer optimizer: to an averager without one); or
//! evaluate and save rank 0's model only. A mean of variances is not the variance of all data, but
//! close to it if the data are mixed. Counters that are integers are no floats: leave them out.
//!
//! # Data
//! Give each rank its own part of the data, **mixed**: rank r takes the samples r, r + n, r + 2·n,
//! … of one permutation that all ranks draw with the same seed, and a new one in each epoch. Data
//! sorted by label do harm that grows with H, since each rank forgets what it does not see. Parts
//! of different size are the usual case: call [`LocalSgd::done`](crate::LocalSgd::done) at the end
//! of an epoch. Where batches differ in size, or a faster GPU gets more of them,
//! [`step_weighted`](crate::LocalSgd::step_weighted) counts each rank by its samples.
//!
//! # Evaluation and checkpoints
//! Between averages every rank has a model of its own, which is a little worse than the mean. Call
//! [`sync`](crate::LocalSgd::sync) before evaluating or saving; then all ranks hold the same bits,
//! and rank 0 alone can do either. Sums of losses and of numbers of samples go through
//! [`all_reduce_scalars`](crate::ParamAverager::all_reduce_scalars), on all ranks at the same
//! point, so after `done`, not while some ranks still train.
//!
//! Save [`LocalSgd::save`](crate::LocalSgd::save) with the model, and pass it to
//! [`load`](crate::LocalSgd::load) when training resumes: the schedule goes on where it was. After
//! `sync` rank 0's model and state are enough, for any number of ranks; load the model on rank 0,
//! since `build` copies it to the others. Between two averages each rank saves its own model and
//! its own state, after the same step, and builds with [`Start::Own`](crate::Start::Own) when it
//! has loaded them. Optimizer state is each rank's own: save it on every rank, or begin it anew.
//!
//! An [outer optimizer](crate::Outer)'s state is divided among the ranks, so every rank saves, also
//! after `sync`. For another number of ranks pass the states of all to
//! [`load_all`](crate::LocalSgd::load_all). `Start::Own` is refused with it: a rank that has saved
//! between two averages puts its own parameters into the tensors after `build`.
//!
//! # What an average has moved
//! How far the ranks' parameters are from their mean says whether H is too large. With
//! [`Builder::telemetry`](crate::Builder::telemetry) every [`Report`](crate::Report) has this
//! rank's distance, relative to the norm, and the share of values that are not finite, from a
//! sample; flodl warns from 0.05 on. [`Telemetry::waits`](crate::Telemetry::waits) tells on every
//! rank how long each of them has waited in the average before: a rank that comes late waits least.
//!
//! ```
//! use param_averager::{Action, Communicator, Device, LocalSgd, ParamAverager, Report, Schedule};
//!
//! Communicator::run(&[Device::cpu(); 2], |communicator| {
//!     let rank = communicator.rank();
//!     let mut model = vec![1.0f32; 1000];
//!     let averager = ParamAverager::builder(communicator).telemetry(true).build(&mut model)?;
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     let mut lines = vec![format!("step,{}", Report::CSV_COLUMNS)];
//!     for step in 1..=16 {
//!         model.iter_mut().for_each(|weight| *weight += 0.001 * rank as f32); // an inner step
//!         if let Action::Averaged(report) = sgd.step(&mut model)? {
//!             let telemetry = report.telemetry.expect("asked for");
//!             assert!((0.003..0.005).contains(&telemetry.relative_change())); // 8 · 0.001 / 2
//!             lines.push(format!("{step},{}", report.csv()));
//!         }
//!     }
//!     assert_eq!(lines.len(), 3);
//!     Ok::<_, param_averager::Error>(())
//! })?;
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! Every average is also an event of `tracing`, target `param_averager`, level `DEBUG`, with the
//! same numbers as fields; and with the feature `metrics`, counters, gauges and histograms of that
//! crate's recorder, `param_averager_*`, with the label `rank`. Install the recorder before
//! `build`.
//!
//! # When not to use it
//! * One device is fast enough: a larger batch is simpler.
//! * GPUs are joined by NVLink: an all-reduce of gradients at every step costs little, and is
//!   exactly synchronous.
//! * The model does not fit on one device: parameters that are sharded are not averaged by this
//!   crate as a whole, only shard by shard, among ranks that hold the same shard.
//! * The data of each rank are of another kind, and must stay there: that is federated learning,
//!   with methods of its own.
