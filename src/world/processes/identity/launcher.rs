//! Rank, world size and job of this process, from the environment variables that launchers set.

mod hosts;
#[cfg(test)]
mod tests;

use crate::abi::PA_MAX_WORLD;
use crate::world::processes::identity::ancestry::Process;
use crate::world::processes::identity::job::Known;
use crate::world::HostPlace;

/// The values found in the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launched {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Name of the world, unique on this host.
    pub(crate) name: String,
    /// Source of the name, for messages.
    pub(crate) source: String,
    pub(crate) known: Known,
    /// The variable that gave the rank.
    pub(crate) variable: &'static str,
    pub(crate) place: HostPlace,
}

/// The variables of one launcher: rank, world size, and the number of ranks on this host, if it
/// sets one, with the rank among them.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_size: &'static str,
    local_rank: &'static str,
    /// Variables whose values together differ between any two jobs of one host.
    job: &'static [&'static str],
    /// Number of the first variables of `job` that are required.
    required: usize,
    /// The variable of `job` that only the launcher itself sets, to another value for each job.
    knows: &'static str,
}

/// Variable by which a user names the world explicitly, with any launcher.
pub(crate) const RENDEZVOUS: &str = "PARAM_AVERAGER_RENDEZVOUS";

/// Facts about this process that are looked up like variables: the process that started all ranks
/// of this host, and the presence of a terminal.
pub(crate) const PARENT: &str = "the process that has started this one";
pub(crate) const TERMINAL: &str = "the terminal";

/// Programs of MPICH and Intel MPI that are an ancestor of all ranks of a host, nearest first.
const PROXIES: [&str; 3] = ["hydra_pmi_proxy", "pmi_proxy", "mpiexec.hydra"];

/// Ids of Slurm steps that run a shell: interactive step, batch script, and external step.
const SHELLS: [&str; 3] = ["4294967290", "4294967291", "4294967292"];

/// Known launchers. The first with a rank variable counts: a launcher that was started inside of
/// another's job comes first.
const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        name: "torchrun",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        local_size: "LOCAL_WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        job: &["MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"],
        required: 1,
        knows: "TORCHELASTIC_RUN_ID",
    },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        job: &["PMIX_NAMESPACE"],
        required: 1,
        knows: "PMIX_NAMESPACE",
    },
    Launcher {
        name: "MPICH",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        local_size: "MPI_LOCALNRANKS",
        local_rank: "MPI_LOCALRANKID",
        job: &[PARENT], // MPICH names no job, but starts all ranks of a host from one process
        required: 1,
        knows: PARENT,
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
        local_rank: "SLURM_LOCALID",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"],
        required: 2, // a job can run several steps at once
        knows: "SLURM_JOB_ID",
    },
];

/// Names of all variables that must be UTF-8.
pub(crate) fn variables() -> impl Iterator<Item = &'static str> {
    let of = |launcher: &Launcher| {
        let Launcher { rank, world_size, local_size, local_rank, job, .. } = *launcher;
        [rank, world_size, local_size, local_rank].into_iter().chain(job.iter().copied())
    };
    let more = [RENDEZVOUS].into_iter().chain(hosts::VARIABLES);
    LAUNCHERS.iter().flat_map(of).chain(more).filter(|name| *name != PARENT)
}

/// The process that started all ranks of this host, as pid and start time. Wrappers of single ranks
/// are skipped.
pub(crate) fn parent() -> Option<String> {
    let own = Process::own()?;
    let proxy = own.ancestors().find(|ancestor| PROXIES.contains(&ancestor.name.as_str()));
    let found = proxy.or_else(|| own.parent())?;
    Some(format!("{}.{}", found.pid, found.start))
}

pub(crate) fn has_terminal() -> bool {
    Process::own().is_some_and(|own| own.has_terminal)
}

/// True if `address` is an address of this host. Unknown names are not resolved.
fn is_here(address: &str) -> bool {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let first = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let is_named = !address.is_empty() && first(address) == first(host.trim());
    let is_own =
        |ip: std::net::IpAddr| ip.is_loopback() || std::net::UdpSocket::bind((ip, 0)).is_ok();
    address == "localhost" || is_named || address.parse().is_ok_and(is_own)
}

impl Launcher {
    /// The launcher that has set the rank of this process, if any.
    fn find(get: &impl Fn(&str) -> Option<String>) -> Option<&'static Launcher> {
        // srun sets PMI_RANK, too, for programs that use its PMI.
        let is_slurm = get("SLURM_PROCID").is_some() && get("MPI_LOCALNRANKS").is_none();
        let is_meant = |launcher: &&Launcher| {
            get(launcher.rank).is_some() && !(is_slurm && launcher.rank == "PMI_RANK")
        };
        LAUNCHERS.iter().find(is_meant)
    }

    /// The error, if a launcher's variables say that this process is one of several ranks, and not
    /// which. Variables such as `MASTER_PORT`, which a shell may set for programs that it starts
    /// later, say nothing.
    fn half_set(get: &impl Fn(&str) -> Option<String>) -> Option<String> {
        LAUNCHERS.iter().find_map(|launcher| {
            let Launcher { name, rank, world_size, local_size, .. } = *launcher;
            let set = [world_size, local_size].into_iter().find(|size| get(size).is_some())?;
            get(rank).is_none().then(|| {
                format!(
                    "{set} is set, but {rank} is not: {name} sets both for the ranks that it \
                        starts; set {rank} on every process, to 0, 1 and so on, or unset {set} if \
                        this process is no rank"
                )
            })
        })
    }

    /// The reason, if the variables are those of a shell that will start the ranks.
    fn shell(&self, get: &impl Fn(&str) -> Option<String>) -> Option<String> {
        if self.name != "Slurm" {
            return None;
        }
        let is_alone = get(self.world_size).as_deref().map(str::trim) == Some("1");
        let what = if get(self.world_size).is_none() {
            format!("{} is set, but {} is not, as in a batch script", self.rank, self.world_size)
        } else if get("SLURM_STEP_ID").is_some_and(|step| SHELLS.contains(&step.as_str())) {
            "SLURM_STEP_ID is that of a shell".into()
        } else if get("SLURM_PTY_PORT").is_some() && (is_alone || get(TERMINAL).is_some()) {
            // Ranks that srun starts from this shell inherit SLURM_PTY_PORT, but have no terminal
            // and several tasks.
            "SLURM_PTY_PORT is set, as by srun --pty".into()
        } else {
            return None;
        };
        Some(format!(
            "this process is a Slurm shell and not a rank ({what}): start the ranks in it by srun, \
                or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        ))
    }
}

impl Launched {
    /// True if a launcher has made this process a rank, even if variables are missing, that of the
    /// rank included, or wrong.
    pub(crate) fn is_there(get: impl Fn(&str) -> Option<String>) -> bool {
        Launcher::find(&get).is_some_and(|launcher| launcher.shell(&get).is_none())
            || Launcher::half_set(&get).is_some()
    }

    /// Reads the variables that `get` returns, `PARENT` among them. An error says what is wrong and
    /// what to do. A `given` name takes precedence.
    pub(crate) fn find(
        get: impl Fn(&str) -> Option<String>,
        given: Option<String>,
    ) -> Result<Launched, String> {
        let launcher = Launcher::find(&get);
        let shell = launcher.and_then(|launcher| launcher.shell(&get));
        if let (true, Some(problem)) =
            (launcher.is_none() || shell.is_some(), Launcher::half_set(&get))
        {
            return Err(problem);
        }
        let Some(launcher) = launcher else {
            let names: Vec<_> =
                LAUNCHERS.iter().map(|l| format!("{} ({})", l.rank, l.name)).collect();
            let names = names.join(", ");
            return Err(format!(
                "no launcher has set the rank of this process: none of {names} is set; start it \
                    with torchrun --no-python, mpirun or srun, set RANK, WORLD_SIZE, MASTER_ADDR \
                    and MASTER_PORT yourself, or use Communicator::builder()"
            ));
        };
        if let Some(problem) = shell {
            return Err(problem);
        }
        let number = |name: &str| -> Result<usize, String> {
            let by = launcher.name;
            let value = get(name).ok_or_else(|| {
                format!(
                    "{0} is set, but {name} is not: {by} sets both for the ranks that it starts; \
                        set {name} to the number of ranks, or unset {0} if this process is no rank",
                    launcher.rank
                )
            })?;
            value
                .trim()
                .parse()
                .map_err(|_| format!("{name} is {value:?}, which is not a whole number from 0"))
        };
        let (mut rank, mut world_size) = (number(launcher.rank)?, number(launcher.world_size)?);
        let (mut a, mut b) = (launcher.rank, launcher.world_size);
        let place = launcher.place(&get, rank, world_size)?;
        if place.hosts > 1 {
            (a, b) = (launcher.local_rank, launcher.local_size);
            (rank, world_size) = (number(a)?, world_size / place.hosts);
        }
        if !(1..=PA_MAX_WORLD as usize).contains(&world_size) {
            return Err(format!(
                "{b} is {world_size}: a world has 1 to {PA_MAX_WORLD} ranks; start as many"
            ));
        }
        if rank >= world_size {
            return Err(format!("{a} is {rank} and {b} is {world_size}: ranks are 0 to {b} - 1"));
        }
        let is_empty = |name: &String| name.is_empty();
        let by_hand = get(RENDEZVOUS);
        if by_hand.as_ref().is_some_and(is_empty) {
            return Err(format!(
                "{RENDEZVOUS} is empty: unset it, or give every rank of this world the same name"
            ));
        }
        let local = get(launcher.local_size).filter(|local| local.trim() != world_size.to_string());
        if let Some(local) = local.filter(|_| launcher.is_torchrun()) {
            let c = launcher.local_size;
            // One host may have several agents.
            if by_hand.is_none() && !get("MASTER_ADDR").is_some_and(|address| is_here(&address)) {
                return Err(format!(
                    "{c} is {local} and {b} is {world_size}: all ranks of torchrun must be \
                     processes of one host; if they are, set MASTER_ADDR to localhost, or \
                     {RENDEZVOUS} to one name, on all of them; if each agent runs on a host of \
                     its own, set {}=agents on all of them, or start the ranks with mpirun or \
                     srun",
                    hosts::HOSTS
                ));
            }
        }
        let known = || match get(launcher.knows) {
            Some(_) => Known::By(launcher.name.into(), launcher.id(&get, &place)),
            None => Known::No,
        };
        let found = |name: String, source: String, known: Known| {
            let variable = launcher.rank;
            let place = place.clone();
            Ok(Launched { rank, world_size, name, source, known, variable, place })
        };
        if let Some(name) = given {
            return found(name, "set by Communicator::builder().rendezvous(..)".into(), known());
        }
        if let Some(name) = by_hand {
            return found(name, format!("set by {RENDEZVOUS}"), Known::ByName);
        }
        let (required, _) = launcher.job.split_at(launcher.required);
        if let Some(missing) = required.iter().find(|name| get(name).is_none()) {
            if world_size == 1 {
                // A single rank has no peer to find.
                let own = Process::own().map_or(0, |own| own.start);
                let name = format!(
                    "alone/{}.{own}/{}",
                    std::process::id(),
                    crate::world::processes::identity::ancestry::pid_namespace().unwrap_or(0)
                );
                return found(name, "made from its process".into(), Known::ByName);
            }
            return Err(format!(
                "{} is set, but neither {missing} nor {RENDEZVOUS}, which name the world: set one \
                    of them to the same value on every rank, {RENDEZVOUS} to a name that no other \
                    job on this host uses",
                launcher.rank
            ));
        }
        let there = launcher.job.iter().filter(|name| get(name).is_some());
        let source = format!("made from {}", there.copied().collect::<Vec<_>>().join(", "));
        found(launcher.id(&get, &place), source, known())
    }
}

impl Launcher {
    fn is_torchrun(&self) -> bool {
        self.rank == "RANK"
    }

    /// The job's name on this host. Agents of torchrun that are hosts may run on one machine.
    fn id(&self, get: &impl Fn(&str) -> Option<String>, place: &HostPlace) -> String {
        let mut job: Vec<String> = self.job.iter().filter_map(|name| get(name)).collect();
        let agent = place.host.filter(|_| self.is_torchrun() && place.hosts > 1);
        job.extend(agent.map(|agent| format!("agent {agent}")));
        job.join("/")
    }
}
