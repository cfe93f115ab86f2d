//! The limits: times that no averager can beat in one host's memory.
//!
//! **One pass.** Averaging must read every replica once and write every replica once. This does
//! that and nothing else: all cores, each with a contiguous part of every replica, no meeting, no
//! votes, no tensors. Plain stores, since the lines they go to were just read. The mean is the sum
//! times 1/n rounded, one rounding more than the library allows itself, since dividing could cost
//! time.
//!
//! **Two passes.** An averager that changes no tensor before all have been summed must keep the
//! mean until then, and whatever is larger than the caches goes to memory and comes back. The first
//! pass reads every replica and writes one mean, past the caches if it is large; the second reads
//! it and writes every replica, past the caches too, since those lines were not just read. Again no
//! meeting, no vote, and every thread goes on to its second pass by itself.

use std::ops::Range;
use std::sync::Arc;

use crate::lanes::{Float, Lanes, LANES};
use crate::memory::{Arena, Placed};
use crate::number::with_number;
use crate::simd::{self, Task};

/// One thread's share of the pass.
pub struct Pass {
    pub arenas: Vec<Arc<Arena>>,
    /// The same in every arena.
    pub buffers: Arc<[Placed]>,
    /// This thread, and how many there are.
    pub part: usize,
    pub parts: usize,
    /// Where the mean waits between two passes; `None`: there is one.
    pub between: Option<Arc<Arena>>,
}

/// Means of more bytes than this are written past the caches: as large as a cluster of cores'
/// third-level cache.
const LARGE: usize = 32 << 20;

impl Pass {
    /// Averages this thread's part of all buffers.
    pub fn run(&self) {
        match &self.between {
            None => self.pass(&self.arenas, &self.arenas, false),
            Some(between) => {
                let between = std::slice::from_ref(between);
                let bytes: usize =
                    self.buffers.iter().map(|buffer| buffer.elements * buffer.dtype.size()).sum();
                self.pass(&self.arenas, between, bytes > LARGE);
                self.pass(between, &self.arenas, bytes > LARGE);
            }
        }
    }

    /// The mean of some → others.
    fn pass(&self, from: &[Arc<Arena>], to: &[Arc<Arena>], stream: bool) {
        for buffer in self.buffers.iter() {
            let range = part(buffer.elements, self.part, self.parts);
            with_number!(buffer.dtype, T => {
                // SAFETY: placed inside of the arenas.
                let start = |a: &Arc<Arena>| unsafe { a.start.add(buffer.offset) }.cast::<T>();
                let starts = |all: &[Arc<Arena>]| all.iter().map(start).collect::<Vec<*mut T>>();
                let (from, to) = (starts(from), starts(to));
                simd::best(Average { from: &from, to: &to, range, stream })
            })
        }
    }
}

/// The `index`-th of `parts` equal ranges of whole lines.
fn part(elements: usize, index: usize, parts: usize) -> Range<usize> {
    let lanes = 4 * LANES;
    let lines = elements.div_ceil(lanes);
    let at = |index: usize| (lines * index / parts * lanes).min(elements);
    at(index)..at(index + 1)
}

/// The mean of a range of some buffers → the same range of others. No two threads share a range.
struct Average<'a, T> {
    from: &'a [*mut T],
    to: &'a [*mut T],
    range: Range<usize>,
    /// Past the caches.
    stream: bool,
}

impl<T: Lanes> Task for Average<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const ISA: u8>(self) {
        // Known counts unroll. Lines of one replica that are moved together: fewer turns between
        // replicas, and no more than the registers hold.
        match self.from.len() {
            1 => self.of::<ISA, 1, 4>(),
            2 => self.of::<ISA, 2, 4>(),
            3 => self.of::<ISA, 3, 4>(),
            4 => self.of::<ISA, 4, 4>(),
            8 => self.of::<ISA, 8, 4>(),
            _ => self.of::<ISA, 0, 4>(),
        }
    }
}

impl<T: Lanes> Average<'_, T> {
    #[inline(always)]
    fn of<const ISA: u8, const N: usize, const GROUPS: usize>(self) {
        let (from, to) = (if N > 0 { &self.from[..N] } else { self.from }, self.to);
        let inverse = T::Sum::inverse(from.len());
        let mut at = self.range.start;
        while at + GROUPS * LANES <= self.range.end {
            // SAFETY: inside of every buffer, in a range that no other thread uses. Plain reads and
            // writes.
            unsafe {
                let block = |start: *mut T| start.add(at).cast::<[[T; LANES]; GROUPS]>();
                let raw =
                    mean::<T, ISA, GROUPS>(from, inverse, |start| block(start).read_unaligned());
                if self.stream {
                    to.iter().for_each(|&start| simd::stream(block(start), &raw));
                } else {
                    to.iter().for_each(|&start| block(start).write_unaligned(raw));
                }
            }
            at += GROUPS * LANES;
        }
        while at < self.range.end {
            let count = LANES.min(self.range.end - at);
            // SAFETY: as above, for `count` elements.
            unsafe {
                let raw = mean::<T, ISA, 1>(from, inverse, |start| {
                    let mut raw = [T::default(); LANES];
                    raw.as_mut_ptr().copy_from_nonoverlapping(start.add(at), count);
                    [raw]
                });
                to.iter().for_each(|&start| {
                    start.add(at).copy_from_nonoverlapping(raw[0].as_ptr(), count)
                });
            }
            at += count;
        }
        simd::stream_fence();
    }
}

#[inline(always)]
fn mean<T: Lanes, const ISA: u8, const GROUPS: usize>(
    replicas: &[*mut T],
    inverse: T::Sum,
    load: impl Fn(*mut T) -> [[T; LANES]; GROUPS],
) -> [[T; LANES]; GROUPS] {
    let mut sum = [[T::Sum::default(); LANES]; GROUPS];
    for &start in replicas {
        let raw = load(start);
        for (sum, raw) in sum.iter_mut().zip(&raw) {
            let wide = T::widen::<ISA>(raw);
            for k in 0..LANES {
                sum[k] += wide[k];
            }
        }
    }
    let mut raw = [[T::default(); LANES]; GROUPS];
    for (raw, sum) in raw.iter_mut().zip(&mut sum) {
        for x in sum.iter_mut() {
            *x *= inverse;
        }
        *raw = T::narrow::<ISA>(sum);
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_element_once() {
        for elements in [0, 1, 63, 64, 65, 1000, 12_345] {
            for parts in 1..9 {
                let mut end = 0;
                for index in 0..parts {
                    let range = part(elements, index, parts);
                    assert_eq!(range.start, end);
                    end = range.end;
                }
                assert_eq!(end, elements);
            }
        }
    }
}
