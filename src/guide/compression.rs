//! Compression: averages with fewer bytes on the wire, their error, and what they cost.
//!
//! [`Builder::compression`](crate::Builder::compression) has the ring send differences in a code.
//! It is for links that are slow beside the devices: PCIe without P2P, where mailboxes are in
//! memory of the host. Between CPUs, which share memory, it saves nothing and costs time.
//!
//! | [`Compression`](crate::Compression) | bytes an element, of 4 | a code is off by at most |
//! |---|---|---|
//! | `None`, the default | 4 | nothing |
//! | `Bf16` | 2 | 2⁻⁸ of the value |
//! | `Int8` | 1.03: one, and 4 for a block of 128 elements | 1/254 of the largest magnitude in its block |
//!
//! ```
//! use param_averager::{
//!     Communicator, Compression, Device, LocalSgd, Outer, ParamAverager, Result, Schedule,
//! };
//!
//! fn train(communicator: Communicator) -> Result<Vec<f32>> {
//!     let mut model = vec![10.0f32; 1000];
//!     let builder = ParamAverager::builder(communicator);
//!     let builder = builder.outer(Outer::diloco()).compression(Compression::Int8);
//!     let mut sgd = LocalSgd::new(builder.build(&mut model)?, Schedule::every(4));
//!     for _batch in 0..100 {
//!         model.iter_mut().for_each(|weight| *weight -= 0.01 * *weight); // an inner step
//!         sgd.step(&mut model)?;
//!     }
//!     sgd.finish(&mut model)?;
//!     Ok(model)
//! }
//!
//! let models = Communicator::run(&[Device::cpu(); 2], train)?;
//! assert_eq!(models[0], models[1]); // the same bits
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # What travels
//! Not parameters, since a parameter that is rounded has lost what the last steps did, but how far
//! each rank has come from the reference, the result of the last average. In n − 1 hops the ranks
//! add their shares of the mean difference, and code each partial sum; the owner of a shard adds
//! the result to it exactly, and sends the difference of the shard from the reference, in code, to
//! all ranks. All of them, the owner too, add what the code says. So all ranks have the same
//! reference, and after an average in place the same bits.
//!
//! Every rank keeps what its codes have rounded away, in f32, and adds it to what it sends in the
//! next average: error feedback, as in Seide et al., 2014, "1-bit stochastic gradient descent", and
//! Karimireddy et al., 2019, arXiv 1901.09847. So errors do not add up, and a difference that is
//! too small for a code is sent once it has grown.
//!
//! A block is 128 neighbouring elements, as the tensors lie in a slot of the ring, whose size is
//! [`Builder::chunk_bytes`](crate::Builder::chunk_bytes): it may have elements of several small
//! tensors. The layout on the wire is in `kernels/codec.h`.
//!
//! # Error
//! Between the mean and what n ranks get lie n codes, n − 1 of partial sums and one of the result.
//! Let M be the largest magnitude of what is coded: of a difference, with what the rank still owes.
//! The sum of all averages since what is owed was last forgotten is off by n · M / 254 at most in
//! an element with `Int8`, and n · M / 256 with `Bf16`, beside what f32 rounds. One average alone,
//! which also sends what was owed before it, is off by twice as much at most. With an outer
//! optimizer, M is also that of its step, whose gain multiplies what the hops have rounded:
//! lr · (1 + μ / (1 − μ)) at most for Nesterov's, 7 for DiLoCo's; with
//! [`Overlap::alpha`](crate::Overlap::alpha), and where a result was not added, also that share of
//! what the last code has. A value that is the same on all ranks need not stay as it is: what is
//! owed to it is sent.
//!
//! A difference of 3.39e38 and more, half of what lies between f32's least and largest value, is no
//! code: its block, 128 elements, is NaN on all ranks.
//!
//! The partial sums' order is that of the ring, so the bits depend on the number of channels and
//! the size of a chunk, for two ranks too; see
//! [`Builder::reproducible`](crate::Builder::reproducible). CPUs and CUDA devices give the same.
//!
//! # With other options
//! * By the ring, which [`Algorithm::Auto`](crate::Algorithm::Auto) then means, all or nothing, for
//!   tensors of f32 alone. Values that are not finite are always rejected, and so are differences
//!   that f32 does not hold. A stage, and an outer optimizer that
//!   [keeps a share](crate::Outer::keeping), are refused.
//! * [`Overlap`](crate::Overlap): averages of copies and of fragments are coded, with a reference
//!   and residuals of each fragment's own, which averages of other fragments do not change, also
//!   where they fail. The difference of a copy from the reference is what travels, and a rank adds
//!   that of the new reference from its copy: so references are the same on all ranks, though
//!   their tensors differ. A rank that drops an average, by
//!   [`drop_overlapped`](crate::ParamAverager::drop_overlapped), has its reference all the same.
//!   While there is no reference, a due average is of the whole model, in full, and training waits
//!   for it; [`start_overlapped`](crate::ParamAverager::start_overlapped) is refused.
//! * Memory: 8 bytes for each element on every rank, for the reference and the residual. Overlap
//!   needs no more than it does without a code.
//! * In full, with no code, are averages that give the ranks values to begin with, as those of
//!   [`build`](crate::Builder::build) and [`broadcast`](crate::ParamAverager::broadcast), and the
//!   first average after a recovery, after a join, with [`Start::Own`](crate::Start::Own) after
//!   `build`, and, with an outer optimizer, after
//!   [`LocalSgd::load`](crate::LocalSgd::load). Their result is the next reference.
//!   [`Report::compression`](crate::Report::compression) tells.
//! * A [weight](crate::ParamAverager::average_weighted) of 0 on all ranks but one copies that
//!   rank's values within the bound, not bit for bit.
//! * An average that fails changes no tensor, but what codes have rounded away before is forgotten
//!   where ranks had begun to reduce. It is forgotten, too, by averages in full, recoveries and
//!   joins, and a saved state does not have it: each costs the error of one average at most.
//! * [`Outer`](crate::Outer): the step is made from exact parameters in f32, and its result is what
//!   is sent.
//! * A CUDA graph replays a coded average, whatever averages in full are made between its replays.
//! * [`Schedule::budget`](crate::Schedule::budget) counts the bytes that travel.
