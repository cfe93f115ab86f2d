//! Link between "hosts" that are worlds of threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::{Hosts, HostsError, HostsLimit};
use crate::sync::{lock, wait_timeout};

/// Link between worlds of threads in one process, each of which stands for a host: for tests of a
/// program that runs on several hosts.
///
/// ```
/// use param_averager::{Communicator, Device, Hierarchy, ParamAverager, Result, ThreadHosts};
///
/// fn average(number: usize, communicator: Communicator, link: ThreadHosts) -> Result<Vec<f32>> {
///     let mut model = vec![0.0; 1000];
///     let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
///     let mut averager = builder.build(&mut model)?;
///     model.fill(number as f32);
///     averager.average(&mut model)?;
///     Ok(model)
/// }
///
/// let hosts = ThreadHosts::new(2, 2); // 2 hosts with 2 ranks
/// std::thread::scope(|scope| {
///     let mut ranks = vec![];
///     for (host, links) in hosts.into_iter().enumerate() {
///         let world = Communicator::from_devices(&[Device::cpu(); 2])?;
///         for (communicator, link) in world.into_iter().zip(links) {
///             let number = 2 * host + communicator.rank();
///             ranks.push(scope.spawn(move || average(number, communicator, link)));
///         }
///     }
///     for rank in ranks {
///         assert_eq!(rank.join().unwrap()?, [1.5; 1000]); // (0 + 1 + 2 + 3) / 4
///     }
///     Ok::<_, param_averager::Error>(())
/// })?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Debug)]
pub struct ThreadHosts {
    host: usize,
    group: Arc<Group>,
}

/// The ranks of one number on all hosts.
#[derive(Debug)]
struct Group {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Bytes of each host in the current call, until all have read them.
    sent: Vec<Option<Vec<u8>>>,
    /// Hosts that have read.
    read: Vec<bool>,
    left: Option<usize>,
}

impl ThreadHosts {
    /// Links of `hosts` hosts with `ranks` ranks each: by host, and by rank.
    pub fn new(hosts: usize, ranks: usize) -> Vec<Vec<ThreadHosts>> {
        let state = || State { sent: vec![None; hosts], read: vec![false; hosts], left: None };
        let group = |_| Arc::new(Group { state: Mutex::new(state()), changed: Condvar::new() });
        let groups: Vec<_> = (0..ranks).map(group).collect();
        let of = |host| {
            let link = |group: &Arc<Group>| ThreadHosts { host, group: group.clone() };
            groups.iter().map(link).collect()
        };
        (0..hosts).map(of).collect()
    }

    /// Shows `send` to all hosts, and `receive` what all have sent.
    fn exchange(
        &mut self,
        send: &[u8],
        limit: &HostsLimit<'_>,
        mut receive: impl FnMut(usize, &[u8]),
    ) -> Result<(), HostsError> {
        let group = self.group.clone();
        let mut state = lock(&group.state);
        // The call before may still have readers.
        state = group.wait(state, limit, |state| state.sent[self.host].is_some())?;
        state.sent[self.host] = Some(send.to_vec());
        group.changed.notify_all();
        state = group.wait(state, limit, |state| state.sent.iter().any(Option::is_none))?;
        for (host, sent) in state.sent.iter().enumerate() {
            let sent = sent.as_deref().unwrap_or_default();
            if sent.len() != send.len() {
                let reason = format!("host {host} sends {} bytes, not {}", sent.len(), send.len());
                return Err(HostsError::new(Some(host), reason));
            }
            receive(host, sent);
        }
        state.read[self.host] = true;
        if state.read.iter().all(|&read| read) {
            state.read.fill(false);
            state.sent.fill(None);
            group.changed.notify_all();
        }
        Ok(())
    }
}

impl Group {
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        limit: &HostsLimit<'_>,
        lasts: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, HostsError> {
        /// Time between two looks at the limit.
        const LOOK: Duration = Duration::from_millis(5);
        loop {
            // A host may leave as soon as it has read, before others have.
            if !lasts(&state) {
                return Ok(state);
            }
            if let Some(host) = state.left {
                return Err(HostsError::new(Some(host), "it has left the link between hosts"));
            }
            limit.check().map_err(|error| HostsError {
                host: state.sent.iter().position(Option::is_none),
                ..error
            })?;
            state = wait_timeout(&self.changed, state, LOOK);
        }
    }

    fn leave(&self, host: usize) {
        lock(&self.state).left.get_or_insert(host);
        self.changed.notify_all();
    }
}

impl Hosts for ThreadHosts {
    fn hosts(&self) -> usize {
        lock(&self.group.state).sent.len()
    }

    fn host(&self) -> usize {
        self.host
    }

    fn all_to_all(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let part = send.len() / self.hosts();
        let own = self.host * part..(self.host + 1) * part;
        self.exchange(send, limit, |host, sent| {
            receive[host * part..][..part].copy_from_slice(&sent[own.clone()]);
        })
    }

    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        self.exchange(send, limit, |host, sent| {
            receive[host * send.len()..][..send.len()].copy_from_slice(sent);
        })
    }

    fn abort(&mut self) {
        self.group.leave(self.host);
    }
}

impl Drop for ThreadHosts {
    fn drop(&mut self) {
        self.group.leave(self.host);
    }
}
