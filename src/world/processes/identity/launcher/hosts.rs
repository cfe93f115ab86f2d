//! Hosts that a launcher has started ranks on.

use super::Launcher;
use crate::world::HostPlace;

/// Variable that says what a host is for torchrun: with `agents`, each agent is one. Agents on one
/// machine need different names where `PARAM_AVERAGER_RENDEZVOUS` sets them.
pub(super) const HOSTS: &str = "PARAM_AVERAGER_HOSTS";
const AGENTS: &str = "agents";
/// torchrun's numbers of an agent and of all agents.
const GROUP_RANK: &str = "GROUP_RANK";
const GROUP_WORLD_SIZE: &str = "GROUP_WORLD_SIZE";
/// Number of a node of a Slurm step.
const NODE: &str = "SLURM_NODEID";

/// Variables that this file reads.
pub(super) const VARIABLES: [&str; 4] = [HOSTS, GROUP_RANK, GROUP_WORLD_SIZE, NODE];
/// Variables of jobs that have one value on all hosts. (An agent of torchrun counts its own
/// restarts.)
const OF_ALL_HOSTS: [&str; 4] =
    ["TORCHELASTIC_RUN_ID", "PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"];

impl Launcher {
    /// The hosts, with as many ranks each. An error if they have not as many. One host for
    /// torchrun, whose agents may all run on one, unless each is said to be a host.
    pub(super) fn place(
        &self,
        get: &impl Fn(&str) -> Option<String>,
        rank: usize,
        world_size: usize,
    ) -> Result<HostPlace, String> {
        let job = self.job.iter().filter(|name| OF_ALL_HOSTS.contains(name));
        let run = job.filter_map(|name| get(name)).collect::<Vec<_>>().join("/");
        let number = |name: &str| get(name).and_then(|value| value.trim().parse::<usize>().ok());
        if self.is_torchrun() {
            let Some(meant) = get(HOSTS) else { return Ok(HostPlace::default()) };
            if meant != AGENTS {
                return Err(format!(
                    "{HOSTS} is {meant:?}: set it to {AGENTS} if each agent of torchrun runs on a \
                     host of its own, or unset it"
                ));
            }
            let names = [GROUP_RANK, GROUP_WORLD_SIZE, self.local_rank, self.local_size];
            let [Some(host), Some(hosts), Some(local), Some(ranks)] = names.map(number) else {
                let shown = names.map(|name| format!("{name} is {:?}", get(name)));
                return Err(format!(
                    "{HOSTS} is {AGENTS}, and {}: torchrun sets them to whole numbers",
                    shown.join(", ")
                ));
            };
            let fits = hosts.checked_mul(ranks) == Some(world_size)
                && (host < hosts && local < ranks && rank == host * ranks + local);
            return fits.then_some(HostPlace { hosts, host: Some(host), run }).ok_or_else(|| {
                format!(
                    "{HOSTS} is {AGENTS}, and this is rank {rank} of {world_size}, rank {local} of \
                     {ranks} of agent {host} of {hosts}: all agents must have as many ranks \
                     (--nproc-per-node), numbered agent by agent; start as many on each host"
                )
            });
        }
        let Some(local) = get(self.local_size) else { return Ok(HostPlace::default()) };
        let Some(ranks) = equal_ranks(&local, world_size) else {
            return Err(format!(
                "{} is {local} and {} is {world_size}: all hosts must have as many ranks; start \
                 as many on each",
                self.local_size, self.world_size
            ));
        };
        let hosts = world_size / ranks;
        // mpirun does not number hosts, and one rank can't tell how it has placed the others: with
        // --map-by node, some of its ranks look as if they were placed host by host.
        let host = number(NODE).filter(|_| self.name == "Slurm");
        let host = if hosts == 1 { Some(0) } else { host.filter(|&host| host < hosts) };
        Ok(HostPlace { hosts, host, run })
    }
}

/// The number of ranks on each host, if it is the same on all: of a number, or of a list as Slurm
/// has it, such as "4(x2)" or "4,4", which adds up to `world_size`.
fn equal_ranks(list: &str, world_size: usize) -> Option<usize> {
    let (mut all, mut ranks, mut is_list) = (0usize, None, false);
    for part in list.trim().split(',') {
        let (number, times) = match part.split_once("(x") {
            Some((number, times)) => (number, times.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        let number: usize = number.trim().parse().ok().filter(|&number| number > 0)?;
        is_list |= times > 1 || ranks.is_some();
        if *ranks.get_or_insert(number) != number {
            return None;
        }
        all = number.checked_mul(times).and_then(|ranks| ranks.checked_add(all))?;
    }
    let ranks = ranks?;
    // Other launchers tell the ranks of this host alone.
    let fits = if is_list { all == world_size } else { world_size.is_multiple_of(ranks) };
    (fits && ranks <= world_size).then_some(ranks)
}
