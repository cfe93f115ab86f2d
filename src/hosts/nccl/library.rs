//! NCCL, loaded at run time, and a communicator.

use std::error::Error as _;
use std::ffi::{c_char, c_int, c_uint, c_void, CStr, OsString};
use std::sync::{Arc, OnceLock};

use crate::backend::cuda::Context;

/// Variable that names the library, instead of `LIBRARIES`.
pub(super) const LIBRARY: &str = "PARAM_AVERAGER_NCCL";
const LIBRARIES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The least version, 2.27.3. Before it a call's job belongs to the thread that made the call, and
/// `ncclCommAbort` on another thread (see `Comm::abort`) uses it after it was freed.
const LEAST: c_int = 22703;
/// The version of nccl.h that `Config` is of, the first with communicators that do not block.
const CONFIG_VERSION: c_uint = 21400;

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTE: c_int = 1;

pub(super) type RawId = [u8; 128];
type RawComm = *mut c_void;

/// `ncclUniqueId`, which is passed by value.
#[repr(C)]
struct UniqueId(RawId);

/// `ncclConfig_t` of version 2.14. Later versions read no further, as its `version` asks for.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
}

type Carry = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> c_int;
type OfComm = unsafe extern "C" fn(RawComm) -> c_int;

/// Functions, with the types that nccl.h has had since 2.14.
pub(super) struct Library {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config:
        unsafe extern "C" fn(*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(RawComm, *mut c_int) -> c_int,
    comm_finalize: OfComm,
    comm_destroy: OfComm,
    comm_abort: OfComm,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: Carry,
    recv: Carry,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(RawComm) -> *const c_char,
}

impl Library {
    /// The library, or the reason why it can't be used and what to do. Looked up once.
    pub(super) fn get() -> Result<&'static Library, String> {
        refused_variables()?; // before NCCL reads them
        static LOADED: OnceLock<Result<Library, String>> = OnceLock::new();
        LOADED.get_or_init(Library::load).as_ref().map_err(String::clone)
    }

    fn load() -> Result<Library, String> {
        let named = std::env::var_os(LIBRARY).filter(|name| !name.is_empty());
        let names = match named {
            Some(name) => vec![name],
            None => LIBRARIES.map(Into::into).to_vec(),
        };
        let mut failed = vec![];
        // SAFETY: its initialisers run, as in every program that uses NCCL.
        let mut open = |name: &OsString| match unsafe { libloading::Library::new(name) } {
            Ok(library) => Some(library),
            Err(error) => {
                let why = error.source().map_or_else(|| error.to_string(), ToString::to_string);
                failed.push(format!("{} ({why})", name.display()));
                None
            }
        };
        let Some(library) = names.iter().find_map(&mut open) else {
            return Err(format!(
                "NCCL could not be loaded, not {}: install it (NVIDIA's package libnccl2, or pip \
                 install nvidia-nccl-cu13 with its folder in LD_LIBRARY_PATH), or name the file in \
                 {LIBRARY}",
                failed.join(", nor ")
            ));
        };
        // NCCL has threads of its own, which may outlive every communicator.
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the types are nccl.h's.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(|_| {
                    concat!("the NCCL that was loaded has no ", $name, ": install 2.27.3 or later")
                })?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!("ncclGetVersion");
        let mut version = 0;
        // SAFETY: given a valid pointer.
        let result = unsafe { get_version(&mut version) };
        if result != SUCCESS || version < LEAST {
            return Err(format!(
                "the NCCL that was loaded says that it is version {version}, and {LEAST} (2.27.3) \
                 is needed: install a later one, or name its file in {LIBRARY}"
            ));
        }
        Ok(Library {
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank_config: function!("ncclCommInitRankConfig"),
            comm_get_async_error: function!("ncclCommGetAsyncError"),
            comm_finalize: function!("ncclCommFinalize"),
            comm_destroy: function!("ncclCommDestroy"),
            comm_abort: function!("ncclCommAbort"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            get_error_string: function!("ncclGetErrorString"),
            get_last_error: function!("ncclGetLastError"),
        })
    }

    /// An id for a new communicator. This process listens for its ranks from now on.
    pub(super) fn unique_id(&self) -> Result<RawId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: given a valid pointer.
        let result = unsafe { (self.get_unique_id)(&mut id) };
        self.check("ncclGetUniqueId", result).map(|()| id.0)
    }

    /// Error of a result that is neither success nor work in progress, with NCCL's texts.
    fn check(&self, function: &str, result: c_int) -> Result<(), String> {
        if matches!(result, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        let text = |text: *const c_char| {
            // SAFETY: these functions return texts that end in a zero and stay.
            let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) });
            text.map_or(String::new(), |text| text.to_string_lossy().trim().to_owned())
        };
        // SAFETY: any number will do.
        let meaning = text(unsafe { (self.get_error_string)(result) });
        // SAFETY: no communicator: the last error of any, be it this one's or not.
        let last = Some(text(unsafe { (self.get_last_error)(std::ptr::null_mut()) }));
        let last = last
            .filter(|last| !last.is_empty())
            .map(|last| format!("; NCCL's last warning: {last}"));
        let last = last.unwrap_or_default();
        // Some of NCCL's texts say so themselves.
        let more = if meaning.contains("NCCL_DEBUG") { "" } else { "; NCCL_DEBUG=WARN says more" };
        Err(format!("{function}: {meaning}{last}{more}"))
    }
}

/// Error if the environment makes NCCL do what a link does not allow.
fn refused_variables() -> Result<(), String> {
    let refused: [(&str, &[&str], &str); 2] = [
        ("NCCL_COMM_BLOCKING", &["", "0"], "NCCL's calls would block without a limit"),
        ("NCCL_COMM_ID", &[""], "the communicators of all ranks would meet at one address"),
    ];
    for (name, allowed, why) in refused {
        let found = std::env::var_os(name);
        if let Some(value) = found.filter(|value| allowed.iter().all(|other| value != other)) {
            return Err(format!("{name} is {value:?}, so that {why}: unset it on all ranks"));
        }
    }
    Ok(())
}

/// A communicator on a device. It does not block: `is_ready` tells when a call has been made. Not
/// dropped, but ended by `abort` or `destroy`.
pub(super) struct Comm {
    library: &'static Library,
    raw: RawComm,
    context: Arc<Context>,
}

// SAFETY: NCCL allows every thread to use a communicator, one at a time.
unsafe impl Send for Comm {}

/// A rank's part of an exchange, on a stream.
pub(super) struct Parts {
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// Device addresses of what is sent and received.
    pub(super) send: u64,
    pub(super) receive: u64,
    /// Bytes of a part, and from one that is sent to the next.
    pub(super) bytes: usize,
    pub(super) step: usize,
    pub(super) stream: *mut c_void,
}

impl Comm {
    /// Begins to meet the other ranks of a communicator.
    pub(super) fn meet(
        context: &Arc<Context>,
        id: RawId,
        ranks: usize,
        rank: usize,
    ) -> Result<Comm, String> {
        let library = Library::get()?;
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: CONFIG_VERSION,
            blocking: 0,
        };
        let too_many = |_| format!("{ranks} hosts are too many for NCCL");
        let (count, number) = (c_int::try_from(ranks).map_err(too_many)?, rank as c_int);
        let mut comm = Comm { library, raw: std::ptr::null_mut(), context: context.clone() };
        let raw = &mut comm.raw;
        // SAFETY: given valid pointers, which are not used behind the call.
        let result = context.bound(|| unsafe {
            (library.comm_init_rank_config)(raw, count, UniqueId(id), number, &mut config)
        });
        let made = library.check("ncclCommInitRankConfig", result?);
        match made {
            Ok(()) if comm.raw.is_null() => Err("NCCL has made no communicator".into()),
            Ok(()) => Ok(comm),
            Err(error) => {
                comm.abort();
                Err(error)
            }
        }
    }

    /// True if the last call has been made, as far as the host has a part in it. An error if
    /// anything has failed since the communicator was made.
    pub(super) fn is_ready(&self) -> Result<bool, String> {
        let mut state = SUCCESS;
        // SAFETY: a communicator that lives.
        let result = unsafe { (self.library.comm_get_async_error)(self.raw, &mut state) };
        self.library.check("ncclCommGetAsyncError", result)?;
        self.library.check("NCCL's work for this rank", state)?;
        Ok(state == SUCCESS)
    }

    /// Enqueues the exchange with all ranks but this one, in one group.
    ///
    /// # Safety
    /// The buffers have a part for each rank (with a step of 0: one to send), and live until the
    /// stream is done.
    pub(super) unsafe fn exchange(&self, parts: &Parts) -> Result<(), String> {
        let Library { group_start, group_end, send, recv, .. } = *self.library;
        let with = |peer: usize| {
            let from = (parts.send as usize + peer * parts.step) as *mut c_void;
            let to = (parts.receive as usize + peer * parts.bytes) as *mut c_void;
            let (bytes, number) = (parts.bytes, peer as c_int);
            // SAFETY: guaranteed by the caller.
            let sent = unsafe { send(from, bytes, BYTE, number, self.raw, parts.stream) };
            self.library.check("ncclSend", sent)?;
            // SAFETY: as above.
            let received = unsafe { recv(to, bytes, BYTE, number, self.raw, parts.stream) };
            self.library.check("ncclRecv", received)
        };
        self.context.bound(|| {
            // SAFETY: always allowed.
            self.library.check("ncclGroupStart", unsafe { group_start() })?;
            let all = (0..parts.ranks).filter(|&peer| peer != parts.rank).try_for_each(with);
            // SAFETY: a group was begun.
            let ended = self.library.check("ncclGroupEnd", unsafe { group_end() });
            all.and(ended)
        })?
    }

    /// Begins to end what other ranks may still be sent.
    pub(super) fn finalize(&self) -> Result<(), String> {
        // SAFETY: a communicator that lives, and is not finalised yet.
        let result = self.context.bound(|| unsafe { (self.library.comm_finalize)(self.raw) });
        self.library.check("ncclCommFinalize", result?)
    }

    /// Frees the communicator, which `is_ready` since `finalize`. Does not block.
    pub(super) fn destroy(self) {
        // SAFETY: the last call. An error leaves nothing to do.
        let _ = self.context.bound(|| unsafe { (self.library.comm_destroy)(self.raw) });
    }

    /// Ends whatever the communicator does, and frees it. NCCL's function blocks, and says that all
    /// ranks must call it: so it has a thread of its own, which nothing waits for.
    pub(super) fn abort(self) {
        if self.raw.is_null() {
            return;
        }
        let abort = move || {
            let own = self;
            // SAFETY: the last call. An error leaves nothing to do.
            let _ = own.context.bound(|| unsafe { (own.library.comm_abort)(own.raw) });
        };
        // Without a thread the communicator stays, and other hosts wait to their limit.
        let _ = std::thread::Builder::new().name("nccl-abort".into()).spawn(abort);
    }
}
