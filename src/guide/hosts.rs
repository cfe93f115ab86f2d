//! Several hosts: the link between them, what it carries, and what happens when a host fails.
//!
//! Within a host ranks need nothing but this crate. Between hosts, each rank exchanges its part of
//! the mean with the ranks of its number on all other hosts, over a link that the program brings:
//! [`Hosts`](crate::Hosts), a trait of five functions.
#![cfg_attr(
    feature = "mpi",
    doc = "[`MpiHosts`](crate::MpiHosts) is a link over MPI (feature `mpi`);"
)]
#![cfg_attr(
    not(feature = "mpi"),
    doc = "`MpiHosts` is a link over MPI (feature `mpi`, which this page was built without);"
)]
#![cfg_attr(
    feature = "nccl",
    doc = "[`NcclHosts`](crate::NcclHosts) is one over NCCL, for CUDA devices (feature `nccl`);"
)]
#![cfg_attr(
    not(feature = "nccl"),
    doc = "`NcclHosts` is one over NCCL, for CUDA devices (feature `nccl`, not in this build);"
)]
//! [`ThreadHosts`](crate::ThreadHosts) is one within a process, for tests.
//!
//! ```text
//!  host 0: ranks 0 … n−1 sum their tensors       host 1: the same
//!      │ rank r has part r of the host's mean         │
//!      ▼                                              ▼
//!  part r of host 0  ◀── rank r ── link ── rank r ──▶  part r of host 1
//!      │ the mean of all hosts, in their order        │
//!      ▼                                              ▼
//!  commit: the ranks of this host vote            the same votes
//!      │ part r goes to all ranks of the host         │
//! ```
//!
//! # Start
//! One program, started on all hosts by Open MPI's or MPICH's `mpirun` or by `srun`, with as many
//! ranks on each host. A feature links MPI when the program is built:
//! `cargo add param-averager --features mpi`, with an MPI and libclang. `examples/hosts.rs` is the
//! program below, whole.
//!
//! ```text
//! let (_universe, _) = mpi::initialize_with_threading(mpi::Threading::Funneled).expect("MPI");
//! let communicator = Communicator::from_env(Device::cpu())?;   // the ranks of this host
//! let link = MpiHosts::new(&communicator)?;
//! let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
//! let averager = builder.build(&mut params)?;                  // rank 0's values of host 0
//! ```
//!
//! On an error end the program by [`std::process::exit`]: finalising MPI waits for the other hosts.
//!
//! Ranks are numbered from 0 on each host, in errors, too. A launcher's job on several hosts
//! without [`Builder::hosts`](crate::Builder::hosts) is an error of `build`: its ranks would train
//! a model for each host.
//!
//! # NCCL
//! `NcclHosts`, of the feature `nccl`, carries the same bytes by NCCL: a communicator for each
//! rank's number, with a rank on each host. NCCL 2.27.3 or later is loaded when the first link is
//! made, from `libnccl.so.2`, `libnccl.so` or the file that `PARAM_AVERAGER_NCCL` names; nothing of
//! it is needed to build. Ranks are on CUDA devices, and NCCL sends from there: their parts, which
//! are in memory of the host, are copied to the device and back. The program is
//! `examples/hosts_nccl.rs`.
//!
//! ```text
//! export PARAM_AVERAGER_HOSTS=agents        # on all hosts
//! torchrun --no-python --nnodes 2 --node-rank N --nproc-per-node 8 --master-addr HOST0 \
//!     --rdzv-id RUN ./trainer
//!
//! let communicator = Communicator::from_env(Device::cuda(local_rank))?; // the ranks of this host
//! let link = NcclHosts::from_env(&communicator)?;
//! let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
//! ```
//!
//! torchrun may start several agents on one host, so `PARAM_AVERAGER_HOSTS=agents` has to say that
//! each is a host: `GROUP_RANK` of `GROUP_WORLD_SIZE`, with `LOCAL_WORLD_SIZE` ranks. Without it
//! all agents are taken to be on one host, and `from_env` is an error where they are not. Agents on
//! one machine are worlds of their own; names set by hand, `PARAM_AVERAGER_RENDEZVOUS`, must differ
//! between them. [`Communicator::host`](crate::Communicator::host) is a host's number, which `srun`
//! tells, too. `mpirun` tells none: pass it to `NcclHosts::new`, such as MPI's rank divided by the
//! ranks on a host where ranks are placed host by host.
//!
//! NCCL needs an id for each communicator. `NcclHosts::from_env` fetches it from host 0 by TCP, at
//! `MASTER_ADDR` and port `PARAM_AVERAGER_HOSTS_PORT` + rank (default: `MASTER_PORT` + 1 + rank):
//! host 0 opens as many ports as it has ranks. A host with another number of hosts or ranks, one
//! that has another's number or is of another run, and another program at the port are errors that
//! say so; other connections are ignored. Runs are told apart if the launcher names them: torchrun
//! by `--rdzv-id`, which is `none` by default, Open MPI and Slurm by themselves, MPICH not at all.
//! A program that can send the id by MPI or in a file passes it to `NcclHosts::new`. Both wait as
//! long as the communicator was told to
//! ([`CommunicatorBuilder::timeout`](crate::CommunicatorBuilder::timeout)). `NCCL_COMM_ID`, which
//! all communicators would share, and `NCCL_COMM_BLOCKING=1`, which makes NCCL's calls block, are
//! errors. NCCL takes both from its `nccl.conf` files, too, which is not seen: leave them out
//! there.
//!
//! Communicators do not block: waits look at the limit and at `ncclCommGetAsyncError`. When a host
//! dies and NCCL sees its connections close, the others' calls end with NCCL's error, else at the
//! limit. The link is ended then by `ncclCommAbort`, on a thread that nothing waits for, and its
//! buffers stay with NCCL: end the program and restart all hosts, as after any lost link.
//!
//! No bytes have been sent by NCCL itself: NCCL 2.32.3 was loaded and has made an id, and refuses
//! simulated devices. Tests use a stand-in for it on simulated devices, among processes that are
//! connected by TCP: 2 hosts with 2 ranks and 3 with 1, the example in two network namespaces with
//! torchrun's variables, killed, late and missing hosts, failing calls, and an `ncclCommAbort` that
//! does not return. The stand-in ends a program for some of the calls that NCCL's documents forbid.
//!
//! # The mean
//! Σ wᵢ · xᵢ / Σ wᵢ over all ranks of all hosts. Each host's mean is made in f32 (f64 for f64) and
//! travels so; the hosts' means are weighted by the sum of their ranks' weights and summed in f64,
//! in the order of hosts; the result is rounded to f32 and to the tensor's dtype. It differs from
//! that of one world of all ranks by the roundings of f32. All ranks get the same bits, and a value
//! that all hosts' means have alike stays as it is. A host whose ranks all have weight 0 only
//! receives; without weights, one that has made no step counts like the others.
//!
//! An [`outer`](crate::guide::outer) optimizer's step, and a
//! [`stage`](crate::Builder::stage), are made from the mean of all hosts. State is divided among
//! the ranks of a host, the same on all hosts. A stage must leave the same on all hosts: one that
//! adds noise of its own would lead them apart, and nothing compares that.
//!
//! # Bytes
//! For S bytes of parameters in f32, n ranks a host and h hosts, each rank sends
//! 2 · (h − 1)/h · S/n to other hosts for each average of all hosts, so a host sends
//! 2 · (h − 1)/h · S. A flat ring over all ranks, with its neighbours in the order of hosts, sends
//! 2 · (1 − 1/(n·h)) · S over each host's link, in 2 · (n·h − 1) steps that wait for one another,
//! where this makes 2 exchanges for each 4 MiB of a rank's part, or for each 16 KiB · h of it with
//! more than 256 hosts. Tensors of f16 and bf16 travel as f32. On 2 hosts with 2 ranks, with 1
//! Gbit/s between them, an average of GPT-2 took 5.6 s, as long as MPI's bare exchange of the same
//! bytes, and `MPI_Allreduce` of all ranks 7.9 s. `cargo bench --bench hosts_plan` counts bytes and
//! messages for 64, 512 and 4,096 hosts, and computes seconds from them
//! (`benches/record/2026-11-30-hosts`).
//!
//! [`Hierarchy::Outer`](crate::Hierarchy::Outer) makes only every k-th average one of all hosts,
//! and those between of one host: with `Schedule::every(h)` ranks agree within hosts every h steps,
//! and between them every k·h; `sync` and `finish` are of all hosts. This is the two-level case of
//! PyTorch's `HierarchicalModelAverager`. With weights, a host counts by all that its ranks have
//! passed since the last average of all hosts. It has the plain mean only: outer optimizers and
//! stages would lead hosts apart between averages of all. Schedules that measure (`overhead`,
//! `budget`, `divergence`) need [`Hierarchy::Every`](crate::Hierarchy::Every).
//!
//! # Compression
//! [`Builder::hosts_compression`](crate::Builder::hosts_compression) has hosts send codes in the
//! place of f32: [`Bf16`](crate::Compression::Bf16), half of the bytes, or
//! [`Int8`](crate::Compression::Int8), 0.258 of them. A rank sends how far its part of its host's
//! mean has come from the reference: the result of the last average of all hosts, or with an outer
//! optimizer the outer parameters. The rank that has a piece sends the mean of these differences,
//! in code, and all hosts add it to the reference. What both codes round away is owed, and added
//! to what the same rank sends in the next average that is committed (error feedback, as in
//! [`guide::compression`](crate::guide::compression), which is about the ring within a host). So
//! the sum of all averages is off by 2 · M / 254 at most with `Int8`, and 2 · M / 512 with `Bf16`,
//! where M is the largest difference with what is owed to it, in a block of 128 elements or of the
//! element. One average alone, which also sends what was owed before it, is off by twice as much at
//! most. All ranks of all hosts get the same bits.
//!
//! With weights, what a host owes is in the units of the mean, and one of less than a thousandth of
//! all weights sends nothing of it.
//!
//! It costs 16 + 8/h bytes of memory for each element of a rank's part and h hosts, 4 less with an
//! outer optimizer on CPUs, and buffers of 14 MiB. Tensors of f64 travel as they are. A value that
//! is the same on all hosts need not stay as it is. A difference that f32 does not hold is refused.
//! On 2 hosts with 2 ranks and 1 Gbit/s between them, an average of GPT-2 took 1.7 s in int8 and
//! 6.5 s in full; at 10 Gbit/s 1.3 and 1.5 s (`benches/record/2026-11-30-hosts`).
//!
//! # CUDA devices
//! Ranks pass `Device::cuda(local_rank)`, and nothing else differs. A rank copies its part of the
//! host's mean to page-locked memory, which takes 4 bytes (8 for f64) for each of its elements,
//! exchanges that, and copies the mean of all hosts back: no GPUDirect. Its host waits for the sum
//! and for the exchange, so that [`start`](crate::ParamAverager::start) returns after both; no
//! kernel waits meanwhile. Such averages are not captured into CUDA graphs. A
//! [`device_stage`](crate::Builder::device_stage) is called behind the exchange. Results have the
//! bits of the same hosts on CPUs. No GPU has run this: it is tested on simulated devices.
//!
//! # All or nothing
//! Before the exchange the ranks of one number show one another what they are about to average, and
//! after it that they succeeded. Then the ranks of each host vote, as they do without a link. So
//! the same votes are counted on every host:
//!
//! | what happens before the vote | what the ranks get; no tensor changes |
//! |---|---|
//! | a host's own sum fails: a NaN, a wrong tensor, a veto | that host: its error; the others: [`Error::HostRefused`](crate::Error::HostRefused). All can go on |
//! | hosts differ in ranks, tensors, options or call | [`Error::HostsDiffer`](crate::Error::HostsDiffer) |
//! | a host has not come within half of [`Builder::timeout`](crate::Builder::timeout), or not sent within three quarters; its link fails | [`Error::HostLost`](crate::Error::HostLost), which is fatal. The link has ended |
//! | a rank dies, or the averaging is aborted | its host: its error, such as [`Error::PeerLost`](crate::Error::PeerLost); the others: `HostLost` |
//!
//! A rank whose own exchange went well, beside one whose exchange failed, gets
//! [`Error::StageVetoed`](crate::Error::StageVetoed) with that rank's reason.
//!
//! A link that has ended is not mended: **restart all hosts from the checkpoint.** `recover` and
//! joins are refused: hosts would not have the same ranks any more.
//! [`recover_within_host`](crate::LocalSgd::recover_within_host), of ranks that are processes,
//! leaves the link and goes on with the ranks that this host has left, with their outer state: so a
//! host can save the newest checkpoint for that restart, or train on alone, away from the others.
//! MPI itself ends all ranks when one dies, unless it was told otherwise.
//!
//! One case is left. A host that is lost or stopped between its word in the last exchange and its
//! own vote, or whose wait in that exchange ends (an eighth of the timeout), or to which the word
//! of a host that has died did not come, is left uncommitted where others have committed. No
//! protocol closes that gap altogether. The link of that host has ended then: the others' next
//! average is `HostLost`.
//!
//! # Limits
//! The ring with its commit; no [`Builder::compression`](crate::Builder::compression), which is of
//! the ring within a host, no overlap, no [`LocalSgd::done`](crate::LocalSgd::done). A rank waits
//! in its call, also for the link. Buffers take 12 MiB at most for each averager, and 8 MiB in
//! `MpiHosts`; with more than 256 hosts 48 KiB · h and 32 KiB · h, but no more than 3 and 2 times
//! the rank's part of the model in f32, and 24 bytes · h. `NcclHosts` takes 8 MiB of page-locked
//! memory and of the device's, with more than 256 hosts 32 KiB · h. All hosts have the same
//! number of ranks and of [`channels`](crate::Builder::channels), whose default depends on the
//! cores. `barrier` and `all_reduce_scalars` are of the ranks of one host. After `sync`, what the
//! ranks of host 0 have [saved](crate::LocalSgd::save) is enough to restart all hosts.
//!
//! Tested with Open MPI 4.1 and MPICH 4.0 on 2 hosts with 2 ranks and 3 hosts with 1, which were
//! network namespaces of one machine, with a slow link, a cut one and a killed rank, and with ranks
//! on simulated devices; no run on several machines was made.
