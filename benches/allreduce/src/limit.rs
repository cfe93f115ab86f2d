//! The limits: times that no averager can beat in one host's memory.
//!
//! **One pass.** Averaging must read every replica once and write every replica once. This does
//! that and nothing else: all cores, each with a contiguous part of every replica, no meeting, no
//! votes, no tensors. Plain stores, since the lines they go to were just read. The mean is the sum
//! times 1/n rounded, one rounding more than the library allows itself, since dividing could cost
//! time. The loop is `limit.cpp`.
//!
//! **Two passes.** An averager that changes no tensor before all have been summed must keep the
//! mean until then, and whatever is larger than the caches goes to memory and comes back. The first
//! pass reads every replica and writes one mean, past the caches if it is large; the second reads
//! it and writes every replica, past the caches too, since those lines were not just read. Again no
//! meeting, no vote, and every thread goes on to its second pass by itself.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use param_averager::{BuildInfo, Dtype};

use crate::memory::{Arena, Placed};

/// The mean of a range of some buffers → the same range of others, as `limit.cpp` has it.
#[repr(C)]
struct Mean {
    from: *const *mut u8,
    reads: usize,
    to: *const *mut u8,
    writes: usize,
    /// In bytes.
    begin: usize,
    end: usize,
    /// In the order of `Dtype::ALL`.
    dtype: u32,
    /// Past the caches.
    stream: bool,
}

type Function = unsafe extern "C" fn(&Mean);

extern "C" {
    fn allreduce_bench_mean_baseline(mean: &Mean);
    #[cfg(target_arch = "x86_64")]
    fn allreduce_bench_mean_avx2(mean: &Mean);
    #[cfg(target_arch = "x86_64")]
    fn allreduce_bench_mean_avx512(mean: &Mean);
}

/// Instruction sets that the library's kernels are compiled for, each with those before it.
const SETS: &[(&str, Function)] = &[
    ("baseline", allreduce_bench_mean_baseline),
    #[cfg(target_arch = "x86_64")]
    ("avx2", allreduce_bench_mean_avx2),
    #[cfg(target_arch = "x86_64")]
    ("avx512", allreduce_bench_mean_avx512),
];

/// Instruction sets that this machine has.
static AVAILABLE: LazyLock<&[(&str, Function)]> = LazyLock::new(|| {
    let best = BuildInfo::get().instruction_set;
    let last = SETS.iter().position(|(set, _)| *set == best).expect("the library's sets");
    &SETS[..=last]
});

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
        self.run_on(AVAILABLE[AVAILABLE.len() - 1].1);
    }

    fn run_on(&self, mean: Function) {
        match &self.between {
            None => self.pass(mean, &self.arenas, &self.arenas, false),
            Some(between) => {
                let between = std::slice::from_ref(between);
                let bytes: usize = self.buffers.iter().map(Placed::bytes).sum();
                self.pass(mean, &self.arenas, between, bytes > LARGE);
                self.pass(mean, between, &self.arenas, bytes > LARGE);
            }
        }
    }

    /// The mean of some → others.
    fn pass(&self, mean: Function, from: &[Arc<Arena>], to: &[Arc<Arena>], stream: bool) {
        let starts = |arenas: &[Arc<Arena>]| -> Vec<*mut u8> {
            arenas.iter().map(|arena| arena.as_mut_ptr()).collect()
        };
        let (from, to) = (starts(from), starts(to));
        for buffer in self.buffers.iter() {
            let part = part(buffer.elements, self.part, self.parts);
            let dtype = Dtype::ALL.iter().position(|&dtype| dtype == buffer.dtype);
            let of = Mean {
                from: from.as_ptr(),
                reads: from.len(),
                to: to.as_ptr(),
                writes: to.len(),
                begin: buffer.offset + part.start * buffer.dtype.size(),
                end: buffer.offset + part.end * buffer.dtype.size(),
                dtype: dtype.expect("one of all") as u32,
                stream,
            };
            // SAFETY: placed inside of the arenas, and no two threads have a part in common. The
            // machine has the function's instruction set.
            unsafe { mean(&of) };
        }
    }
}

/// The `index`-th of `parts` equal ranges of 64 elements, which are whole lines.
fn part(elements: usize, index: usize, parts: usize) -> Range<usize> {
    const LINE: usize = 64;
    let lines = elements.div_ceil(LINE);
    let at = |index: usize| (lines * index / parts * LINE).min(elements);
    at(index)..at(index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::arena;
    use crate::verify;

    /// One pass and two, of lengths that leave a rest.
    #[test]
    fn every_instruction_set_writes_the_mean_to_all() {
        let worlds = [1, 2, 3, 4, 5, 8];
        let cases = Dtype::ALL.into_iter().flat_map(|dtype| worlds.map(|ranks| (dtype, ranks)));
        for (dtype, ranks) in cases {
            for (set, mean) in *AVAILABLE {
                let mut check = verify::tests::check(dtype, ranks);
                check.roundings.more = 1;
                let between = arena(check.arenas[0].len());
                for between in [None, Some(between)] {
                    // SAFETY: no other thread has the arenas.
                    unsafe { check.fill() };
                    for part in 0..3 {
                        let (arenas, buffers) = (check.arenas.clone(), check.tensors.clone());
                        let between = between.clone();
                        Pass { arenas, buffers, part, parts: 3, between }.run_on(*mean);
                    }
                    // SAFETY: as above.
                    let wrong = unsafe { check.found() }.wrong;
                    assert_eq!(wrong, 0, "{dtype}, {ranks} ranks, {set}");
                }
            }
        }
    }

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
