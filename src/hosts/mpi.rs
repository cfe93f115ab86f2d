//! Link between hosts over MPI.

use std::os::raw::{c_int, c_void};
use std::sync::Mutex;

use ::mpi::environment::{is_finalized, is_initialized, threading_support};
use ::mpi::ffi;
use ::mpi::Threading;

use super::looks::Looks;
use super::{has_parts, Hosts, HostsError, HostsLimit};
use crate::sync::lock;
use crate::{Communicator, Error, Result};

/// Link between hosts over MPI, by the crate `mpi`.
///
/// The program initialises MPI before and finalises it after all averagers, on its main thread, on
/// which all averages are made then (`MPI_THREAD_FUNNELED`), or with `Threading::Serialized` or
/// `Multiple`. Hosts are what MPI calls shared-memory domains. Each has the same number of ranks.
///
/// A call that is late ends with an error, and its memory stays with MPI: no further call is made.
/// Then end the program by [`std::process::exit`], without finalising MPI, which would wait for the
/// other hosts.
///
/// ```no_run
/// use mpi::Threading;
/// use param_averager::{Communicator, Device, Hierarchy, MpiHosts, ParamAverager};
///
/// let (_universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
/// let communicator = Communicator::from_env(Device::cpu())?; // the ranks of this host
/// let link = MpiHosts::new(&communicator)?;
/// let mut model = vec![vec![0.0f32; 1000]];
/// let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
/// let mut averager = builder.build(&mut model)?;
/// if let Err(error) = averager.average(&mut model) { // over all ranks of all hosts
///     eprintln!("{error}");
///     std::process::exit(1);
/// }
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Debug)]
pub struct MpiHosts {
    /// The ranks of this number on all hosts, by host.
    group: ffi::MPI_Comm,
    hosts: usize,
    host: usize,
    /// Buffers of calls: MPI keeps them if a call is late.
    send: Vec<u8>,
    receive: Vec<u8>,
}

// SAFETY: a communicator of MPI may be used by any thread that MPI's level of thread support
// allows, which `check_thread` compares before every call.
unsafe impl Send for MpiHosts {}

/// Lock of calls of MPI, of which `Threading::Serialized` allows one at a time.
static ONE: Mutex<()> = Mutex::new(());

impl MpiHosts {
    /// Link of this rank. Collective over all ranks of all hosts (`MPI_COMM_WORLD`).
    ///
    /// # Errors
    /// [`Error::Environment`] if MPI is not initialised, or counts other ranks on this host than
    /// `communicator` has; [`Error::HostLost`] if MPI fails.
    pub fn new(communicator: &Communicator) -> Result<MpiHosts> {
        let wrong = |problem: String| Error::Environment { problem };
        if !is_initialized() || is_finalized() {
            return Err(wrong(
                "MPI is not initialised: call mpi::initialize_with_threading first, and keep the \
                 universe that it returns"
                    .into(),
            ));
        }
        let failed = |error: HostsError| Error::HostLost {
            rank: communicator.rank(),
            host: None,
            reason: error.reason,
        };
        check_thread().map_err(failed)?;
        let mut hosts = MpiHosts {
            // SAFETY: MPI is initialised, here and below.
            group: unsafe { ffi::RSMPI_COMM_NULL },
            hosts: 0,
            host: 0,
            send: vec![],
            receive: vec![],
        };
        // SAFETY: as above.
        let all = unsafe { ffi::RSMPI_COMM_WORLD };
        // SAFETY: as above.
        let kind = unsafe { ffi::RSMPI_COMM_TYPE_SHARED };
        let mut local = Owned::none();
        // SAFETY: as above; the arguments live as long as the calls, here and below.
        checked("MPI_Comm_split_type", unsafe {
            ffi::MPI_Comm_split_type(all, kind, 0, ffi::RSMPI_INFO_NULL, &mut local.0)
        })
        .map_err(failed)?;
        let (world_rank, _) = rank_and_size(all).map_err(failed)?;
        let (rank, size) = rank_and_size(local.0).map_err(failed)?;
        // Hosts are numbered by the rank of their first process, which all their ranks learn.
        let mut first = world_rank;
        // SAFETY: as above.
        checked("MPI_Bcast", unsafe {
            ffi::MPI_Bcast((&raw mut first).cast(), 1, ffi::RSMPI_INT32_T, 0, local.0)
        })
        .map_err(failed)?;
        // SAFETY: as above.
        checked("MPI_Comm_split", unsafe {
            ffi::MPI_Comm_split(all, rank, first, &mut hosts.group)
        })
        .map_err(failed)?;
        // SAFETY: as above.
        checked("MPI_Comm_set_errhandler", unsafe {
            ffi::MPI_Comm_set_errhandler(hosts.group, ffi::RSMPI_ERRORS_RETURN)
        })
        .map_err(failed)?;
        let (host, count) = rank_and_size(hosts.group).map_err(failed)?;
        (hosts.host, hosts.hosts) = (host as usize, count as usize);
        // Checked behind the collective calls, which all ranks make.
        if (rank as usize, size as usize) != (communicator.rank(), communicator.world_size()) {
            return Err(wrong(format!(
                "this process is rank {} of {} on its host, and rank {rank} of {size} for MPI: \
                 make the communicator by Communicator::from_env, in a program that mpirun has \
                 started",
                communicator.rank(),
                communicator.world_size()
            )));
        }
        Ok(hosts)
    }

    /// Makes a call of MPI, and waits for it.
    fn wait(
        &mut self,
        name: &str,
        limit: &HostsLimit<'_>,
        start: impl FnOnce(&mut Self, &mut ffi::MPI_Request) -> c_int,
    ) -> Result<(), HostsError> {
        check_thread()?;
        // SAFETY: MPI is initialised, as `check_thread` has found.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        let started = {
            let _one = lock(&ONE);
            start(self, &mut request)
        };
        let mut made = checked(name, started);
        let (mut looks, mut done) = (Looks::default(), 0);
        while made.is_ok() && done == 0 {
            let code = {
                let _one = lock(&ONE);
                // SAFETY: as above.
                unsafe { ffi::MPI_Test(&mut request, &mut done, ffi::RSMPI_STATUS_IGNORE) }
            };
            made = checked(name, code);
            if made.is_ok() && done == 0 {
                made = limit.check();
            }
            looks.pause();
        }
        if made.is_err() {
            // MPI may still use them: a collective call can't be cancelled.
            std::mem::forget(std::mem::take(&mut self.send));
            std::mem::forget(std::mem::take(&mut self.receive));
        }
        made
    }
}

impl Hosts for MpiHosts {
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
        let part = count(send.len() / self.hosts)?;
        has_parts(send.len() == receive.len() && send.len().is_multiple_of(self.hosts))?;
        fill(&mut self.send, send);
        zeros(&mut self.receive, receive.len());
        self.wait("MPI_Ialltoall", limit, |own, request| {
            let bytes = own.buffers();
            // SAFETY: the buffers have a part for each host, and `wait` keeps them until MPI has
            // ended the call.
            unsafe {
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Ialltoall(bytes.0, part, byte, bytes.1, part, byte, own.group, request)
            }
        })?;
        receive.copy_from_slice(&self.receive);
        Ok(())
    }

    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let part = count(send.len())?;
        has_parts(send.len() * self.hosts == receive.len())?;
        fill(&mut self.send, send);
        zeros(&mut self.receive, receive.len());
        self.wait("MPI_Iallgather", limit, |own, request| {
            let bytes = own.buffers();
            // SAFETY: as above.
            unsafe {
                let byte = ffi::RSMPI_UINT8_T;
                ffi::MPI_Iallgather(bytes.0, part, byte, bytes.1, part, byte, own.group, request)
            }
        })?;
        receive.copy_from_slice(&self.receive);
        Ok(())
    }

    /// Does nothing: MPI has no word for it that leaves the other ranks alive. They wait until
    /// their deadline, or until mpirun ends them, as it does when a rank has died.
    fn abort(&mut self) {}
}

impl MpiHosts {
    fn buffers(&mut self) -> (*const c_void, *mut c_void) {
        (self.send.as_ptr().cast(), self.receive.as_mut_ptr().cast())
    }
}

/// A communicator that is freed when it is dropped.
struct Owned(ffi::MPI_Comm);

impl Owned {
    fn none() -> Owned {
        // SAFETY: a constant.
        Owned(unsafe { ffi::RSMPI_COMM_NULL })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: MPI is initialised, and nothing else uses the communicator.
        unsafe {
            if self.0 != ffi::RSMPI_COMM_NULL {
                ffi::MPI_Comm_free(&mut self.0);
            }
        }
    }
}

fn fill(buffer: &mut Vec<u8>, bytes: &[u8]) {
    buffer.clear();
    buffer.reserve_exact(bytes.len());
    buffer.extend_from_slice(bytes);
}

fn zeros(buffer: &mut Vec<u8>, length: usize) {
    buffer.clear();
    buffer.reserve_exact(length);
    buffer.resize(length, 0);
}

fn count(bytes: usize) -> Result<c_int, HostsError> {
    let too_long = |_| HostsError::new(None, format!("{bytes} bytes are too many for MPI"));
    c_int::try_from(bytes).map_err(too_long)
}

fn rank_and_size(group: ffi::MPI_Comm) -> Result<(c_int, c_int), HostsError> {
    let (mut rank, mut size) = (0, 0);
    // SAFETY: MPI is initialised.
    checked("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(group, &mut rank) })?;
    // SAFETY: as above.
    checked("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(group, &mut size) })?;
    Ok((rank, size))
}

/// Error of a call of MPI, with MPI's text.
fn checked(name: &str, code: c_int) -> Result<(), HostsError> {
    if code == ffi::MPI_SUCCESS as c_int {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has room for the longest text.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let text = String::from_utf8_lossy(&text[..usize::try_from(length).unwrap_or(0)]).into_owned();
    Err(HostsError::new(None, format!("{name} has failed: {text}")))
}

/// Error if MPI must not be called, or not on this thread.
fn check_thread() -> Result<(), HostsError> {
    if !is_initialized() || is_finalized() {
        let reason = "MPI is finalised: keep the universe until all averagers are dropped";
        return Err(HostsError::new(None, reason));
    }
    let level = threading_support();
    let mut is_main = 0;
    // SAFETY: MPI is initialised.
    checked("MPI_Is_thread_main", unsafe { ffi::MPI_Is_thread_main(&mut is_main) })?;
    if is_main != 0 || matches!(level, Threading::Serialized | Threading::Multiple) {
        return Ok(());
    }
    Err(HostsError::new(
        None,
        format!(
            "MPI was initialised with {level:?}, and this is not its main thread: average there, \
             or initialise MPI with Threading::Serialized"
        ),
    ))
}
