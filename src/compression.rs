//! Compression of what ranks send to one another.

use crate::abi::{PaKernel, PA_RING_BF16, PA_RING_INT8};

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

    /// Kernel of the ring.
    pub(crate) fn kernel(self) -> Option<PaKernel> {
        match self {
            Compression::None => None,
            Compression::Bf16 => Some(PA_RING_BF16),
            Compression::Int8 => Some(PA_RING_INT8),
        }
    }
}
