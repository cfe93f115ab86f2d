//! Bytes of a saved state: a version, tagged sections, and a checksum. Knows no section's content.
//!
//! ```text
//! magic 8 | version u32 | bytes in all u64 | sections u32 | section… | checksum u64
//! section: required u8 | bytes of the tag u32 | bytes u64 | tag | content
//! ```
//! Numbers are little-endian. The checksum is over all bytes before it: any change of bytes within
//! 8 aligned ones changes it, and any other change with a chance of 1 − 2⁻⁶⁴.

use crate::error::StateError;
use crate::hash::Digest;

/// Begin of a saved state. A conversion of line ends changes it.
const MAGIC: [u8; 8] = *b"PASGD\r\n\0";
const VERSION: u32 = 1;
const CHECKSUM: usize = 8;

/// Sections of a saved state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sections(Vec<Section>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Section {
    tag: String,
    /// True if a reader that does not know the tag must not load the rest.
    required: bool,
    content: Vec<u8>,
}

impl Sections {
    pub(crate) fn push(&mut self, tag: &str, required: bool, content: Vec<u8>) {
        self.0.push(Section { tag: tag.into(), required, content });
    }

    /// Content of a section that the caller knows.
    pub(crate) fn take(&mut self, tag: &str) -> Option<Vec<u8>> {
        let index = self.0.iter().position(|section| section.tag == tag)?;
        Some(self.0.remove(index).content)
    }

    /// Ends the reading: an error if a section that must be known was not taken.
    pub(crate) fn end(self) -> Result<(), StateError> {
        match self.0.into_iter().find(|section| section.required) {
            Some(section) => Err(StateError::UnknownSection { tag: section.tag }),
            None => Ok(()),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut body = Writer::default();
        body.u32(self.0.len() as u32);
        for Section { tag, required, content } in &self.0 {
            body.u8((*required).into());
            body.u32(tag.len() as u32);
            body.u64(content.len() as u64);
            body.bytes(tag.as_bytes());
            body.bytes(content);
        }
        let mut all = Writer::default();
        all.bytes(&MAGIC);
        all.u32(VERSION);
        all.u64((MAGIC.len() + 4 + 8 + body.0.len() + CHECKSUM) as u64);
        all.bytes(&body.0);
        let checksum = Digest::of(&all.0);
        all.u64(checksum);
        all.0
    }

    /// Parses any bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Sections, StateError> {
        let has_magic = bytes.iter().zip(&MAGIC).all(|(found, expected)| found == expected);
        if !has_magic || bytes.is_empty() {
            return Err(StateError::NotAState);
        }
        let found = bytes.len() as u64;
        let mut header = Reader(bytes);
        let cut = StateError::Truncated { found, expected: None };
        header.bytes(MAGIC.len()).ok_or(cut.clone())?;
        let version = header.u32().ok_or(cut.clone())?;
        if version != VERSION {
            return Err(StateError::OtherVersion { found: version, expected: VERSION });
        }
        let expected = header.u64().ok_or(cut)?;
        if found < expected {
            return Err(StateError::Truncated { found, expected: Some(expected) });
        }
        let Some((before, checksum)) = bytes.split_last_chunk::<CHECKSUM>() else {
            return Err(StateError::Corrupt);
        };
        if found != expected || u64::from_le_bytes(*checksum) != Digest::of(before) {
            return Err(StateError::Corrupt);
        }
        let body = header.0.get(..header.0.len().saturating_sub(CHECKSUM));
        let sections = body.and_then(|body| sections(Reader(body)));
        sections.map(Sections).ok_or(StateError::Corrupt)
    }
}

fn sections(mut body: Reader) -> Option<Vec<Section>> {
    let mut all = vec![];
    for _ in 0..body.u32()? {
        let required = body.u8()? != 0;
        let (tag, content) = (body.u32()? as usize, usize::try_from(body.u64()?).ok()?);
        let tag = std::str::from_utf8(body.bytes(tag)?).ok()?.to_owned();
        all.push(Section { tag, required, content: body.bytes(content)?.to_owned() });
    }
    body.0.is_empty().then_some(all)
}

/// Bytes of a section, written one value after the other.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

impl Writer {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn words(&mut self, words: &[u64]) {
        words.iter().for_each(|&word| self.u64(word));
    }

    /// A number that may be missing.
    pub(crate) fn optional(&mut self, value: Option<f64>) {
        self.u8(value.is_some().into());
        self.u64(value.unwrap_or(0.0).to_bits());
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.u32(text.len() as u32);
        self.bytes(text.as_bytes());
    }
}

/// Bytes of a section that are still to be read. `None`: they end too early.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(first)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn f64(&mut self) -> Option<f64> {
        self.u64().map(f64::from_bits)
    }

    pub(crate) fn optional(&mut self) -> Option<Option<f64>> {
        let (is_some, value) = (self.u8()? != 0, self.f64()?);
        Some(is_some.then_some(value))
    }

    pub(crate) fn text(&mut self) -> Option<&'a str> {
        let bytes = self.u32()? as usize;
        std::str::from_utf8(self.bytes(bytes)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sections() -> Sections {
        let mut sections = Sections::default();
        sections.push("first", true, vec![1, 2, 3]);
        sections.push("", false, vec![]);
        sections.push("third", false, (0..=255).collect());
        sections
    }

    #[test]
    fn sections_come_back() {
        let mut read = Sections::from_bytes(&sections().to_bytes()).unwrap();
        assert_eq!(read, sections());
        assert_eq!(read.take("second"), None);
        let refused = StateError::UnknownSection { tag: "first".into() };
        assert_eq!(read.clone().end(), Err(refused));
        assert_eq!(read.take("first"), Some(vec![1, 2, 3]));
        assert_eq!(read.end(), Ok(()), "the others are not required");
        let none = Sections::default();
        assert_eq!(Sections::from_bytes(&none.to_bytes()), Ok(none));
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let bytes = sections().to_bytes();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                let error = Sections::from_bytes(&changed).unwrap_err();
                let named = match at {
                    0..8 => matches!(error, StateError::NotAState),
                    8..12 => matches!(error, StateError::OtherVersion { expected: 1, .. }),
                    12..20 => {
                        matches!(error, StateError::Truncated { .. } | StateError::Corrupt)
                    }
                    _ => matches!(error, StateError::Corrupt),
                };
                assert!(named, "byte {at}, bit {bit}: {error}");
            }
        }
    }

    #[test]
    fn every_byte_changed_to_any_other_is_an_error() {
        let bytes = sections().to_bytes();
        for at in 0..bytes.len() {
            for value in (0..=255).filter(|&value| value != bytes[at]) {
                let mut changed = bytes.clone();
                changed[at] = value;
                assert!(Sections::from_bytes(&changed).is_err(), "byte {at}: {value}");
            }
        }
    }

    #[test]
    fn every_truncation_and_every_addition_is_an_error() {
        let bytes = sections().to_bytes();
        for length in 0..bytes.len() {
            let error = Sections::from_bytes(&bytes[..length]).unwrap_err();
            let expected = (length >= 20).then_some(bytes.len() as u64);
            let found = length as u64;
            match length {
                0 => assert_eq!(error, StateError::NotAState),
                _ => assert_eq!(error, StateError::Truncated { found, expected }, "{length}"),
            }
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Sections::from_bytes(&longer), Err(StateError::Corrupt));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Sections::from_bytes(&bytes).is_err());
        }

        /// A file made by hand, with a right checksum and any body.
        #[test]
        fn any_body_is_read_or_an_error(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut all = Writer::default();
            all.bytes(&MAGIC);
            all.u32(VERSION);
            all.u64((20 + body.len() + CHECKSUM) as u64);
            all.bytes(&body);
            let checksum = Digest::of(&all.0);
            all.u64(checksum);
            if let Ok(sections) = Sections::from_bytes(&all.0) {
                prop_assert!(sections.to_bytes().len() == all.0.len());
            }
        }
    }
}
