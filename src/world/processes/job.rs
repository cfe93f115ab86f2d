//! Which job a process belongs to: what tells the ranks of one job from those of another that uses
//! the same name.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ancestry::{pid_namespace, Process};

/// Arguments that are compared one by one; those that follow are compared together.
const MOST_ARGUMENTS: usize = 48;
/// Variables by which launchers give a process its rank. A wrapper that was given one is that
/// rank's alone, also where it hands the rank on under another name.
const RANK_VARIABLES: [&str; 5] =
    ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"];
/// Characters of an argument, or of an id, that an error shows.
const MOST_SHOWN: usize = 64;

/// A rank's description of its job. Bounded: it is part of the first message to an unknown process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Job {
    kind: Kind,
    pid: u32,
    /// In which that is its pid. `None`: not known.
    namespace: Option<u64>,
    arguments: Vec<Argument>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// The name of the world was given by hand to all ranks, which says enough.
    Named,
    /// Who names the job (a launcher, or the program), and the name.
    Known(String, String),
    /// Ranks that a script or a program has started.
    Started(Start),
}

/// How a rank was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Start {
    /// This process and its ancestors up to the nearest that is not this rank's alone, the starter:
    /// the pid and the start of each. Empty: /proc does not tell. A rank that looks before the next
    /// one is there goes further up, so the starter of one is looked for in the chain of the other.
    chain: Vec<(u32, u64)>,
    /// Name of the starter.
    starter: String,
    session: u32,
    group: u32,
    /// The process that started this rank has ended: the starter is whichever adopts orphans.
    is_orphan: bool,
}

/// An element of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Argument {
    /// Its beginning.
    shown: String,
    hash: u64,
    /// The hash with the rank's number replaced wherever it stands by itself.
    hash_by_rank: u64,
}

/// Whose job it is, as far as the caller or a launcher says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::world) enum Known {
    /// By how the process was started.
    #[default]
    No,
    /// The name of the world is enough.
    ByName,
    /// A launcher's, or the program's, name for the job.
    By(String, String),
}

impl Job {
    /// This process's, as `rank`, of which `variable` told.
    pub(super) fn own(known: &Known, rank: usize, variable: Option<&str>) -> Job {
        let kind = match known {
            Known::ByName => Kind::Named,
            Known::By(by, id) => Kind::Known(shown(by), shown(id) + &suffix(id)),
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

    /// Evidence that a rank of the other job is not of this one, if there is some.
    pub(super) fn differs(&self, other: &Job) -> Option<String> {
        match (&self.kind, &other.kind) {
            (Kind::Named, Kind::Named) => None,
            (Kind::Started(one), Kind::Started(two)) => {
                // Numbers of two PID namespaces can't be compared.
                let is_near = self.namespace == other.namespace && self.namespace.is_some();
                let starts = if is_near { one.differs(two) } else { None };
                starts.or_else(|| differ(&self.arguments, &other.arguments))
            }
            (one, two) if one == two => None,
            (one, two) => Some(format!("{one} and {two}")),
        }
    }

    /// The process, for another one that may be in another PID namespace.
    pub(super) fn process(&self) -> String {
        match self.namespace == pid_namespace() || self.namespace.is_none() {
            true => format!("process {}", self.pid),
            false => format!("process {} of another PID namespace", self.pid),
        }
    }

    /// As this process would call it.
    pub(super) fn pid(&self) -> Option<u32> {
        (self.namespace.is_some() && self.namespace == pid_namespace()).then_some(self.pid)
    }

    /// The job without the process.
    pub(super) fn name(&self) -> String {
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
            // Siblings of a wrapper run that wrapper; those of a subshell may still be subshells.
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
            starter: shown(&starter.name),
            chain: chain.iter().map(|process| (process.pid, process.start)).collect(),
            session: own.session,
            group: own.group,
            is_orphan,
        }
    }

    fn differs(&self, other: &Start) -> Option<String> {
        // Whichever adopts orphans is the starter of all of them, of any job.
        let is_same = if self.is_orphan || other.is_orphan {
            (self.session, self.group) == (other.session, other.group)
        } else {
            let has = |one: &Start, two: &Start| {
                one.chain.last().is_some_and(|last| two.chain.contains(last))
            };
            // Without an ancestor that this PID namespace shows, nothing tells.
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
    // The program itself is found by other ways on several ranks.
    let first = pairs.find(|(index, (one, two))| *index > 0 && !is_same(one, two));
    let first = first.map(|(_, (one, two))| format!("{:?} and {:?}", one.shown, two.shown));
    let counts = || {
        let all = |arguments: &[Argument]| arguments.len().saturating_sub(1);
        (ones.len() != others.len()).then(|| format!("{} of them and {}", all(ones), all(others)))
    };
    first.or_else(counts).map(|what| format!("their arguments differ: {what}"))
}

/// Of a command line with rank `rank`'s number in it.
fn arguments(all: impl Iterator<Item = String>, rank: usize) -> Vec<Argument> {
    let mut arguments: Vec<Argument> = vec![];
    let mut rest: Option<(String, u64, u64)> = None;
    for text in all {
        let (hash, hash_by_rank) = (hash(&text), hash(&without(&text, rank)));
        if arguments.len() < MOST_ARGUMENTS {
            arguments.push(Argument { shown: shown(&text), hash, hash_by_rank });
        } else {
            let (shown, one, two) = rest.unwrap_or((shown(&text), 0, 0));
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

/// The text with each run of digits that is the rank replaced.
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

/// The beginning, in characters of which each takes at most four bytes in a message.
fn shown(text: &str) -> String {
    let plain = |c: char| if c.is_control() || c == '"' || c == '\\' { '?' } else { c };
    let mut shown: String = text.chars().take(MOST_SHOWN).map(plain).collect();
    if shown.chars().count() < text.chars().count() {
        shown.push('…');
    }
    shown
}

/// Tells texts apart that are cut.
fn suffix(text: &str) -> String {
    if shown(text) == text {
        String::new()
    } else {
        format!("#{:016x}", hash(text))
    }
}

/// FNV-1a, the same everywhere.
pub(super) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
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
        assert!(differs("t a b", "t a").unwrap().contains("2 of them and 1"));
        let long = |last: &str| format!("t{} {last}", " x".repeat(2 * MOST_ARGUMENTS));
        assert_eq!(differs(&long("0"), &long("1")), None);
        assert!(differs(&long("7"), &long("8")).is_some());
        let ends = |end: &str| format!("t {}{end}", "x".repeat(10 * MOST_SHOWN));
        assert!(differs(&ends("a"), &ends("b")).is_some());
    }

    fn started(starter: u32, session: u32, group: u32, is_orphan: bool) -> Job {
        chain_of(&[9, starter], session, group, is_orphan)
    }

    /// This process and its ancestors, the starter last.
    fn chain_of(pids: &[u32], session: u32, group: u32, is_orphan: bool) -> Job {
        let chain = pids.iter().map(|&pid| (pid, 7)).collect();
        let kind = Kind::Started(Start { chain, starter: "sh".into(), session, group, is_orphan });
        Job { kind, pid: 9, namespace: Some(1), arguments: vec![] }
    }

    #[test]
    fn ranks_that_one_process_has_started_are_of_one_job() {
        let one = started(10, 5, 6, false);
        assert_eq!(one.differs(&started(10, 5, 8, false)), None); // an interactive shell's
        assert!(one
            .differs(&started(11, 5, 6, false))
            .unwrap()
            .contains("not started by one process"));
        assert_eq!(one.differs(&started(1, 5, 6, true)), None); // the script has ended meanwhile
        assert!(one.differs(&started(1, 5, 7, true)).is_some());
        // Two scripts that have ended: their ranks have one adopter.
        assert!(started(1, 5, 6, true).differs(&started(1, 5, 7, true)).is_some());
        assert_eq!(started(1, 5, 6, true).differs(&started(1, 5, 6, true)), None);
        // The first rank looks before the second is there, and takes its subshell (30) for its own.
        let early = chain_of(&[20, 30, 10], 5, 6, false);
        assert_eq!(early.differs(&chain_of(&[21, 30], 5, 6, false)), None);
        assert_eq!(chain_of(&[21, 30], 5, 6, false).differs(&early), None);
        assert!(early.differs(&chain_of(&[41, 40], 5, 6, false)).is_some());
        // The first rank is the process that has started the second.
        assert_eq!(
            chain_of(&[30, 10], 5, 6, false).differs(&chain_of(&[21, 30], 5, 6, false)),
            None
        );
        // Nothing is known of the ancestors.
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

        /// A first message has room for every command line.
        #[test]
        fn what_is_said_is_bounded(all in proptest::collection::vec(any::<String>(), 0..200), rank in 0usize..16) {
            let long = all.iter().map(|text| text.repeat(20));
            let arguments = arguments(long, rank);
            let job = Job { arguments, ..started(1, 1, 1, false) };
            prop_assert!(serde_json::to_vec(&job).unwrap().len() < 24 << 10);
            prop_assert_eq!(job.differs(&job), None);
        }
    }
}
