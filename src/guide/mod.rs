//! Guide: short pages on what concerns more than one item.
//!
//! | page | it answers |
//! |---|---|
//! | [`frameworks`] | How are tensors of candle, burn, tch or another trainer averaged? |
#![cfg_attr(
    all(target_os = "linux", feature = "processes"),
    doc = "| [`processes`] | How do processes start, find one another and tell jobs apart? |"
)]
#![cfg_attr(
    feature = "cuda",
    doc = "| [`streams`] | What is an average ordered with on a CUDA stream and in a CUDA graph? |"
)]
//! | [`failures`] | What can fail, what do the tensors hold then, and how does training go on? |
#![cfg_attr(
    all(target_os = "linux", feature = "processes"),
    doc = "| [`joining`] | How does a process enter a world that is training? |"
)]
//! | [`hosts`] | How do ranks of several hosts average, and what if a host fails? |
//! | [`practice`] | Which H and which learning rate? How are optimizer state, buffers and data treated? |
//! | [`outer`] | Which outer optimizer, and how is its state kept? |
//! | [`overlap`] | How does training go on while an average is made, and what does it cost? |
//! | [`compression`] | What do coded averages cost, and how far off is the mean? |
//! | [`accuracy`] | How exact is the mean, and when do two runs have the same bits? |
//!
//! # The data path of an average
//!
//! ```text
//!  tensors: any count, size, alignment    the trainer's memory, never moved, pointers never change
//!      │ gather 16-byte packs through the segment table                      (flatten)
//!      ▼
//!  rank r: inbox slot ─ + own packs × weight, in f32 ─▶ outbox slot = inbox of rank r+1
//!      │                n-1 reduce steps; / Σ weights on the last one:
//!      │                rank r now holds shard r of the mean
//!      ▼
//!  commit: every rank has its shard and every verdict is good, or no rank writes
//!      ▼
//!  own shard ─▶ outbox … inbox ─▶ outbox            n-1 gather steps
//!      │ scatter packs back through the same table                           (unflatten)
//!      ▼
//!  the same tensors, now the mean, the same bits on every rank
//! ```
//!
//! That is the ring ([`Algorithm::Ring`](crate::Algorithm::Ring)), in one fused kernel: no flatten
//! buffer, no collective per tensor, no new storage. The step of an [outer optimizer](outer) comes
//! between the commit and the gather, in a kernel of its own: three launches instead of one. Where
//! ranks can address each other's tensors (threads of one process, on CPUs, on one CUDA device, or
//! on devices with verified access over NVLink), [`Algorithm::Auto`](crate::Algorithm::Auto) takes
//! the direct way instead: the owner of each part reads its n values, adds them in one order,
//! rounds once and writes n results. The outer step is a part of its one kernel.
//!
//! The kernels' source is written once and compiled for CPUs and, by nvcc, for NVIDIA GPUs. It is
//! meant to be read: `kernels/ring.h` and `kernels/direct.h` first.
//!
//! ```
//! use param_averager::{Algorithm, Communicator, Device, ParamAverager};
//!
//! Communicator::run(&[Device::cpu(), Device::cpu()], |communicator| {
//!     let mut model = (vec![0.0f32; 1000], vec![0.0f32; 10]);
//!     let averager = ParamAverager::builder(communicator).build(&mut model)?;
//!     // What `Auto` stands for here, and the memory that it takes beside the model, in bytes.
//!     assert_eq!(averager.algorithm(), Algorithm::Direct);
//!     assert!(averager.memory_overhead() < 1 << 20);
//!     Ok::<_, param_averager::Error>(())
//! })?;
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # Memory and system calls
//! Extra memory per rank on CPUs: at most S/n + 4 MiB by the ring, for S bytes of parameters and n
//! ranks, and 1 MiB directly; the state of an [outer optimizer](outer); with an
//! [`Overlap::delay`](crate::Overlap::delay) a copy of the largest fragment; and 2 S with
//! [compression]. After construction nothing is allocated and no system call is made, waiting and
//! averages of copies aside; except in the first average after a recovery or a join, which divides
//! that state anew. On a CUDA device the slots take up to 16 MiB, and the driver may allocate.

pub mod accuracy;
pub mod compression;
pub mod failures;
pub mod frameworks;
pub mod hosts;
#[cfg(all(target_os = "linux", feature = "processes"))]
pub mod joining;
pub mod outer;
pub mod overlap;
pub mod practice;
#[cfg(all(target_os = "linux", feature = "processes"))]
pub mod processes;
#[cfg(feature = "cuda")]
pub mod streams;
