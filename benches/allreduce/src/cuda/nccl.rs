//! NCCL, loaded at run time, as far as its rows need it. Signatures and numbers are those of
//! nccl.h, which has not changed them since 2.10 (ncclAvg, bfloat16).

use std::ffi::{c_char, c_int, c_void, CStr};
use std::sync::Arc;

use libloading::Library;
use param_averager::Dtype;

use super::device::Stream;
use crate::failure::Failure;

/// Its library, instead of those below.
const LIBRARY: &str = "PA_NCCL_LIB";
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// ncclAvg and bfloat16.
const LEAST: i32 = 21000;
/// Several ranks of one process on one GPU, which `SHARING` asks for.
const LEAST_SHARING: i32 = 23003;
pub const SHARING: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([c_char; 128]);

type Comm = *mut c_void;

/// ncclRedOp_t.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Sum = 0,
    Avg = 4,
}

/// Its functions.
struct Functions {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        Comm,
        *mut c_void,
    ) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Since 2.13.
    last_error: Option<unsafe extern "C" fn(Comm) -> *const c_char>,
}

/// NCCL.
#[derive(Clone)]
pub struct Nccl {
    functions: Arc<Functions>,
    version: i32,
}

impl Nccl {
    /// Loads it, or says why it can't be used. `sharing`: several ranks are to be on one GPU.
    pub fn load(sharing: bool) -> Result<Self, String> {
        let names = match std::env::var(LIBRARY) {
            Ok(name) if !name.is_empty() => vec![name],
            _ => LIBRARIES.map(str::to_owned).to_vec(),
        };
        // SAFETY: its initialisers run, as in every program that uses it.
        let library =
            names.iter().find_map(|name| unsafe { Library::new(name) }.ok()).ok_or_else(|| {
                format!(
                    "{} could not be loaded; install NCCL, or name its library in {LIBRARY}",
                    names.join(" or ")
                )
            })?;
        // It has threads of its own, which may outlive every communicator.
        let library: &'static Library = Box::leak(Box::new(library));
        // SAFETY: the types are nccl.h's.
        unsafe { Nccl::from(library) }.and_then(|nccl| match nccl.version {
            version if version < LEAST => Err(format!(
                "NCCL {} has no ncclAvg: install 2.10 or \
                later",
                nccl.version()
            )),
            version if sharing && version < LEAST_SHARING => Err(format!(
                "NCCL {} can't have several ranks of a process on one GPU, which needs 2.30.3; one \
                 process a rank with \
                 distinct NCCL_HOSTID, for older ones, isn't built",
                nccl.version()
            )),
            _ => Ok(nccl),
        })
    }

    /// # Safety
    /// The library's functions have the types of nccl.h.
    unsafe fn from(library: &'static Library) -> Result<Self, String> {
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the caller's.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|_| concat!("it has no ", $name, ": install NCCL 2.10 or later"))?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!("ncclGetVersion");
        let functions = Functions {
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank: function!("ncclCommInitRank"),
            comm_destroy: function!("ncclCommDestroy"),
            comm_abort: function!("ncclCommAbort"),
            all_reduce: function!("ncclAllReduce"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            error_string: function!("ncclGetErrorString"),
            // SAFETY: the caller's.
            last_error: unsafe { library.get(b"ncclGetLastError\0") }
                .ok()
                .map(|function| *function),
        };
        let mut version = 0;
        // SAFETY: given a valid pointer.
        let result = unsafe { get_version(&mut version) };
        let nccl = Nccl { functions: Arc::new(functions), version };
        nccl.check("ncclGetVersion", result)?;
        Ok(nccl)
    }

    /// Such as 2.32.3.
    pub fn version(&self) -> String {
        let (major, rest) = (self.version / 10_000, self.version % 10_000);
        format!("{major}.{}.{}", rest / 100, rest % 100)
    }

    fn check(&self, function: &str, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        let text = |text: *const c_char| {
            // SAFETY: it returns texts that end in a zero and stay.
            (!text.is_null())
                .then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        // SAFETY: any number will do.
        let meaning = text(unsafe { (self.functions.error_string)(result) }).unwrap_or_default();
        // SAFETY: no communicator: the last error of any.
        let last =
            self.functions.last_error.and_then(|last| text(unsafe { last(std::ptr::null_mut()) }));
        let last = last
            .filter(|last| !last.trim().is_empty())
            .map_or(String::new(), |last| format!(" ({})", last.trim()));
        Err(format!("{function}: {meaning}{last}; NCCL_DEBUG=WARN says more"))
    }

    pub fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: given a valid pointer.
        let result = unsafe { (self.functions.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", result).map(|()| id)
    }
}

/// One rank's membership, with the device that was current on the thread that made it.
pub struct Member {
    nccl: Nccl,
    comm: Comm,
}

// SAFETY: a communicator may be used by any thread, by one at a time: that of the crew which runs,
// or whoever drops it.
unsafe impl Send for Member {}
// SAFETY: as above.
unsafe impl Sync for Member {}

impl Member {
    /// Collective: returns when all ranks have called it.
    pub fn new(nccl: &Nccl, id: UniqueId, ranks: usize, rank: usize) -> Result<Self, String> {
        let mut comm = std::ptr::null_mut();
        // SAFETY: given a valid pointer; a device's context is bound.
        let result = unsafe {
            (nccl.functions.comm_init_rank)(&mut comm, ranks as c_int, id, rank as c_int)
        };
        nccl.check("ncclCommInitRank", result).map_err(|error| format!("rank {rank}: {error}"))?;
        Ok(Member { nccl: nccl.clone(), comm })
    }

    /// Enqueues all-reduces of these (address, elements, dtype), in place, in one group.
    ///
    /// # Safety
    /// They lie in memory of the member's device, which nobody else uses until the stream is done.
    /// One thread at a time.
    pub unsafe fn all_reduce(
        &self,
        buffers: &[(u64, usize, Dtype)],
        op: Op,
        stream: &Stream,
    ) -> Result<(), Failure> {
        let Functions { group_start, group_end, all_reduce, .. } = *self.nccl.functions;
        let failed = |function: &str, result| {
            self.nccl
                .check(function, result)
                .map_err(|error| Failure::Failed(format!("NCCL: {error}")))
        };
        // SAFETY: always allowed.
        failed("ncclGroupStart", unsafe { group_start() })?;
        let mut results = buffers.iter().map(|&(address, elements, dtype)| {
            let buffer = address as *mut c_void;
            // SAFETY: the caller's.
            let result = unsafe {
                all_reduce(
                    buffer,
                    buffer,
                    elements,
                    code(dtype),
                    op as c_int,
                    self.comm,
                    stream.raw.cast(),
                )
            };
            failed("ncclAllReduce", result)
        });
        let enqueued = results.try_for_each(|result| result);
        // SAFETY: a group was begun.
        let ended = failed("ncclGroupEnd", unsafe { group_end() });
        enqueued.and(ended)
    }

    /// Ends whatever it waits for, and it.
    pub fn abort(self) {
        // SAFETY: its last use; no thread is in one of its calls, as each of them has returned. An
        // error leaves nothing to do.
        let _ = unsafe { (self.nccl.functions.comm_abort)(self.comm) };
    }

    /// Gives it back. Collective. Of one that is dropped instead, the end of the process takes
    /// care.
    pub fn destroy(self) {
        // SAFETY: its last use, and what was enqueued is done. An error leaves nothing to do.
        let _ = unsafe { (self.nccl.functions.comm_destroy)(self.comm) };
    }
}

/// ncclDataType_t.
fn code(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::F16 => 6,
        Dtype::F32 => 7,
        Dtype::F64 => 8,
        _ => 9, // bfloat16
    }
}
