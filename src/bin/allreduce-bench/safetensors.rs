//! The header of a safetensors checkpoint: names, shapes and dtypes. The values are not read, so that a file that was
//! cut anywhere after its header will do.
//!
//! ```text
//! u64 length, little endian | {"__metadata__": {…}, "wte": {"dtype": "F32", "shape": [50257, 768], "data_offsets": [0, 154389504]}, …} | values
//! ```
//!
//! Tensors of integers and booleans are buffers or counters, such as `position_ids`, that nobody averages: they are left
//! out, with a note. Other floats, such as F8_E4M3, are parameters that can't be averaged: an error.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use param_averager::Dtype;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::failure::Failure;
use crate::layout::{Layout, Tensor};

/// The format's own bound.
const MOST_HEADER_BYTES: u64 = 100_000_000;

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The layout of a checkpoint, in the order in which its values lie.
pub fn layout(path: &Path) -> Result<Layout, Failure> {
    let shown = path.display().to_string();
    let named = |what: String| Failure::Failed(format!("{shown}: {what}"));
    let header =
        File::open(path).map_err(|e| format!("cannot open it: {e}")).and_then(read_header).map_err(named)?;
    let (tensors, left_out) = tensors(&header).map_err(named)?;
    let mut layout = Layout::new(shown.clone(), tensors);
    if let Some(first) = left_out.first() {
        layout.note =
            Some(format!("{} left out, whose elements are not floats, such as `{first}`", left_out.len()));
    }
    Ok(layout)
}

fn read_header(mut file: impl Read) -> Result<Vec<u8>, String> {
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|e| truncated(e, "shorter than the 8 bytes that a safetensors file begins with"))?;
    let length = u64::from_le_bytes(length);
    if length > MOST_HEADER_BYTES {
        return Err(format!(
            "says that its header has {length} bytes, but safetensors allows {MOST_HEADER_BYTES}: it is no safetensors \
             file, or a damaged one"
        ));
    }
    let mut header = vec![];
    let got = file.take(length).read_to_end(&mut header).map_err(|e| format!("cannot read it: {e}"))? as u64;
    if got < length {
        return Err(format!(
            "is cut within its header, which has {length} bytes of which {got} are there: fetch it again"
        ));
    }
    Ok(header)
}

fn truncated(error: std::io::Error, what: &str) -> String {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => format!("is {what}: fetch it again"),
        _ => format!("cannot read it: {error}"),
    }
}

/// Its tensors, and the names of those left out.
fn tensors(header: &[u8]) -> Result<(Vec<Tensor>, Vec<String>), String> {
    let map: Map<String, Value> = serde_json::from_slice(header).map_err(|e| {
        format!("its header is not a JSON object ({e}): it is no safetensors file, or a damaged one")
    })?;
    let (mut found, mut left_out) = (vec![], vec![]);
    for (name, value) in map.into_iter().filter(|(name, _)| name != "__metadata__") {
        let info: Info = serde_json::from_value(value).map_err(|e| {
            format!("tensor `{name}`: {e}; its header entry needs dtype, shape and data_offsets")
        })?;
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
                    "tensor `{name}` has dtype {other}, which can't be averaged: convert it to F32, F64, F16 or BF16 \
                     first"
                ))
            }
        };
        let [begin, end] = info.data_offsets;
        let bytes = info.shape.iter().try_fold(dtype.size() as u64, |product, &dim| product.checked_mul(dim));
        if end.checked_sub(begin) != bytes {
            return Err(format!(
                "tensor `{name}`: {dtype} of shape {:?} does not take the bytes {begin} to {end} that its data_offsets \
                 give it: the file is damaged",
                info.shape
            ));
        }
        found.push((begin, Tensor { name, shape: info.shape, dtype }));
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
        let tensor =
            |name: &str, shape: &[u64], dtype| Tensor { name: name.into(), shape: shape.into(), dtype };
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
            (&file("[1, 2"), "not a JSON object"),
            (&file("[]"), "not a JSON object"),
            (&file(r#"{"x": {"dtype": "F32", "shape": [1]}}"#), "tensor `x`: missing field `data_offsets`"),
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
