//! Worlds of processes: how one is joined, by what a launcher says or by hand.

use std::time::Duration;

use super::processes::{Known, ProcessBootstrap, Setup};
use super::{Communicator, Device, Group, Rebuild, WorldId};
use crate::abi::PA_MAX_WORLD;
use crate::{Error, Result};

/// How long ranks wait for one another to start, unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);

impl Communicator {
    /// This process as one rank of a world of processes on this host, as its launcher says:
    /// torchrun (`--no-python`), Open MPI's or MPICH's mpirun, srun, or a script that sets `RANK`,
    /// `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`. Collective: returns when all ranks have come,
    /// which it waits for as [`CommunicatorBuilder::timeout`] does.
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
    /// On CUDA devices, `Communicator::from_env(Device::cuda(local_rank))`, several processes may have
    /// one, and each may see other ones: they know them by UUID. Before it returns, every two ranks
    /// try whether they reach each other's memory by CUDA IPC; see [`Link`](crate::Link). Ranks are
    /// all on CPUs or all on CUDA devices. What [`Communicator::from_devices`] says of CUDA devices holds
    /// here, too; and processes that share a GPU without MPS run by turns there, so that every
    /// hand-off between them takes one. No GPU has shown yet how well this works.
    ///
    /// Ranks find one another by a name, which is made of the launcher's variables or is that in
    /// `PARAM_AVERAGER_RENDEZVOUS`. It becomes an abstract Unix socket of rank 0's: no file, no
    /// port. Rank 0 keeps it for as long as it is in the world. Processes of other users are not
    /// let in, and neither are those of another job, which is told by the launcher's name for it,
    /// or else by the process that started the ranks and by their arguments. A name in
    /// `PARAM_AVERAGER_RENDEZVOUS` is trusted to be one job's. [`CommunicatorBuilder::from_env`] does the
    /// same with other options.
    pub fn from_env(device: Device) -> Result<Communicator> {
        Communicator::builder().device(device).from_env()?.build()
    }

    /// This process as one more rank of a world of processes that has begun, on this host and of
    /// this user: waits until the others let it in, which [`LocalSgd`](crate::LocalSgd) does after
    /// the next average that is due, and [`ParamAverager::admit_joiner`](crate::ParamAverager::admit_joiner)
    /// where it is called. `rendezvous` is the name of the world that its ranks gave, or
    /// [`Communicator::rendezvous`] tells. Waits as [`CommunicatorBuilder::timeout`] does, also for the
    /// world itself to begin.
    ///
    /// It has no model of its own: building its averager gives its tensors the values that the
    /// others have, and [`LocalSgd::position`](crate::LocalSgd::position) tells how far they are.
    /// It builds the averagers that they have, in the same order, and at once, since they wait for
    /// it, a minute at most: whatever takes long comes before this call. If building fails, as it
    /// does when another rank is lost meanwhile, this process has left, and can join again.
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
    /// A name belongs to one world while the rank 0 that began it is there. Of several worlds of
    /// one name, it is the first that answers; [`Communicator::world`] tells which, and how many
    /// there were.
    pub fn join(rendezvous: impl Into<String>, device: Device) -> Result<Communicator> {
        Communicator::builder().rendezvous(rendezvous).device(device).join()
    }

    /// True if a launcher has made this process a rank, by one of the variables that
    /// [`Communicator::from_env`] reads; that still fails if the others are wrong. A shell of Slurm's, in
    /// a batch script or by `srun --pty`, is no rank. A program that no launcher has started can
    /// start ranks itself, or do without them.
    pub fn is_launched() -> bool {
        Setup::is_in_the_environment()
    }

    /// The same as [`Communicator::from_env`] with everything said by the caller.
    pub fn builder() -> CommunicatorBuilder {
        CommunicatorBuilder {
            rank: None,
            world_size: None,
            rendezvous: None,
            source: "that of Communicator::builder().rendezvous(..)".into(),
            known: Known::No,
            variable: None,
            device: Device::cpu(),
            timeout: TIMEOUT,
        }
    }
}

/// A rank of a world of processes, by hand. See [`Communicator::from_env`].
///
/// ```no_run
/// use param_averager::Communicator;
///
/// let rank: usize = std::env::args().nth(1).and_then(|rank| rank.parse().ok()).expect("a rank");
/// let communicator = Communicator::builder().rank(rank).world_size(2).rendezvous("my-run").build()?;
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
}

impl CommunicatorBuilder {
    /// This process's number, from 0. Each rank has one of its own.
    pub fn rank(mut self, rank: usize) -> Self {
        self.rank = Some(rank);
        self
    }

    /// The number of ranks, 1 to 16; the same on every rank.
    pub fn world_size(mut self, world_size: usize) -> Self {
        self.world_size = Some(world_size);
        self
    }

    /// What the ranks find one another by: the same on every rank, and no other world of this
    /// user's on this host. Any name will do, up to 1,024 bytes; `"localhost:29500"` and
    /// `"unix:/run/my-run"` are names, too: nothing listens on a port, and no file is made.
    pub fn rendezvous(mut self, name: impl Into<String>) -> Self {
        self.rendezvous = Some(name.into());
        self
    }

    /// Where this rank's parameters are. Default: [`Device::cpu`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// How long to wait for the other ranks to start, or to be let in. Default: 10 minutes.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// A name for the job, the same on every rank of it and no other job's: such as a scheduler's
    /// id. Ranks that give one belong together, however they were started. Default: that of the
    /// launcher; without one, ranks belong together that were started by one process, wrappers and
    /// subshells of each rank aside, with the same arguments but for the rank's number.
    pub fn job(mut self, job: impl Into<String>) -> Self {
        self.known = Known::By("job".into(), job.into());
        self
    }

    /// Takes rank and world size from the launcher's variables, as [`Communicator::from_env`] does, and
    /// the name unless [`rendezvous`](CommunicatorBuilder::rendezvous) has set one before. Other options
    /// stay as they are.
    ///
    /// ```no_run
    /// use std::time::Duration;
    /// use param_averager::Communicator;
    ///
    /// let communicator = Communicator::builder().timeout(Duration::from_secs(30)).from_env()?.build()?;
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
        if self.known == Known::No {
            self.known = found.known;
        }
        Ok(self)
    }

    /// Waits for the other ranks. Collective.
    pub fn build(self) -> Result<Communicator> {
        let setup = Setup {
            rank: self.rank.ok_or_else(|| missing("rank"))?,
            world_size: self.world_size.ok_or_else(|| missing("world_size"))?,
            name: self.rendezvous.ok_or_else(|| missing("rendezvous"))?,
            source: self.source,
            known: self.known,
            variable: self.variable,
        };
        meet(setup, self.device, self.timeout)
    }

    /// [`Communicator::join`] with more said by the caller. A rank and the world's size are the others' to
    /// say. Without a name it is that in `PARAM_AVERAGER_RENDEZVOUS`.
    pub fn join(self) -> Result<Communicator> {
        let name = match self.rendezvous {
            Some(name) => name,
            None => Setup::name_of_the_environment()?.ok_or_else(|| missing("rendezvous"))?,
        };
        if self.rank.is_some() || self.world_size.is_some() {
            let problem =
                "Communicator::builder().join() joins a world that has begun, and gets its rank \
                from that: leave .rank(..) and \
                           .world_size(..) out, or call .build() to begin one";
            return Err(Error::Environment { problem: problem.into() });
        }
        let processes = ProcessBootstrap::join(&name, self.device, self.timeout)?;
        Ok(Communicator::new(Group::Processes(std::sync::Arc::new(processes))))
    }
}

fn missing(what: &str) -> Error {
    let problem = format!(
        "Communicator::builder() needs .{what}(..): every process of a world says its \
        rank, the world's size and a name"
    );
    Error::Environment { problem }
}

fn meet(setup: Setup, device: Device, timeout: Duration) -> Result<Communicator> {
    if !(1..=PA_MAX_WORLD as usize).contains(&setup.world_size) {
        return Err(Error::WorldSize { found: setup.world_size });
    }
    if setup.rank >= setup.world_size {
        let problem = format!(
            "rank {} of a world of {}: ranks are numbered from 0",
            setup.rank, setup.world_size
        );
        return Err(Error::Environment { problem });
    }
    let processes = ProcessBootstrap::meet(setup, device, timeout)?;
    Ok(Communicator::new(Group::Processes(std::sync::Arc::new(processes))))
}

impl Communicator {
    /// Name of a world of processes, for processes that [join](Communicator::join) it later.
    pub fn rendezvous(&self) -> Option<&str> {
        self.processes().map(|processes| processes.name())
    }

    /// Identity of a world of processes: its name, and the process that began it. After
    /// [`Communicator::join`] it tells which one was entered. `None` for ranks that are threads.
    pub fn world(&self) -> Option<&WorldId> {
        self.processes().map(|processes| processes.world())
    }

    /// Whether a process waits to join, as far as this rank knows.
    pub(crate) fn has_joiner(&self) -> bool {
        self.processes().is_some_and(|processes| processes.has_joiner())
    }

    /// True if a process has joined with this view.
    pub(crate) fn has_joined(&self) -> bool {
        self.processes().is_some_and(|processes| processes.has_joined())
    }

    /// True if a member of this view is gone, or has left it for the next one, as far as this rank
    /// knows.
    pub(crate) fn has_lost_a_member(&self) -> bool {
        self.processes().is_some_and(|processes| processes.has_lost_a_member())
    }

    /// Number of this view of the world.
    pub(crate) fn view(&self) -> u32 {
        self.processes().map_or(0, |processes| processes.number())
    }

    /// Remembers what an averager of this process can be built from again.
    pub(crate) fn register(&self, averager: std::sync::Weak<dyn Rebuild>) {
        self.processes().into_iter().for_each(|processes| processes.register(averager.clone()));
    }

    /// Builds all averagers of this process again, unless that was done in this view. Collective;
    /// by whichever averager a process recovers first. `averages`: the one that this rank averages
    /// next.
    pub(crate) fn rebuild(&self, averages: Option<&str>, timeout: Duration) -> Result<()> {
        match self.processes() {
            Some(processes) => processes.rebuild(self, averages, timeout),
            None => Err(Error::RecoveryUnsupported { rank: self.rank() }),
        }
    }

    /// True if this process is in another view by now.
    pub(crate) fn is_superseded(&self) -> bool {
        self.processes().is_some_and(|processes| processes.is_superseded())
    }

    /// Whether that is this rank.
    pub(crate) fn is_new(&self) -> bool {
        self.processes().is_some_and(|processes| processes.is_new())
    }

    /// Whether it still has no model.
    pub(crate) fn lacks_model(&self) -> bool {
        self.processes().is_some_and(|processes| processes.lacks_model())
    }

    pub(crate) fn not_admitted(&self) -> Error {
        let reason = "the others have built an averager without letting this process in: it joins \
            as they call ParamAverager::admit_joiner"
            .into();
        Error::JoinRefused { rendezvous: self.rendezvous().unwrap_or_default().to_owned(), reason }
    }

    /// Whoever joined has the model now.
    pub(crate) fn has_model(&self) {
        self.processes().into_iter().for_each(|processes| processes.has_model());
    }

    /// This process can't go on in this world.
    pub(crate) fn leave(&self) {
        self.processes().into_iter().for_each(|processes| processes.leave());
    }

    fn processes(&self) -> Option<&ProcessBootstrap> {
        match &self.membership.group {
            Group::Threads(..) => None,
            Group::Processes(processes) => Some(processes),
        }
    }
}
