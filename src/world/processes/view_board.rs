//! The view board: memory shared by all processes of a world, which holds the current view, that
//! is, the agreed list of members.
//!
//! A view is decided by one compare-and-swap of the word `agreed`, from the word of the view
//! before. The word names a list of members that was written before the swap. View numbers only
//! grow, so no word returns and the swap succeeds once per view. Each rank of a view has two lists,
//! one for even and one for odd next views, so a proposal never overwrites the list in force. A
//! rank passes to another process in a later view, and a process that was stopped may resume its
//! proposal then. Therefore every word of a list carries the view it was proposed for, and no word
//! is replaced by one of an earlier view: an old proposal cannot change a newer list, and a reader
//! that meets words of two views reads `agreed` again. Ids of processes come from a counter and are
//! never reused.

use std::mem::offset_of;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};

use crate::abi::PA_MAX_WORLD;
use crate::backend::Memfd;

const MOST: usize = PA_MAX_WORLD as usize;

/// Layout of the board. Zeroed at first.
#[repr(C)]
struct Words {
    /// (view << 32) | rank of the proposer, in the view before.
    agreed: AtomicU64,
    /// Tells worlds of one name apart.
    nonce: AtomicU64,
    /// Next id to give to a joiner.
    next_id: AtomicU32,
    reserved: AtomicU32,
    /// Proposed lists, by rank of the proposer in the view before, and by parity of the view.
    lists: [[List; 2]; MOST],
}

/// A proposed list of members. Each word is (view << 32) | value.
#[repr(C)]
struct List {
    count: AtomicU64,
    /// Id of the joiner that this view admits, plus 1; 0 if none.
    joined: AtomicU64,
    /// Ids of the members, by rank.
    members: [AtomicU64; MOST],
}

#[derive(Debug)]
pub(crate) struct ViewBoard {
    memory: Memfd,
}

/// A view: an agreed list of members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) number: u32,
    /// Ids of the members, by rank.
    pub(crate) members: Vec<usize>,
    /// Id of the joiner that this view has admitted.
    pub(crate) joined: Option<usize>,
    /// The value of `agreed` that decided this view.
    word: u64,
}

impl ViewBoard {
    /// Creates the board of a world whose first view has the ids 0 to `size` - 1, by rank.
    pub(crate) fn new(size: usize) -> Result<ViewBoard, String> {
        let board = ViewBoard { memory: Memfd::new(size_of::<Words>())? };
        // Random: clock and pid are not unique across PID namespaces.
        let mut nonce = [0; 8];
        let filled = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
        filled.map_err(|error| format!("no random number for the world's nonce: {error}"))?;
        board.words().nonce.store(u64::from_ne_bytes(nonce), Ordering::Relaxed);
        board.words().next_id.store(size as u32, Ordering::Relaxed);
        board.write(0, 0, &(0..size).collect::<Vec<_>>(), None);
        Ok(board)
    }

    /// Opens a board that another process has created.
    pub(crate) fn open(file: OwnedFd) -> Result<ViewBoard, String> {
        Ok(ViewBoard { memory: Memfd::open(file, size_of::<Words>())? })
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.memory.file()
    }

    pub(crate) fn nonce(&self) -> u64 {
        self.words().nonce.load(Ordering::Relaxed)
    }

    /// Takes an id that no process of this world has had. `None` after 2^32 ids.
    pub(crate) fn new_id(&self) -> Option<usize> {
        let next = |id: u32| id.checked_add(1);
        let id = self.words().next_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.ok().map(|id| id as usize)
    }

    /// The first view of a world of `size` ranks, which may have been replaced.
    pub(crate) fn first(size: usize) -> View {
        View { number: 0, members: (0..size).collect(), joined: None, word: 0 }
    }

    /// The current view.
    pub(crate) fn agreed(&self) -> View {
        loop {
            // Acquire: every word of the list is at least as new as the word that its proposer
            // wrote.
            let word = self.words().agreed.load(Ordering::Acquire);
            let view = (word >> 32) as u32;
            if let Some((members, joined)) = self.read(word as u32 as usize, view) {
                return View { number: view, members, joined, word };
            }
            // A list of a later view has replaced this one. Its proposer had seen a later decision,
            // and by this fence and the release in `write` this process sees it, too.
            fence(Ordering::Acquire);
            if self.words().agreed.load(Ordering::Relaxed) == word {
                // Damaged memory: a view without members, so that no process waits for one.
                return View { number: view, members: vec![], joined: None, word };
            }
        }
    }

    /// The list that a rank proposed for a view. `None` if a word belongs to another view.
    fn read(&self, rank: usize, view: u32) -> Option<(Vec<usize>, Option<usize>)> {
        let list = &self.words().lists[rank % MOST][view as usize & 1];
        let load = |word: &AtomicU64| {
            let word = word.load(Ordering::Relaxed);
            ((word >> 32) as u32 == view).then_some(word as u32 as usize)
        };
        let count = load(&list.count)?;
        let members: Option<Vec<usize>> = list.members.iter().take(count).map(load).collect();
        Some((members?, load(&list.joined)?.checked_sub(1)))
    }

    /// Number of the current view.
    pub(crate) fn view(&self) -> u32 {
        (self.words().agreed.load(Ordering::Acquire) >> 32) as u32
    }

    /// Proposes the view after `last`. The first proposal of any member decides. Does nothing
    /// unless `me` is a member of `last`. Each member proposes at most once per view.
    pub(crate) fn propose(&self, me: usize, last: &View, members: &[usize], joined: Option<usize>) {
        let Some(rank) = last.members.iter().position(|&id| id == me) else { return };
        let next = last.number + 1;
        self.write(rank, next, members, joined);
        let word = u64::from(next) << 32 | rank as u64;
        // Release: a process that reads the decision sees the list.
        let _ = self.words().agreed.compare_exchange(
            last.word,
            word,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    fn write(&self, rank: usize, view: u32, members: &[usize], joined: Option<usize>) {
        let list = &self.words().lists[rank][view as usize & 1];
        let write = |word: &AtomicU64, value: usize| {
            let new = u64::from(view) << 32 | value as u64;
            // A word of a later view stays: this proposal is too late then, and its swap fails.
            let older = |word: u64| ((word >> 32) as u32 <= view).then_some(new);
            let _ = word.fetch_update(Ordering::Release, Ordering::Relaxed, older);
        };
        for (word, &id) in list.members.iter().zip(members) {
            write(word, id);
        }
        write(&list.joined, joined.map_or(0, |id| id + 1));
        write(&list.count, members.len());
    }

    fn words(&self) -> &Words {
        const { assert!(offset_of!(Words, lists) == 24) };
        // SAFETY: the mapping has this size and alignment, is initialised by the system, is
        // borrowed with `self`, and is accessed through atomics only.
        unsafe { &*(self.memory.address() as *const Words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_proposal_holds_for_all() {
        let board = ViewBoard::new(3).unwrap();
        let first = board.agreed();
        assert_eq!(first, ViewBoard::first(3));
        assert_eq!((board.new_id(), board.new_id()), (Some(3), Some(4)));
        board.propose(1, &first, &[1, 2, 4], Some(4));
        board.propose(2, &first, &[0, 2], None);
        let second = board.agreed();
        assert_eq!(
            (second.number, &second.members[..], second.joined),
            (1, &[1, 2, 4][..], Some(4))
        );
        board.propose(0, &second, &[0], None); // not a member
        assert_eq!(board.view(), 1);
        board.propose(4, &second, &[4], None);
        assert_eq!(board.agreed().members, [4]);
        assert_eq!(board.view(), 2);
    }

    #[test]
    fn ids_are_not_used_up() {
        let board = ViewBoard::new(1).unwrap();
        for id in 1..100_000 {
            assert_eq!(board.new_id(), Some(id));
        }
        board.words().next_id.store(u32::MAX, Ordering::Relaxed);
        assert_eq!((board.new_id(), board.new_id()), (None, None));
        let (first, last) = (board.agreed(), u32::MAX as usize - 1);
        board.propose(0, &first, &[0, last], Some(last));
        assert_eq!((board.agreed().members, board.agreed().joined), (vec![0, last], Some(last)));
    }

    /// A process that was stopped at any word of its proposal resumes after its rank has passed to
    /// another process.
    #[test]
    fn a_late_proposal_changes_no_later_list() {
        for late in [1, 2, 3, 4] {
            let board = ViewBoard::new(2).unwrap();
            let mut views = vec![board.agreed()];
            for view in 1..6 {
                let last = views.last().unwrap();
                let members: Vec<usize> = (0..2 + view % 3).map(|at| 10 * view + at).collect();
                board.propose(last.members[0], last, &members, None);
                views.push(board.agreed());
                assert_eq!(views[view].members, members);
            }
            let now = board.agreed();
            let stale = &views[late - 1];
            board.propose(stale.members[0], stale, &[7; MOST], Some(7));
            board.propose(stale.members[1], stale, &[8; MOST], Some(8));
            assert_eq!(board.agreed(), now);
        }
    }

    #[test]
    fn a_damaged_board_has_no_members() {
        let board = ViewBoard::new(2).unwrap();
        for word in [5 << 32, 5 << 32 | 3, u64::MAX] {
            board.words().agreed.store(word, Ordering::Relaxed);
            assert!(board.agreed().members.is_empty());
        }
    }

    /// Threads propose as fast as possible, from alternating ranks, while another thread reads:
    /// every list that is read was proposed by one thread.
    #[test]
    fn every_list_that_is_read_was_proposed_by_one_thread() {
        const LAST: u32 = 20_000;
        let board = ViewBoard::new(2).unwrap();
        std::thread::scope(|scope| {
            for me in 0..2 {
                let board = &board;
                scope.spawn(move || {
                    let mut stopped: Option<View> = None;
                    while board.view() < LAST {
                        let last = board.agreed();
                        // All members except the proposers are the same number. The ranks of the
                        // proposers alternate.
                        let number = (last.number as usize + 1) * 2 + me;
                        if let Some(late) = stopped.take().filter(|late| late.number < last.number)
                        {
                            board.propose(me, &late, &[3; MOST], Some(3));
                        } else if number.is_multiple_of(7) {
                            // stopped before its proposal, until the other thread has made one
                            stopped = Some(last);
                            std::thread::yield_now();
                            continue;
                        }
                        let both = if number & 2 == 0 { [0, 1] } else { [1, 0] };
                        let members = [&both[..], &vec![number; number % (MOST - 1)]].concat();
                        board.propose(me, &last, &members, Some(number));
                    }
                });
            }
            while board.view() < LAST {
                let seen = board.agreed();
                if seen.number > 0 {
                    let number = seen.joined.unwrap();
                    assert_eq!(number / 2, seen.number as usize);
                    let both = if number & 2 == 0 { [0, 1] } else { [1, 0] };
                    assert_eq!(
                        seen.members,
                        [&both[..], &vec![number; number % (MOST - 1)]].concat()
                    );
                }
            }
        });
    }
}
