//! Processes as /proc shows them: parents, start times and programs. Values that can't be read are
//! `None`: /proc may be missing, may hide other users' processes (hidepid), and shows nothing
//! outside of this PID namespace.

use std::fs::{read, read_link, read_to_string};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// `PF_EXITING` of the kernel's `task_struct.flags`.
const EXITING: u64 = 0x4;

/// The fields of /proc/PID/stat that this crate uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// Name of the program, at most 15 bytes.
    pub(crate) name: String,
    /// Pid of the parent; 0 if it is outside of this PID namespace.
    pub(crate) parent: u32,
    pub(crate) group: u32,
    pub(crate) session: u32,
    pub(crate) has_terminal: bool,
    /// Start time in clock ticks since boot. Pid and start time together identify a process.
    pub(crate) start: u64,
    /// True if the process is freeing its memory and closing its files, in this order, or has done
    /// so.
    pub(crate) is_ending: bool,
    /// Address of the arguments, which is random for every exec. A process forked without exec has
    /// its parent's.
    arguments_at: u64,
}

impl Process {
    pub(crate) fn of(pid: u32) -> Option<Process> {
        // A program's name may be any bytes.
        Process::parse(&String::from_utf8_lossy(&read(format!("/proc/{pid}/stat")).ok()?))
    }

    /// This process. /proc may belong to another PID namespace than this process, so its pid may
    /// differ from `std::process::id()`.
    pub(crate) fn own() -> Option<Process> {
        Process::parse(&String::from_utf8_lossy(&read("/proc/self/stat").ok()?))
    }

    fn parse(text: &str) -> Option<Process> {
        // The name is in parentheses, and may contain some.
        let (pid, rest) = text.split_once('(')?;
        let (name, rest) = rest.rsplit_once(')')?;
        let pid = pid.trim().parse().ok()?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Fields are numbered as in proc_pid_stat(5).
        let number = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u64>().ok());
        let small = |field: usize| number(field).and_then(|number| u32::try_from(number).ok());
        Some(Process {
            pid,
            name: name.into(),
            parent: small(4)?,
            group: small(5)?,
            session: small(6)?,
            has_terminal: fields.get(7 - 3)? != &"0",
            start: number(22)?,
            is_ending: number(9)? & EXITING != 0 || ["Z", "X", "x"].contains(fields.first()?),
            arguments_at: number(48).unwrap_or(0),
        })
    }

    pub(crate) fn parent(&self) -> Option<Process> {
        let parent = (self.parent != 0).then(|| Process::of(self.parent))??;
        // The pid of a parent that has ended may have been reused.
        (parent.start <= self.start).then_some(parent)
    }

    /// Parent, grandparent and so on.
    pub(crate) fn ancestors(&self) -> impl Iterator<Item = Process> {
        const MOST: usize = 64;
        std::iter::successors(self.parent(), Process::parent).take(MOST)
    }

    /// True if its parent forked it without exec, as shells make subshells.
    pub(crate) fn is_copy_of(&self, parent: &Process) -> bool {
        let arguments = |process: &Process| read(format!("/proc/{}/cmdline", process.pid)).ok();
        self.arguments_at != 0
            && self.arguments_at == parent.arguments_at
            && arguments(self).is_some_and(|own| Some(own) == arguments(parent))
    }

    /// True if `parent` is not the process that started this one, but has adopted it. Such a parent
    /// tells nothing about the job: it adopts the orphans of every job.
    pub(crate) fn is_adopted_by(&self, parent: &Process) -> bool {
        // A process leads its own session or is in its parent's.
        if self.session != self.pid && self.session != parent.session {
            return true;
        }
        // A process leads its own process group or is in its parent's. A shell with job control
        // also puts a process into the group of a sibling, which may have ended if the shell has a
        // terminal.
        let has_group_of_parent = [self.pid, parent.group].contains(&self.group);
        let has_group_of_sibling = || {
            Process::of(self.group).is_some_and(|leader| leader.parent == parent.pid)
                || parent.has_terminal && parent.pid != 1
        };
        !has_group_of_parent && !has_group_of_sibling()
    }

    /// True if the process was started with this value of the variable.
    pub(crate) fn was_given(&self, variable: &str, value: &str) -> bool {
        let wanted = format!("{variable}={value}");
        let environment = read(format!("/proc/{}/environ", self.pid)).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|entry| entry == wanted.as_bytes())
    }

    /// True if this process is a wrapper, such as `timeout`: its arguments end with all arguments
    /// of `process`.
    pub(crate) fn is_wrapper_of(&self, process: &Process) -> bool {
        let arguments = |pid: u32| read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let (ours, theirs) = (arguments(self.pid), arguments(process.pid));
        !theirs.is_empty()
            && ours.strip_suffix(&theirs[..]).is_some_and(|before| before.last() == Some(&0))
    }

    /// Path of the program; empty if it can't be read.
    pub(crate) fn program(&self) -> PathBuf {
        read_link(format!("/proc/{}/exe", self.pid)).unwrap_or_default()
    }

    /// True if a child other than `child` runs one of these programs.
    pub(crate) fn has_other_child(&self, child: u32, programs: &[PathBuf]) -> bool {
        let children =
            read_to_string(format!("/proc/{0}/task/{0}/children", self.pid)).unwrap_or_default();
        let runs = |pid: &str| {
            read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| programs.contains(&exe))
        };
        children.split_whitespace().filter(|pid| *pid != child.to_string()).any(runs)
    }
}

/// Identifier of this process's PID namespace. Pids of two namespaces can't be compared.
pub(crate) fn pid_namespace() -> Option<u64> {
    std::fs::metadata("/proc/self/ns/pid").ok().map(|found| found.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_read() {
        let line =
            "4213 (a) b (c) R 12 4213 77 0 -1 4194564 1 0 0 0 0 0 0 0 20 0 3 0 987654 1 2 3 \
            4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 \
                    19 20 21 22 23 24 25 140737 140738 140739 140740 0";
        let found = Process::parse(line).unwrap();
        assert_eq!(
            (found.name.as_str(), found.parent, found.group, found.session),
            ("a) b (c", 12, 4213, 77)
        );
        assert_eq!((found.has_terminal, found.start, found.is_ending), (false, 987_654, true));
        assert_eq!(found.arguments_at, 140_737);
        for end in [0, 5, 12, 20, 60] {
            assert_eq!(Process::parse(&line[..end]), None);
        }
    }

    #[test]
    fn adopted_processes_are_told_from_children() {
        let process = |pid, parent, group, session, has_terminal| Process {
            pid,
            name: "p".into(),
            parent,
            group,
            session,
            has_terminal,
            start: 1,
            is_ending: false,
            arguments_at: 0,
        };
        let none = u32::MAX; // no process has this pid
        let shell = process(none - 1, 0, 5, 5, true);
        let reaper = process(none - 1, 0, 5, 5, false);
        let first = process(1, 0, 1, 1, true);
        for (parent, group, session, is_adopted) in [
            (&reaper, 5, 5, false),      // a child of a script
            (&reaper, 9, 9, false),      // a child that leads a session
            (&reaper, 9, 5, false),      // a child that leads a group
            (&reaper, none, none, true), // of an ended session
            (&reaper, none, 5, true),    // of an ended group
            (&shell, none, 5, false),    // the first process of the pipeline has ended
            (&shell, 5, none, true),
            (&first, none, 1, true), // pid 1 of a container adopts, with or without a terminal
            (&first, 1, 1, false),
        ] {
            let child = process(9, parent.pid, group, session, false);
            assert_eq!(child.is_adopted_by(parent), is_adopted, "{child:?} {parent:?}");
        }
    }

    #[test]
    fn this_process_has_a_parent() {
        let own = Process::own().unwrap();
        assert_eq!((own.pid, own.is_ending), (std::process::id(), false));
        assert_eq!(own.ancestors().next().map_or(0, |parent| parent.pid), own.parent);
        assert!(own.start > 0 && pid_namespace().is_some());
        assert!(!own.parent().is_some_and(|parent| own.is_copy_of(&parent)));
    }
}
