//! Hosts on one machine: network namespaces on a bridge, each with a host name of its own, in which
//! mpirun, of Open MPI or MPICH, starts its ranks.

use std::fs;
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
    hosts: usize,
    name: String,
    agent: PathBuf,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("cannot run ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))),
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
    let tools = [(launcher(), "--version"), ("ip", "-V"), ("tc", "-V")];
    let lacks = tools.iter().find_map(|(program, version)| test_support::tool(program, &[version]));
    let trial = format!("pa-trial-{}", std::process::id());
    let namespaces = || {
        let made =
            ip(&format!("netns add {trial}")).and_then(|()| ip(&format!("netns del {trial}")));
        made.err().map(|error| format!("no network namespaces: {}", error.trim()))
    };
    lacks.or_else(namespaces)
}

impl Network {
    pub fn new(hosts: usize) -> Network {
        let name = format!("pa{}", std::process::id() % 100_000);
        let agent = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("agent-{name}"));
        let network = Network { hosts, name, agent };
        network.up().unwrap_or_else(|error| panic!("{error}"));
        network
    }

    fn up(&self) -> Result<(), String> {
        let name = &self.name;
        ip(&format!("link add {name} type bridge"))?;
        ip(&format!("addr add {NETWORK}.254/24 dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        for host in 0..self.hosts {
            let (space, own) = (self.space(host), self.outer(host));
            ip(&format!("netns add {space}"))?;
            ip(&format!("link add {own} type veth peer name eth0 netns {space}"))?;
            ip(&format!("link set {own} master {name}"))?;
            ip(&format!("link set {own} up"))?;
            ip(&format!("-n {space} addr add {}/24 dev eth0", address(host)))?;
            ip(&format!("-n {space} link set eth0 up"))?;
            ip(&format!("-n {space} link set lo up"))?;
        }
        // In the place of ssh: the first argument, behind an option of MPICH's, is the address of a
        // host.
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = -x ] && shift\nhost={name}-${{1##*.}}\nshift\n\
             exec ip netns exec $host unshare --uts sh -c \"hostname $host; $*\"\n"
        );
        fs::write(&self.agent, script).map_err(|error| error.to_string())?;
        let runs = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&self.agent, runs).map_err(|error| error.to_string())
    }

    fn space(&self, host: usize) -> String {
        format!("{}-{}", self.name, host + 1)
    }

    fn outer(&self, host: usize) -> String {
        format!("{}v{}", self.name, host + 1)
    }

    /// Limits the rate of what a host receives.
    pub fn slow(&self, host: usize, rate: &str) {
        let how = "burst 256kb latency 400ms";
        let line = format!("qdisc add dev {} root tbf rate {rate} {how}", self.outer(host));
        let output = Command::new("tc").args(line.split(' ')).output().expect("tc runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Cuts the link of a host.
    pub fn cut(&self, host: usize) {
        ip(&format!("link set {} down", self.outer(host))).unwrap();
    }

    /// Joins a link that was cut.
    pub fn mend(&self, host: usize) {
        ip(&format!("link set {} up", self.outer(host))).unwrap();
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
        let hosts: Vec<String> =
            (0..self.hosts).map(|host| format!("{}:{each}", address(host))).collect();
        let mut command = Command::new(launcher());
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if is_mpich() {
            // Or it finds that the hosts are one machine, and uses its memory.
            command.env("UCX_TLS", "tcp,self");
            command.args(["-launcher", "ssh", "-launcher-exec"]).arg(&self.agent);
            command.args(["-localhost", &format!("{NETWORK}.254"), "-hosts", &hosts.join(",")]);
            command.args(["-n", &(self.hosts * each).to_string()]).arg(program);
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
        for host in 0..self.hosts {
            let _ = ip(&format!("netns del {}", self.space(host)));
            let _ = ip(&format!("link del {}", self.outer(host)));
        }
        let _ = ip(&format!("link del {}", self.name));
        let _ = fs::remove_file(&self.agent);
    }
}

fn address(host: usize) -> String {
    format!("{NETWORK}.{}", host + 1)
}
