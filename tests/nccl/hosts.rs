//! Hosts that are groups of processes, with the variables of torchrun.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::OnceLock;

use test_support::process::{self, RankProcess};
use test_support::simulator;

/// A job of `hosts` agents with `ranks` ranks each.
pub struct Job {
    hosts: usize,
    ranks: usize,
    variables: Vec<(&'static str, String)>,
}

/// The stand-in for NCCL.
pub fn standin() -> &'static str {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libnccl-standin.so");
        test_support::shared_library("tests/nccl/standin.cpp".as_ref(), &library, &[]);
        library
    };
    LIBRARY.get_or_init(build).to_str().expect("a name in UTF-8")
}

/// The first of three free ports, below those that the system gives to anyone.
fn ports() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = std::process::id() * 61 + NEXT.fetch_add(1, Ordering::Relaxed);
        let first = 20_000 + (step % 4000) as u16 * 3;
        if (first..first + 3).all(|port| TcpListener::bind(("0.0.0.0", port)).is_ok()) {
            return first;
        }
    }
}

impl Job {
    pub fn new(hosts: usize, ranks: usize) -> Job {
        // Small devices: an averager takes as many channels as fit.
        let settings = [("CUDASIM_DEVICES", "2"), ("CUDASIM_SMS", "1")];
        let mut variables = simulator::environment(&settings).expect("simulated devices");
        variables.extend([
            ("MASTER_ADDR", "127.0.0.1".to_owned()),
            ("MASTER_PORT", ports().to_string()),
            ("TORCHELASTIC_RUN_ID", process::name()),
            ("TORCHELASTIC_RESTART_COUNT", "0".into()),
            ("PARAM_AVERAGER_HOSTS", "agents".into()),
            ("PARAM_AVERAGER_NCCL", standin().into()),
        ]);
        Job { hosts, ranks, variables }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Job {
        self.variables.push((name, value.into()));
        self
    }

    /// Variables of one rank of one host.
    pub fn variables(&self, host: usize, rank: usize) -> Vec<(&'static str, String)> {
        let Job { hosts, ranks, .. } = *self;
        let numbers = [
            ("RANK", host * ranks + rank),
            ("WORLD_SIZE", hosts * ranks),
            ("LOCAL_RANK", rank),
            ("LOCAL_WORLD_SIZE", ranks),
            ("GROUP_RANK", host),
            ("GROUP_WORLD_SIZE", hosts),
        ];
        let numbers = numbers.map(|(name, number)| (name, number.to_string()));
        [&self.variables[..], &numbers].concat()
    }

    /// Starts one rank.
    pub fn start_one(&self, role: &str, host: usize, rank: usize) -> RankProcess {
        process::start(role, &self.variables(host, rank))
    }

    /// Starts all ranks: by host, and by rank.
    pub fn start(&self, role: &str) -> Vec<RankProcess> {
        let each = |host| (0..self.ranks).map(move |rank| self.start_one(role, host, rank));
        (0..self.hosts).flat_map(each).collect()
    }
}
