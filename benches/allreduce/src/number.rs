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
pub trait Float: Copy + Default + Into<f64> {
    /// Rounds.
    fn of(x: f64) -> Self;
}

impl Float for f32 {
    #[inline(always)]
    fn of(x: f64) -> f32 {
        x as f32
    }
}

impl Float for f64 {
    #[inline(always)]
    fn of(x: f64) -> f64 {
        x
    }
}

macro_rules! number {
    ($type:ty, $sum:ty, $mantissa:literal, $smallest:literal, $widen:expr, $narrow:expr) => {
        impl Number for $type {
            type Sum = $sum;
            const MANTISSA: i32 = $mantissa;
            const SMALLEST: i32 = $smallest;
            #[inline(always)]
            fn widen(raw: &[$type], wide: &mut [$sum]) {
                $widen(raw, wide)
            }
            #[inline(always)]
            fn narrow(wide: &[$sum], raw: &mut [$type]) {
                $narrow(wide, raw)
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
    };
}
number!(f32, f32, 23, -149, copy, copy);
number!(f64, f64, 52, -1074, copy, copy);
number!(f16, f32, 10, -24, to_f32, of_f32);
number!(bf16, f32, 7, -133, to_f32, of_f32);

#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}

#[inline(always)]
fn to_f32<T>(raw: &[T], wide: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    raw.convert_to_f32_slice(wide);
}

#[inline(always)]
fn of_f32<T>(wide: &[f32], raw: &mut [T])
where
    [T]: HalfFloatSliceExt,
{
    raw.convert_from_f32_slice(wide);
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
