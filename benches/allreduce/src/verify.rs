//! Fresh random data for every checked average, and the f64 mean that its result is compared with.
//!
//! Every value is a function of (seed, rank, tensor, element), roughly normal within ±4: the
//! reference is computed again from the seed, and nothing is kept. An element of a rank is wrong if
//! it is further from the mean than rounding allows, or if its bits are not the first rank's.
//!
//! Bounds of rounding, with one ulp of x being the distance between neighbours at |x|:
//!
//! * f32, f64: n ulp of the largest input (n + 1 for the limits, which multiply by 1/n; n + 3 with
//!   weights).
//! * bf16, f16: half an ulp of the mean, and as many ulp in f32 of the largest input; besides, if
//!   partial sums travelled in the dtype, n − 2 half ulps of the partial means.
//! * after the step of an outer optimizer, θ − (θ − mean): besides, one ulp of 4 in the type of
//!   sums.
//! * bf16, f16 of a collective that scales each input in the dtype, too: n + 1 ulp of the largest
//!   input.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::Arc;

use multiversion::multiversion;

use crate::memory::{cores, Arena, Placed};
use crate::number::{with_number, Number, CHUNK};

/// Elements that one core checks at a time, in one go.
const PIECE: usize = 1 << 16;

/// The data of one average, and what its result must be.
pub struct Check {
    pub seed: u64,
    /// Replicas of the ranks from `first` on, as many as this process has.
    pub arenas: Vec<Arc<Arena>>,
    pub first: usize,
    pub tensors: Arc<[Placed]>,
    /// One for each rank; all 1 for a plain mean.
    pub weights: Vec<f64>,
    pub roundings: Roundings,
}

/// Roundings of a method besides those of a plain sum and one division.
#[derive(Clone, Copy, Debug)]
pub struct Roundings {
    pub more: u8,
    /// Loss of 16-bit dtypes on the wire.
    pub wire: Wire,
    /// The mean went through a step of an outer optimizer, whose result it is.
    pub stepped: bool,
}

/// How partial sums of 16-bit dtypes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// As f32, or not at all.
    Wide,
    /// In the dtype.
    Narrow,
    /// In the dtype, of inputs that were multiplied in it by 1/n rounded to it.
    NarrowAndScaled,
}

/// Result of a check.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    /// Wrong elements of all ranks.
    pub wrong: u64,
    /// Largest distance of the first rank's elements from the f64 mean, in ulp of the largest of
    /// the inputs (ulp of the mean would count what inputs cancel). Infinite for a NaN.
    pub ulps: f64,
}

/// Part of a tensor.
#[derive(Clone, Copy)]
struct Piece {
    tensor: usize,
    begin: usize,
    elements: usize,
}

impl Check {
    /// Calls `f` for every piece, on all cores, and adds up the results.
    fn sum(&self, f: impl Fn(Piece) -> u64 + Sync) -> u64 {
        let pieces = self.tensors.iter().enumerate().flat_map(|(tensor, placed)| {
            let piece =
                move |begin| Piece { tensor, begin, elements: PIECE.min(placed.elements - begin) };
            (0..placed.elements).step_by(PIECE).map(piece)
        });
        let (pieces, next) = (pieces.collect::<Vec<_>>(), AtomicUsize::new(0));
        let take = || pieces.get(next.fetch_add(1, Ordering::Relaxed)).copied();
        let work = || std::iter::from_fn(take).map(&f).sum::<u64>();
        std::thread::scope(|scope| {
            let more = (1..cores().min(pieces.len())).map(|_| scope.spawn(work));
            let more: Vec<_> = more.collect();
            work() + more.into_iter().map(|each| each.join().expect("adds numbers")).sum::<u64>()
        })
    }

    fn elements<T>(&self, arena: usize, piece: Piece) -> *mut [T] {
        let start = self.tensors[piece.tensor].offset + piece.begin * size_of::<T>();
        let start = self.arenas[arena].as_mut_ptr().wrapping_add(start);
        std::ptr::slice_from_raw_parts_mut(start.cast(), piece.elements)
    }

    fn key(&self, rank: usize, piece: Piece) -> u32 {
        let place =
            (rank as u64) << 58 ^ (piece.tensor as u64) << 36 ^ (piece.begin / PIECE) as u64;
        // splitmix64's finalizer
        let mut x = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ place;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ x >> 31) as u32
    }

    /// Writes every rank's data.
    ///
    /// # Safety
    /// No other thread uses the arenas meanwhile.
    pub unsafe fn fill(&self) {
        self.sum(|piece| {
            for arena in 0..self.arenas.len() {
                with_number!(self.tensors[piece.tensor].dtype, T => {
                    // SAFETY: placed inside of the arena, and no two pieces share elements.
                    let values = unsafe { &mut *self.elements::<T>(arena, piece) };
                    fill(values, self.key(self.first + arena, piece))
                });
            }
            0
        });
    }

    /// A number that two ranks have in common if their elements have the same bits. Of the first
    /// arena.
    ///
    /// # Safety
    /// No other thread writes to the arenas meanwhile.
    pub unsafe fn digest(&self) -> u64 {
        // 32 bits of each piece, so that the sum has room.
        self.sum(|piece| {
            let mut hasher = DefaultHasher::new();
            (piece.tensor, piece.begin).hash(&mut hasher);
            let size = self.tensors[piece.tensor].dtype.size();
            let bytes =
                Piece { begin: size * piece.begin, elements: size * piece.elements, ..piece };
            // SAFETY: placed inside of the arena, which is initialised; the rest is the caller's.
            hasher.write(unsafe { &*self.elements::<u8>(0, bytes) });
            hasher.finish() >> 32
        })
    }

    /// Compares the average of what `fill` wrote with the mean. Nothing to compare: nothing wrong.
    ///
    /// # Safety
    /// No other thread writes to the arenas meanwhile.
    pub unsafe fn found(&self) -> Found {
        if self.arenas.is_empty() {
            return Found::default();
        }
        let ulps = AtomicU64::new(0f64.to_bits());
        let wrong = self.sum(|piece| {
            with_number!(self.tensors[piece.tensor].dtype, T => {
                // SAFETY: as above.
                let result = |arena| unsafe { &*self.elements::<T>(arena, piece) };
                let results: Vec<&[T]> = (0..self.arenas.len()).map(result).collect();
                let keys = (0..self.weights.len()).map(|rank| self.key(rank, piece));
                let keys: Vec<u32> = keys.collect();
                let found = compare(&results, &keys, &self.weights, self.roundings);
                // The bits of numbers that are not negative are ordered as the numbers are.
                ulps.fetch_max(found.ulps.to_bits(), Ordering::Relaxed);
                found.wrong
            })
        });
        Found { wrong, ulps: f64::from_bits(ulps.into_inner()) }
    }
}

/// CHUNK values from `index` on, in the dtype.
#[inline(always)]
fn values<T: Number>(key: u32, index: usize, wide: &mut [f64; CHUNK], raw: &mut [T; CHUNK]) {
    for (k, wide) in wide.iter_mut().enumerate() {
        // lowbias32 of a Weyl sequence; four 16-bit numbers of it and of its product make a bell.
        let mut x = key.wrapping_add((index + k) as u32).wrapping_mul(0x9e37_79b9);
        x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
        x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        let y = (x ^ x >> 13).wrapping_mul(0x85eb_ca6b);
        let sum = (x & 0xffff) + (x >> 16) + (y & 0xffff) + (y >> 16);
        *wide = f64::from(sum as i32 - 131_070) * (4.0 / 131_070.0);
    }
    T::narrow(wide, raw);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2", "x86_64+avx2+fma"))]
fn fill<T: Number>(elements: &mut [T], key: u32) {
    let (mut wide, mut raw) = ([0.0; CHUNK], [T::default(); CHUNK]);
    for (chunk, elements) in elements.chunks_mut(CHUNK).enumerate() {
        values(key, chunk * CHUNK, &mut wide, &mut raw);
        elements.copy_from_slice(&raw[..elements.len()]);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2", "x86_64+avx2+fma"))]
fn compare<T: Number>(
    results: &[&[T]],
    keys: &[u32],
    weights: &[f64],
    roundings: Roundings,
) -> Found {
    let (n, total) = (weights.len() as f64, weights.iter().sum::<f64>());
    let mut found = Found::default();
    let (mut wide, mut raw) = ([0.0; CHUNK], [T::default(); CHUNK]);
    for at in (0..results[0].len()).step_by(CHUNK) {
        let (mut sum, mut lost, mut most) = ([0.0f64; CHUNK], [0.0f64; CHUNK], [0.0f64; CHUNK]);
        for (&key, &weight) in keys.iter().zip(weights) {
            values(key, at, &mut wide, &mut raw);
            T::widen(&raw, &mut wide);
            for k in 0..CHUNK {
                let (x, before) = (wide[k], sum[k]);
                let term = x * weight;
                sum[k] += term;
                if T::MANTISSA == f64::MANTISSA {
                    // The exact loss of the sum: the reference must be better than the result.
                    let part = sum[k] - before;
                    lost[k] += (before - (sum[k] - part)) + (term - part);
                }
                most[k] = most[k].max(x.abs());
            }
        }
        let count = CHUNK.min(results[0].len() - at);
        let mut first = [T::default(); CHUNK];
        first[..count].copy_from_slice(&results[0][at..at + count]);
        T::widen(&first, &mut wide);
        let (mut off, mut ulps) = ([0u64; CHUNK], [0.0f64; CHUNK]);
        for k in 0..CHUNK {
            let mean = (sum[k] + lost[k]) / total;
            let error = (wide[k] - mean).abs();
            // A NaN is not within anything.
            off[k] = 1 - u64::from(error <= roundings.bound::<T>(n, mean, most[k]));
            ulps[k] = error / ulp::<T>(most[k]);
        }
        found.wrong += off[..count].iter().sum::<u64>();
        for &ulps in &ulps[..count] {
            found.ulps = if ulps.is_nan() { f64::INFINITY } else { found.ulps.max(ulps) };
        }
        for result in &results[1..] {
            let others = result[at..at + count].iter().zip(&first).zip(&off);
            found.wrong +=
                others.map(|((x, y), off)| off | u64::from(x.bits() != y.bits())).sum::<u64>();
        }
    }
    found
}

impl Roundings {
    /// Bound of the error of a result of n ranks that should be `mean`; `most`: the largest input's
    /// |x|.
    #[inline(always)]
    fn bound<T: Number>(&self, n: f64, mean: f64, most: f64) -> f64 {
        let ulps = n + f64::from(self.more);
        // Half an ulp of θ − mean, within ±8, and half an ulp of the result.
        let step = |mantissa| if self.stepped { power(2 - mantissa) } else { 0.0 };
        if size_of::<T>() > 2 {
            return ulps * ulp::<T>(most) + step(T::MANTISSA);
        }
        let hops = match self.wire {
            Wire::Wide => 0.0,
            // How often a partial mean, which is no larger than the largest input, is rounded.
            Wire::Narrow => (n - 2.0).max(0.0),
            // Each input loses half an ulp to the rounded 1/n and half to its product, each hop
            // half an ulp of the sum.
            Wire::NarrowAndScaled => return (n + 1.0) * ulp::<T>(most),
        };
        // A partial mean is made of a partial sum in f32, and back, with five roundings.
        let summed = (ulps + 5.0 * hops) * ulp::<f32>(most) + step(f32::MANTISSA);
        let before = summed + hops * 0.5 * ulp::<T>(most);
        before + 0.5 * ulp::<T>(mean.abs() + before)
    }
}

/// 2^exponent, for normal f64s and the smallest one.
#[inline(always)]
fn power(exponent: i32) -> f64 {
    if exponent < -1022 {
        f64::from_bits(1 << (exponent + 1074))
    } else {
        f64::from_bits(((exponent + 1023) as u64) << 52)
    }
}

/// Distance of neighbours at x ≥ 0.
#[inline(always)]
fn ulp<T: Number>(x: f64) -> f64 {
    let exponent = f64::from_bits(x.to_bits() & 0x7ff0_0000_0000_0000);
    (exponent * power(-T::MANTISSA)).max(power(T::SMALLEST))
}

#[cfg(test)]
#[path = "verify_tests.rs"]
pub mod tests;
