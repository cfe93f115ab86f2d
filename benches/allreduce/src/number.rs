//! The element types of tensors.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use param_averager::Dtype;

/// Elements that are converted at a time, in the first-level cache.
pub const CHUNK: usize = 256;

/// An element type of tensors. Data are made and checked in f64.
pub trait Number: Copy + Default + Send + Sync + 'static {
    /// Bits after the leading one.
    const MANTISSA: i32;
    /// Exponent of the smallest positive value, subnormal ones included.
    const SMALLEST: i32;

    /// Converts exactly.
    fn widen(raw: &[Self; CHUNK], wide: &mut [f64; CHUNK]);
    /// Rounds to nearest even, halves after f32.
    fn narrow(wide: &[f64; CHUNK], raw: &mut [Self; CHUNK]);
    /// Bits in memory.
    fn bits(self) -> u64;
}

macro_rules! number {
    ($type:ty, $widen:expr, $narrow:expr) => {
        impl Number for $type {
            const MANTISSA: i32 = <$type>::MANTISSA_DIGITS as i32 - 1;
            const SMALLEST: i32 = <$type>::MIN_EXP - <$type>::MANTISSA_DIGITS as i32;
            #[inline(always)]
            fn widen(raw: &[$type; CHUNK], wide: &mut [f64; CHUNK]) {
                $widen(raw, wide)
            }
            #[inline(always)]
            fn narrow(wide: &[f64; CHUNK], raw: &mut [$type; CHUNK]) {
                $narrow(wide, raw)
            }
            #[inline(always)]
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
    };
}
number!(f32, |raw, wide| each(raw, wide, f64::from), |wide, raw| each(wide, raw, |x| x as f32));
number!(f64, |raw, wide| each(raw, wide, |x| x), |wide, raw| each(wide, raw, |x| x));
number!(f16, widen_half, narrow_half);
number!(bf16, widen_half, narrow_half);

#[inline(always)]
fn each<T: Copy, U>(from: &[T; CHUNK], to: &mut [U; CHUNK], f: impl Fn(T) -> U) {
    from.iter().zip(to).for_each(|(from, to)| *to = f(*from));
}

#[inline(always)]
fn widen_half<T>(raw: &[T; CHUNK], wide: &mut [f64; CHUNK])
where
    [T]: HalfFloatSliceExt,
{
    let mut single = [0.0; CHUNK];
    raw[..].convert_to_f32_slice(&mut single);
    each(&single, wide, f64::from);
}

#[inline(always)]
fn narrow_half<T>(wide: &[f64; CHUNK], raw: &mut [T; CHUNK])
where
    [T]: HalfFloatSliceExt,
{
    let mut single = [0.0; CHUNK];
    each(wide, &mut single, |x| x as f32);
    raw[..].convert_from_f32_slice(&single);
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
