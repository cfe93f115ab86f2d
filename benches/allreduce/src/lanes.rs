//! Vector code for the limits: elements of every dtype, sixteen at a time, in memory and in the
//! type that sums are made in. By hand for 16-bit dtypes: with loops over slices, or the half
//! crate's conversions, the limit took 2.5 (bf16) and 5 (f16) times as long (rustc 1.95, AVX-512),
//! and was none.
//!
//! Loops, not `std::array::from_fn`: that is not always inlined, and then compiled for the baseline
//! instruction set.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use crate::simd::BASELINE;

/// Elements that are handled together: at least one vector register of any instruction set.
pub const LANES: usize = 16;

/// An element type of tensors.
pub trait Lanes: Copy + Default + Send + Sync + 'static {
    /// Type of the sums.
    type Sum: Float;

    /// Exactly. The machine must have `ISA`.
    fn widen<const ISA: u8>(raw: &[Self; LANES]) -> [Self::Sum; LANES];
    /// Rounded once, to nearest even. The machine must have `ISA`.
    fn narrow<const ISA: u8>(wide: &[Self::Sum; LANES]) -> [Self; LANES];
}

/// A type that sums are made in.
pub trait Float: Copy + Default + std::ops::AddAssign + std::ops::MulAssign {
    /// 1 / n.
    fn inverse(n: usize) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn inverse(n: usize) -> f32 {
        1.0 / n as f32
    }
}

impl Float for f64 {
    #[inline(always)]
    fn inverse(n: usize) -> f64 {
        1.0 / n as f64
    }
}

impl Lanes for f32 {
    type Sum = f32;
    #[inline(always)]
    fn widen<const ISA: u8>(raw: &[f32; LANES]) -> [f32; LANES] {
        *raw
    }
    #[inline(always)]
    fn narrow<const ISA: u8>(wide: &[f32; LANES]) -> [f32; LANES] {
        *wide
    }
}

impl Lanes for f64 {
    type Sum = f64;
    #[inline(always)]
    fn widen<const ISA: u8>(raw: &[f64; LANES]) -> [f64; LANES] {
        *raw
    }
    #[inline(always)]
    fn narrow<const ISA: u8>(wide: &[f64; LANES]) -> [f64; LANES] {
        *wide
    }
}

impl Lanes for bf16 {
    type Sum = f32;
    #[inline(always)]
    fn widen<const ISA: u8>(raw: &[bf16; LANES]) -> [f32; LANES] {
        #[cfg(target_arch = "x86_64")]
        if ISA > BASELINE {
            // SAFETY: the machine has it.
            return unsafe { x86::widen_bf16::<ISA>(raw) };
        }
        let mut wide = [0.0; LANES];
        for k in 0..LANES {
            wide[k] = f32::from_bits(u32::from(raw[k].to_bits()) << 16);
        }
        wide
    }
    /// NaN aside, which is not summed here.
    #[inline(always)]
    fn narrow<const ISA: u8>(wide: &[f32; LANES]) -> [bf16; LANES] {
        #[cfg(target_arch = "x86_64")]
        if ISA > BASELINE {
            // SAFETY: the machine has it.
            return unsafe { x86::narrow_bf16::<ISA>(wide) };
        }
        let mut raw = [bf16::ZERO; LANES];
        for k in 0..LANES {
            let bits = wide[k].to_bits();
            raw[k] = bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16);
        }
        raw
    }
}

impl Lanes for f16 {
    type Sum = f32;
    #[inline(always)]
    fn widen<const ISA: u8>(raw: &[f16; LANES]) -> [f32; LANES] {
        #[cfg(target_arch = "x86_64")]
        if ISA > BASELINE {
            // SAFETY: the machine has it.
            return unsafe { x86::widen_f16::<ISA>(raw) };
        }
        raw.map(f16::to_f32)
    }
    #[inline(always)]
    fn narrow<const ISA: u8>(wide: &[f32; LANES]) -> [f16; LANES] {
        #[cfg(target_arch = "x86_64")]
        if ISA > BASELINE {
            // SAFETY: the machine has it.
            return unsafe { x86::narrow_f16::<ISA>(wide) };
        }
        wide.map(f16::from_f32)
    }
}

/// Conversions that the compiler does not find by itself. Each needs the machine to have `ISA`, at
/// least AVX2.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use super::LANES;
    use crate::simd::AVX512;

    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

    #[inline(always)]
    pub unsafe fn widen_bf16<const ISA: u8>(raw: &[bf16; LANES]) -> [f32; LANES] {
        let mut wide = [0.0f32; LANES];
        // SAFETY: one vector of each array, or two halves.
        unsafe {
            let raw = _mm256_loadu_si256(raw.as_ptr().cast());
            if ISA == AVX512 {
                let bits = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(raw));
                _mm512_storeu_ps(wide.as_mut_ptr(), _mm512_castsi512_ps(bits));
            } else {
                let low = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw));
                let high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(raw));
                _mm256_storeu_si256(wide.as_mut_ptr().cast(), _mm256_slli_epi32::<16>(low));
                _mm256_storeu_si256(wide.as_mut_ptr().add(8).cast(), _mm256_slli_epi32::<16>(high));
            }
        }
        wide
    }

    #[inline(always)]
    pub unsafe fn narrow_bf16<const ISA: u8>(wide: &[f32; LANES]) -> [bf16; LANES] {
        let mut raw = [bf16::ZERO; LANES];
        // SAFETY: as above.
        unsafe {
            if ISA == AVX512 {
                let bits = _mm512_castps_si512(_mm512_loadu_ps(wide.as_ptr()));
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded =
                    _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
                let raw_bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded));
                _mm256_storeu_si256(raw.as_mut_ptr().cast(), raw_bits);
            } else {
                let rounded = |at: *const f32| {
                    let bits = _mm256_loadu_si256(at.cast());
                    let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
                    let rounded =
                        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
                    _mm256_srli_epi32::<16>(rounded)
                };
                // Packing works within 128-bit halves; the permutation puts the four quarters in
                // order.
                let packed =
                    _mm256_packus_epi32(rounded(wide.as_ptr()), rounded(wide.as_ptr().add(8)));
                _mm256_storeu_si256(
                    raw.as_mut_ptr().cast(),
                    _mm256_permute4x64_epi64::<0b11_01_10_00>(packed),
                );
            }
        }
        raw
    }

    #[inline(always)]
    pub unsafe fn widen_f16<const ISA: u8>(raw: &[f16; LANES]) -> [f32; LANES] {
        let mut wide = [0.0f32; LANES];
        // SAFETY: as above.
        unsafe {
            if ISA == AVX512 {
                let raw = _mm256_loadu_si256(raw.as_ptr().cast());
                _mm512_storeu_ps(wide.as_mut_ptr(), _mm512_cvtph_ps(raw));
            } else {
                for at in [0, 8] {
                    let half = _mm_loadu_si128(raw.as_ptr().add(at).cast());
                    _mm256_storeu_ps(wide.as_mut_ptr().add(at), _mm256_cvtph_ps(half));
                }
            }
        }
        wide
    }

    #[inline(always)]
    pub unsafe fn narrow_f16<const ISA: u8>(wide: &[f32; LANES]) -> [f16; LANES] {
        let mut raw = [f16::ZERO; LANES];
        // SAFETY: as above.
        unsafe {
            if ISA == AVX512 {
                let half = _mm512_cvtps_ph::<NEAREST>(_mm512_loadu_ps(wide.as_ptr()));
                _mm256_storeu_si256(raw.as_mut_ptr().cast(), half);
            } else {
                for at in [0, 8] {
                    let half = _mm256_cvtps_ph::<NEAREST>(_mm256_loadu_ps(wide.as_ptr().add(at)));
                    _mm_storeu_si128(raw.as_mut_ptr().add(at).cast(), half);
                }
            }
        }
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{self, Task};

    /// Converts on the best instruction set, and without any.
    struct Convert<T> {
        wide: [f32; LANES],
        result: std::marker::PhantomData<T>,
    }

    impl<T: Lanes<Sum = f32>> Task for Convert<T> {
        type Output = ([T; LANES], [f32; LANES]);
        #[inline(always)]
        fn run<const ISA: u8>(self) -> Self::Output {
            let raw = T::narrow::<ISA>(&self.wide);
            (raw, T::widen::<ISA>(&raw))
        }
    }

    fn both_ways<T: Lanes<Sum = f32> + std::fmt::Debug + PartialEq>(
        round: fn(f32) -> T,
        back: fn(T) -> f32,
    ) {
        for start in (0..20_000u32).map(|k| k * 211_111) {
            let wide = std::array::from_fn(|k| f32::from_bits(start.wrapping_add(k as u32 * 77)));
            if wide.iter().any(|x: &f32| x.is_nan()) {
                continue;
            }
            let expected = (wide.map(round), wide.map(round).map(back));
            simd::each(
                || Convert { wide, result: std::marker::PhantomData },
                |found| assert_eq!(found, expected),
            );
        }
    }

    #[test]
    fn halves_are_rounded_as_the_half_crate_does() {
        both_ways::<bf16>(bf16::from_f32, bf16::to_f32);
        both_ways::<f16>(f16::from_f32, f16::to_f32);
    }
}
