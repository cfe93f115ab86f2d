//! Ranks that are processes of one Linux host: start, names, jobs, and access.
//!
//! # Start
//! One program, started once for each rank, by `torchrun --no-python --nproc-per-node 4 ./trainer`,
//! `mpirun -n 4 ./trainer` (Open MPI, MPICH), `srun`, or a loop that sets `RANK`, `WORLD_SIZE`,
//! `MASTER_ADDR` and `MASTER_PORT`. [`Communicator::from_env`] reads these variables.
//! [`Communicator::builder`] takes the same from the program, and its
//! [`from_env`](crate::CommunicatorBuilder::from_env) takes the launcher's values with other
//! options of yours. [`Communicator::is_launched`] tells whether a launcher has started the
//! process; a shell of Slurm's is no rank. Half of a launcher's variables, such as `WORLD_SIZE`
//! without `RANK`, are an error of `from_env`, and `is_launched` is true: such a process does not
//! train alone.
//!
//! ```no_run
//! use std::time::Duration;
//! use param_averager::{Communicator, LocalSgd, ParamAverager, Result, Schedule};
//!
//! fn main() -> Result<()> {
//!     // Waits for the other ranks, for 2 minutes at most.
//!     let start = Communicator::builder().timeout(Duration::from_secs(120)).from_env()?;
//!     let communicator = start.build()?;
//!     let mut params = vec![vec![communicator.rank() as f32; 1000]];
//!     let averager = ParamAverager::builder(communicator).build(&mut params)?;
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     for _batch in 0..100 {
//!         // train_step(&mut params, batch);
//!         match sgd.step(&mut params) {
//!             // Goes on without the lost rank.
//!             Err(error) if error.is_fatal() => sgd.recover(&mut params)?,
//!             done => done?,
//!         };
//!     }
//!     sgd.finish(&mut params)?;
//!     Ok(())
//! }
//! ```
//!
//! # Names
//! Ranks find one another by a name made of the launcher's variables; `PARAM_AVERAGER_RENDEZVOUS`
//! replaces it. The name becomes an abstract Unix socket of rank 0: no port is opened, and no file
//! is made. Ranks that are missing or disagree are named on every rank. A rank that waits for more
//! than 10 seconds says for which ranks, where its name is from, and what to set: see
//! [waits](crate#what-blocks-and-what-can-deadlock).
//!
//! # Jobs
//! Two jobs with one name do not mix. Rank 0 keeps the name for as long as it is in the world; a
//! crash frees it. A process that starts later with this name is refused, and told which process
//! has it. It tries again for two seconds before that, so that a job can be started again while its
//! former run ends.
//!
//! Ranks tell each other their job: the launcher's name for it, [`CommunicatorBuilder::job`], or
//! else the process that started them (wrappers, subshells and the end of a loop aside) and their
//! arguments without the rank's number. The error names the difference, and how to declare one job.
//! Ranks started by hand in two terminals, or by two container runtimes in one PID namespace, need
//! one name in `PARAM_AVERAGER_RENDEZVOUS`, which is trusted.
//!
//! Jobs that nothing tells apart, such as two runs from one script that differ in a variable of the
//! environment alone, are seen by their second rank 0, which ends both rendezvous if it starts in
//! time. If it comes later, a rank of its job may have taken the place of a rank of the first: that
//! rank and the second rank 0 get an error, and the mixed world runs. Give such jobs names of their
//! own. A rank that starts more than 2 seconds after its own rank 0 was refused waits
//! until its timeout. [`Communicator::world`] tells which world a rank is in: its name, and the
//! process and the job that began it, and when.
//!
//! # Access
//! Processes of other users are refused. Connections without a valid handshake are dropped; time,
//! bytes and file descriptors of each are bounded, and rank 0 neither hangs nor exhausts anything
//! (fuzzed for an hour, `fuzz/RECORD.md`). A flood of connections, or files that take long to
//! close, can delay the start until its timeout. A process of the same user can also impersonate a
//! rank, and so keep a world from starting.
//!
//! # Containers
//! Ranks may be in PID and user namespaces of their own, with one network namespace and one user,
//! whatever numbers a namespace gives it. In a user namespace that does not map the user (`unshare
//! -U` without `-r`) all users look alike, so every process is refused. A child that a rank forks
//! without exec keeps neither its name nor its connections.
//!
//! # Memory and files
//! Mailboxes of ranks on CPUs are sealed memfds. Nothing is left under `/dev/shm` or `/tmp` after
//! any kind of exit. All processes average by the ring, on one host.
//!
//! # CUDA devices
//! `Communicator::from_env(Device::cuda(local_rank))`: each process has one device, and several may
//! share it. Each process may see other devices (`CUDA_VISIBLE_DEVICES`); devices are compared by
//! UUID. A mailbox is in the receiver's memory (CUDA IPC) where a probe, in which kernels of both
//! processes move bytes both ways through such a mapping, succeeds; else in a sealed memfd that
//! both register. [`Link`] and the order of the ring are as for threads, as far as the processes
//! see each other's devices. Memory that a peer has mapped is freed when the peer has closed it or
//! has ended, and is not used again before. The ranks of one world are all on CPUs, or all on CUDA
//! devices. How they meet, and what MPS changes, is in [`streams`](super::streams). All of this has
//! been simulated only; no GPU has run it. Neither the gain of CUDA IPC is
//! known, nor the behaviour of a driver when the process that exported memory is killed while a
//! peer's kernel writes there.
//!
//! [`Communicator::builder`]: crate::Communicator::builder
//! [`Communicator::from_env`]: crate::Communicator::from_env
//! [`Communicator::is_launched`]: crate::Communicator::is_launched
//! [`Communicator::world`]: crate::Communicator::world
//! [`CommunicatorBuilder::job`]: crate::CommunicatorBuilder::job
//! [`Link`]: crate::Link
