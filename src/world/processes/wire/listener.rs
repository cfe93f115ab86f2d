//! Accept loop for listeners with a guessable name. A connection is handed on only after a valid
//! first message from the same uid, within `HELLO`. Other users, other programs and floods are
//! dropped.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};

use crate::backend::limits::thread;
use crate::sync::lock;
use crate::world::processes::identity::credentials::is_same_user;
use crate::world::processes::wire::frame::{self, Frame, Kind};
use crate::world::processes::wire::private::Private;

/// Limit on connections whose first message is incomplete.
pub(crate) const MOST: usize = 64;
/// Time for the first message.
const HELLO: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 2000 });
/// Time for the first message if other connections wait for it.
const PATIENCE: Duration = Duration::from_millis(500);
/// Stack of a thread in bytes.
const STACK: usize = 256 << 10;
/// Pause between two attempts to accept while descriptors are missing.
const AGAIN: Duration = Duration::from_millis(2);

/// Time for the first message.
#[cfg(not(feature = "__testing"))]
fn hello_time() -> Duration {
    HELLO
}

#[cfg(feature = "__testing")]
use testing::hello_time;

#[cfg(feature = "__testing")]
pub mod testing {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    static MILLIS: AtomicU64 = AtomicU64::new(super::HELLO.as_millis() as u64);

    pub(crate) fn hello_time() -> Duration {
        Duration::from_millis(MILLIS.load(Ordering::Relaxed))
    }

    /// Sets the time that a process has for its first message.
    pub fn set_hello_time(time: Duration) {
        MILLIS.store(time.as_millis() as u64, Ordering::Relaxed);
    }
}

/// A listening socket. Dropping it shuts the socket down and frees the name soon after.
#[derive(Debug)]
pub(crate) struct Listener {
    // Dropped in this order: the thread waits for `_open`, so it is the last owner of the socket.
    listener: Arc<Private<UnixListener>>,
    short: Arc<Shortage>,
    _open: mpsc::Sender<()>,
}

/// Resources that were missing for a connection or for the files it sent.
#[derive(Debug, Default)]
struct Shortage {
    files: AtomicBool,
    /// True if files were missing although no other connection held any.
    is_alone: AtomicBool,
    /// The reason why no thread could be started.
    thread: Mutex<Option<String>>,
    /// Number of connections being read.
    reading: AtomicUsize,
}

impl Listener {
    /// Calls `handle` for each connection of the same user whose first message is one of `kinds`,
    /// with at most `most_files` files. Each connection is read on a thread of its own, so that
    /// none delays another. Connections above `MOST` are closed, and their processes may try again.
    ///
    /// Dropping the listener waits for no thread: closing a file from an unknown process can take
    /// as long as that process chooses (`SO_LINGER`). So `handle` may still be called shortly after
    /// the drop.
    pub(crate) fn open(
        listener: UnixListener,
        kinds: &'static [Kind],
        most_files: usize,
        handle: impl Fn(Private<UnixStream>, Frame) + Send + Sync + 'static,
    ) -> Result<Listener, Shut> {
        let (listener, short) = (Arc::new(Private::new(listener)), Arc::new(Shortage::default()));
        let (open, is_open) = mpsc::channel();
        let missing = short.clone();
        let read_first = move |stream: Private<UnixStream>| match frame::receive(
            &stream,
            kinds,
            most_files,
            Instant::now() + hello_time(),
        ) {
            Ok(frame) => handle(stream, frame),
            Err(error) if error.kind() == frame::SHORT => missing.file(1),
            // A process of another version understands at least the header of the answer, and its
            // version.
            Err(error) if error.kind() == frame::OTHER_VERSION => {
                let refuse = (Kind::Refuse, 0, 0);
                let _ = frame::send(
                    &stream,
                    refuse,
                    &error.to_string(),
                    &[],
                    Instant::now() + hello_time(),
                );
            }
            Err(_) => {}
        };
        let (read_first, socket, missing) = (Arc::new(read_first), listener.clone(), short.clone());
        let run = move || {
            accept_loop(&socket, &is_open, &missing, &read_first);
            // the last owner of the socket closes the connections in its backlog
            let _ = is_open.recv();
        };
        match thread("listener".into(), STACK, run) {
            Ok(_) => Ok(Listener { listener, short, _open: open }),
            Err(reason) => Err(Shut { reason, listener }),
        }
    }

    /// The missing resource, if any, and what to do.
    pub(crate) fn shortage(&self) -> Option<String> {
        let thread = lock(&self.short.thread).clone();
        thread.or_else(|| self.short.files.load(Ordering::Relaxed).then(frame::short_of_files))
    }

    /// True if no connection can be read: a thread or a file descriptor is missing, although no
    /// other connection holds one.
    pub(crate) fn is_stuck(&self) -> bool {
        let thread = lock(&self.short.thread);
        thread.is_some() || self.short.is_alone.load(Ordering::Relaxed)
    }
}

/// A socket on which no connection is read, since no thread could be started.
#[derive(Debug)]
pub(crate) struct Shut {
    pub(crate) reason: String,
    listener: Arc<Private<UnixListener>>,
}

impl Shut {
    /// Answers up to `most` connections with a reason, on this thread.
    pub(crate) fn refuse(
        &self,
        kinds: &[Kind],
        most_files: usize,
        most: usize,
        reason: &str,
        until: Instant,
    ) {
        let mut answered = 0;
        while answered < most {
            let left = until.saturating_duration_since(Instant::now());
            let mut watched = [PollFd::new(&**self.listener, PollFlags::IN)];
            if left.is_zero() || poll(&mut watched, left.try_into().ok().as_ref()) == Ok(0) {
                return;
            }
            let Ok((stream, _)) = self.listener.accept() else { return };
            let soon = || Instant::now() + PATIENCE;
            if is_same_user(&stream).is_ok()
                && frame::receive(&stream, kinds, most_files, soon()).is_ok()
            {
                let _ = frame::send(&stream, (Kind::Refuse, 0, 0), &reason, &[], soon());
                answered += 1;
            }
        }
    }
}

impl Shortage {
    /// Records that a descriptor was missing, while `own` of the connections being read were the
    /// caller's.
    fn file(&self, own: usize) {
        self.files.store(true, Ordering::Relaxed);
        self.is_alone.fetch_or(self.reading.load(Ordering::Relaxed) <= own, Ordering::Relaxed);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Wakes the thread.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Runs until the listener is closed.
fn accept_loop(
    listener: &UnixListener,
    is_open: &mpsc::Receiver<()>,
    short: &Arc<Shortage>,
    read_first: &Arc<impl Fn(Private<UnixStream>) + Send + Sync + 'static>,
) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => Private::new(stream),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                continue
            }
            // The socket is shut, or no descriptor is left. Connections being read will free some,
            // or the process that waits here gives up.
            Err(error) => {
                if is_short(&error) {
                    short.file(0);
                }
                match is_open.recv_timeout(AGAIN) {
                    Err(RecvTimeoutError::Timeout) => continue,
                    _ => return,
                }
            }
        };
        // Checked first, so that another user cannot make this process start a thread.
        if is_same_user(&stream).is_err() || short.reading.load(Ordering::Relaxed) >= MOST {
            continue;
        }
        short.reading.fetch_add(1, Ordering::Relaxed);
        let (read_first, counted) = (read_first.clone(), short.clone());
        let stream = Arc::new(Mutex::new(Some(stream)));
        let unread = stream.clone();
        let read = move || {
            let stream = lock(&stream).take();
            stream.into_iter().for_each(|stream| read_first(stream));
            // last, so that a connection that takes long to close still counts
            counted.reading.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(reason) = thread("hello".into(), STACK, read) {
            short.reading.fetch_sub(1, Ordering::Relaxed);
            let reason = format!(
                "rank 0, or a member, of this world can't start a thread to receive messages: \
                    {reason}"
            );
            // The send buffer of an unused socket has room, so this does not block.
            let stream = lock(&unread).take();
            let _ = stream.map(|stream| {
                frame::send(&stream, (Kind::Refuse, 0, 0), &reason, &[], Instant::now())
            });
            *lock(&short.thread) = Some(reason);
        }
    }
}

/// True if the error is a shortage of file descriptors.
fn is_short(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    use std::io::{IoSlice, Write};
    use std::mem::MaybeUninit;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;

    const LINGER: Duration = Duration::from_secs(20);

    /// A socket that takes `LINGER` to close, and its other end, which does not read.
    fn lingering() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        one.set_nonblocking(true).unwrap();
        while one.write(&[0; 1 << 16]).is_ok() {}
        one.set_nonblocking(false).unwrap();
        rustix::net::sockopt::set_socket_linger(&one, Some(LINGER)).unwrap();
        (one, other)
    }

    /// A process with another version of this crate is told so, and its message is not handed on.
    #[test]
    fn another_version_is_told_so() {
        let address = format!("other-version-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(address).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let _listener =
            Listener::open(listener, &[Kind::Hello], 1, |_, _| panic!("its message was handed on"))
                .unwrap();
        let stream = UnixStream::connect_addr(&address).unwrap();
        let mut header = frame::header((Kind::Hello, 0, 0), 2, 0);
        header[4] ^= 0x80;
        (&stream).write_all(&header).unwrap();
        let answer = frame::receive(&stream, &[Kind::Refuse], 0, Instant::now() + LINGER).unwrap();
        let reason: String = answer.parse().unwrap();
        assert!(reason.contains("use one version of param-averager on every rank"), "{reason}");
    }

    /// Neither later connections nor closing the listener wait until an unknown process's file is
    /// closed.
    #[test]
    fn files_of_unknown_processes_may_take_long_to_close() {
        let address =
            SocketAddr::from_abstract_name(format!("lingering-{}", std::process::id())).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let connect = || UnixStream::connect_addr(&address).unwrap();
        let mut other_ends = vec![];
        // Sends bytes with the last copy of a file that lingers.
        let mut send = |stream: &UnixStream, bytes: &[u8]| {
            let (file, end) = lingering();
            let files = [file.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
            sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::empty()).unwrap();
            other_ends.push(end);
        };
        let garbage = connect();
        send(&garbage, b"GET / HTTP/1.1\r\n\r\n  ");
        let valid = connect();
        let begin = Instant::now();
        frame::send(&valid, (Kind::Hello, 0, 7), &(), &[], begin + LINGER).unwrap();
        let _idle: Vec<UnixStream> = (0..MOST).map(|_| connect()).collect();
        // One is refused, and the other is still in the backlog when the listener is closed.
        let late = [connect(), connect()];
        late.iter().for_each(|late| send(late, b"P"));
        let (send_number, received) = mpsc::channel();
        let listener = Listener::open(listener, &[Kind::Hello], 1, move |_, frame| {
            send_number.send(frame.number).unwrap()
        });
        let listener = listener.unwrap();
        assert_eq!(received.recv_timeout(LINGER / 2), Ok(7));
        std::thread::sleep(Duration::from_millis(100));
        drop(listener);
        assert!(begin.elapsed() < LINGER / 2, "{:?}", begin.elapsed());
    }
}
