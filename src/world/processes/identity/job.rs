//! Description of the job that a process belongs to, which tells ranks of two jobs with one name
//! apart.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::hash::fnv1a;
use crate::world::processes::identity::ancestry::{pid_namespace, Process};

/// Number of arguments that are compared one by one. Further arguments are compared together.
const MOST_ARGUMENTS: usize = 48;
/// Variables by which launchers give a process its rank. A process that was given one is a wrapper
/// of that rank alone, even if it passes the rank on in another variable.
const RANK_VARIABLES: [&str; 5] =
    ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"];
/// Characters of an argument, or of an id, that an error message shows.
const MOST_SHOWN: usize = 64;

/// Job of a rank. Bounded in size, since it is part of the first message to an unknown process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    kind: Kind,
    pid: u32,
    /// PID namespace of `pid`. `None` if unknown.
    namespace: Option<u64>,
    arguments: Vec<Argument>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// All ranks were given the name of the world explicitly, so the name identifies the job.
    Named,
    /// Source of a job id (a launcher, or the program), and the id.
    Known(String, String),
    /// Ranks started by a script or a program, without a job id.
    Started(Start),
}

/// Processes that started a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    /// (pid, start time) of this process and its ancestors up to the starter: the nearest ancestor
    /// that does not belong to this rank alone. Empty if /proc does not tell. A rank that starts
    /// before its siblings can take a subshell of its own for the starter of all and go further up,
    /// so the starter of each rank is looked up in the chain of the other.
    chain: Vec<(u32, u64)>,
    /// Name of the starter.
    starter: String,
    session: u32,
    group: u32,
    /// True if the process that started this rank has ended. The starter is then the process that
    /// adopts orphans.
    is_orphan: bool,
}

/// An element of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    /// Beginning of the text, for messages.
    shown: String,
    hash: u64,
    /// Hash of the text with the rank's number replaced.
    hash_by_rank: u64,
}

/// Source of the job's identity, as far as the caller or a launcher gives one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Known {
    /// Unknown: the processes that started the ranks are compared.
    #[default]
    No,
    /// The name of the world identifies the job.
    ByName,
    /// Source of the id (a launcher, or the program), and the id.
    By(String, String),
}

impl Job {
    /// Job of this process as `rank`, which it was given in `variable`.
    pub(crate) fn own(known: &Known, rank: usize, variable: Option<&str>) -> Job {
        let kind = match known {
            Known::ByName => Kind::Named,
            Known::By(by, id) => Kind::Known(excerpt(by), excerpt(id) + &suffix(id)),
            Known::No => Kind::Started(Start::own(rank, variable)),
        };
        let arguments = match kind {
            Kind::Started(_) => {
                arguments(std::env::args_os().map(|s| s.to_string_lossy().into_owned()), rank)
            }
            _ => vec![],
        };
        Job { kind, pid: std::process::id(), namespace: pid_namespace(), arguments }
    }

    /// Evidence that the two jobs differ, or `None`.
    pub(crate) fn differs(&self, other: &Job) -> Option<String> {
        match (&self.kind, &other.kind) {
            (Kind::Named, Kind::Named) => None,
            (Kind::Started(one), Kind::Started(two)) => {
                // Pids of two PID namespaces can't be compared.
                let is_near = self.namespace == other.namespace && self.namespace.is_some();
                let starts = if is_near { one.differs(two) } else { None };
                starts.or_else(|| differ(&self.arguments, &other.arguments))
            }
            (one, two) if one == two => None,
            (one, two) => Some(format!("{one} and {two}")),
        }
    }

    /// The process as text, for a reader that may be in another PID namespace.
    pub(crate) fn process(&self) -> String {
        match self.namespace == pid_namespace() || self.namespace.is_none() {
            true => format!("process {}", self.pid),
            false => format!("process {} of another PID namespace", self.pid),
        }
    }

    /// The pid in the namespace of this process, if it has one there.
    pub(crate) fn pid(&self) -> Option<u32> {
        (self.namespace.is_some() && self.namespace == pid_namespace()).then_some(self.pid)
    }

    /// The job as text, without the process.
    pub(crate) fn name(&self) -> String {
        self.kind.to_string()
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.process(), self.kind)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Named => f.write_str("of the job that has this name"),
            Kind::Known(by, id) => write!(f, "of {by} {id:?}"),
            Kind::Started(start) => match start.chain.last() {
                Some((pid, _)) if !start.is_orphan => {
                    write!(f, "started by process {pid}, {:?}", start.starter)
                }
                _ => write!(f, "of session {}, process group {}", start.session, start.group),
            },
        }
    }
}

impl Start {
    fn own(rank: usize, variable: Option<&str>) -> Start {
        let Some(own) = Process::own() else {
            return Start {
                chain: vec![],
                starter: String::new(),
                session: 0,
                group: 0,
                is_orphan: false,
            };
        };
        let program = std::env::current_exe().unwrap_or_default();
        let value = rank.to_string();
        let mut chain = vec![own.clone()];
        for ancestor in own.ancestors() {
            let below = chain.last().expect("it begins with this process");
            // Siblings of a wrapper run the same wrapper. Siblings of a subshell may still be
            // subshells.
            let of_ranks = || [program.clone(), below.program(), ancestor.program()];
            let is_shared = || ancestor.has_other_child(below.pid, &of_ranks());
            let was_given = |variable: &str| ancestor.was_given(variable, &value);
            let is_alone = RANK_VARIABLES.into_iter().chain(variable).any(was_given)
                || (ancestor.parent().is_some_and(|parent| ancestor.is_copy_of(&parent))
                    || ancestor.is_wrapper_of(&own))
                    && !is_shared();
            chain.push(ancestor);
            if !is_alone {
                break;
            }
        }
        let starter = chain.last().expect("it begins with this process");
        let below = &chain[chain.len().saturating_sub(2)];
        let is_orphan = below.is_adopted_by(starter);
        Start {
            starter: excerpt(&starter.name),
            chain: chain.iter().map(|process| (process.pid, process.start)).collect(),
            session: own.session,
            group: own.group,
            is_orphan,
        }
    }

    fn differs(&self, other: &Start) -> Option<String> {
        // The process that adopts orphans is the starter of the orphans of every job, so their
        // sessions and process groups are compared instead.
        let is_same = if self.is_orphan || other.is_orphan {
            (self.session, self.group) == (other.session, other.group)
        } else {
            let has = |one: &Start, two: &Start| {
                one.chain.last().is_some_and(|last| two.chain.contains(last))
            };
            // Without an ancestor in this PID namespace there is no evidence.
            let is_known = self.chain.len() > 1 && other.chain.len() > 1;
            !is_known || has(self, other) || has(other, self)
        };
        (!is_same).then(|| "they were not started by one process".into())
    }
}

fn differ(ones: &[Argument], others: &[Argument]) -> Option<String> {
    let mut pairs = ones.iter().zip(others).enumerate();
    let is_same = |one: &Argument, two: &Argument| {
        one.hash == two.hash || one.hash_by_rank == two.hash_by_rank
    };
    // The path of the program itself may differ between ranks.
    let first = pairs.find(|(index, (one, two))| *index > 0 && !is_same(one, two));
    let first = first.map(|(_, (one, two))| format!("{:?} and {:?}", one.shown, two.shown));
    let counts = || {
        let all = |arguments: &[Argument]| arguments.len().saturating_sub(1);
        (ones.len() != others.len()).then(|| format!("{} arguments and {}", all(ones), all(others)))
    };
    first.or_else(counts).map(|what| format!("their arguments differ: {what}"))
}

/// Arguments of a command line, hashed with and without the number of rank `rank`.
fn arguments(all: impl Iterator<Item = String>, rank: usize) -> Vec<Argument> {
    let mut arguments: Vec<Argument> = vec![];
    let mut rest: Option<(String, u64, u64)> = None;
    for text in all {
        let (hash, hash_by_rank) = (fnv1a(text.bytes()), fnv1a(without(&text, rank).bytes()));
        if arguments.len() < MOST_ARGUMENTS {
            arguments.push(Argument { shown: excerpt(&text), hash, hash_by_rank });
        } else {
            let (shown, one, two) = rest.unwrap_or((excerpt(&text), 0, 0));
            rest = Some((shown, one.rotate_left(7) ^ hash, two.rotate_left(7) ^ hash_by_rank));
        }
    }
    arguments.extend(rest.map(|(shown, hash, hash_by_rank)| Argument {
        shown,
        hash,
        hash_by_rank,
    }));
    arguments
}

/// The text with each run of digits that equals the rank replaced.
fn without(text: &str, rank: usize) -> String {
    let mut replaced = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, digits) = rest.split_at(at);
        let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
        let (number, after) = digits.split_at(end);
        replaced += before;
        replaced += if number.parse() == Ok(rank) { "\u{0}" } else { number };
        rest = after;
    }
    replaced + rest
}

/// Beginning of a text, made of characters that take at most four bytes in a message.
fn excerpt(text: &str) -> String {
    let plain = |c: char| if c.is_control() || c == '"' || c == '\\' { '?' } else { c };
    let mut shown: String = text.chars().take(MOST_SHOWN).map(plain).collect();
    if shown.chars().count() < text.chars().count() {
        shown.push('…');
    }
    shown
}

/// Suffix that keeps truncated texts different.
fn suffix(text: &str) -> String {
    if excerpt(text) == text {
        String::new()
    } else {
        format!("#{:016x}", fnv1a(text.bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(line: &str, rank: usize) -> Vec<Argument> {
        arguments(line.split(' ').map(str::to_owned), rank)
    }

    #[test]
    fn arguments_are_compared_without_the_rank() {
        let differs = |one: &str, two: &str| differ(&of(one, 0), &of(two, 1));
        for (one, two) in [
            ("t --lr 0.1", "t --lr 0.1"),
            ("t --rank 0", "t --rank 1"),
            ("t --rank=0 part-000.bin", "t --rank=1 part-001.bin"),
            ("./t x", "/bin/t x"),
        ] {
            assert_eq!(differs(one, two), None);
        }
        assert_eq!(
            differs("t --lr 0.1", "t --lr 0.2").unwrap(),
            "their arguments differ: \"0.1\" and \"0.2\""
        );
        assert!(differs("t --seed 42", "t --seed 43").is_some());
        assert!(differs("t a b", "t a").unwrap().contains("2 arguments and 1"));
        let long = |last: &str| format!("t{} {last}", " x".repeat(2 * MOST_ARGUMENTS));
        assert_eq!(differs(&long("0"), &long("1")), None);
        assert!(differs(&long("7"), &long("8")).is_some());
        let ends = |end: &str| format!("t {}{end}", "x".repeat(10 * MOST_SHOWN));
        assert!(differs(&ends("a"), &ends("b")).is_some());
    }

    fn started(starter: u32, session: u32, group: u32, is_orphan: bool) -> Job {
        chain_of(&[9, starter], session, group, is_orphan)
    }

    /// A job with a chain of processes, this one first and the starter last.
    fn chain_of(pids: &[u32], session: u32, group: u32, is_orphan: bool) -> Job {
        let chain = pids.iter().map(|&pid| (pid, 7)).collect();
        let kind = Kind::Started(Start { chain, starter: "sh".into(), session, group, is_orphan });
        Job { kind, pid: 9, namespace: Some(1), arguments: vec![] }
    }

    #[test]
    fn ranks_that_one_process_has_started_are_of_one_job() {
        let one = started(10, 5, 6, false);
        assert_eq!(one.differs(&started(10, 5, 8, false)), None); // from an interactive shell
        assert!(one
            .differs(&started(11, 5, 6, false))
            .unwrap()
            .contains("not started by one process"));
        assert_eq!(one.differs(&started(1, 5, 6, true)), None); // the script has ended
        assert!(one.differs(&started(1, 5, 7, true)).is_some());
        // Two scripts that have ended: one process has adopted the ranks of both.
        assert!(started(1, 5, 6, true).differs(&started(1, 5, 7, true)).is_some());
        assert_eq!(started(1, 5, 6, true).differs(&started(1, 5, 6, true)), None);
        // The first rank starts before the second exists, and takes its subshell (30) for the
        // starter of both.
        let early = chain_of(&[20, 30, 10], 5, 6, false);
        assert_eq!(early.differs(&chain_of(&[21, 30], 5, 6, false)), None);
        assert_eq!(chain_of(&[21, 30], 5, 6, false).differs(&early), None);
        assert!(early.differs(&chain_of(&[41, 40], 5, 6, false)).is_some());
        // The first rank has started the second.
        assert_eq!(
            chain_of(&[30, 10], 5, 6, false).differs(&chain_of(&[21, 30], 5, 6, false)),
            None
        );
        // No ancestor is known.
        assert_eq!(chain_of(&[20], 5, 6, false).differs(&chain_of(&[21], 8, 9, false)), None);
        let elsewhere = Job { namespace: Some(2), ..started(1, 1, 1, false) };
        assert_eq!(one.differs(&elsewhere), None);
        let known =
            |id: &str| Job { kind: Kind::Known("torchrun".into(), id.into()), ..elsewhere.clone() };
        assert_eq!(known("a/0").differs(&known("a/0")), None);
        assert_eq!(
            known("a/0").differs(&known("a/1")).unwrap(),
            "of torchrun \"a/0\" and of torchrun \"a/1\""
        );
        assert!(known("a/0").differs(&one).is_some());
        let named = Job { kind: Kind::Named, ..one.clone() };
        assert!(named.differs(&named.clone()).is_none() && named.differs(&one).is_some());
    }

    #[test]
    fn this_process_is_of_its_own_job() {
        let own = || Job::own(&Known::No, 0, Some("RANK"));
        assert_eq!(own().differs(&own()), None);
        assert_eq!(own().pid(), Some(std::process::id()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(test_support::count(32, 256) as u32))]

        /// Every command line fits into a first message.
        #[test]
        fn a_description_is_bounded(
            all in proptest::collection::vec(any::<String>(), 0..200), rank in 0usize..16
        ) {
            let long = all.iter().map(|text| text.repeat(20));
            let arguments = arguments(long, rank);
            let job = Job { arguments, ..started(1, 1, 1, false) };
            prop_assert!(serde_json::to_vec(&job).unwrap().len() < 24 << 10);
            prop_assert_eq!(job.differs(&job), None);
        }
    }
}
