//! Averages of ranks on devices, over the link.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use test_support::network::Network;
use test_support::output_within;

use crate::hosts::Job;

pub fn ranks_of_two_hosts_average_as_one_world() {
    let mut ranks = Job::new(2, 2).with("PA_NCCL_ROUNDS", "4").start("averages");
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1);
    }
}

/// The other host goes on alone.
pub fn a_killed_host_changes_no_tensor() {
    let mut ranks = Job::new(2, 2).start("averages");
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[2..].iter().for_each(|rank| rank.signal(Signal::KILL));
    for rank in &mut ranks[..2] {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        assert_eq!((rank.said("unchanged").len(), rank.said("alone").len()), (1, 1));
        let error = &rank.said("error")[0];
        assert!(error.contains("link between hosts"), "{error}");
    }
}

/// As torchrun starts it, which is not here: two agents, in network namespaces.
pub fn the_example_averages_in_two_namespaces() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "-p", "param-averager", "--features", "nccl"]);
    cargo.args(["--example", "hosts_nccl"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success(), "the example does not build");
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples/hosts_nccl");
    let network = Network::new(2, "10.211.78");
    let job = Job::new(2, 2).with("MASTER_ADDR", network.address(0));
    let start = |host, rank| {
        let mut command = network.command(host, &program);
        command.envs(job.variables(host, rank));
        command.env("STANDIN_NCCL_ADDRESS", network.address(host));
        command
    };
    std::thread::scope(|scope| {
        let numbers = [(0, 0), (0, 1), (1, 0), (1, 1)];
        let run = |(host, rank)| {
            let command = start(host, rank);
            scope.spawn(move || output_within(command, Duration::from_secs(120)))
        };
        for ((host, rank), thread) in numbers.into_iter().zip(numbers.map(run)) {
            let ended = thread.join().unwrap();
            let line = format!("rank {rank} of 2, host {host} of 2: 1.5"); // the mean of 0 to 3
            assert!(ended.code == Some(0) && ended.said.contains(&line), "{}", ended.said);
        }
    });
}
