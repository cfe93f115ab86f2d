//! What is averaged: a list of tensors, from a model known by name, a JSON file or a checkpoint's
//! header.

use std::path::Path;

use param_averager::Dtype;
use serde::Deserialize;

use crate::failure::Failure;
use crate::{models, number, safetensors};

/// A model's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// As `--layout` gives it.
    pub name: String,
    pub tensors: Vec<Tensor>,
    /// The factor of `--scale`, unless 1.
    pub scale: Option<f64>,
    /// What was left out, in words.
    pub note: Option<String>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub dtype: Dtype,
}

impl Tensor {
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

impl Layout {
    pub fn new(name: impl Into<String>, tensors: Vec<Tensor>) -> Self {
        Layout { name: name.into(), tensors, scale: None, note: None }
    }

    /// One flat buffer of about `bytes`, as in nccl-tests: rounded down to whole elements, at least
    /// one.
    pub fn flat(bytes: u64, dtype: Dtype) -> Self {
        let elements = (bytes / dtype.size() as u64).max(1);
        Layout::new("flat", vec![Tensor { name: "flat".into(), shape: vec![elements], dtype }])
    }

    /// A model by name, or a file.
    pub fn load(spec: &str) -> Result<Self, Failure> {
        let layout = match (spec, Path::new(spec).extension().and_then(|e| e.to_str())) {
            ("gpt2", _) => models::gpt2(),
            ("resnet50", _) => models::resnet50(),
            ("llama3-8b", _) => models::llama3_8b(),
            (_, Some("json")) => from_json(Path::new(spec))?,
            (_, Some("safetensors")) => safetensors::layout(Path::new(spec))?,
            _ => {
                return Err(Failure::Usage(format!(
                    "--layout {spec}: not a model I know (gpt2, resnet50, llama3-8b) nor a file \
                     that ends in .json or \
                     .safetensors"
                )))
            }
        };
        layout.checked()
    }

    /// Has something to average, of a size that fits in an address space.
    fn checked(self) -> Result<Self, Failure> {
        let fail = |what: &str| Err(Failure::Failed(format!("{}: {what}", self.name)));
        if self.tensors.is_empty() {
            return fail(
                "holds no tensors, so there is nothing to average: give a file with at least one",
            );
        }
        let mut bytes = 0u64;
        for tensor in &self.tensors {
            let elements =
                tensor.shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
            let sum = elements
                .and_then(|elements| elements.checked_mul(tensor.dtype.size() as u64))
                .and_then(|size| bytes.checked_add(size))
                .filter(|&sum| sum < 1 << 62);
            match sum {
                Some(sum) => bytes = sum,
                None => {
                    return fail(&format!(
                        "tensor `{}` of shape {:?} makes the model larger than any memory: correct \
                         its shape",
                        tensor.name, tensor.shape
                    ))
                }
            }
        }
        if bytes == 0 {
            return fail("all of its tensors are empty: give a file with at least one element");
        }
        Ok(self)
    }

    /// All tensors in one dtype.
    pub fn with_dtype(mut self, dtype: Dtype) -> Self {
        self.tensors.iter_mut().for_each(|tensor| tensor.dtype = dtype);
        self
    }

    /// Every tensor's first dimension times `scale`, at least 1. Empty tensors and scalars stay as
    /// they are.
    pub fn scaled(mut self, scale: f64) -> Self {
        for first in self.tensors.iter_mut().filter_map(|tensor| tensor.shape.first_mut()) {
            *first = (*first).min(((*first as f64 * scale).round() as u64).max(1));
        }
        self.scale = (scale != 1.0).then_some(scale);
        self
    }

    pub fn elements(&self) -> u64 {
        self.tensors.iter().map(Tensor::elements).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.elements() * tensor.dtype.size() as u64).sum()
    }

    /// The dtype of all of them, or none.
    pub fn dtype(&self) -> Option<Dtype> {
        let first = self.tensors.first()?.dtype;
        self.tensors.iter().all(|tensor| tensor.dtype == first).then_some(first)
    }

    /// Its dtype for people.
    pub fn dtype_name(&self) -> String {
        self.dtype().map_or("mixed".into(), |dtype| dtype.to_string())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    shape: Vec<u64>,
    dtype: String,
}

const JSON_FORM: &str =
    r#"a layout is a list such as [{"name": "wte", "shape": [50257, 768], "dtype": "f32"}]"#;

fn from_json(path: &Path) -> Result<Layout, Failure> {
    let shown = path.display().to_string();
    let fail = |what: String| Failure::Failed(format!("{shown}: {what}"));
    let text = std::fs::read_to_string(path).map_err(|e| fail(format!("cannot read it: {e}")))?;
    let entries: Vec<Entry> = serde_json::from_str(&text).map_err(|e| {
        let hint = if text.contains("\"weight_map\"") {
            "; this looks like the index of a checkpoint in several files: give one of its \
             .safetensors files"
        } else {
            ""
        };
        fail(format!("{e}; {JSON_FORM}{hint}"))
    })?;
    let tensors =
        entries.into_iter().map(|Entry { name, shape, dtype }| match number::dtype(&dtype) {
            Some(dtype) => Ok(Tensor { name, shape, dtype }),
            None => {
                Err(fail(format!("tensor `{name}` has dtype `{dtype}`: use f32, f64, f16 or bf16")))
            }
        });
    Ok(Layout::new(shown.clone(), tensors.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_are_the_real_ones() {
        for (name, tensors, parameters, dtype) in [
            ("gpt2", 148, 124_439_808, Dtype::F32),
            ("resnet50", 161, 25_557_032, Dtype::F32),
            ("llama3-8b", 291, 8_030_261_248, Dtype::Bf16),
        ] {
            let layout = Layout::load(name).unwrap();
            assert_eq!((layout.tensors.len(), layout.elements()), (tensors, parameters), "{name}");
            assert_eq!(
                (layout.dtype(), layout.bytes()),
                (Some(dtype), parameters * dtype.size() as u64)
            );
            let mut names: Vec<_> = layout.tensors.iter().map(|tensor| &tensor.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), tensors, "{name}: names are unique");
        }
    }

    #[test]
    fn scaling_shrinks_first_dimensions_and_keeps_every_tensor() {
        let layout = Layout::load("gpt2").unwrap().scaled(0.01);
        assert_eq!(layout.tensors.len(), 148);
        assert_eq!(layout.tensors[0].shape, [503, 768]);
        assert!(layout.tensors.iter().all(|tensor| tensor.elements() > 0));
        assert_eq!(layout.scaled(1e-9).tensors[0].shape, [1, 768]);
    }

    #[test]
    fn flat_buffers_are_whole_elements() {
        assert_eq!(Layout::flat(1023, Dtype::F64).elements(), 127);
        assert_eq!(Layout::flat(3, Dtype::F32).elements(), 1);
    }

    #[test]
    fn an_unknown_model_is_a_usage_error() {
        let error = Layout::load("gpt3").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("gpt2, resnet50, llama3-8b"), "{error}");
    }
}
