//! The memory that all processes of a world share: which generation the world is in, and who belongs to it.
//!
//! A generation is decided by one compare-and-swap of one word, which names a process and thereby a list of members that this
//! process has written before. Processes have ids, given once, so that no list is ever written by two.

use std::mem::offset_of;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::abi::PA_MAX_WORLD;
use crate::backend::Shared;

/// Processes that a world can have had in its life.
pub(super) const MOST_IDS: usize = 4096;
const MOST: usize = PA_MAX_WORLD as usize;

/// What is in it. Zeroed at first.
#[repr(C)]
struct Words {
    /// (generation << 32) | the id of the process whose list holds.
    decision: AtomicU64,
    /// Tells this world from others of its name.
    nonce: AtomicU64,
    /// The id that the next process gets.
    next_id: AtomicU32,
    reserved: AtomicU32,
    /// By id, for odd and even generations: who proposes the next list leaves the one that holds as it is.
    lists: [[List; 2]; MOST_IDS],
}

#[repr(C)]
struct List {
    count: AtomicU32,
    /// The id of the one that is new, plus 1; 0: nobody is.
    joined: AtomicU32,
    /// By rank.
    members: [AtomicU32; MOST],
}

#[derive(Debug)]
pub(super) struct Page {
    memory: Shared,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decision {
    pub(super) generation: u32,
    /// Ids, by rank.
    pub(super) members: Vec<usize>,
    /// The one of them that was let in with this generation.
    pub(super) joined: Option<usize>,
    /// The word that says so.
    word: u64,
}

impl Page {
    /// Of a world whose first generation has the ids 0 to `size` - 1, by rank.
    pub(super) fn new(size: usize) -> Result<Page, String> {
        let page = Page { memory: Shared::new(size_of::<Words>())? };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
        // Two processes may begin at once, but have two ids.
        let nonce = time ^ u64::from(std::process::id()) << 40;
        page.words().nonce.store(nonce, Ordering::Relaxed);
        page.words().next_id.store(size as u32, Ordering::Relaxed);
        page.write(0, 0, &(0..size).collect::<Vec<_>>(), None);
        Ok(page)
    }

    /// What another process made with `new`.
    pub(super) fn open(file: OwnedFd) -> Result<Page, String> {
        Ok(Page { memory: Shared::open(file, size_of::<Words>())? })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.memory.file()
    }

    pub(super) fn nonce(&self) -> u64 {
        self.words().nonce.load(Ordering::Relaxed)
    }

    /// An id that nobody had. `None`: there are no more.
    pub(super) fn new_id(&self) -> Option<usize> {
        let next = |id: u32| (id < MOST_IDS as u32).then_some(id + 1);
        let id = self.words().next_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.ok().map(|id| id as usize)
    }

    /// The generation that a world begins with, which may be over.
    pub(super) fn first(size: usize) -> Decision {
        Decision { generation: 0, members: (0..size).collect(), joined: None, word: 0 }
    }

    /// The generation that the world is in.
    pub(super) fn decision(&self) -> Decision {
        loop {
            let word = self.words().decision.load(Ordering::Acquire);
            let (generation, by) = ((word >> 32) as u32, word as u32 as usize);
            let list = &self.words().lists[by % MOST_IDS][generation as usize & 1];
            let load = |word: &AtomicU32| word.load(Ordering::Relaxed) as usize;
            let members = list.members.iter().take(load(&list.count)).map(load).collect();
            let joined = load(&list.joined).checked_sub(1);
            // With the fence in `write`: who has read a word of the list after this one has seen that this one is over.
            fence(Ordering::Acquire);
            if self.words().decision.load(Ordering::Relaxed) == word {
                return Decision { generation, members, joined, word };
            }
        }
    }

    /// Only the generation: it may be over.
    pub(super) fn generation(&self) -> u32 {
        (self.words().decision.load(Ordering::Acquire) >> 32) as u32
    }

    /// Proposes the generation after `last`: it is that if nobody else was earlier. One proposal a process at a time.
    pub(super) fn propose(&self, me: usize, last: &Decision, members: &[usize], joined: Option<usize>) {
        let next = last.generation + 1;
        self.write(me, next, members, joined);
        let word = u64::from(next) << 32 | me as u64;
        let _ = self.words().decision.compare_exchange(last.word, word, Ordering::AcqRel, Ordering::Acquire);
    }

    fn write(&self, me: usize, generation: u32, members: &[usize], joined: Option<usize>) {
        let list = &self.words().lists[me][generation as usize & 1];
        fence(Ordering::Release);
        list.count.store(members.len() as u32, Ordering::Relaxed);
        list.joined.store(joined.map_or(0, |id| id as u32 + 1), Ordering::Relaxed);
        for (word, &id) in list.members.iter().zip(members) {
            word.store(id as u32, Ordering::Relaxed);
        }
    }

    fn words(&self) -> &Words {
        const { assert!(offset_of!(Words, lists) == 24) };
        // SAFETY: of that size and aligned, as all of a mapping is; initialised by the system, all of it atomics, and borrowed
        // with the memory.
        unsafe { &*(self.memory.address() as *const Words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_proposal_holds_for_all() {
        let page = Page::new(3).unwrap();
        let first = page.decision();
        assert_eq!(first, Page::first(3));
        assert_eq!((page.new_id(), page.new_id()), (Some(3), Some(4)));
        page.propose(1, &first, &[1, 2, 4], Some(4));
        page.propose(2, &first, &[0, 2], None);
        let second = page.decision();
        assert_eq!((second.generation, &second.members[..], second.joined), (1, &[1, 2, 4][..], Some(4)));
        page.propose(1, &second, &[1], None);
        assert_eq!(page.decision().members, [1]);
        assert_eq!(page.generation(), 2);
    }

    #[test]
    fn ids_come_to_an_end() {
        let page = Page::new(1).unwrap();
        assert_eq!((1..MOST_IDS).filter(|&id| page.new_id() == Some(id)).count(), MOST_IDS - 1);
        assert_eq!((page.new_id(), page.new_id()), (None, None));
    }

    /// Threads that propose as fast as they can, and one that reads: it sees no list that nobody has proposed.
    #[test]
    fn what_is_read_was_proposed_by_one() {
        let page = Page::new(2).unwrap();
        std::thread::scope(|scope| {
            for me in 0..2 {
                let page = &page;
                scope.spawn(move || {
                    while page.generation() < 20_000 {
                        let last = page.decision();
                        // All members are the same number.
                        let number = (last.generation as usize + 1) * 2 + me;
                        page.propose(me, &last, &vec![number; 1 + number % MOST], Some(number));
                    }
                });
            }
            while page.generation() < 20_000 {
                let seen = page.decision();
                if seen.generation > 0 {
                    let number = seen.joined.unwrap();
                    assert_eq!(number / 2, seen.generation as usize);
                    assert_eq!(seen.members, vec![number; 1 + number % MOST]);
                }
            }
        });
    }
}
