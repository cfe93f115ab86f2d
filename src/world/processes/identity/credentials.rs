//! Identity of the process at the other end of a socket, as the kernel reports it, and of the user
//! of this process.
//!
//! Pids and uids are relative to namespaces. The kernel reports pid 0 for a process that the
//! reader's PID namespace does not contain, and the overflow uid for a user that the reader's user
//! namespace does not map.

use std::fs::read_to_string;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

/// Possible causes of ranks not finding one another, for error messages.
pub(crate) const CAUSES: &str =
    "ranks find one another only within one network namespace (containers need a common one, such \
        as --network=host) and as one user";
/// Default of the kernel's overflow uid, if /proc does not tell it.
const OVERFLOW: u32 = 65534;

/// `SO_PEERCRED` of a stream: the process that connected, or that called listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// `None` if the process is outside of this PID namespace.
    pub(crate) pid: Option<u32>,
    /// The effective uid, as this process's user namespace maps it.
    uid: u32,
}

impl Credentials {
    /// Reads the credentials. rustix is not used: its type for a pid cannot hold the 0 that the
    /// kernel reports for a process of another PID namespace.
    pub(crate) fn of(stream: &UnixStream) -> io::Result<Credentials> {
        let mut found = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut bytes = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the descriptor is borrowed and open, and `found` has room for the `bytes` that
        // the kernel may write, all of whose values are valid for it.
        let failed = unsafe {
            libc::getsockopt(
                stream.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut found).cast(),
                &mut bytes,
            )
        };
        if failed != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Credentials {
            pid: u32::try_from(found.pid).ok().filter(|&pid| pid != 0),
            uid: found.uid,
        })
    }
}

/// Refuses a peer of another user. Any user may connect to an abstract name, and only processes of
/// this user are trusted.
pub(crate) fn is_same_user(stream: &UnixStream) -> Result<Credentials, String> {
    let found = Credentials::of(stream).map_err(|error| format!("SO_PEERCRED: {error}"))?;
    Users::now().check(found.uid)?;
    Ok(found)
}

/// Fails if this process can't tell its own user from others.
pub(crate) fn is_some_user() -> Result<(), String> {
    let users = Users::now();
    users.check(users.own)
}

/// Uid for the listening socket's name, as the parent user namespace has it. Ranks inside and
/// outside of a rootless container are one user with different uids.
pub(crate) fn user_of_the_name() -> u32 {
    Users::now().outside()
}

/// The user namespace of this process.
#[derive(Debug)]
struct Users {
    own: u32,
    overflow: u32,
    /// Mapping of the user namespace as (first id inside, first id outside, count). `None` if
    /// unknown.
    map: Option<Vec<[u32; 3]>>,
}

impl Users {
    fn now() -> Users {
        let overflow = read_to_string("/proc/sys/kernel/overflowuid").ok();
        let overflow = overflow.and_then(|text| text.trim().parse().ok()).unwrap_or(OVERFLOW);
        let map = read_to_string("/proc/self/uid_map").ok().map(|text| Users::parse(&text));
        Users { own: rustix::process::geteuid().as_raw(), overflow, map }
    }

    fn parse(map: &str) -> Vec<[u32; 3]> {
        let line = |line: &str| {
            let mut numbers = line.split_whitespace().map(|number| number.parse().ok());
            Some([numbers.next()??, numbers.next()??, numbers.next()??])
        };
        map.lines().filter_map(line).collect()
    }

    /// True if every user has a uid of its own in this namespace. False without /proc, so that the
    /// overflow uid is refused.
    fn is_identity(&self) -> bool {
        self.map.as_deref() == Some(&[[0, 0, u32::MAX]])
    }

    fn check(&self, peer: u32) -> Result<(), String> {
        let own = self.own;
        if (peer == self.overflow || own == self.overflow) && !self.is_identity() {
            let process = if own == self.overflow {
                "this process"
            } else {
                "the process that holds the name"
            };
            return Err(format!(
                "{process} runs as user {}, which stands for every unmapped user of a user \
                    namespace, so the users of two processes can't be compared: map the user in \
                    /proc/self/uid_map (unshare -r, podman --userns=keep-id)",
                self.overflow
            ));
        }
        if peer != own {
            return Err(format!(
                "the name belongs to user {peer}, not to user {own}: choose another name for this \
                    world"
            ));
        }
        Ok(())
    }

    fn outside(&self) -> u32 {
        let within = |&&[inside, _, count]: &&[u32; 3]| {
            self.own.checked_sub(inside).is_some_and(|at| at < count)
        };
        let found = self.map.iter().flatten().find(within);
        found.map_or(self.own, |&[inside, outside, _]| outside.wrapping_add(self.own - inside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(own: u32, map: Option<&str>) -> Users {
        Users { own, overflow: OVERFLOW, map: map.map(Users::parse) }
    }

    const IDENTITY: Option<&str> = Some("         0          0 4294967295\n");
    const ROOTLESS: Option<&str> = Some("0 1000 1\n1 100000 65536\n");

    #[test]
    fn users_that_look_alike_are_refused() {
        assert!(users(0, IDENTITY).check(0).is_ok());
        assert!(users(0, IDENTITY).check(1000).unwrap_err().contains("belongs to user 1000"));
        // The overflow uid as an ordinary account.
        assert!(users(OVERFLOW, IDENTITY).check(OVERFLOW).is_ok());
        for map in [Some(""), Some("0 1000 1"), ROOTLESS, None, Some("65534 65534 1")] {
            let error = users(OVERFLOW, map).check(OVERFLOW).unwrap_err();
            assert!(error.contains("this process runs as user 65534"), "{error}");
            let error = users(0, map).check(OVERFLOW).unwrap_err();
            assert!(
                error.contains("the process that holds the name runs as user 65534"),
                "{error}"
            );
            assert!(users(0, map).check(0).is_ok());
        }
    }

    #[test]
    fn a_user_has_one_name_inside_and_outside() {
        assert_eq!(users(0, IDENTITY).outside(), 0);
        assert_eq!(users(1000, IDENTITY).outside(), 1000);
        assert_eq!(users(0, ROOTLESS).outside(), 1000);
        assert_eq!(users(5, ROOTLESS).outside(), 100_004);
        assert_eq!(users(1000, None).outside(), 1000);
        assert_eq!(users(OVERFLOW, Some("")).outside(), OVERFLOW);
    }

    #[test]
    fn the_other_end_of_a_socket_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let found = Credentials::of(&one).unwrap();
        assert_eq!(found.pid, Some(std::process::id()));
        assert_eq!(found.uid, rustix::process::geteuid().as_raw());
    }
}
