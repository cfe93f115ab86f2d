//! Place of a rank among the hosts of its job.

/// The hosts that a launcher has started ranks on, as one rank knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPlace {
    /// Number of hosts with as many ranks each.
    pub(crate) hosts: usize,
    /// Number of this host, if the launcher tells it.
    pub(crate) host: Option<usize>,
    /// Launcher's name of the job, the same on all hosts. Empty if it has none.
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    pub(crate) run: String,
}

impl Default for HostPlace {
    fn default() -> HostPlace {
        HostPlace { hosts: 1, host: Some(0), run: String::new() }
    }
}
