//! Streams of the application: which kind each one is, and which averages on them would wait for
//! one another.
//!
//! An average that was started on a stream is enqueued within it: later work of that stream waits
//! for the average, which waits for those of the peers. If the average of a peer is behind that
//! work, on the same stream or by the rules of the null stream, neither ends. That can be seen
//! among the ranks of one process, and is refused.

use std::sync::Mutex;
use std::thread::ThreadId;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use crate::backend::Unstarted;
use crate::sync::lock;

/// `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`.
const LEGACY: usize = 1;
const PER_THREAD: usize = 2;

/// A stream of one context, as far as the order of work is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// The context's default stream. Its work and that of blocking streams wait for each other.
    Null,
    /// The default stream of this thread.
    PerThread(ThreadId),
    Blocking(usize),
    NonBlocking(usize),
}

impl Stream {
    /// # Safety
    /// `raw` is a stream of the current context.
    pub(super) unsafe fn of(raw: sys::CUstream) -> Result<Stream, Failed> {
        match raw as usize {
            0 | LEGACY => return Ok(Stream::Null),
            PER_THREAD => return Ok(Stream::PerThread(std::thread::current().id())),
            _ => {}
        }
        let mut flags = 0;
        // SAFETY: guaranteed by the caller.
        unsafe { call!(cuStreamGetFlags(raw, &mut flags)) }?;
        Ok(match flags & sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32 {
            0 => Stream::Blocking(raw as usize),
            _ => Stream::NonBlocking(raw as usize),
        })
    }

    pub(super) fn is_non_blocking(self) -> bool {
        matches!(self, Stream::NonBlocking(_))
    }

    /// The reason why work on this stream waits for all earlier work on `other`, if it does.
    fn waits_for(self, other: Stream) -> Option<&'static str> {
        let is_blocking = |stream| matches!(stream, Stream::Blocking(_) | Stream::PerThread(_));
        match (self, other) {
            (one, other) if one == other => Some("the stream"),
            (Stream::Null, other) if is_blocking(other) => {
                Some("the null stream, which waits for every blocking stream, and on one of them")
            }
            (one, Stream::Null) if is_blocking(one) => {
                Some("a blocking stream, which waits for the null stream, and there")
            }
            _ => None,
        }
    }
}

/// An average that has begun behind the work of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Begun {
    /// Address of the context.
    pub(super) context: usize,
    /// Address of the averager's control block, which all its ranks in this process share.
    pub(super) control: u64,
    pub(super) rank: usize,
    pub(super) stream: Stream,
}

/// Averages that later work of their streams waits for, with a number for each.
static HELD: Mutex<(u64, Vec<(u64, Begun)>)> = Mutex::new((0, vec![]));

/// An average that later work of its stream waits for, until it is dropped.
#[derive(Debug)]
pub(super) struct Held(u64);

impl Drop for Held {
    fn drop(&mut self) {
        lock(&HELD).1.retain(|(number, _)| *number != self.0);
    }
}

impl Begun {
    /// Refuses an average behind work that waits for a peer's average. If later work of its own
    /// stream will wait for it (`holds`), peers are refused in the same way until the result is
    /// dropped. Of two averages that would wait for each other, one is always refused.
    pub(super) fn enter(self, holds: bool) -> Result<Option<Held>, Unstarted> {
        let mut held = lock(&HELD);
        let is_peer = |other: &Begun| {
            (other.context, other.control) == (self.context, self.control)
                && other.rank != self.rank
        };
        let peers = held.1.iter().map(|(_, other)| other).filter(|other| is_peer(other));
        let mut waits =
            peers.filter_map(|other| Some((self.stream.waits_for(other.stream)?, other.rank)));
        if let Some((why, rank)) = waits.next() {
            return Err(Unstarted::Refused {
                found: format!("{why} on which rank {rank} has started its average of this call"),
                expected: "a stream of this rank's own (with `start`, no blocking one beside a \
                    rank on the null stream), or `average` on every rank in the place of `start`",
            });
        }
        if !holds {
            return Ok(None);
        }
        held.0 += 1;
        let number = held.0;
        held.1.push((number, self));
        Ok(Some(Held(number)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_that_would_wait_for_each_other_are_refused() {
        let thread = Stream::PerThread(std::thread::current().id());
        let other = Stream::PerThread(std::thread::spawn(|| ()).thread().id());
        let all = [
            Stream::Null,
            thread,
            other,
            Stream::Blocking(16),
            Stream::Blocking(32),
            Stream::NonBlocking(48),
            Stream::NonBlocking(64),
        ];
        let begun = |rank, stream| Begun { context: 1, control: 7, rank, stream };
        for (i, first) in all.into_iter().enumerate() {
            for (j, second) in all.into_iter().enumerate() {
                // By the rules of the null stream.
                let is_null = |at| at == 0;
                let is_blocking = |at| (1..5).contains(&at);
                let waits = i == j || is_null(i) && is_blocking(j) || is_null(j) && is_blocking(i);
                let held = begun(0, first).enter(true).unwrap();
                for holds in [false, true] {
                    let entered = begun(1, second).enter(holds);
                    assert_eq!(entered.is_err(), waits, "{first:?}, {second:?}");
                    // Averagers and contexts of others, and further averages of the same rank.
                    let elsewhere = [
                        Begun { control: 8, ..begun(1, second) },
                        Begun { context: 2, ..begun(1, second) },
                        begun(0, second),
                    ];
                    drop(entered);
                    assert!(elsewhere.iter().all(|begun| begun.enter(holds).is_ok()));
                }
                drop(held);
                assert!(begun(1, second).enter(true).is_ok(), "the first has ended");
            }
        }
        // Averages that nothing waits for are never in the way.
        assert!(begun(0, Stream::Null).enter(false).unwrap().is_none());
        assert!(begun(1, Stream::Null).enter(true).is_ok());
    }
}
