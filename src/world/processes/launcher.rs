//! Who this process is, as launchers tell it through the environment.

/// What the environment says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Launched {
    pub(super) rank: usize,
    pub(super) world_size: usize,
    /// Names the world among those of this host.
    pub(super) name: String,
}

/// A launcher's variables for rank, world size, and how many of the ranks are on this host, if it says.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world_size: &'static str,
    local_size: &'static str,
    /// Variables that, taken together, no two jobs of one host have the same. The first must be there.
    job: &'static [&'static str],
}

/// What a user sets to name the world by hand, for any launcher.
pub(super) const RENDEZVOUS: &str = "PARAM_AVERAGER_RENDEZVOUS";

/// Not a variable: the number of the process that started this one.
pub(super) const PARENT: &str = "the parent process";

/// In this order: a launcher inside of another's job is the one that is meant.
const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        name: "torchrun",
        rank: "RANK",
        world_size: "WORLD_SIZE",
        local_size: "LOCAL_WORLD_SIZE",
        job: &["MASTER_PORT", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"],
    },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world_size: "OMPI_COMM_WORLD_SIZE",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        job: &["PMIX_NAMESPACE"],
    },
    Launcher {
        name: "MPICH",
        rank: "PMI_RANK",
        world_size: "PMI_SIZE",
        local_size: "MPI_LOCALNRANKS",
        job: &[PARENT], // it gives jobs no name, but starts all ranks of a host from one process
    },
    Launcher {
        name: "Slurm",
        rank: "SLURM_PROCID",
        world_size: "SLURM_STEP_NUM_TASKS",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"],
    },
];

impl Launcher {
    /// The one that has set the rank of this process, if there is one.
    fn find(get: &impl Fn(&str) -> Option<String>) -> Option<&'static Launcher> {
        // srun sets PMI_RANK, too, for programs that talk to its own PMI.
        let is_slurm = get("SLURM_PROCID").is_some() && get("MPI_LOCALNRANKS").is_none();
        let is_meant =
            |launcher: &&Launcher| get(launcher.rank).is_some() && !(is_slurm && launcher.rank == "PMI_RANK");
        LAUNCHERS.iter().find(is_meant)
    }
}

impl Launched {
    /// Whether a launcher has set the rank of this process, be the rest right or wrong.
    pub(super) fn is_there(get: impl Fn(&str) -> Option<String>) -> bool {
        Launcher::find(&get).is_some()
    }

    /// From the variables that `get` knows, `PARENT` among them, or what is wrong with them and what to do.
    pub(super) fn find(get: impl Fn(&str) -> Option<String>) -> Result<Launched, String> {
        let Some(launcher) = Launcher::find(&get) else {
            let names: Vec<_> = LAUNCHERS.iter().map(|l| format!("{} ({})", l.rank, l.name)).collect();
            let names = names.join(", ");
            return Err(format!(
                "no launcher has set the rank of this process: none of {names} is there; start it with torchrun --no-python, \
                 mpirun or srun, set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself, or use World::builder()"
            ));
        };
        let number = |name: &str| -> Result<usize, String> {
            let by = launcher.name;
            let value = get(name).ok_or_else(|| {
                format!(
                    "{} is set, but {name} is not: {by} sets both for the ranks that it starts",
                    launcher.rank
                )
            })?;
            value.trim().parse().map_err(|_| format!("{name} is {value:?}, which is no number from 0"))
        };
        let (rank, world_size) = (number(launcher.rank)?, number(launcher.world_size)?);
        if rank >= world_size {
            let (a, b) = (launcher.rank, launcher.world_size);
            return Err(format!("{a} is {rank} and {b} is {world_size}: ranks are 0 to {b} - 1"));
        }
        // Slurm writes "4", "4(x2)" or "4,2".
        if let Some(local) = get(launcher.local_size) {
            if local.trim() != world_size.to_string() {
                let (a, b) = (launcher.local_size, launcher.world_size);
                return Err(format!(
                    "{a} is {local} and {b} is {world_size}: all ranks must be processes of one host"
                ));
            }
        }
        if let Some(name) = get(RENDEZVOUS) {
            if name.is_empty() {
                return Err(format!(
                    "{RENDEZVOUS} is empty: unset it, or give every rank of this world the same name"
                ));
            }
            return Ok(Launched { rank, world_size, name });
        }
        if get(launcher.job[0]).is_none() {
            return Err(format!(
                "{} is set, but neither {} nor {RENDEZVOUS} is, by which ranks find one another: set one of them to the \
                 same on every rank, {RENDEZVOUS} to any name that no other job on this host has",
                launcher.rank, launcher.job[0]
            ));
        }
        let job: Vec<String> = launcher.job.iter().filter_map(|name| get(name)).collect();
        Ok(Launched { rank, world_size, name: job.join("/") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &[(&str, &str)]) -> Result<Launched, String> {
        let get = |name: &str| variables.iter().find(|(other, _)| *other == name).map(|(_, v)| v.to_string());
        Launched::find(get)
    }

    #[test]
    fn launchers_are_understood() {
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "3"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
        ];
        let found = find(&torchrun).unwrap();
        assert_eq!((found.rank, found.world_size), (3, 4));
        assert_eq!(found.name, "29500/localhost/none/0");
        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "1234"),
        ];
        assert_eq!(find(&mpirun).unwrap(), Launched { rank: 1, world_size: 2, name: "1234".into() });
        let mpich = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2"), (PARENT, "77")];
        assert_eq!(find(&mpich).unwrap().name, "77");
        let mpich = [mpich[0], mpich[1], (RENDEZVOUS, "a job")];
        assert_eq!(find(&mpich).unwrap().name, "a job");
        let slurm = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "2"),
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "0"),
        ];
        assert_eq!(find(&slurm).unwrap().name, "77/0");
        let pmi2 = [&slurm[..], &[("PMI_RANK", "0"), ("PMI_SIZE", "2")]].concat();
        assert_eq!(find(&pmi2).unwrap().name, "77/0");
    }

    #[test]
    fn what_is_missing_or_contradictory_is_named() {
        let error = |variables: &[(&str, &str)]| find(variables).unwrap_err();
        assert!(error(&[]).contains("RANK (torchrun)"));
        let is_there =
            |names: &[&str]| Launched::is_there(|name| names.contains(&name).then(|| "x".to_owned()));
        assert!(
            !is_there(&[]) && !is_there(&["WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", RENDEZVOUS, PARENT])
        );
        assert!(["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"]
            .iter()
            .all(|rank| is_there(&[rank])));
        assert!(error(&[("RANK", "0")]).contains("RANK is set, but WORLD_SIZE is not"));
        assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "two")]).contains("WORLD_SIZE is \"two\""));
        assert!(error(&[("RANK", "2"), ("WORLD_SIZE", "2")]).contains("RANK is 2 and WORLD_SIZE is 2"));
        let two_hosts = [("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_PORT", "1")];
        assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "2"), (RENDEZVOUS, "")]).contains("is empty"));
        assert!(error(&two_hosts).contains("LOCAL_WORLD_SIZE is 2 and WORLD_SIZE is 4"));
        assert!(
            error(&[("RANK", "0"), ("WORLD_SIZE", "2")]).contains("neither MASTER_PORT nor PARAM_AVERAGER")
        );
        let slurm =
            [("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_STEP_TASKS_PER_NODE", "2(x2)")];
        assert!(error(&slurm).contains("2(x2)"));
    }
}
