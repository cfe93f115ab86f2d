//! System limits on the resources of a process. They are checked before calls that would raise a
//! signal or abort, and named with their values in error messages.

use std::io;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;

/// A resource that a call asked the system for. Sizes are in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// Memory of this process: address space or a mapping.
    Memory(usize),
    /// A memfd.
    #[cfg(target_os = "linux")]
    Memfd,
    /// A file of this size.
    #[cfg(target_os = "linux")]
    File(usize),
    /// A socket, or another file descriptor.
    #[cfg(target_os = "linux")]
    Descriptor,
    Thread,
}

/// Error text: the call, its size, the system's error, and the limit that explains it.
pub(crate) fn why(call: &str, wanted: Wanted, error: impl Into<io::Error>) -> String {
    let error = error.into();
    let size = match wanted {
        Wanted::Memory(bytes) => format!(" of {bytes} bytes"),
        #[cfg(target_os = "linux")]
        Wanted::File(bytes) => format!(" of {bytes} bytes"),
        _ => String::new(),
    };
    match limits(wanted, &error) {
        Some(limits) => format!("{call}{size}: {error}; {limits}"),
        None => format!("{call}{size}: {error}"),
    }
}

/// Starts a thread with a stack of `stack` bytes, and returns once it runs. Between the start of a
/// thread and its first line std maps memory, and a lack of it aborts the process. So the memory is
/// tested first, and the new thread has it when this function returns.
pub(crate) fn thread(
    name: String,
    stack: usize,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, String> {
    spare_for_a_thread(stack).map_err(|reason| format!("a thread's {reason}"))?;
    let begun = Arc::new(Barrier::new(2));
    let begins = begun.clone();
    let thread = std::thread::Builder::new().name(name).stack_size(stack).spawn(move || {
        begins.wait();
        run();
    });
    let thread = thread.map_err(|error| why("starting a thread", Wanted::Thread, error))?;
    begun.wait();
    Ok(thread)
}

#[cfg(target_os = "linux")]
use linux::spare_for_a_thread;
#[cfg(target_os = "linux")]
pub(crate) use linux::{check_file_size, is_shortage, spare, spare_for_all};

/// On other systems only the calls themselves report a shortage.
#[cfg(not(target_os = "linux"))]
pub(crate) fn spare(_bytes: usize) -> Result<(), String> {
    Ok(())
}

#[cfg(not(target_os = "linux"))]
pub(crate) use {spare as spare_for_all, spare as spare_for_a_thread};

#[cfg(not(target_os = "linux"))]
fn limits(_wanted: Wanted, _error: &io::Error) -> Option<String> {
    None
}

#[cfg(target_os = "linux")]
use linux::limits;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::{self, BufRead, BufReader};
    use std::ptr::null_mut;

    use rustix::io::Errno;
    use rustix::mm::{mmap_anonymous, mprotect, munmap, MapFlags, MprotectFlags, ProtFlags};
    use rustix::process::{getrlimit, Resource};

    use super::{why, Wanted};

    /// Memory in bytes that every larger allocation leaves for small ones, whose failure aborts the
    /// process.
    const MARGIN: usize = 4 << 20;
    /// A multiple of every page size.
    const STEP: usize = 64 << 10;
    /// Mappings of a thread: its stack, its signal stack and a malloc arena, each with a guard.
    const OF_A_THREAD: usize = 6;
    /// Mappings made from the begin of a rendezvous or a build to its end, apart from new threads.
    /// Includes further arenas of existing threads.
    const OF_A_PHASE: usize = 48;

    /// Checks that `bytes` of memory, and a margin for small allocations, can be mapped now. The
    /// memory is released at once, so another thread may still take it; but a process that is short
    /// of memory gets an error here. Takes a few µs.
    pub(crate) fn spare(bytes: usize) -> Result<(), String> {
        map(bytes, 1)
    }

    /// Checks memory and mappings before a rendezvous or a build. Takes about 0.1 ms.
    pub(crate) fn spare_for_all(bytes: usize) -> Result<(), String> {
        map(bytes, OF_A_PHASE)
    }

    /// Checks memory and mappings for a thread with this stack.
    pub(super) fn spare_for_a_thread(stack: usize) -> Result<(), String> {
        map(stack, OF_A_THREAD)
    }

    /// Maps `bytes` bytes as `mappings` mappings, and unmaps them.
    fn map(bytes: usize, mappings: usize) -> Result<(), String> {
        let all = bytes
            .saturating_add(MARGIN)
            .checked_next_multiple_of(STEP)
            .unwrap_or(usize::MAX - STEP + 1);
        let failed = |error: Errno| why("memory", Wanted::Memory(all), error);
        // SAFETY: a new mapping, wherever the system puts it.
        let start = unsafe {
            mmap_anonymous(null_mut(), all, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let start = start.map_err(failed)?;
        // A range with another protection is a mapping of its own.
        let split = |index: usize| {
            // SAFETY: inside of the new mapping, which no other code uses.
            unsafe { mprotect(start.byte_add((2 * index + 1) * STEP), STEP, MprotectFlags::READ) }
        };
        let split = (0..mappings / 2).try_for_each(split).map_err(failed);
        // SAFETY: mapped above, with this size.
        let _ = unsafe { munmap(start, all) };
        split
    }

    /// Checks that a file may have this size: exceeding the limit raises SIGXFSZ.
    pub(crate) fn check_file_size(bytes: usize) -> Result<(), String> {
        match getrlimit(Resource::Fsize).current {
            Some(most) if most < bytes as u64 => {
                Err(why("a memfd", Wanted::File(bytes), Errno::FBIG))
            }
            _ => Ok(()),
        }
    }

    /// True if the error is a shortage of a system resource, as opposed to a missing peer.
    pub(crate) fn is_shortage(error: &io::Error) -> bool {
        let all = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
        all.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
    }

    pub(super) fn limits(wanted: Wanted, error: &io::Error) -> Option<String> {
        let errno = Errno::from_io_error(error)?;
        match (errno, wanted) {
            (Errno::MFILE, _) => Some(limit(
                Resource::Nofile,
                "the limit on open files of this process is",
                "RLIMIT_NOFILE",
                "ulimit -n",
            )),
            (Errno::NFILE, _) => Some(
                "the limit on open files of the system is reached: raise the sysctl \
                    fs.file-max"
                    .into(),
            ),
            (Errno::FBIG, _) => Some(limit(
                Resource::Fsize,
                "the limit on the size of a file of this process, memfds included, in bytes is",
                "RLIMIT_FSIZE",
                "ulimit -f",
            )),
            (Errno::PERM | Errno::ACCESS | Errno::NOSYS, Wanted::Memfd) => Some(
                "a sandbox (seccomp) forbids memfd_create, which processes need to share memory: \
                    allow it"
                    .into(),
            ),
            (Errno::NOSPC, _) => Some("the system's shared memory is full: free memory".into()),
            (Errno::AGAIN, Wanted::Thread) => Some(threads()),
            (Errno::NOMEM | Errno::AGAIN, Wanted::Memory(bytes) | Wanted::File(bytes)) => {
                Some(memory(bytes))
            }
            (Errno::NOMEM, _) => Some(memory(0)),
            _ => None,
        }
    }

    /// Text about one limit.
    fn limit(resource: Resource, what: &str, name: &str, raise: &str) -> String {
        match getrlimit(resource).current {
            Some(most) => format!("{what} {most} ({name}): raise {raise}"),
            None => format!(
                "{what} not set ({name}), so a limit of the system itself is reached: \
                free some"
            ),
        }
    }

    /// Text about the limit that an allocation of this size exceeds.
    fn memory(bytes: usize) -> String {
        let used = used();
        let exceeds = |resource, used: Option<u64>| {
            let most = getrlimit(resource).current?;
            used.is_none_or(|used| used.saturating_add(bytes as u64) > most).then_some(most)
        };
        let all = |used: Option<u64>| {
            used.map_or(String::new(), |used| format!(", of which {used} are used"))
        };
        let [space, data] = used.map_or([None; 2], |used| used.map(Some));
        if let Some(most) = exceeds(Resource::As, space) {
            let used = all(space);
            return format!(
                "the address space of this process is limited to {most} bytes{used} \
                (RLIMIT_AS): raise ulimit -v"
            );
        }
        if let Some(most) = exceeds(Resource::Data, data) {
            let used = all(data);
            return format!(
                "the data of this process are limited to {most} bytes{used} (RLIMIT_DATA): raise \
                 ulimit -d"
            );
        }
        // SAFETY: a new mapping, wherever the system puts it, and unmapped at once.
        let probe = unsafe {
            mmap_anonymous(
                null_mut(),
                bytes.max(1),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
            .and_then(|start| munmap(start, bytes.max(1)))
        };
        if probe == Err(Errno::AGAIN) {
            let what = "this process locks its memory (mlockall), and its limit on locked bytes is";
            return limit(Resource::Memlock, what, "RLIMIT_MEMLOCK", "ulimit -l");
        }
        match (mappings(), number("/proc/sys/vm/max_map_count")) {
            (Some(found), Some(most)) if found + 16 >= most => format!(
                "this process has {found} of at most {most} mappings: raise the sysctl \
                 vm.max_map_count"
            ),
            (None, Some(most)) => format!(
                "the system has no memory left, or this process has reached its limit of {most} \
                    mappings: free memory, or raise the sysctl vm.max_map_count"
            ),
            _ => "the system has no memory left: free some, or see vm.overcommit_memory".into(),
        }
    }

    /// Address space and data of this process, in bytes.
    fn used() -> Option<[u64; 2]> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let kibibytes = |name: &str| -> Option<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some([kibibytes("VmSize:")? << 10, kibibytes("VmData:")? << 10])
    }

    fn mappings() -> Option<u64> {
        let mut maps = BufReader::new(File::open("/proc/self/maps").ok()?);
        let mut count = 0;
        loop {
            let (lines, bytes) = {
                let some = maps.fill_buf().ok()?;
                (some.iter().filter(|&&byte| byte == b'\n').count(), some.len())
            };
            if bytes == 0 {
                return Some(count);
            }
            count += lines as u64;
            maps.consume(bytes);
        }
    }

    /// Text about the limit that prevents a thread, if memory does not.
    fn threads() -> String {
        if let Some((most, path)) = full_cgroup() {
            return format!(
                "the limit on processes and threads of the control group {path} is {most}: raise \
                    its pids.max"
            );
        }
        limit(
            Resource::Nproc,
            "the limit on processes and threads of this user is",
            "RLIMIT_NPROC",
            "ulimit -u",
        )
    }

    /// The full control group of this process or above it: its limit on processes, and its path.
    fn full_cgroup() -> Option<(u64, String)> {
        let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            let mount = match controllers {
                "" => "/sys/fs/cgroup",
                all if all.split(',').any(|controller| controller == "pids") => {
                    "/sys/fs/cgroup/pids"
                }
                _ => continue,
            };
            let mut path = path.trim_end_matches('/');
            loop {
                let file = |name: &str| number(&format!("{mount}{path}/{name}"));
                if let (Some(most), Some(found)) = (file("pids.max"), file("pids.current")) {
                    if found >= most {
                        return Some((
                            most,
                            if path.is_empty() { "/".into() } else { path.into() },
                        ));
                    }
                }
                match path.rfind('/') {
                    Some(end) => path = &path[..end],
                    None => break,
                }
            }
        }
        None
    }

    /// Number in a file of the kernel, if it holds one.
    fn number(path: &str) -> Option<u64> {
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    }
}
