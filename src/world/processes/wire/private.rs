//! Sockets that a forked child does not keep. `O_CLOEXEC` closes a socket in a child that execs. In
//! a child that does not, a copy would keep the name of an ended world taken, or a connection open.

use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Once;

/// Limit on registered descriptors, enough for several worlds of 16 ranks. A child keeps its copies
/// of further ones.
const MOST: usize = 1024;
const FREE: i32 = -1;

/// Raw descriptors of all `Private`s. Of fixed size and lock-free, since the fork handler runs in a
/// child whose other threads are gone.
static REGISTERED: [AtomicI32; MOST] = [const { AtomicI32::new(FREE) }; MOST];

/// A socket that each child forked without exec finds replaced by an unconnected one. Closing or
/// shutting down the child's copy does not affect this process.
#[derive(Debug)]
pub(crate) struct Private<T: AsFd> {
    slot: Option<&'static AtomicI32>,
    socket: T,
}

impl<T: AsFd> Private<T> {
    pub(crate) fn new(socket: T) -> Private<T> {
        static HANDLER: Once = Once::new();
        // SAFETY: the handler calls async-signal-safe functions only, and is never unloaded: it is
        // a function of this program. Without memory for it, children keep their copies.
        HANDLER.call_once(|| _ = unsafe { libc::pthread_atfork(None, None, Some(in_child)) });
        let raw = socket.as_fd().as_raw_fd();
        let take = |slot: &&AtomicI32| {
            slot.compare_exchange(FREE, raw, Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        Private { slot: REGISTERED.iter().find(take), socket }
    }
}

impl<T: AsFd> Deref for Private<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.socket
    }
}

impl<T: AsFd> AsFd for Private<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<T: AsFd> Drop for Private<T> {
    fn drop(&mut self) {
        // Cleared before the descriptor is closed: its number may be reused at once.
        self.slot.into_iter().for_each(|slot| slot.store(FREE, Ordering::SeqCst));
    }
}

/// Fork handler. Runs in the child, on its only thread.
extern "C" fn in_child() {
    // SAFETY: socket, dup3 and close are async-signal-safe; errno, which they change, is restored.
    // The descriptors are those of live `Private`s, copied at the fork, which the child's copies of
    // these objects go on to own.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let mut harmless = FREE;
        for slot in &REGISTERED {
            let raw = slot.load(Ordering::SeqCst);
            if raw == FREE {
                continue;
            }
            if harmless == FREE {
                // Closing first frees a descriptor, so `socket` cannot fail for want of one.
                libc::close(raw);
                harmless = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
                if harmless == raw {
                    harmless = libc::fcntl(raw, libc::F_DUPFD_CLOEXEC, 0);
                } else if harmless != FREE {
                    libc::dup3(harmless, raw, libc::O_CLOEXEC);
                }
                continue;
            }
            libc::dup3(harmless, raw, libc::O_CLOEXEC);
        }
        if harmless != FREE {
            libc::close(harmless);
        }
        *errno = saved;
    }
}
