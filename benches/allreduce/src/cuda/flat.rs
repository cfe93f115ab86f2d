//! Where each tensor goes in a flat buffer, for the rows that flatten.

use std::sync::Arc;

use param_averager::Dtype;

use crate::memory::Placed;

/// Tensors start at multiples of this in the flat buffer, too, so that every copy moves packs of 16
/// bytes: the best that a flatten can do. What lies between is averaged along; it is zero.
const ALIGNMENT: usize = 16;
/// Bytes that one block spans at a time: 4 packs for each of its threads.
pub const PIECE_BYTES: usize = 4 * 16 * super::kernels::THREADS as usize;

/// A flat buffer for each dtype, one after the other in one block of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Flat {
    pub buffers: Arc<[Placed]>,
    /// What is copied, each tensor in one piece, dtype by dtype.
    pub spans: Vec<Span>,
    pub bytes: usize,
}

/// A tensor, or part of it, as offsets in its rank's memory and in the flat one.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub tensor: usize,
    pub flat: usize,
    pub bytes: usize,
    pub dtype: Dtype,
}

impl Flat {
    pub fn new(tensors: &[Placed]) -> Self {
        let (mut buffers, mut spans, mut end) = (vec![], vec![], 0usize);
        for dtype in Dtype::ALL {
            let offset = end;
            for tensor in
                tensors.iter().filter(|tensor| tensor.dtype == dtype && tensor.elements > 0)
            {
                let bytes = tensor.elements * dtype.size();
                spans.push(Span { tensor: tensor.offset, flat: end, bytes, dtype });
                end = (end + bytes).next_multiple_of(ALIGNMENT);
            }
            if end > offset {
                let elements = (end - offset) / dtype.size();
                buffers.push(Placed { name: format!("flat {dtype}"), offset, elements, dtype });
            }
        }
        Flat { buffers: buffers.into(), spans, bytes: end }
    }

    /// The spans, cut into pieces for blocks.
    pub fn pieces(&self) -> Vec<Span> {
        let pieces = self.spans.iter().flat_map(|copy| {
            (0..copy.bytes).step_by(PIECE_BYTES).map(move |at| Span {
                tensor: copy.tensor + at,
                flat: copy.flat + at,
                bytes: PIECE_BYTES.min(copy.bytes - at),
                dtype: copy.dtype,
            })
        });
        pieces.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_in_one_piece_and_packs_are_aligned() {
        let place =
            |offset, elements, dtype| Placed { name: String::new(), offset, elements, dtype };
        let tensors = [
            place(0, 3, Dtype::F32),
            place(64, 40_001, Dtype::Bf16),
            place(128_000, 0, Dtype::F32),
            place(128_064, 20_000, Dtype::F32),
        ];
        let flat = Flat::new(&tensors);
        let sizes: Vec<_> = flat.buffers.iter().map(|b| (b.dtype, b.offset, b.elements)).collect();
        assert_eq!(sizes, [(Dtype::F32, 0, 20_004), (Dtype::Bf16, 80_016, 40_008)]);
        assert_eq!((flat.bytes, flat.spans.len()), (160_032, 3));
        let pieces = flat.pieces();
        assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), 12 + 80_000 + 80_002);
        assert!(pieces
            .iter()
            .all(|p| p.bytes <= PIECE_BYTES && p.flat % 16 == 0 && p.tensor % 16 == 0));
        assert!(pieces.windows(2).all(|two| two[0].flat + two[0].bytes <= two[1].flat));
    }
}
