//! Hosts on one machine: network namespaces on a bridge, with a link that can be slowed and cut.

use std::ffi::OsStr;
use std::process::Command;

use crate::Skip;

/// Some hosts, until dropped.
pub struct Network {
    hosts: usize,
    subnet: &'static str,
    name: String,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| format!("cannot run ip: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

impl Network {
    /// Skips where namespaces can't be made.
    pub fn missing() -> Skip {
        let tools = [("ip", "-V"), ("tc", "-V")];
        let lacks = tools.iter().find_map(|(program, version)| crate::tool(program, &[version]));
        let trial = format!("pa-trial-{}", std::process::id());
        let namespaces = || {
            let made =
                ip(&format!("netns add {trial}")).and_then(|()| ip(&format!("netns del {trial}")));
            made.err().map(|error| format!("no network namespaces: {}", error.trim()))
        };
        lacks.or_else(namespaces)
    }

    /// Hosts with addresses in a /24 of their own, such as `10.211.77`.
    pub fn new(hosts: usize, subnet: &'static str) -> Network {
        let name = format!("pa{}", std::process::id() % 100_000);
        let network = Network { hosts, subnet, name };
        network.up().unwrap_or_else(|error| panic!("{error}"));
        network
    }

    fn up(&self) -> Result<(), String> {
        let name = &self.name;
        ip(&format!("link add {name} type bridge"))?;
        ip(&format!("addr add {}/24 dev {name}", self.outside()))?;
        ip(&format!("link set {name} up"))?;
        for host in 0..self.hosts {
            let (space, own) = (self.space(host), self.outer(host));
            ip(&format!("netns add {space}"))?;
            ip(&format!("link add {own} type veth peer name eth0 netns {space}"))?;
            ip(&format!("link set {own} master {name}"))?;
            ip(&format!("link set {own} up"))?;
            ip(&format!("-n {space} addr add {}/24 dev eth0", self.address(host)))?;
            ip(&format!("-n {space} link set eth0 up"))?;
            ip(&format!("-n {space} link set lo up"))?;
        }
        Ok(())
    }

    /// A name that no other network has.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn hosts(&self) -> usize {
        self.hosts
    }

    /// Address of a host.
    pub fn address(&self, host: usize) -> String {
        format!("{}.{}", self.subnet, host + 1)
    }

    /// Address of this machine, outside of the namespaces.
    pub fn outside(&self) -> String {
        format!("{}.254", self.subnet)
    }

    /// Name of a host's namespace: the network's name, a dash, and the last number of its address.
    fn space(&self, host: usize) -> String {
        format!("{}-{}", self.name, host + 1)
    }

    fn outer(&self, host: usize) -> String {
        format!("{}v{}", self.name, host + 1)
    }

    /// Command that runs a program on a host.
    pub fn command(&self, host: usize, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.space(host)]).arg(program);
        command
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
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = ip(&format!("netns del {}", self.space(host)));
            let _ = ip(&format!("link del {}", self.outer(host)));
        }
        let _ = ip(&format!("link del {}", self.name));
    }
}
