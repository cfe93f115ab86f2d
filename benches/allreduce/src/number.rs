//! The element types of tensors, and the types that sums are made in.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use param_averager::Dtype;

/// An element type of tensors.
pub trait Number: Copy + Default + Send + Sync + 'static {
    /// Type of sums.
    type Sum: Float;
    /// Bits after the leading one.
    const MANTISSA: i32;
    /// Exponent of the smallest positive value, subnormal ones included.
    const SMALLEST: i32;

    /// Converts exactly, into a slice of the same length.
    fn widen(raw: &[Self], wide: &mut [Self::Sum]);
    /// Rounds to nearest even, into a slice of the same length.
    fn narrow(wide: &[Self::Sum], raw: &mut [Self]);
    /// Bits in memory.
    fn bits(self) -> u64;
}

/// A type that sums are made in.
pub trait Float:
    Number<Sum = Self> + std::ops::Add<Output = Self> + std::ops::Mul<Output = Self> + Into<f64>
{
    /// 1 / n.
    fn inverse(n: usize) -> Self;
    /// Value in −4 … 4 of a level in −131070 … 131070. Dividing uses all bits of the mantissa.
    fn spread(level: i32) -> Self;
}

macro_rules! float {
    ($type:ty, $mantissa:literal, $smallest:literal) => {
        impl Number for $type {
            type Sum = $type;
            const MANTISSA: i32 = $mantissa;
            const SMALLEST: i32 = $smallest;
            #[inline(always)]
            fn widen(raw: &[$type], wide: &mut [$type]) {
                wide.copy_from_slice(raw);
            }
            #[inline(always)]
            fn narrow(wide: &[$type], raw: &mut [$type]) {
                raw.copy_from_slice(wide);
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
        impl Float for $type {
            #[inline(always)]
            fn inverse(n: usize) -> $type {
                1.0 / n as $type
            }
            #[inline(always)]
            fn spread(level: i32) -> $type {
                level as $type * (4.0 / 131_070.0)
            }
        }
    };
}
float!(f32, 23, -149);
float!(f64, 52, -1074);

/// Not half's conversions of slices: the compiler makes no vector code of their cases for NaN,
/// which no value here is.
impl Number for bf16 {
    type Sum = f32;
    const MANTISSA: i32 = 7;
    const SMALLEST: i32 = -133;
    #[inline(always)]
    fn widen(raw: &[bf16], wide: &mut [f32]) {
        for (wide, raw) in wide.iter_mut().zip(raw) {
            *wide = f32::from_bits(u32::from(raw.to_bits()) << 16);
        }
    }
    #[inline(always)]
    fn narrow(wide: &[f32], raw: &mut [bf16]) {
        for (raw, wide) in raw.iter_mut().zip(wide) {
            let bits = wide.to_bits();
            *raw = bf16::from_bits((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16);
        }
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        self.to_bits().into()
    }
}

impl Number for f16 {
    type Sum = f32;
    const MANTISSA: i32 = 10;
    const SMALLEST: i32 = -24;
    #[inline(always)]
    fn widen(raw: &[f16], wide: &mut [f32]) {
        raw.convert_to_f32_slice(wide);
    }
    #[inline(always)]
    fn narrow(wide: &[f32], raw: &mut [f16]) {
        raw.convert_from_f32_slice(wide);
    }
    #[inline(always)]
    fn bits(self) -> u64 {
        self.to_bits().into()
    }
}

/// Evaluates an expression with `$T` as the Rust type of a dtype.
macro_rules! with_number {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            param_averager::Dtype::F32 => with_number!(@ $T = f32, $body),
            param_averager::Dtype::F64 => with_number!(@ $T = f64, $body),
            param_averager::Dtype::F16 => with_number!(@ $T = half::f16, $body),
            param_averager::Dtype::Bf16 => with_number!(@ $T = half::bf16, $body),
            other => unreachable!("{other}: layouts have four dtypes"),
        }
    };
    (@ $T:ident = $type:ty, $body:expr) => {{
        type $T = $type;
        $body
    }};
}
pub(crate) use with_number;

/// A dtype from its name in nccl-tests, Rust, PyTorch or safetensors.
pub fn dtype(name: &str) -> Option<Dtype> {
    Some(match name.to_ascii_lowercase().as_str() {
        "f32" | "float" | "float32" => Dtype::F32,
        "f64" | "double" | "float64" => Dtype::F64,
        "f16" | "half" | "float16" => Dtype::F16,
        "bf16" | "bfloat16" => Dtype::Bf16,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_as_the_half_crate_does() {
        let wide: Vec<f32> = (0..20_000u32).map(|k| f32::from_bits(k * 211_111)).collect();
        let wide: Vec<f32> = wide.into_iter().filter(|x| !x.is_nan()).collect();
        let (mut raw, mut back) = (vec![bf16::ZERO; wide.len()], vec![0.0; wide.len()]);
        bf16::narrow(&wide, &mut raw);
        bf16::widen(&raw, &mut back);
        for ((&wide, raw), back) in wide.iter().zip(raw).zip(back) {
            assert_eq!((raw, back), (bf16::from_f32(wide), bf16::from_f32(wide).to_f32()));
        }
    }

    #[test]
    fn dtypes_have_many_names() {
        for (names, dtype) in [
            (["float", "f32"], Dtype::F32),
            (["double", "F64"], Dtype::F64),
            (["half", "F16"], Dtype::F16),
            (["bfloat16", "BF16"], Dtype::Bf16),
        ] {
            assert_eq!(names.map(super::dtype), [Some(dtype); 2]);
        }
        assert_eq!(super::dtype("int8"), None);
    }
}
