//! Layouts: lists of tensors to average.

use param_averager::Dtype;

use crate::failure::Failure;

/// A model's tensors.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// The value of `--layout`, or "flat".
    pub name: String,
    pub tensors: Vec<Tensor>,
    /// The factor of `--scale`, unless 1.
    pub scale: Option<f64>,
    /// Parts of a file that were left out.
    pub note: Option<String>,
}

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

    fn bytes(&self) -> Option<u64> {
        let size = self.dtype.size() as u64;
        self.shape.iter().try_fold(size, |product, &dim| product.checked_mul(dim))
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

    /// Refuses a layout of nothing, and one that no address space holds.
    pub fn checked(self) -> Result<Self, Failure> {
        let fail = |what: &str| Err(Failure::Failed(format!("{}: {what}", self.name)));
        if self.tensors.is_empty() {
            return fail(
                "holds no tensors, so there is nothing to average: give a file with at least one",
            );
        }
        let mut bytes = 0u64;
        for tensor in &self.tensors {
            let sum = tensor.bytes().and_then(|size| bytes.checked_add(size));
            let Some(sum) = sum.filter(|&sum| sum < 1 << 62) else {
                return fail(&format!(
                    "tensor `{}` of shape {:?} makes the model larger than any memory: correct its \
                     shape",
                    tensor.name, tensor.shape
                ));
            };
            bytes = sum;
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

    /// Bytes of as many elements in the type of sums: f32, or f64 for f64.
    pub fn bytes_of_sums(&self) -> u64 {
        let size = |tensor: &Tensor| tensor.dtype.size().max(4) as u64;
        self.tensors.iter().map(|tensor| tensor.elements() * size(tensor)).sum()
    }

    /// The dtype that all tensors have, or none.
    pub fn dtype(&self) -> Option<Dtype> {
        let first = self.tensors.first()?.dtype;
        self.tensors.iter().all(|tensor| tensor.dtype == first).then_some(first)
    }

    pub fn dtype_name(&self) -> String {
        self.dtype().map_or("mixed".into(), |dtype| dtype.to_string())
    }
}
