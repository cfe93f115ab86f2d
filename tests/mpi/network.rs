//! Hosts in which mpirun, of Open MPI or MPICH, starts its ranks: network namespaces, each with a
//! host name of its own.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use test_support::Skip;

/// Variable that tells a rank its role.
pub const ROLE: &str = "PA_MPI_ROLE";
/// Addresses of the hosts, in a network of their own.
const NETWORK: &str = "10.211.77";

/// Some hosts, until dropped.
pub struct Network {
    network: test_support::network::Network,
    agent: PathBuf,
}

impl Deref for Network {
    type Target = test_support::network::Network;

    fn deref(&self) -> &Self::Target {
        &self.network
    }
}

/// True if this program is linked with MPICH, not Open MPI.
pub fn is_mpich() -> bool {
    mpi::environment::library_version().is_ok_and(|version| version.contains("MPICH"))
}

fn launcher() -> &'static str {
    match is_mpich() {
        true => "mpiexec.hydra",
        false => "mpirun",
    }
}

/// Skips where namespaces can't be made, or MPI is not there.
pub fn missing() -> Skip {
    let mpi = test_support::tool(launcher(), &["--version"]);
    mpi.or_else(test_support::network::Network::missing)
}

impl Network {
    pub fn new(hosts: usize) -> Network {
        let network = test_support::network::Network::new(hosts, NETWORK);
        let name = network.name();
        let agent = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("agent-{name}"));
        // In the place of ssh: the first argument, behind an option of MPICH's, is the address of a
        // host.
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = -x ] && shift\nhost={name}-${{1##*.}}\nshift\n\
             exec ip netns exec $host unshare --uts sh -c \"hostname $host; $*\"\n"
        );
        fs::write(&agent, script).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        Network { network, agent }
    }

    /// mpirun with these ranks on each host, in a role of this program.
    pub fn mpirun(&self, each: usize, role: &str) -> Command {
        self.mpirun_with(each, role, &[])
    }

    /// The same with more variables.
    pub fn mpirun_with(&self, each: usize, role: &str, more: &[(&str, String)]) -> Command {
        let program = std::env::current_exe().expect("this program");
        let role = (ROLE, role.to_owned());
        self.mpirun_of(each, &program, &[more, &[role]].concat())
    }

    /// The same of any program.
    pub fn mpirun_of(
        &self,
        each: usize,
        program: &Path,
        environment: &[(&str, String)],
    ) -> Command {
        let hosts: Vec<String> = (0..self.network.hosts())
            .map(|host| format!("{}:{each}", self.network.address(host)))
            .collect();
        let mut command = Command::new(launcher());
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if is_mpich() {
            // Or it finds that the hosts are one machine, and uses its memory.
            command.env("UCX_TLS", "tcp,self");
            command.args(["-launcher", "ssh", "-launcher-exec"]).arg(&self.agent);
            command.args(["-localhost", &self.network.outside(), "-hosts", &hosts.join(",")]);
            command.args(["-n", &(self.network.hosts() * each).to_string()]).arg(program);
            return command;
        }
        let network = format!("{NETWORK}.0/24");
        command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-H"]);
        command.arg(hosts.join(","));
        command.args(["--mca", "plm_rsh_agent"]).arg(&self.agent);
        for option in ["oob_tcp_if_include", "btl_tcp_if_include"] {
            command.args(["--mca", option, &network]);
        }
        for (name, _) in environment {
            command.args(["-x", name]);
        }
        command.arg(program);
        command
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.agent);
    }
}
