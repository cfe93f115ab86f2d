//! NCCL, loaded at run time, as far as its rows need it, with the types of cudarc's bindings.
//! (Those load a library without a version in its name only, and panic where there is none.)

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void, CStr};
use std::sync::Arc;

use cudarc::driver::CudaStream;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::Library;
use param_averager::Dtype;

use crate::failure::Failure;

/// Names the library, instead of those below.
const LIBRARY: &str = "PA_NCCL_LIB";
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// ncclAvg and bfloat16.
const LEAST: i32 = 21000;
/// Several ranks of one process on one GPU, which `SHARING` asks for.
const LEAST_SHARING: i32 = 23003;
const SHARING: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// Sets what several ranks on one GPU need, before NCCL is loaded and before any thread looks at
/// the environment.
pub fn allow_sharing() {
    // The default level is PXB, which would leave the fast way out on machines with PCIe alone.
    for (name, value) in [(SHARING, "1"), ("NCCL_P2P_LEVEL", "SYS")] {
        if std::env::var_os(name).is_none() {
            std::env::set_var(name, value);
        }
    }
}

/// Declares functions of NCCL, and loads them.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty;)*) => {
        #[allow(non_snake_case)]
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load(library: &'static Library) -> Result<Self, String> {
                let missing = |name| format!("it has no {name}: install NCCL 2.10 or later");
                Ok(Functions {
                    // SAFETY: the types are nccl.h's.
                    $($name: *unsafe { library.get(stringify!($name)) }
                        .map_err(|_| missing(stringify!($name)))?,)*
                })
            }
        }
    };
}
// With the types that nccl.h has had since 2.10. Results are numbers: a later version may have
// other ones.
functions! {
    ncclGetVersion: fn(*mut c_int) -> c_int;
    ncclGetErrorString: fn(c_int) -> *const c_char;
    ncclGetUniqueId: fn(*mut ncclUniqueId) -> c_int;
    ncclCommInitRank: fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int) -> c_int;
    ncclCommDestroy: fn(ncclComm_t) -> c_int;
    ncclCommAbort: fn(ncclComm_t) -> c_int;
    ncclAllReduce: fn(Data, Data, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, Stream) -> c_int;
    ncclGroupStart: fn() -> c_int;
    ncclGroupEnd: fn() -> c_int;
}
type Data = *mut c_void;
type Stream = *mut c_void;

pub struct Nccl {
    functions: Functions,
    /// Its version and how ranks are placed.
    pub what: String,
}

impl Nccl {
    /// Loads it, or says why it can't be used. `sharing`: several ranks are to be on one GPU.
    pub fn load(placement: &str, sharing: bool) -> Result<Self, String> {
        let names = match std::env::var(LIBRARY) {
            Ok(name) if !name.is_empty() => vec![name],
            _ => LIBRARIES.map(str::to_owned).to_vec(),
        };
        // SAFETY: its initialisers run, as in every program that uses it.
        let load = |name: &String| unsafe { Library::new(name) }.ok();
        let library = names.iter().find_map(load).ok_or_else(|| {
            let names = names.join(" or ");
            format!("{names} could not be loaded; install NCCL, or name its library in {LIBRARY}")
        })?;
        // It has threads of its own, which may outlive every communicator.
        let functions = Functions::load(Box::leak(Box::new(library)))?;
        let (mut version, mut nccl) = (0, Nccl { functions, what: String::new() });
        // SAFETY: given a valid pointer.
        let result = unsafe { (nccl.functions.ncclGetVersion)(&mut version) };
        nccl.check("ncclGetVersion", result)?;
        let (major, rest) = (version / 10_000, version % 10_000);
        let shown = format!("NCCL {major}.{}.{}", rest / 100, rest % 100); // such as 2.32.3
        let how = if sharing { format!(", in process, with {SHARING}=1") } else { String::new() };
        nccl.what = format!("{shown}, {placement}{how}");
        match version {
            ..LEAST => Err(format!("{shown} has no ncclAvg: install 2.10 or later")),
            ..LEAST_SHARING if sharing => Err(format!(
                "{shown} can't have several ranks of a process on one GPU, which needs \
                 2.30.3; one process a rank with distinct NCCL_HOSTID, for older ones, isn't built"
            )),
            _ => Ok(nccl),
        }
    }

    pub fn unique_id(&self) -> Result<ncclUniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: given a valid pointer.
        let result = unsafe { (self.functions.ncclGetUniqueId)(&mut id) };
        self.check("ncclGetUniqueId", result).map(|()| id)
    }

    fn check(&self, function: &str, result: c_int) -> Result<(), String> {
        if result == 0 {
            return Ok(());
        }
        // SAFETY: any number will do, and the texts end in a zero and stay.
        let meaning = unsafe { CStr::from_ptr((self.functions.ncclGetErrorString)(result)) };
        let meaning = meaning.to_string_lossy();
        Err(format!("{function}: {meaning}; NCCL_DEBUG=WARN says more"))
    }
}

/// NCCL, and what the communicators of one row have in common.
pub type Loaded = (Arc<Nccl>, ncclUniqueId);

/// One rank's communicator, made and used by one thread with its device bound.
pub struct Comm {
    nccl: Arc<Nccl>,
    raw: ncclComm_t,
    /// A call has failed.
    failed: Cell<bool>,
}

impl Comm {
    /// Collective: returns when all ranks have called it.
    pub fn join((nccl, id): Loaded, ranks: usize, rank: usize) -> Result<Comm, Failure> {
        let (mut raw, init) = (std::ptr::null_mut(), nccl.functions.ncclCommInitRank);
        // SAFETY: given a valid pointer; a device's context is bound.
        let result = unsafe { init(&mut raw, ranks as c_int, id, rank as c_int) };
        let joined = nccl.check("ncclCommInitRank", result);
        joined.map_err(|error| Failure::Failed(format!("rank {rank}: {error}")))?;
        Ok(Comm { nccl, raw, failed: Cell::new(false) })
    }

    /// Enqueues all-reduces of these (address, elements, dtype), in place, in one group. `sum`:
    /// ncclSum, else ncclAvg.
    ///
    /// # Safety
    /// They lie in memory of the rank's device, which nothing else uses until the stream is done.
    pub unsafe fn all_reduce(
        &self,
        buffers: &[(u64, usize, Dtype)],
        sum: bool,
        stream: &CudaStream,
    ) -> Result<(), Failure> {
        let functions = &self.nccl.functions;
        let check = |function: &str, result| {
            self.nccl.check(function, result).map_err(|error| {
                self.failed.set(true);
                Failure::Failed(format!("NCCL: {error}"))
            })
        };
        let op = if sum { ncclRedOp_t::ncclSum } else { ncclRedOp_t::ncclAvg };
        // SAFETY: always allowed.
        check("ncclGroupStart", unsafe { (functions.ncclGroupStart)() })?;
        let mut results = buffers.iter().map(|&(address, elements, dtype)| {
            let (buffer, dtype) = (address as *mut c_void, data_type(dtype));
            let (comm, stream) = (self.raw, stream.cu_stream().cast());
            let call = functions.ncclAllReduce;
            // SAFETY: the caller's.
            let result = unsafe { call(buffer, buffer, elements, dtype, op, comm, stream) };
            check("ncclAllReduce", result)
        });
        let enqueued = results.try_for_each(|result| result);
        // SAFETY: a group was begun.
        let ended = check("ncclGroupEnd", unsafe { (functions.ncclGroupEnd)() });
        enqueued.and(ended)
    }
}

impl Drop for Comm {
    /// Collective. After a failure it ends whatever the communicator waits for.
    fn drop(&mut self) {
        let Functions { ncclCommAbort, ncclCommDestroy, .. } = self.nccl.functions;
        let end = if self.failed.get() { ncclCommAbort } else { ncclCommDestroy };
        // SAFETY: its last use, and what was enqueued is done or has failed. An error leaves
        // nothing to do.
        let _ = unsafe { end(self.raw) };
    }
}

fn data_type(dtype: Dtype) -> ncclDataType_t {
    match dtype {
        Dtype::F16 => ncclDataType_t::ncclFloat16,
        Dtype::F32 => ncclDataType_t::ncclFloat32,
        Dtype::F64 => ncclDataType_t::ncclFloat64,
        _ => ncclDataType_t::ncclBfloat16,
    }
}
