//! Compression of what ranks, and hosts, send to one another.

use crate::abi::{PaKernel, PA_RING_BF16, PA_RING_INT8};

/// Elements of a block of Int8.
const BLOCK: usize = 128;
/// Added to a number of less than 2²², it leaves the nearest integer in the lower bits.
const TO_INTEGER: f32 = 12_582_912.0;

/// Scale of an Int8 block, and the factor of its values; from the bits of its largest magnitude.
fn scale_of(most: u32) -> (f32, f32) {
    const LEAST: u32 = 27 << 23; // 2⁻¹⁰⁰: 127 divided by a subnormal may be infinity
    const TOP: u32 = 0x7f7f_8000; // as in the kernels
    match f32::from_bits(most) {
        _ if most < LEAST => (0.0, 0.0),
        _ if most >= TOP => (f32::NAN, 0.0),
        most => (most / 127.0, 127.0 / most),
    }
}

/// Code in which the ring sends differences, for slow links: PCIe without P2P, whose mailboxes are
/// in memory of the host.
///
/// All ranks keep the result of the last average, the reference, and send how far the f32 tensors
/// of each have come from it since, coded. What a code rounds away is not lost: the rank that has
/// coded adds it to its next difference (error feedback: Seide et al., 2014; Karimireddy et al.,
/// 2019, arXiv 1901.09847). The guide's page on [compression](crate::guide::compression) has the
/// bounds, and what it costs in memory.
///
/// ```
/// use param_averager::{Communicator, Compression, Device, ParamAverager};
///
/// Communicator::run(&[Device::cpu(), Device::cpu()], |communicator| {
///     let rank = communicator.rank() as f32;
///     let mut model = vec![1.0f32; 1000];
///     let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
///     let mut averager = builder.build(&mut model)?; // in full: rank 0's values, the reference
///     model.iter_mut().for_each(|weight| *weight += 0.1 * rank);
///     let report = averager.average(&mut model)?;
///     assert_eq!(report.compression, Compression::Int8);
///     assert!(model.iter().all(|weight| (weight - 1.05).abs() < 0.1 / 254.0 * 2.0));
///     Ok::<_, param_averager::Error>(())
/// })?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Compression {
    /// No code: parameters travel in their own dtype. The default.
    #[default]
    None,
    /// Rounded to bf16: 2 bytes for an element. A value is off by 2⁻⁸ of itself at most.
    Bf16,
    /// Integers from −127 to 127 with a scale in f32 for each block of 128 elements: 1.03 bytes for
    /// an element. A value is off by 1/254 of the largest magnitude in its block at most.
    Int8,
}

impl Compression {
    /// Bytes on the wire for each byte of parameters.
    pub fn ratio(self) -> f64 {
        match self {
            Compression::None => 1.0,
            Compression::Bf16 => 0.5,
            Compression::Int8 => (128.0 + 4.0) / 512.0,
        }
    }

    /// Bytes of the codes of some values.
    pub(crate) fn length(self, values: usize) -> usize {
        match self {
            Compression::None => 4 * values,
            Compression::Bf16 => 2 * values,
            Compression::Int8 => values + 4 * values.div_ceil(BLOCK),
        }
    }

    /// Codes values, with the errors that `kernels/codec.h` has. In Int8 the scale of a block comes
    /// before its codes. A block that holds what has no code is decoded as NaN.
    pub(crate) fn encode(self, values: &[f32], codes: &mut [u8]) {
        assert_eq!(codes.len(), self.length(values.len()));
        match self {
            Compression::None => codes.copy_from_slice(bytemuck::cast_slice(values)),
            Compression::Bf16 => {
                let bf16 = |value: f32| match value.is_nan() {
                    true => 0x7fff,
                    false => {
                        let bits = value.to_bits();
                        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
                    }
                };
                for (code, &value) in codes.chunks_exact_mut(2).zip(values) {
                    code.copy_from_slice(&bf16(value).to_le_bytes());
                }
            }
            Compression::Int8 => {
                let blocks = codes.chunks_mut(4 + BLOCK).zip(values.chunks(BLOCK));
                for (codes, values) in blocks {
                    let (scale, codes) = codes.split_at_mut(4);
                    let magnitudes = values.iter().map(|value| value.to_bits() & 0x7fff_ffff);
                    let (step, factor) = scale_of(magnitudes.fold(0, u32::max));
                    scale.copy_from_slice(&step.to_le_bytes());
                    for (code, value) in codes.iter_mut().zip(values) {
                        *code = (value * factor + TO_INTEGER).to_bits() as u8;
                    }
                }
            }
        }
    }

    /// Values of codes.
    pub(crate) fn decode(self, codes: &[u8], values: &mut [f32]) {
        assert_eq!(codes.len(), self.length(values.len()));
        match self {
            Compression::None => bytemuck::cast_slice_mut(values).copy_from_slice(codes),
            Compression::Bf16 => {
                for (value, code) in values.iter_mut().zip(codes.chunks_exact(2)) {
                    let code = u16::from_le_bytes([code[0], code[1]]);
                    *value = f32::from_bits(u32::from(code) << 16);
                }
            }
            Compression::Int8 => {
                let blocks = codes.chunks(4 + BLOCK).zip(values.chunks_mut(BLOCK));
                for (codes, values) in blocks {
                    let (scale, codes) = codes.split_at(4);
                    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
                    for (value, &code) in values.iter_mut().zip(codes) {
                        *value = f32::from(code as i8) * scale;
                    }
                }
            }
        }
    }

    /// Kernel of the ring.
    pub(crate) fn kernel(self) -> Option<PaKernel> {
        match self {
            Compression::None => None,
            Compression::Bf16 => Some(PA_RING_BF16),
            Compression::Int8 => Some(PA_RING_INT8),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Compression;

    fn coded(code: Compression, values: &[f32]) -> Vec<f32> {
        let (mut codes, mut found) = (vec![0; code.length(values.len())], vec![0.0; values.len()]);
        code.encode(values, &mut codes);
        code.decode(&codes, &mut found);
        found
    }

    proptest! {
        #[test]
        fn codes_are_off_by_what_is_promised(
            values in prop::collection::vec(
                prop_oneof![-1e3f32..1e3, -1e-20f32..1e-20, Just(0.0), Just(3e38)], 0..400,
            ),
        ) {
            prop_assert_eq!(&coded(Compression::None, &values), &values);
            for (found, value) in coded(Compression::Bf16, &values).iter().zip(&values) {
                prop_assert!((found - value).abs() <= value.abs() / 256.0, "{} {}", found, value);
            }
            let found = coded(Compression::Int8, &values);
            for (found, values) in found.chunks(128).zip(values.chunks(128)) {
                let most = values.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                // Half a step, and what f32 rounds; nothing is coded below 2^-100.
                let bound = most / 253.99 + 8e-31;
                for (found, value) in found.iter().zip(values) {
                    prop_assert!((found - value).abs() <= bound, "{} {} {}", found, value, most);
                }
            }
        }
    }

    #[test]
    fn values_without_a_code_become_nan() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut values = vec![1.0f32; 300];
            values[200] = bad;
            let found = coded(Compression::Int8, &values);
            assert!(found[128..256].iter().all(|value| value.is_nan()));
            assert!(found[..128].iter().chain(&found[256..]).all(|value| *value == 1.0));
            assert!(!coded(Compression::Bf16, &values)[200].is_finite());
        }
    }
}
