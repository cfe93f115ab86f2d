//! The header of a safetensors checkpoint: names, shapes and dtypes. The values are not read, so
//! that a file that was cut anywhere after its header will do.
//!
//! ```text
//! u64 length, little endian | {"__metadata__": {…}, "wte": {"dtype": "F32", "shape": [50257, 768], "data_offsets": [0, 154389504]}, …} | values
//! ```
//!
//! Tensors of integers and booleans are buffers or counters, such as `position_ids`, that nobody
//! averages: they are left out, with a note. Other floats, such as F8_E4M3, are parameters that
//! can't be averaged: an error.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use param_averager::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::failure::Failure;
use crate::layout::{Layout, Tensor};

/// The format's own bound.
const MOST_HEADER_BYTES: u64 = 100_000_000;

#[derive(serde::Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The entries of a header, as they are written: a map would keep the last of two that have one
/// name.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = vec![];
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// The layout of a checkpoint, in the order in which its values lie.
pub fn layout(path: &Path) -> Result<Layout, Failure> {
    let shown = path.display().to_string();
    let named = |what: String| Failure::Failed(format!("{shown}: {what}"));
    let header = File::open(path)
        .map_err(|e| format!("cannot open it: {e}"))
        .and_then(read_header)
        .map_err(named)?;
    let (tensors, left_out) = tensors(&header).map_err(named)?;
    if let (true, Some(first)) = (tensors.is_empty(), left_out.first()) {
        return Err(named(format!(
            "none of its {} tensors, such as `{first}`, has elements that are floats, so there is \
             nothing to average: give the \
             checkpoint of a model",
            left_out.len()
        )));
    }
    let mut layout = Layout::new(shown.clone(), tensors);
    if let Some(first) = left_out.first() {
        layout.note = Some(format!(
            "{} left out, whose elements are not floats, such as `{first}`",
            left_out.len()
        ));
    }
    Ok(layout)
}

fn read_header(mut file: impl Read) -> Result<Vec<u8>, String> {
    let mut begin = [0; 8];
    file.read_exact(&mut begin).map_err(|e| {
        truncated(e, "shorter than the 8 bytes that a safetensors file begins with")
    })?;
    let length = u64::from_le_bytes(begin);
    if let (true, Some(found)) = (length > MOST_HEADER_BYTES, other_format(begin)) {
        return Err(format!("is no safetensors file: {found}"));
    }
    if length > MOST_HEADER_BYTES {
        return Err(format!(
            "says that its header has {length} bytes, but safetensors allows {MOST_HEADER_BYTES}: \
             it is no safetensors \
             file, or a damaged one"
        ));
    }
    let mut header = vec![];
    let got =
        file.take(length).read_to_end(&mut header).map_err(|e| format!("cannot read it: {e}"))?
            as u64;
    if got < length {
        return Err(format!(
            "is cut within its header, which has {length} bytes of which {got} are there: fetch it \
             again"
        ));
    }
    Ok(header)
}

/// The kind of another file, by its first bytes, where they are no length that the format allows.
fn other_format(begin: [u8; 8]) -> Option<&'static str> {
    const FORMATS: [(&[u8], &str); 8] = [
        (
            b"version ",
            "it is a pointer of Git LFS, not the file that it stands for: fetch that with `git lfs \
             pull`",
        ),
        (b"<!DOCTYP", "it is an HTML page, such as of a login or an error: fetch the file itself"),
        (b"<!doctyp", "it is an HTML page, such as of a login or an error: fetch the file itself"),
        (b"<html", "it is an HTML page, such as of a login or an error: fetch the file itself"),
        (b"PK\x03\x04", "it is a zip, as torch.save writes: convert it with \
            safetensors.torch.save_file"),
        (
            b"\x80\x02",
            "it is a pickle, as torch.save once wrote: convert it with safetensors.torch.save_file",
        ),
        (b"GGUF", "it is a GGUF file: give the checkpoint that it was made from"),
        (b"\x1f\x8b", "it is compressed by gzip: unpack it first"),
    ];
    FORMATS.into_iter().find(|(magic, _)| begin.starts_with(magic)).map(|(_, what)| what)
}

fn truncated(error: std::io::Error, what: &str) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => format!("is {what}: fetch it again"),
        _ => format!("cannot read it: {error}"),
    }
}

/// Its tensors, and the names of those left out.
fn tensors(header: &[u8]) -> Result<(Vec<Tensor>, Vec<String>), String> {
    let Entries(entries) = serde_json::from_slice(header).map_err(|e| {
        format!(
            "its header is not a JSON object ({e}): it is no safetensors file, or a damaged one"
        )
    })?;
    let mut names = BTreeSet::new();
    if let Some((twice, _)) = entries.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(format!("its header has `{twice}` twice: the file is damaged, write it again"));
    }
    let (mut found, mut left_out, mut spans) = (vec![], vec![], vec![]);
    for (name, value) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
        let info: Info = serde_json::from_value(value).map_err(|e| {
            format!("tensor `{name}`: {e}; its header entry needs dtype, shape and data_offsets")
        })?;
        let [begin, end] = info.data_offsets;
        spans.push((begin, end, name.clone()));
        let dtype = match info.dtype.as_str() {
            "F32" => Dtype::F32,
            "F64" => Dtype::F64,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            other if other == "BOOL" || other.starts_with(['I', 'U']) => {
                left_out.push(name);
                continue;
            }
            other => {
                return Err(format!(
                    "tensor `{name}` has dtype {other}, which can't be averaged: convert it to \
                     F32, F64, F16 or BF16 \
                     first"
                ))
            }
        };
        let bytes = info
            .shape
            .iter()
            .try_fold(dtype.size() as u64, |product, &dim| product.checked_mul(dim));
        if end.checked_sub(begin) != bytes {
            return Err(format!(
                "tensor `{name}`: {dtype} of shape {:?} does not take the bytes {begin} to {end} \
                 that its data_offsets \
                 give it: the file is damaged",
                info.shape
            ));
        }
        found.push((begin, Tensor { name, shape: info.shape, dtype }));
    }
    // As the format's own crate does: values lie one after the other, each byte in one tensor.
    spans.sort();
    let mut before = (0, "the header");
    for (begin, end, name) in &spans {
        if *begin != before.0 {
            let how = if *begin < before.0 { "overlap" } else { "leave a gap between them" };
            return Err(format!(
                "the data_offsets of `{name}` begin at {begin}, those of {} end at {}, so that \
                 they {how}: the file is damaged",
                before.1, before.0
            ));
        }
        if end < begin {
            return Err(format!(
                "the data_offsets of `{name}` end before they begin: the file is damaged"
            ));
        }
        before = (*end, name);
    }
    // Tensors without elements share their offset with the next one.
    found.sort_by_key(|&(begin, ref tensor)| (begin, tensor.elements()));
    Ok((found.into_iter().map(|(_, tensor)| tensor).collect(), left_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
    }

    const GOOD: &str = r#"{"__metadata__": {"format": "pt"},
        "b": {"dtype": "BF16", "shape": [3], "data_offsets": [24, 30]},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "steps": {"dtype": "I64", "shape": [], "data_offsets": [30, 38]}}"#;

    #[test]
    fn a_good_header_gives_its_tensors_in_file_order() {
        let header = read_header(&file(GOOD)[..]).unwrap();
        let (tensors, left_out) = super::tensors(&header).unwrap();
        let tensor = |name: &str, shape: &[u64], dtype| Tensor {
            name: name.into(),
            shape: shape.into(),
            dtype,
        };
        assert_eq!(tensors, [tensor("a", &[2, 3], Dtype::F32), tensor("b", &[3], Dtype::Bf16)]);
        assert_eq!(left_out, ["steps"]);
    }

    #[test]
    fn bad_headers_say_what_is_wrong() {
        let whole = file(GOOD);
        for (bytes, says) in [
            (&whole[..5], "shorter than the 8 bytes"),
            (&whole[..50], "cut within its header"),
            (&[0xff; 64], "no safetensors file"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "an HTML page"),
            (b"<html lang=\"en\"><head>", "an HTML page"),
            (b"PK\x03\x04\0\0\x08\x08\0\0", "as torch.save writes"),
            (b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9", "a pickle"),
            (b"GGUF\x03\0\0\0\0\0", "a GGUF file"),
            (
                &file(
                    r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                        "x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#,
                ),
                "has `x` twice",
            ),
            (
                &file(
                    r#"{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                        "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}"#,
                ),
                "of `y` begin at 4, those of x end at 8, so that they overlap",
            ),
            (
                &file(
                    r#"{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                        "ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}"#,
                ),
                "overlap",
            ),
            (
                &file(
                    r#"{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                        "y": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}"#,
                ),
                "gap",
            ),
            (&file("[1, 2"), "not a JSON object"),
            (&file("[]"), "not a JSON object"),
            (
                &file(r#"{"x": {"dtype": "F32", "shape": [1]}}"#),
                "tensor `x`: missing field `data_offsets`",
            ),
            (
                &file(r#"{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#),
                "tensor `x`: invalid value",
            ),
            (
                &file(r#"{"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}"#),
                "tensor `x` has dtype F8_E4M3",
            ),
            (
                &file(r#"{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}"#),
                "does not take the bytes 0 to 4",
            ),
            (
                &file(r#"{"x": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}"#),
                "does not take the bytes",
            ),
            (
                &file(
                    r#"{"x": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}"#,
                ),
                "does not take the bytes",
            ),
        ] {
            let result = read_header(bytes).and_then(|header| super::tensors(&header));
            let error = result.expect_err(says);
            assert!(error.contains(says), "{error:?} does not say {says:?}");
        }
    }
}
