//! Hashes that are equal on all machines and in all versions, for values that ranks compare and
//! that are saved.

/// FNV-1a, 64 bits.
pub(crate) fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Digest of bytes by words of 8: a digest by single bytes takes longer than an average. Each step
/// is invertible, so bytes that differ within one word have different digests.
#[derive(Default)]
pub(crate) struct Digest(u64);

impl Digest {
    /// Digest of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut digest = Digest::default();
        digest.add(bytes);
        digest.value()
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let mut word = |bytes: [u8; 8]| {
            // An odd factor with mixed bits, from the golden ratio, as in Fibonacci hashing.
            let mixed = (self.0.rotate_left(23) ^ u64::from_le_bytes(bytes)).wrapping_add(1);
            self.0 = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        };
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|&bytes| word(bytes));
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        word(last);
        word((bytes.len() as u64).to_le_bytes());
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::fnv1a;

    /// Vectors of the authors' test suite.
    #[test]
    fn known_values() {
        assert_eq!(fnv1a(*b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(*b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(*b"foobar"), 0x8594_4171_f739_67e8);
    }
}
