//! Facts that the ranks of a link show one another: the same on all hosts, but for the number of
//! the host.

use crate::hash::Digest;
use crate::Communicator;

/// First word: "pahosts" and the version of the messages.
const MAGIC: u64 = u64::from_le_bytes(*b"pahosts1");
/// Text for ranks of another version, in words behind the name of their host.
pub(super) const OTHER_VERSION: &str = "is not of this version of param-averager: start one on all";
const WORDS: usize = 6;

/// A rank of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) hosts: usize,
    pub(super) host: usize,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// Digest of the launcher's name of the job.
    pub(super) run: u64,
}

impl Hello {
    pub(super) const BYTES: usize = WORDS * 8;

    pub(super) fn new(communicator: &Communicator, host: usize, hosts: usize) -> Hello {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        let run = Digest::of(communicator.place().run.as_bytes());
        Hello { hosts, host, rank, ranks, run }
    }

    pub(super) fn bytes(&self) -> [u8; Hello::BYTES] {
        let Hello { hosts, host, rank, ranks, run } = *self;
        let words = [MAGIC, hosts as u64, host as u64, rank as u64, ranks as u64, run];
        let mut bytes = [0; Hello::BYTES];
        let places = bytes.chunks_exact_mut(8).zip(words);
        places.for_each(|(place, word)| place.copy_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// The rank that has shown these bytes, unless they are something else.
    pub(super) fn of(bytes: &[u8]) -> Option<Hello> {
        let (words, rest) = bytes.as_chunks::<8>();
        let words: &[_; WORDS] = words.try_into().ok().filter(|_| rest.is_empty())?;
        let [magic, hosts, host, rank, ranks, run] = words.map(u64::from_le_bytes);
        let [hosts, host, rank, ranks] = [hosts, host, rank, ranks].map(usize::try_from);
        let (hosts, host, rank, ranks) = (hosts.ok()?, host.ok()?, rank.ok()?, ranks.ok()?);
        (magic == MAGIC).then_some(Hello { hosts, host, rank, ranks, run })
    }

    /// True if the first bytes are those of a rank of another version.
    pub(super) fn is_of_other_version(bytes: &[u8]) -> bool {
        let own = MAGIC.to_le_bytes();
        bytes.first_chunk().is_some_and(|first| *first != own && first[..7] == own[..7])
    }

    /// The difference of what a host has shown, if it does not belong to this one's link.
    pub(super) fn compare(shown: &[u8], own: &Hello) -> Option<String> {
        match Hello::of(shown) {
            Some(shown) => shown.differs(own),
            None => Some(OTHER_VERSION.into()),
        }
    }

    /// The difference of a rank that does not belong to this one's link, in words behind the name
    /// of its host.
    pub(super) fn differs(&self, own: &Hello) -> Option<String> {
        let both = |what: &str, theirs: usize, ours: usize| {
            (theirs != ours).then(|| {
                format!("has {what} {theirs}, and host {} has {ours}: start all alike", own.host)
            })
        };
        both("hosts:", self.hosts, own.hosts)
            .or_else(|| both("ranks:", self.ranks, own.ranks))
            .or_else(|| both("a link of rank", self.rank, own.rank))
            .or_else(|| (self.host >= own.hosts).then(|| "has a number too large".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_ranks_are_understood_and_nothing_else() {
        let hello = Hello { hosts: 3, host: 2, rank: 1, ranks: 4, run: u64::MAX };
        assert_eq!(Hello::of(&hello.bytes()), Some(hello));
        assert_eq!(Hello::of(&hello.bytes()[1..]), None);
        for at in 0..8 {
            let mut other = hello.bytes();
            other[at] ^= 1;
            assert_eq!(Hello::of(&other), None);
        }
        assert_eq!(Hello { host: 0, run: 1, ..hello }.differs(&hello), None);
        for (other, words) in [
            (Hello { hosts: 2, ..hello }, "has hosts: 2, and host 2 has 3"),
            (Hello { ranks: 2, ..hello }, "has ranks: 2, and host 2 has 4"),
            (Hello { rank: 0, ..hello }, "has a link of rank 0, and host 2 has 1"),
            (Hello { host: 3, ..hello }, "has a number too large"),
        ] {
            let differs = other.differs(&hello).unwrap();
            assert!(differs.contains(words), "{differs}");
        }
    }
}
