//! Worlds of processes: how one is joined, by what a launcher says or by hand.

use std::time::Duration;

use super::processes::{Processes, Setup};
use super::{Communicator, Device, Group, World};
use crate::abi::PA_MAX_WORLD;
use crate::{Error, Result};

/// How long ranks wait for one another to start, unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(600);

impl World {
    /// This process as one rank of a world of processes on this host, as its launcher says: torchrun (`--no-python`), Open MPI's or
    /// MPICH's mpirun, srun, or a script that sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`. Collective: returns when all
    /// ranks have come, which it waits for as [`WorldBuilder::timeout`] does.
    ///
    /// ```no_run
    /// use param_averager::{Device, ParamAverager, World};
    ///
    /// let communicator = World::from_env(Device::cpu())?;
    /// let mut model = vec![vec![communicator.rank() as f32; 1000]];
    /// let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
    /// averager.average(&mut model)?;
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    ///
    /// On CUDA devices, `World::from_env(Device::cuda(local_rank))`, several processes may have one, and each may see other ones: they
    /// know them by UUID. Before it returns, every two ranks try whether they reach each other's memory by CUDA IPC; see
    /// [`Link`](crate::Link). Ranks are all on CPUs or all on CUDA devices. What [`World::in_process`] says of CUDA devices holds here, too;
    /// and processes that share a GPU without MPS run by turns there, so that every hand-off between them takes one. No GPU has shown yet
    /// how well this works.
    ///
    /// Ranks find one another by a name, which is made of the launcher's variables or is that in `PARAM_AVERAGER_RENDEZVOUS`. It
    /// becomes an abstract Unix socket of rank 0's: no file, no port. Processes of other users are not let in.
    pub fn from_env(device: Device) -> Result<Communicator> {
        join(Setup::of_the_environment()?, device, TIMEOUT)
    }

    /// The same with everything said by the caller.
    pub fn builder() -> WorldBuilder {
        WorldBuilder {
            rank: None,
            world_size: None,
            rendezvous: None,
            device: Device::cpu(),
            timeout: TIMEOUT,
        }
    }
}

/// A rank of a world of processes, by hand. See [`World::from_env`].
///
/// ```no_run
/// use param_averager::World;
///
/// let rank: usize = std::env::args().nth(1).and_then(|rank| rank.parse().ok()).expect("a rank");
/// let communicator = World::builder().rank(rank).world_size(2).rendezvous("my-run").join()?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "call join"]
pub struct WorldBuilder {
    rank: Option<usize>,
    world_size: Option<usize>,
    rendezvous: Option<String>,
    device: Device,
    timeout: Duration,
}

impl WorldBuilder {
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

    /// What the ranks find one another by: the same on every rank, and no other world of this user's on this host. Any name
    /// will do; `"localhost:29500"` and `"unix:/run/my-run"` are names, too: nothing listens on a port, and no file is made.
    pub fn rendezvous(mut self, name: impl Into<String>) -> Self {
        self.rendezvous = Some(name.into());
        self
    }

    /// Where this rank's parameters are. Default: [`Device::cpu`].
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        self
    }

    /// How long to wait for the other ranks to start. Default: 10 minutes.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Waits for the other ranks. Collective.
    pub fn join(self) -> Result<Communicator> {
        let missing = |what| {
            Error::Environment {
            problem: format!("World::builder() needs .{what}(..): every process of a world says its rank, the world's size and a name"),
        }
        };
        let setup = Setup {
            rank: self.rank.ok_or_else(|| missing("rank"))?,
            world_size: self.world_size.ok_or_else(|| missing("world_size"))?,
            name: self.rendezvous.ok_or_else(|| missing("rendezvous"))?,
        };
        join(setup, self.device, self.timeout)
    }
}

fn join(setup: Setup, device: Device, timeout: Duration) -> Result<Communicator> {
    if !(1..=PA_MAX_WORLD as usize).contains(&setup.world_size) {
        return Err(Error::WorldSize { found: setup.world_size });
    }
    if setup.rank >= setup.world_size {
        let problem =
            format!("rank {} of a world of {}: ranks are numbered from 0", setup.rank, setup.world_size);
        return Err(Error::Environment { problem });
    }
    let processes = Processes::meet(setup, device, timeout)?;
    Ok(Communicator::new(Group::Processes(std::sync::Arc::new(processes))))
}
