//! Constructors of worlds of processes: from the variables of a launcher, or with explicit values.

use std::sync::Arc;
use std::time::Duration;

use super::communicator::{Communicator, TIMEOUT};
use super::host_place::HostPlace;
use super::processes::{Known, ProcessBootstrap, Setup};
use super::world_id::WorldId;
use crate::abi::PA_MAX_WORLD;
use crate::{Device, Error, Result};

impl Communicator {
    /// Joins the ranks of a new world of processes on this host, as the rank that its launcher has
    /// set.
    ///
    /// Launchers are torchrun (`--no-python`), the mpirun of Open MPI or MPICH, srun, or a script
    /// that sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`. Collective: blocks until
    /// all ranks have arrived, for at most [`CommunicatorBuilder::timeout`].
    ///
    /// ```no_run
    /// use param_averager::{Device, ParamAverager, Communicator};
    ///
    /// let communicator = Communicator::from_env(Device::cpu())?;
    /// let mut model = vec![vec![communicator.rank() as f32; 1000]];
    /// let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
    /// averager.average(&mut model)?;
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// **CUDA.** Pass `Device::cuda(local_rank)`. Several processes may share a device, and each
    /// may see a different set of devices: ranks compare UUIDs. Before this function returns, every
    /// two ranks test whether they reach each other's memory by CUDA IPC; see
    /// [`Link`](crate::Link). All ranks are on CPUs or all are on CUDA devices. The rules of
    /// [`Communicator::from_devices`] for CUDA devices apply. Processes that share a GPU without
    /// MPS are time-sliced, so each exchange between them takes a time slice. None of this has been
    /// measured on a GPU.
    ///
    /// **Several hosts.** Where Open MPI, MPICH or Slurm have started equally many ranks on each of
    /// several hosts, the world is that of this host's ranks, numbered from 0 on each host, and
    /// [`Communicator::hosts`] is the number of hosts. So it is with torchrun where
    /// `PARAM_AVERAGER_HOSTS=agents` says that each agent, `GROUP_RANK` of `GROUP_WORLD_SIZE`, is a
    /// host; without it, all agents are taken to be on one. Averages over all hosts need a link,
    /// [`Builder::hosts`](crate::Builder::hosts).
    ///
    /// **Rendezvous.** Ranks find one another by the name of their world. The name is made from the
    /// launcher's variables unless `PARAM_AVERAGER_RENDEZVOUS` sets it. Rank 0 listens on an
    /// abstract Unix socket of that name, without a file or a port, for as long as it is in the
    /// world. Rank 0 refuses processes of other users and of other jobs, and names its process; a
    /// process that comes while a world of its name runs tries again for two seconds first, since
    /// the former run of a restarted job may be ending. The launcher's job id
    /// identifies a job; without one, the parent process and the arguments of the ranks do. A name
    /// in `PARAM_AVERAGER_RENDEZVOUS` is trusted to belong to one job.
    /// [`CommunicatorBuilder::from_env`] takes further options.
    ///
    /// # Errors
    ///
    /// [`Error::Environment`] names variables that are missing or contradictory.
    /// [`Error::Rendezvous`] says which ranks did not arrive, or why this one was refused.
    pub fn from_env(device: Device) -> Result<Communicator> {
        Communicator::builder().device(device).from_env()?.build()
    }

    /// Adds this process, as one more rank, to a running world of this host and this user.
    ///
    /// Blocks until the members admit it, for at most [`CommunicatorBuilder::timeout`]; the world
    /// itself may start within that time, too. [`LocalSgd`](crate::LocalSgd) admits a joiner after
    /// the next average that is due, and
    /// [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner) where it is called.
    /// `rendezvous` is the name of the world, which [`Communicator::rendezvous`] returns on its
    /// members.
    ///
    /// The joiner receives its model when it builds its averager, which sets its tensors to the
    /// members' values. [`LocalSgd::position`](crate::LocalSgd::position) then returns their step.
    /// The joiner must build the averagers of the members, in the same order, within one minute
    /// after this call: the members wait for it. Do slow preparations before this call. If building
    /// fails, as it does when another rank is lost meanwhile, the joiner has left the world and can
    /// join again.
    ///
    /// ```no_run
    /// use param_averager::{Device, LocalSgd, ParamAverager, Schedule, Communicator};
    ///
    /// let communicator = Communicator::join("my-run", Device::cpu())?;
    /// let mut model = vec![vec![0.0f32; 1000]];
    /// let averager = ParamAverager::builder(communicator).build(&mut model)?;
    /// let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    /// for _step in sgd.position()..10_000 {
    ///     // forward, backward, optimizer step
    ///     sgd.step(&mut model)?;
    /// }
    /// sgd.finish(&mut model)?;
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// A name belongs to one world for as long as the rank 0 that began it lives. Among several
    /// worlds of one name, the joiner enters the first that answers. [`Communicator::world`]
    /// returns its identity and the number of the others.
    ///
    /// # Errors
    ///
    /// [`Error::JoinRefused`] carries the reason.
    pub fn join(rendezvous: impl Into<String>, device: Device) -> Result<Communicator> {
        Communicator::builder().rendezvous(rendezvous).device(device).join()
    }

    /// True if a launcher has made this process a rank: a variable of its rank or of the number of
    /// ranks, which [`Communicator::from_env`] reads, is set.
    ///
    /// `from_env` can still fail: on half of the variables, such as `WORLD_SIZE` without `RANK`, or
    /// on wrong ones. A Slurm shell, in a batch script or by `srun --pty`, is not a rank. A program
    /// without a launcher can start ranks itself, or run without them.
    pub fn is_launched() -> bool {
        Setup::is_in_the_environment()
    }

    /// Returns a builder that takes rank, world size and name from the caller instead of a
    /// launcher.
    pub fn builder() -> CommunicatorBuilder {
        CommunicatorBuilder {
            rank: None,
            world_size: None,
            rendezvous: None,
            source: "set by Communicator::builder().rendezvous(..)".into(),
            known: Known::No,
            variable: None,
            device: Device::cpu(),
            timeout: TIMEOUT,
            place: HostPlace::default(),
        }
    }
}

/// Options of one rank in a world of processes. See [`Communicator::from_env`].
///
/// ```no_run
/// use param_averager::Communicator;
///
/// let rank: usize = std::env::args().nth(1).and_then(|rank| rank.parse().ok()).expect("a rank");
/// let builder = Communicator::builder().rank(rank).world_size(2).rendezvous("my-run");
/// let communicator = builder.build()?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "call build or join"]
pub struct CommunicatorBuilder {
    rank: Option<usize>,
    world_size: Option<usize>,
    rendezvous: Option<String>,
    source: String,
    known: Known,
    variable: Option<&'static str>,
    device: Device,
    timeout: Duration,
    place: HostPlace,
}

impl CommunicatorBuilder {
    /// Sets the rank of this process, from 0 to `world_size - 1`, different on each process.
    /// Required by [`build`](CommunicatorBuilder::build).
    pub fn rank(mut self, rank: usize) -> Self {
        self.rank = Some(rank);
        self
    }

    /// Sets the number of ranks, 1 to 16, the same on every rank. Required by
    /// [`build`](CommunicatorBuilder::build).
    pub fn world_size(mut self, world_size: usize) -> Self {
        self.world_size = Some(world_size);
        self
    }

    /// Sets the name of the world: the same on every rank, and not the name of another world of
    /// this user on this host.
    ///
    /// Any string of at most 1,024 bytes is valid. `"localhost:29500"` and `"unix:/run/my-run"` are
    /// only names: no port is bound and no file is created.
    pub fn rendezvous(mut self, name: impl Into<String>) -> Self {
        self.rendezvous = Some(name.into());
        self
    }

    /// Sets the device of this rank's parameters. Default: [`Device::cpu`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// Sets the longest wait for the other ranks to arrive, or for admission. Default: 10 minutes.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets an identifier of the job, the same on all its ranks and different from that of any
    /// other job, such as a scheduler's job id.
    ///
    /// Ranks with one identifier belong together, however they were started. Default: the
    /// launcher's job id. Without one, ranks belong together if one process started them, apart
    /// from wrappers and subshells of each rank, and if their arguments are the same except for the
    /// rank.
    pub fn job(mut self, job: impl Into<String>) -> Self {
        self.known = Known::By("job".into(), job.into());
        self
    }

    /// Takes rank and world size from the launcher's variables, as [`Communicator::from_env`] does.
    ///
    /// Takes the name from them, too, unless [`rendezvous`](CommunicatorBuilder::rendezvous) has
    /// set one before. Other options keep their values.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use param_averager::Communicator;
    ///
    /// let builder = Communicator::builder().timeout(Duration::from_secs(30)).from_env()?;
    /// let communicator = builder.build()?;
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Environment`] names the variables that are missing or contradict one another.
    pub fn from_env(mut self) -> Result<Self> {
        let found = Setup::of_the_environment(self.rendezvous.take())?;
        (self.rank, self.world_size) = (Some(found.rank), Some(found.world_size));
        (self.rendezvous, self.source, self.variable) =
            (Some(found.name), found.source, found.variable);
        self.place = found.place;
        if self.known == Known::No {
            self.known = found.known;
        }
        Ok(self)
    }

    /// Joins the other ranks in a new world. Collective: blocks until all ranks have arrived, for
    /// at most [`timeout`](CommunicatorBuilder::timeout).
    pub fn build(self) -> Result<Communicator> {
        let setup = Setup {
            rank: self.rank.ok_or_else(|| missing("rank"))?,
            world_size: self.world_size.ok_or_else(|| missing("world_size"))?,
            name: self.rendezvous.ok_or_else(|| missing("rendezvous"))?,
            source: self.source,
            known: self.known,
            variable: self.variable,
            place: self.place,
        };
        meet(setup, self.device, self.timeout)
    }

    /// Joins a running world, as [`Communicator::join`] does, with further options.
    ///
    /// Neither [`rank`](CommunicatorBuilder::rank) nor
    /// [`world_size`](CommunicatorBuilder::world_size) may be set: the members determine both.
    /// Without a name, `PARAM_AVERAGER_RENDEZVOUS` is used.
    pub fn join(self) -> Result<Communicator> {
        let name = match self.rendezvous {
            Some(name) => name,
            None => Setup::name_of_the_environment()?.ok_or_else(|| missing("rendezvous"))?,
        };
        if self.rank.is_some() || self.world_size.is_some() {
            let problem =
                "Communicator::builder().join() joins a running world, which assigns the rank: \
                    leave .rank(..) and .world_size(..) out, or call .build() to begin a world";
            return Err(Error::Environment { problem: problem.into() });
        }
        let bootstrap = ProcessBootstrap::join(&name, self.device, self.timeout)?;
        Ok(Communicator::of(Arc::new(bootstrap)))
    }
}

fn missing(what: &str) -> Error {
    let problem = format!(
        "Communicator::builder() needs .{what}(..): every process of a world gives its rank, the \
            world size and a name"
    );
    Error::Environment { problem }
}

fn meet(setup: Setup, device: Device, timeout: Duration) -> Result<Communicator> {
    if !(1..=PA_MAX_WORLD as usize).contains(&setup.world_size) {
        return Err(Error::WorldSize { found: setup.world_size });
    }
    if setup.rank >= setup.world_size {
        let problem = format!(
            "rank {} of a world of {} ranks: ranks are numbered from 0",
            setup.rank, setup.world_size
        );
        return Err(Error::Environment { problem });
    }
    let place = setup.place.clone();
    let bootstrap = ProcessBootstrap::meet(setup, device, timeout)?;
    Ok(Communicator::of(Arc::new(bootstrap)).at(place, timeout))
}

impl Communicator {
    /// The name of a world of processes, which [`Communicator::join`] takes. `None` for threads.
    pub fn rendezvous(&self) -> Option<&str> {
        self.world().map(WorldId::name)
    }

    /// The identity of a world of processes: its name, and the process that began it. On a joiner
    /// it identifies the world that [`Communicator::join`] entered. `None` for threads.
    pub fn world(&self) -> Option<&WorldId> {
        self.elastic().map(|elastic| elastic.world())
    }
}
