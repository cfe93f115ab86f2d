//! Fresh random data for every checked average, and the f64 mean that it is held against.
//!
//! Every value is a function of (seed, rank, tensor, element), roughly normal within ±4, so that
//! nothing needs to be kept to be compared with: the reference is computed again from the seed. An
//! element of a rank counts as wrong if it is further from the mean than rounding allows, or if its
//! bits are not those of rank 0.
//!
//! What rounding allows, with one ulp of x being the distance between neighbours at |x|:
//!
//! | | |
//! |---|---|
//! | f32, f64 | n ulp of the largest input (n + 1 with weights, and for the limit, which multiplies by 1/n) |
//! | bf16, f16 | half an ulp of the mean, and n ulp in f32 of the largest input |
//! | … whose partial sums travelled in the dtype | besides, n − 1 half ulps of the partial sums, divided by n |
//! | … of a collective that scales each input in the dtype, too | n + 1 ulp of the largest input |

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use crate::memory::{on_all_cores, Arena, Placed};
use crate::number::{with_number, Float, Number, LANES, MOST_LEVEL};
use crate::simd::{self, Task};

/// Elements that one core checks at a time; a multiple of LANES.
const PIECE: usize = 1 << 16;

/// A check: the data of one average and what its result must be.
pub struct Check {
    pub seed: u64,
    /// Of all ranks, or of as many as this process has, from rank `first` on.
    pub arenas: Vec<Arc<Arena>>,
    pub first: usize,
    pub tensors: Arc<[Placed]>,
    /// One for each rank; all 1: plain.
    pub weights: Vec<f64>,
    /// Roundings that the method makes besides those of a plain sum and one division.
    pub more_roundings: u8,
    /// What 16-bit dtypes lose on their way.
    pub wire: Wire,
}

/// How partial sums of 16-bit dtypes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// As f32, or not at all.
    Wide,
    /// In the dtype.
    Narrow,
    /// In the dtype, as a sum of inputs that were multiplied by 1/n in it, which was rounded to it.
    NarrowAndScaled,
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// Elements, of all ranks, that are not what they should be.
    pub wrong: u64,
    /// The largest distance from the f64 mean, of rank 0's elements, each in ulp of the largest of
    /// its inputs: ulp of the mean itself would count what the inputs cancel, not what the average
    /// loses. Infinite for a NaN.
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
    fn pieces(&self) -> Vec<Piece> {
        let pieces = self.tensors.iter().enumerate().flat_map(|(tensor, placed)| {
            let begins = (0..placed.elements).step_by(PIECE);
            begins.map(move |begin| Piece {
                tensor,
                begin,
                elements: PIECE.min(placed.elements - begin),
            })
        });
        pieces.collect()
    }

    fn start<T>(&self, arena: usize, piece: Piece) -> *mut T {
        let bytes = self.tensors[piece.tensor].offset + piece.begin * size_of::<T>();
        // SAFETY: placed inside of the arena.
        unsafe { self.arenas[arena].start().add(bytes).cast() }
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

    /// Gives every rank its data.
    ///
    /// # Safety
    /// Nobody else accesses the arenas meanwhile.
    pub unsafe fn fill(&self) {
        let pieces = self.pieces();
        let arenas = self.arenas.len();
        on_all_cores(pieces.len() * arenas, |job| {
            let (arena, piece) = (job % arenas, pieces[job / arenas]);
            with_number!(self.tensors[piece.tensor].dtype, T => {
                // SAFETY: so many elements lie there, and each job has others.
                let values = unsafe { std::slice::from_raw_parts_mut(self.start::<T>(arena, piece), piece.elements) };
                simd::best(Fill { values, key: self.key(self.first + arena, piece) })
            });
            0
        });
    }

    /// A number that two ranks have in common if their elements have the same bits.
    ///
    /// # Safety
    /// Nobody else writes to the arenas meanwhile.
    pub unsafe fn digest(&self) -> u64 {
        let pieces = self.pieces();
        // Of 32 bits a piece, so that the sum has room.
        on_all_cores(pieces.len(), |job| {
            let piece = pieces[job];
            with_number!(self.tensors[piece.tensor].dtype, T => {
                // SAFETY: so many elements lie there, and nobody writes them.
                let bytes = unsafe {
                    std::slice::from_raw_parts(self.start::<T>(0, piece).cast::<u8>(), piece.elements * size_of::<T>())
                };
                let mix = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
                let words = bytes.chunks(8).map(|word| match word.try_into() {
                    Ok(whole) => u64::from_ne_bytes(whole),
                    Err(_) => word.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte)),
                });
                words.fold(job as u64, mix) >> 32
            })
        })
    }

    /// How well the average of what `fill` gave came out.
    ///
    /// # Safety
    /// Nobody else accesses the arenas meanwhile.
    pub unsafe fn found(&self) -> Found {
        let pieces = self.pieces();
        let ulps = AtomicU64::new(0f64.to_bits());
        let wrong = on_all_cores(pieces.len(), |job| {
            let piece = pieces[job];
            with_number!(self.tensors[piece.tensor].dtype, T => {
                // SAFETY: so many elements lie there, and nobody writes them.
                let of = |arena| unsafe { std::slice::from_raw_parts(self.start::<T>(arena, piece), piece.elements) };
                let results: Vec<&[T]> = (0..self.arenas.len()).map(of).collect();
                let keys: Vec<u32> = (0..self.weights.len()).map(|rank| self.key(rank, piece)).collect();
                let tolerance = Tolerance::new::<T>(&self.weights, self.more_roundings, self.wire);
                let found = simd::best(Compare { results: &results, keys: &keys, weights: &self.weights, tolerance });
                // The bits of numbers that are not negative are ordered as they are.
                ulps.fetch_max(found.ulps.to_bits(), Ordering::Relaxed);
                found.wrong
            })
        });
        Found { wrong, ulps: f64::from_bits(ulps.into_inner()) }
    }
}

/// LANES values from `index` on.
#[inline(always)]
fn values<T: Number, const ISA: u8>(key: u32, index: usize) -> [T; LANES] {
    let mut wide = [T::Sum::default(); LANES];
    for (k, wide) in wide.iter_mut().enumerate() {
        // lowbias32 of a Weyl sequence; four 16-bit numbers of it and of its product make a bell.
        let mut x = key.wrapping_add((index + k) as u32).wrapping_mul(0x9e37_79b9);
        x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
        x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
        x ^= x >> 16;
        let y = (x ^ x >> 13).wrapping_mul(0x85eb_ca6b);
        let sum = (x & 0xffff) + (x >> 16) + (y & 0xffff) + (y >> 16);
        *wide = T::Sum::spread(sum as i32 - MOST_LEVEL);
    }
    T::narrow::<ISA>(&wide)
}

struct Fill<'a, T> {
    values: &'a mut [T],
    key: u32,
}

impl<T: Number> Task for Fill<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run<const ISA: u8>(self) {
        for (chunk, lanes) in self.values.chunks_mut(LANES).enumerate() {
            let values = values::<T, ISA>(self.key, chunk * LANES);
            match <&mut [T; LANES]>::try_from(&mut *lanes) {
                Ok(whole) => *whole = values,
                Err(_) => lanes.copy_from_slice(&values[..lanes.len()]),
            }
        }
    }
}

/// How far from the mean a result may be.
#[derive(Clone, Copy, Debug)]
struct Tolerance {
    /// Ulps of the largest input, in the type that sums are made in.
    ulps: f64,
    /// How often a partial mean, which is no larger than the largest input, is rounded to the
    /// wire's dtype.
    hops: f64,
    /// Ulps of the largest input in the dtype itself, instead of all that.
    scaled: Option<f64>,
}

impl Tolerance {
    fn new<T: Number>(weights: &[f64], more_roundings: u8, wire: Wire) -> Self {
        let n = weights.len() as f64;
        let narrow = wire == Wire::Narrow && size_of::<T>() == 2;
        let hops = if narrow { (n - 2.0).max(0.0) } else { 0.0 };
        // Each input loses half an ulp to the rounded 1/n and half to its product, each hop half an
        // ulp of the sum.
        let scaled = (wire == Wire::NarrowAndScaled && size_of::<T>() == 2).then_some(n + 1.0);
        Tolerance { ulps: n + f64::from(more_roundings), hops, scaled }
    }

    /// Bound of the error of a result that should be `mean`; `most`: the largest input's |x|.
    #[inline(always)]
    fn of<T: Number>(&self, mean: f64, most: f64) -> f64 {
        if let Some(ulps) = self.scaled {
            return ulps * ulp(most, T::MANTISSA, power(T::SMALLEST));
        }
        if size_of::<T>() > 2 {
            return self.ulps * ulp(most, T::MANTISSA, power(T::SMALLEST));
        }
        // A partial mean is made of a partial sum in f32, and back, with five roundings.
        let summed = (self.ulps + 5.0 * self.hops) * ulp(most, f32::MANTISSA, power(f32::SMALLEST));
        let before = summed + self.hops * 0.5 * ulp(most, T::MANTISSA, power(T::SMALLEST));
        before + 0.5 * ulp(mean.abs() + before, T::MANTISSA, power(T::SMALLEST))
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

/// The distance of neighbours at x ≥ 0 for so many bits of mantissa.
#[inline(always)]
fn ulp(x: f64, mantissa: i32, smallest: f64) -> f64 {
    (f64::from_bits(x.to_bits() & 0x7ff0_0000_0000_0000) * power(-mantissa)).max(smallest)
}

struct Compare<'a, T> {
    results: &'a [&'a [T]],
    keys: &'a [u32],
    weights: &'a [f64],
    tolerance: Tolerance,
}

impl<T: Number> Task for Compare<'_, T> {
    type Output = Found;
    #[inline(always)]
    fn run<const ISA: u8>(self) -> Found {
        let elements = self.results[0].len();
        let total: f64 = self.weights.iter().sum();
        let (mut wrong, mut most_ulps) = (0, 0.0f64);
        for at in (0..elements).step_by(LANES) {
            let (mut sum, mut lost, mut most) = ([0.0f64; LANES], [0.0f64; LANES], [0.0f64; LANES]);
            for (&key, &weight) in self.keys.iter().zip(self.weights) {
                let wide = T::widen::<ISA>(&values::<T, ISA>(key, at));
                for k in 0..LANES {
                    let x: f64 = wide[k].into();
                    let (term, before) = (x * weight, sum[k]);
                    sum[k] += term;
                    if T::MANTISSA == f64::MANTISSA {
                        // What the sum lost, exactly: the reference must be better than what it
                        // judges.
                        let part = sum[k] - before;
                        lost[k] += (before - (sum[k] - part)) + (term - part);
                    }
                    most[k] = most[k].max(x.abs());
                }
            }
            let count = LANES.min(elements - at);
            let mut first = [T::default(); LANES];
            first[..count].copy_from_slice(&self.results[0][at..at + count]);
            let wide = T::widen::<ISA>(&first);
            let (mut off, mut ulps) = ([0u64; LANES], [0.0f64; LANES]);
            for k in 0..LANES {
                let mean = (sum[k] + lost[k]) / total;
                let x: f64 = wide[k].into();
                let tolerance = self.tolerance.of::<T>(mean, most[k]);
                // A NaN is not within anything.
                let error = (x - mean).abs();
                off[k] = 1 - u64::from(error <= tolerance);
                ulps[k] = error / ulp(most[k], T::MANTISSA, power(T::SMALLEST));
            }
            wrong += off[..count].iter().sum::<u64>();
            for &ulps in &ulps[..count] {
                most_ulps = if ulps.is_nan() { f64::INFINITY } else { most_ulps.max(ulps) };
            }
            for result in &self.results[1..] {
                let mut other = [T::default(); LANES];
                other[..count].copy_from_slice(&result[at..at + count]);
                for k in 0..count {
                    wrong += off[k] | u64::from(other[k].bits() != first[k].bits());
                }
            }
        }
        Found { wrong, ulps: most_ulps }
    }
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
