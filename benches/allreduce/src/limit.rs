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

use multiversion::multiversion;

use crate::memory::{Arena, Placed};
use crate::number::{with_number, Float, Number};

/// One thread's share of the pass.
pub struct Pass {
    pub arenas: Vec<Arc<Arena>>,
    /// The same in every arena.
    pub buffers: Arc<[Placed]>,
    /// This thread, and how many there are.
    pub part: usize,
    pub parts: usize,
    /// Where the mean waits between two passes; `None`: there is one pass.
    pub between: Option<Arc<Arena>>,
}

/// Means of more bytes than this are written past the caches: as large as a cluster of cores'
/// third-level cache.
const LARGE: usize = 32 << 20;
/// Elements that are summed in the first-level cache.
const CHUNK: usize = 512;

impl Pass {
    /// Averages this thread's part of all buffers.
    pub fn run(&self) {
        let Some(between) = &self.between else {
            return self.pass(&self.arenas, &self.arenas, false);
        };
        let between = std::slice::from_ref(between);
        let large = self.buffers.iter().map(Placed::bytes).sum::<usize>() > LARGE;
        self.pass(&self.arenas, between, large);
        self.pass(between, &self.arenas, large);
    }

    /// Writes the mean of some arenas to others.
    fn pass(&self, from: &[Arc<Arena>], to: &[Arc<Arena>], stream: bool) {
        for buffer in self.buffers.iter() {
            let range = part(buffer.elements, self.part, self.parts);
            with_number!(buffer.dtype, T => {
                let starts = |arenas: &[Arc<Arena>]| -> Vec<*mut T> {
                    // SAFETY: placed inside of the arenas.
                    let start = |a: &Arc<Arena>| unsafe { a.start.add(buffer.offset) }.cast::<T>();
                    arenas.iter().map(start).collect()
                };
                // SAFETY: the range lies inside of every buffer, and is this thread's alone.
                unsafe { average::<T>(&starts(from), &starts(to), range, stream) }
            })
        }
    }
}

/// The `index`-th of `parts` equal ranges of whole lines.
fn part(elements: usize, index: usize, parts: usize) -> Range<usize> {
    const LINE: usize = 64;
    let lines = elements.div_ceil(LINE);
    let at = |index: usize| (lines * index / parts * LINE).min(elements);
    at(index)..at(index + 1)
}

/// Writes the mean of a range of some buffers to the same range of others.
///
/// # Safety
/// The range lies inside of every buffer, and no other thread uses it.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2", "x86_64+avx2+fma"))]
unsafe fn average<T: Number>(from: &[*mut T], to: &[*mut T], range: Range<usize>, stream: bool) {
    let inverse = T::Sum::of(1.0 / from.len() as f64);
    let (mut sum, mut wide) = ([T::Sum::default(); CHUNK], [[T::Sum::default(); CHUNK]; 2]);
    let mut mean = Lines([T::default(); CHUNK]);
    for at in range.clone().step_by(CHUNK) {
        let count = CHUNK.min(range.end - at);
        // Two at a time halve the traffic of the sums.
        for (index, pair) in from.chunks(2).enumerate() {
            for (&start, wide) in pair.iter().zip(&mut wide) {
                // SAFETY: the caller's. The borrow ends before anything is written.
                let raw = unsafe { std::slice::from_raw_parts(start.add(at), count) };
                T::widen(raw, &mut wide[..count]);
            }
            let [one, other] = &wide;
            for k in 0..count {
                let term = if pair.len() == 2 { one[k] + other[k] } else { one[k] };
                sum[k] = if index == 0 { term } else { sum[k] + term };
            }
        }
        for sum in &mut sum[..count] {
            *sum = *sum * inverse;
        }
        T::narrow(&sum[..count], &mut mean.0[..count]);
        for &start in to {
            // SAFETY: the caller's.
            unsafe { copy(mean.0.as_ptr(), start.add(at), count, stream) };
        }
    }
    #[cfg(target_arch = "x86_64")]
    std::arch::x86_64::_mm_sfence(); // streamed stores come before what this thread does next
}

/// Starts at a multiple of a vector's size.
#[repr(align(64))]
struct Lines<T>([T; CHUNK]);

/// Copies, past the caches if asked and the machine has an instruction for it.
///
/// # Safety
/// Valid for `count` elements each, and they do not overlap. `from` is a multiple of 16.
#[inline(always)]
unsafe fn copy<T>(from: *const T, to: *mut T, count: usize, stream: bool) {
    #[cfg(target_arch = "x86_64")]
    if stream && to.addr().is_multiple_of(16) && count == CHUNK {
        use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_stream_si128};
        let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
        for at in 0..size_of::<T>() * CHUNK / 16 {
            // SAFETY: inside of both, at multiples of 16. Every x86-64 has SSE2.
            unsafe { _mm_stream_si128(to.add(at), _mm_load_si128(from.add(at))) };
        }
        return;
    }
    // SAFETY: the caller's.
    unsafe { to.copy_from_nonoverlapping(from, count) }
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
