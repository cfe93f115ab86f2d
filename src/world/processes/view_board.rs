//! The memory that all processes of a world share: which view the world is in, and who
//! belongs to it.
//!
//! A view is decided by one compare-and-swap of one word, which names a list of members that
//! was written before. Each member of a view has a pair of lists of its own, by its rank, in
//! which it proposes the next one; the pair's parity keeps the list that holds as it is meanwhile.
//! Ranks pass to other processes in later views, and one that was stopped may go on writing
//! then. So every word of a list carries the view that it was proposed for, and a word is
//! only ever replaced by one of a later view: once a list is written, no proposal of an
//! earlier view changes it. Ids of processes are counted, and never run out.

use std::mem::offset_of;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{fence, AtomicU32, AtomicU64, Ordering};

use crate::abi::PA_MAX_WORLD;
use crate::backend::Memfd;

const MOST: usize = PA_MAX_WORLD as usize;

/// What is in it. Zeroed at first.
#[repr(C)]
struct Words {
    /// (view << 32) | the rank, in the view before, of the process whose list holds.
    agreed: AtomicU64,
    /// Tells this world from others of its name.
    nonce: AtomicU64,
    /// The id that the next process gets.
    next_id: AtomicU32,
    reserved: AtomicU32,
    /// By rank in the view before, for even and odd views.
    lists: [[List; 2]; MOST],
}

/// Each word is (view << 32) | value.
#[repr(C)]
struct List {
    count: AtomicU64,
    /// Id of the joiner of this view, plus 1; 0: there is none.
    joined: AtomicU64,
    /// By rank.
    members: [AtomicU64; MOST],
}

#[derive(Debug)]
pub(super) struct ViewBoard {
    memory: Memfd,
}

/// The agreed list of members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) number: u32,
    /// Ids, by rank.
    pub(super) members: Vec<usize>,
    /// The member that was admitted with this view.
    pub(super) joined: Option<usize>,
    /// The word that decided it.
    word: u64,
}

impl ViewBoard {
    /// Of a world whose first view has the ids 0 to `size` - 1, by rank.
    pub(super) fn new(size: usize) -> Result<ViewBoard, String> {
        let board = ViewBoard { memory: Memfd::new(size_of::<Words>())? };
        // Not of the clock and the process: two processes of two PID namespaces may have one id.
        let mut nonce = [0; 8];
        let filled = rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty());
        filled.map_err(|error| format!("no random number for the name of the world: {error}"))?;
        board.words().nonce.store(u64::from_ne_bytes(nonce), Ordering::Relaxed);
        board.words().next_id.store(size as u32, Ordering::Relaxed);
        board.write(0, 0, &(0..size).collect::<Vec<_>>(), None);
        Ok(board)
    }

    /// What another process made with `new`.
    pub(super) fn open(file: OwnedFd) -> Result<ViewBoard, String> {
        Ok(ViewBoard { memory: Memfd::open(file, size_of::<Words>())? })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.memory.file()
    }

    pub(super) fn nonce(&self) -> u64 {
        self.words().nonce.load(Ordering::Relaxed)
    }

    /// An id that nobody had. `None`: 2^32 processes have asked for one.
    pub(super) fn new_id(&self) -> Option<usize> {
        let next = |id: u32| id.checked_add(1);
        let id = self.words().next_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        id.ok().map(|id| id as usize)
    }

    /// The view that a world begins with, which may be over.
    pub(super) fn first(size: usize) -> View {
        View { number: 0, members: (0..size).collect(), joined: None, word: 0 }
    }

    /// The view that the world is in.
    pub(super) fn agreed(&self) -> View {
        loop {
            // Acquire: every word of the list is at least as new as the one that its proposer
            // wrote.
            let word = self.words().agreed.load(Ordering::Acquire);
            let view = (word >> 32) as u32;
            if let Some((members, joined)) = self.read(word as u32 as usize, view) {
                return View { number: view, members, joined, word };
            }
            // Its place has been taken by the list of a later view, whose proposer has seen
            // that another decision holds. With the release in `write`, so does this process.
            fence(Ordering::Acquire);
            if self.words().agreed.load(Ordering::Relaxed) == word {
                // Not written by this crate: no process is a member, and nobody waits for it.
                return View { number: view, members: vec![], joined: None, word };
            }
        }
    }

    /// The list that a rank proposed for a view. `None`: a part of it is of another one.
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

    /// Only the view: it may be over.
    pub(super) fn view(&self) -> u32 {
        (self.words().agreed.load(Ordering::Acquire) >> 32) as u32
    }

    /// Proposes the view after `last`, of which `me` is a member: it is that if nobody else
    /// was earlier. Each member proposes once for each view.
    pub(super) fn propose(&self, me: usize, last: &View, members: &[usize], joined: Option<usize>) {
        let Some(rank) = last.members.iter().position(|&id| id == me) else { return };
        let next = last.number + 1;
        self.write(rank, next, members, joined);
        let word = u64::from(next) << 32 | rank as u64;
        // Release: whoever reads the decision sees the list.
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
            // Unless a later view's is there: then this proposal is too late, and is not
            // decided.
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
        // SAFETY: of that size and aligned, as all of a mapping is; initialised by the system, all
        // of it atomics, and borrowed with the memory.
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
        board.propose(0, &second, &[0], None); // is no member
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

    /// A process that was stopped half way through its proposal, at any word, goes on when its rank
    /// is another process's.
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
    fn a_page_that_is_damaged_has_no_members() {
        let board = ViewBoard::new(2).unwrap();
        for word in [5 << 32, 5 << 32 | 3, u64::MAX] {
            board.words().agreed.store(word, Ordering::Relaxed);
            assert!(board.agreed().members.is_empty());
        }
    }

    /// Threads that propose as fast as they can, in each other's places, and readers: no list is
    /// seen that nobody has proposed.
    #[test]
    fn what_is_read_was_proposed_by_one() {
        const LAST: u32 = 20_000;
        let board = ViewBoard::new(2).unwrap();
        std::thread::scope(|scope| {
            for me in 0..2 {
                let board = &board;
                scope.spawn(move || {
                    let mut stopped: Option<View> = None;
                    while board.view() < LAST {
                        let last = board.agreed();
                        // All members but those that propose are the same number. Ranks change
                        // every time.
                        let number = (last.number as usize + 1) * 2 + me;
                        if let Some(late) = stopped.take().filter(|late| late.number < last.number)
                        {
                            board.propose(me, &late, &[3; MOST], Some(3));
                        } else if number.is_multiple_of(7) {
                            stopped = Some(last); // before its proposal, until others have gone on
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
