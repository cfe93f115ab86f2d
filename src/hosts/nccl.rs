//! Link between hosts over NCCL.

mod hello;
mod library;
mod store;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use self::hello::Hello;
use self::library::{Comm, Library, Parts, RawId};
use super::looks::Looks;
use super::{has_parts, Hosts, HostsError, HostsLimit};
use crate::backend::cuda::{Context, Staging};
use crate::backend::MemorySpace;
use crate::{Communicator, Error, Result};

/// Bytes of the buffers at first: those of an average's exchange of up to 256 hosts, and for each
/// host of more.
const BYTES: usize = 4 << 20;
const BYTES_OF_HOST: usize = 16 << 10;
/// Longest wait for NCCL to end what it sends, as a link is dropped.
const DRAIN: Duration = Duration::from_secs(10);

/// Link between hosts over NCCL, for ranks on CUDA devices: one communicator for each rank, with
/// the ranks of its number on all other hosts.
///
/// NCCL 2.27.3 or later is loaded when the first link is made: `libnccl.so.2`, `libnccl.so`, or the
/// file that `PARAM_AVERAGER_NCCL` names. It chooses the network by its own variables, such as
/// `NCCL_SOCKET_IFNAME`.
///
/// No call blocks: each wait has the limit of its caller, and NCCL's errors, such as that of a
/// closed connection, end it before. A link that has failed is ended by `ncclCommAbort`, on a
/// thread that nothing waits for, since that function may block; its buffers are not freed, since
/// NCCL may still use them.
///
/// Tested on simulated devices, with a stand-in for NCCL. No bytes have been sent by NCCL itself.
///
/// ```no_run
/// use param_averager::{Communicator, Device, NcclHosts};
///
/// // Started by torchrun on each host, with PARAM_AVERAGER_HOSTS=agents.
/// let rank: usize = std::env::var("LOCAL_RANK").expect("torchrun").parse().expect("a number");
/// let communicator = Communicator::from_env(Device::cuda(rank))?; // the ranks of this host
/// let link = NcclHosts::from_env(&communicator)?;
/// # Ok::<(), param_averager::Error>(())
/// ```
pub struct NcclHosts {
    host: usize,
    hosts: usize,
    /// Absent if the link has ended.
    open: Option<Open>,
}

struct Open {
    comm: Comm,
    staging: Staging,
}

/// Identity of a link, which its ranks on all hosts share: one for each rank's number.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NcclId(RawId);

impl NcclId {
    /// Number of bytes of an id.
    pub const BYTES: usize = size_of::<RawId>();

    /// New id, for the ranks of one number. They reach this process by it: it has to live until all
    /// have made their links.
    ///
    /// # Errors
    /// [`Error::Environment`] if NCCL can't be loaded, finds no network, or is told to block by
    /// `NCCL_COMM_BLOCKING`, or to share one address by `NCCL_COMM_ID`.
    pub fn new() -> Result<NcclId> {
        let wrong = |problem| Error::Environment { problem };
        Library::get().and_then(Library::unique_id).map(NcclId).map_err(wrong)
    }

    /// Id of these bytes, of [`to_bytes`](Self::to_bytes) on another host.
    pub fn from_bytes(bytes: [u8; NcclId::BYTES]) -> NcclId {
        NcclId(bytes)
    }

    /// Its bytes, to be sent to other hosts.
    pub fn to_bytes(self) -> [u8; NcclId::BYTES] {
        self.0
    }
}

impl fmt::Debug for NcclId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NcclId({:016x})", crate::hash::Digest::of(&self.0))
    }
}

impl NcclHosts {
    /// Link of this rank, on a host that the launcher has numbered: [`Communicator::host`] of
    /// [`Communicator::hosts`].
    ///
    /// Host 0's rank makes an id, and those of its number on other hosts fetch it by TCP, from
    /// `MASTER_ADDR`, at the port of `PARAM_AVERAGER_HOSTS_PORT` (default: `MASTER_PORT` + 1) plus
    /// the rank. Both show the number of hosts, of ranks, their own and the launcher's name of the
    /// job. Connections are not encrypted, and any process that reaches the port and names the job
    /// is served: use a network of the cluster's own. Collective over the ranks of this number on
    /// all hosts: waits for them as long as [`Communicator::from_env`] waits for the ranks of this
    /// host, by default 10 minutes.
    ///
    /// # Errors
    /// [`Error::Environment`] if a variable is missing, if NCCL can't be loaded, if
    /// `NCCL_COMM_BLOCKING=1` or `NCCL_COMM_ID` is set, or for a rank on a CPU;
    /// [`Error::HostLost`] if hosts differ, if one does not come, or if NCCL fails.
    pub fn from_env(communicator: &Communicator) -> Result<NcclHosts> {
        let wrong = |problem| Error::Environment { problem };
        let lost = |error: HostsError| lost(communicator, error);
        let context = device(communicator)?;
        let Some(host) = communicator.host() else {
            return Err(wrong(
                "the launcher does not number this host (mpirun numbers none): pass the number to \
                 NcclHosts::new, or start the ranks by srun or torchrun"
                    .into(),
            ));
        };
        let hello = Hello::new(communicator, host, communicator.hosts());
        let limit = HostsLimit::new(communicator.timeout(), &|| false);
        let place = || {
            let place = store::Place::find(|name| std::env::var(name).ok(), hello.rank);
            place.map_err(wrong)
        };
        let id = match (hello.hosts, host) {
            (1, _) => NcclId::new()?,
            (_, 0) => {
                let listener = place()?.listen().map_err(wrong)?;
                let id = Library::get().and_then(Library::unique_id);
                // The others are told, too, if there is none.
                let served = store::serve(listener, &hello, id.as_ref(), &limit);
                let id = id.map_err(wrong)?;
                served.map_err(lost)?;
                NcclId(id)
            }
            _ => {
                Library::get().map_err(wrong)?; // before this host waits
                NcclId(place()?.ask(&hello, &limit).map_err(lost)?)
            }
        };
        NcclHosts::meet(&context, &hello, id, &limit).map_err(lost)
    }

    /// Link of this rank, on host `host` of `hosts`, with an `id` that a rank of the same number on
    /// some host has made by [`NcclId::new`]: for programs that send it by MPI or through a file.
    /// Collective as [`from_env`](Self::from_env).
    ///
    /// # Errors
    /// As of `from_env`.
    pub fn new(
        communicator: &Communicator,
        host: usize,
        hosts: usize,
        id: NcclId,
    ) -> Result<NcclHosts> {
        let context = device(communicator)?;
        if host >= hosts {
            let problem = format!("host {host} of {hosts}: hosts are numbered from 0");
            return Err(Error::Environment { problem });
        }
        Library::get().map_err(|problem| Error::Environment { problem })?;
        let hello = Hello::new(communicator, host, hosts);
        let limit = HostsLimit::new(communicator.timeout(), &|| false);
        NcclHosts::meet(&context, &hello, id, &limit).map_err(|error| lost(communicator, error))
    }

    /// Meets the other hosts, and compares what they show. This first exchange also opens NCCL's
    /// connections, and all memory is allocated here: an allocation may wait for the device, which
    /// no average has to do.
    fn meet(
        context: &Arc<Context>,
        hello: &Hello,
        id: NcclId,
        limit: &HostsLimit<'_>,
    ) -> Result<NcclHosts, HostsError> {
        let (host, hosts) = (hello.host, hello.hosts);
        let staging = Staging::new(context, BYTES.max(BYTES_OF_HOST.saturating_mul(hosts)))
            .map_err(failed)?;
        let comm = Comm::meet(context, id.0, hosts, host).map_err(failed)?;
        let mut link = NcclHosts { host, hosts, open: Some(Open { comm, staging }) };
        let mut all = vec![0; Hello::BYTES * hosts];
        let met = link.open()?.wait(limit, |open| open.comm.is_ready());
        met.inspect_err(|_| link.abort())?;
        link.all_gather(&hello.bytes(), &mut all, limit)?;
        for (other, shown) in all.chunks(Hello::BYTES).enumerate() {
            if let Some(differs) = Hello::compare(shown, hello) {
                link.abort();
                return Err(HostsError::new(Some(other), format!("host {other} {differs}")));
            }
        }
        Ok(link)
    }

    fn open(&mut self) -> Result<&mut Open, HostsError> {
        self.open.as_mut().ok_or_else(|| failed("the link has ended"))
    }

    /// Sends each other host a part of `send`, `step` bytes from one to the next, and receives
    /// theirs.
    fn exchange(
        &mut self,
        send: &[u8],
        step: usize,
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let (host, hosts, part) = (self.host, self.hosts, receive.len() / self.hosts);
        receive[host * part..][..part].copy_from_slice(&send[host * step..][..part]);
        let open = self.open()?;
        if part == 0 || hosts == 1 {
            return Ok(());
        }
        if let Err(error) = open.exchange(send, step, host, hosts, receive.len(), limit) {
            self.abort();
            return Err(error);
        }
        let received = open.staging.received();
        let others = (0..receive.len()).step_by(part).filter(|&at| at != host * part);
        others.for_each(|at| receive[at..at + part].copy_from_slice(&received[at..at + part]));
        Ok(())
    }
}

impl Open {
    /// See `NcclHosts::exchange`. `bytes` are received; an error leaves work behind.
    fn exchange(
        &mut self,
        send: &[u8],
        step: usize,
        host: usize,
        hosts: usize,
        bytes: usize,
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let staging = &mut self.staging;
        staging.grow_idle(bytes.max(send.len())).map_err(failed)?;
        staging.upload(send).map_err(failed)?;
        let ((send, receive), stream) = (staging.addresses(), staging.stream());
        let (rank, ranks, part) = (host, hosts, bytes / hosts);
        let parts = Parts { rank, ranks, send, receive, bytes: part, step, stream };
        // SAFETY: the buffers have a part for each host. They are freed when this exchange has
        // ended, or never.
        unsafe { self.comm.exchange(&parts) }.map_err(failed)?;
        // NCCL enqueues until it is ready.
        self.wait(limit, |open| open.comm.is_ready())?;
        self.staging.download(bytes).map_err(failed)?;
        self.wait(limit, |open| {
            let ready = open.comm.is_ready();
            // The stream goes on when all bytes are there: an error is that of the next call then.
            if open.staging.is_downloaded()? {
                return Ok(true);
            }
            ready.map(|_| false)
        })
    }

    /// Waits until `is_done`, within the limit.
    fn wait(
        &mut self,
        limit: &HostsLimit<'_>,
        is_done: impl Fn(&Open) -> Result<bool, String>,
    ) -> Result<(), HostsError> {
        let mut looks = Looks::default();
        while !is_done(self).map_err(failed)? {
            limit.check()?;
            looks.pause();
        }
        Ok(())
    }
}

impl Hosts for NcclHosts {
    fn hosts(&self) -> usize {
        self.hosts
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
        has_parts(send.len() == receive.len() && send.len().is_multiple_of(self.hosts))?;
        self.exchange(send, send.len() / self.hosts, receive, limit)
    }

    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        has_parts(send.len() * self.hosts == receive.len())?;
        self.exchange(send, 0, receive, limit)
    }

    /// Ends the link by `ncclCommAbort`, which closes its connections: other hosts' calls end with
    /// an error as soon as NCCL sees that.
    fn abort(&mut self) {
        if let Some(Open { comm, staging }) = self.open.take() {
            std::mem::forget(staging); // NCCL's kernel may still use it
            comm.abort();
        }
    }
}

impl Drop for NcclHosts {
    /// Waits, for 10 seconds at most, until NCCL has sent what other hosts still wait for.
    fn drop(&mut self) {
        let Some(open) = &mut self.open else { return };
        let limit = HostsLimit::new(DRAIN, &|| false);
        let finalized = open.comm.finalize().map_err(failed);
        let drained = finalized.and_then(|()| open.wait(&limit, |open| open.comm.is_ready()));
        match self.open.take_if(|_| drained.is_ok()) {
            Some(open) => open.comm.destroy(),
            None => self.abort(),
        }
    }
}

impl fmt::Debug for NcclHosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.open.is_some() { "" } else { ", ended" };
        write!(f, "NcclHosts(host {} of {}{state})", self.host, self.hosts)
    }
}

fn failed(reason: impl Into<String>) -> HostsError {
    HostsError::new(None, reason)
}

fn lost(communicator: &Communicator, error: HostsError) -> Error {
    Error::HostLost { rank: communicator.rank(), host: error.host, reason: error.reason }
}

/// The device of a rank.
fn device(communicator: &Communicator) -> Result<Arc<Context>> {
    match communicator.space() {
        MemorySpace::Cuda(context) => Ok(context.clone()),
        MemorySpace::Host => Err(Error::Environment {
            problem: format!(
                "rank {} is on a CPU, and NCCL sends from CUDA devices: make its communicator with \
                 Device::cuda, or use another link, such as MpiHosts",
                communicator.rank()
            ),
        }),
    }
}
