//! Layouts by name and from files: a JSON list, or the header of a safetensors checkpoint, whose
//! values are not read.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use param_averager::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use crate::failure::Failure;
use crate::layout::{Layout, Tensor};
use crate::{models, number};

/// A model by name, or a file.
pub fn load(spec: &str) -> Result<Layout, Failure> {
    let path = Path::new(spec);
    let named = |what: String| Failure::Failed(format!("{spec}: {what}"));
    let layout = match (spec, path.extension().and_then(|extension| extension.to_str())) {
        ("gpt2", _) => models::gpt2(),
        ("resnet50", _) => models::resnet50(),
        ("llama3-8b", _) => models::llama3_8b(),
        (_, Some("json")) => Layout::new(spec, json(path).map_err(named)?),
        (_, Some("safetensors")) => {
            let (tensors, note) = safetensors(path).map_err(named)?;
            Layout { note, ..Layout::new(spec, tensors) }
        }
        _ => {
            return Err(Failure::Usage(format!(
                "--layout {spec}: not a known model (gpt2, resnet50, llama3-8b) nor a file that \
                 ends in .json or .safetensors"
            )))
        }
    };
    layout.checked()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    shape: Vec<u64>,
    dtype: String,
}

fn json(path: &Path) -> Result<Vec<Tensor>, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read it: {e}"))?;
    let entries: Vec<Entry> = serde_json::from_str(&text).map_err(|e| {
        let index = text.contains("\"weight_map\"");
        let hint = if index {
            "; this looks like the index of a checkpoint in several files: give one of its \
             .safetensors files"
        } else {
            ""
        };
        format!(
            "{e}; a layout is a list such as \
             [{{\"name\": \"wte\", \"shape\": [50257, 768], \"dtype\": \"f32\"}}]{hint}"
        )
    })?;
    let tensor = |Entry { name, shape, dtype }| match number::dtype(&dtype) {
        Some(dtype) => Ok(Tensor { name, shape, dtype }),
        None => Err(format!("tensor `{name}` has dtype `{dtype}`: use f32, f64, f16 or bf16")),
    };
    entries.into_iter().map(tensor).collect()
}

/// Tensors in file order, and a note on those that were left out: integers and booleans are
/// buffers or counters, such as `position_ids`. Other floats, such as F8_E4M3, are parameters that
/// can't be averaged: an error.
fn safetensors(path: &Path) -> Result<(Vec<Tensor>, Option<String>), String> {
    let file = File::open(path).map_err(|e| format!("cannot open it: {e}"))?;
    let metadata: Metadata = serde_json::from_slice(&header(file)?).map_err(|e| {
        format!("its header is not one of safetensors ({e}): the file is damaged; fetch it again")
    })?;
    let (mut tensors, mut left_out) = (vec![], vec![]);
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let dtype = match info.dtype.to_string().as_str() {
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
                     F32, F64, F16 or BF16 first"
                ))
            }
        };
        let shape = info.shape.iter().map(|&dim| dim as u64).collect();
        tensors.push(Tensor { name, shape, dtype });
    }
    let Some(first) = left_out.first() else { return Ok((tensors, None)) };
    if tensors.is_empty() {
        return Err(format!(
            "none of its {} tensors, such as `{first}`, has elements that are floats, so there is \
             nothing to average: give the checkpoint of a model",
            left_out.len()
        ));
    }
    let note =
        format!("{} left out, whose elements are not floats, such as `{first}`", left_out.len());
    Ok((tensors, Some(note)))
}

/// Bound of the format.
const MOST_HEADER_BYTES: u64 = 100_000_000;

fn header(mut file: impl Read) -> Result<Vec<u8>, String> {
    let read = |e: std::io::Error| format!("cannot read it: {e}");
    let mut begin = vec![];
    file.by_ref().take(8).read_to_end(&mut begin).map_err(read)?;
    let Ok(length) = begin[..].try_into().map(u64::from_le_bytes) else {
        return Err("is shorter than the 8 bytes that a safetensors file begins with".into());
    };
    if length > MOST_HEADER_BYTES {
        let other = OTHER_FORMATS.iter().find(|(magic, _)| begin.starts_with(magic));
        let what = other.map_or("its header is longer than the format allows", |(_, what)| what);
        return Err(format!("is no safetensors file: {what}"));
    }
    let mut header = vec![];
    file.take(length).read_to_end(&mut header).map_err(read)?;
    match header.len() as u64 {
        got if got < length => Err(format!(
            "is cut within its header, which has {length} bytes of which {got} are there: fetch it \
             again"
        )),
        _ => Ok(header),
    }
}

/// First bytes of other files, where they are no length that the format allows.
const OTHER_FORMATS: [(&[u8], &str); 8] = [
    (
        b"version ",
        "it is a pointer of Git LFS: fetch the file that it stands for with `git lfs pull`",
    ),
    (b"<!DOCTYP", "it is an HTML page, such as of a login or an error: fetch the file itself"),
    (b"<!doctyp", "it is an HTML page, such as of a login or an error: fetch the file itself"),
    (b"<html", "it is an HTML page, such as of a login or an error: fetch the file itself"),
    (
        b"PK\x03\x04",
        "it is a zip, as torch.save writes: convert it with safetensors.torch.save_file",
    ),
    (
        b"\x80\x02",
        "it is a pickle, as torch.save once wrote: convert it with safetensors.torch.save_file",
    ),
    (b"GGUF", "it is a GGUF file: give the checkpoint that it was made from"),
    (b"\x1f\x8b", "it is compressed by gzip: unpack it first"),
];
