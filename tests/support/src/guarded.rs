//! Tensors between guard bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};

use param_averager::{Device, Dtype, TensorMut};

use crate::Random;

/// A tensor in memory of its own between guard bytes, at any address that suits its dtype.
pub struct Guarded {
    pub dtype: Dtype,
    pub elements: usize,
    misaligned: usize,
    memory: Vec<u64>,
    offset: usize,
    guard: u8,
}

/// Guard bytes on each side of a tensor, at least.
pub const GUARD: usize = 64;
/// Each tensor has another guard byte: the mean of equal guards would leave them whole.
static GUARDS: AtomicU8 = AtomicU8::new(0);

impl Guarded {
    /// `misaligned`: how many elements after a multiple of 16 bytes it begins.
    pub fn new(dtype: Dtype, elements: usize, misaligned: usize) -> Self {
        let bytes = elements * dtype.size();
        let guard = GUARDS.fetch_add(37, Ordering::Relaxed);
        let memory = vec![u64::from_ne_bytes([guard; 8]); (2 * GUARD + 32 + bytes) / 8 + 1];
        let address = memory.as_ptr() as usize + GUARD;
        let offset =
            address.next_multiple_of(16) - memory.as_ptr() as usize + misaligned * dtype.size();
        let mut tensor = Guarded { dtype, elements, misaligned, memory, offset, guard };
        tensor.bytes_mut().fill(0);
        tensor
    }

    pub fn random(dtype: Dtype, elements: usize, misaligned: usize, random: &mut Random) -> Self {
        let mut tensor = Guarded::new(dtype, elements, misaligned);
        tensor.fill_random(random);
        tensor
    }

    /// A tensor with the same values, in memory of its own.
    pub fn copy(&self) -> Self {
        let mut copy = Guarded::new(self.dtype, self.elements, self.misaligned);
        copy.bytes_mut().copy_from_slice(self.bytes());
        copy
    }

    pub fn bytes(&self) -> &[u8] {
        let all: &[u8] = bytemuck::cast_slice(&self.memory);
        &all[self.offset..self.offset + self.elements * self.dtype.size()]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let (offset, bytes) = (self.offset, self.elements * self.dtype.size());
        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut self.memory);
        &mut all[offset..offset + bytes]
    }

    pub fn guards_are_whole(&self) -> bool {
        let tensor = self.offset..self.offset + self.elements * self.dtype.size();
        guards_are_whole(bytemuck::cast_slice(&self.memory), [tensor], self.guard)
    }

    pub fn tensor(&mut self) -> TensorMut<'_> {
        let (dtype, elements) = (self.dtype, self.elements);
        // SAFETY: own memory, borrowed for as long.
        unsafe {
            TensorMut::from_raw_parts(self.bytes_mut().as_mut_ptr(), elements, dtype, Device::cpu())
        }
    }

    pub fn get(&self, i: usize) -> f64 {
        let at = &self.bytes()[i * self.dtype.size()..][..self.dtype.size()];
        match self.dtype {
            Dtype::F32 => f32::from_ne_bytes(at.try_into().unwrap()).into(),
            Dtype::F64 => f64::from_ne_bytes(at.try_into().unwrap()),
            Dtype::F16 => half::f16::from_ne_bytes(at.try_into().unwrap()).into(),
            _ => half::bf16::from_ne_bytes(at.try_into().unwrap()).into(),
        }
    }

    pub fn set(&mut self, i: usize, value: f64) {
        let (dtype, size) = (self.dtype, self.dtype.size());
        put(dtype, value, &mut self.bytes_mut()[i * size..][..size]);
    }

    pub fn fill_random(&mut self, random: &mut Random) {
        for i in 0..self.elements {
            self.set(i, random.value());
        }
    }
}

impl param_averager::Parameters for Guarded {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        visit(self.tensor());
    }
}

/// Values of all tensors.
pub fn bits(model: &[Guarded]) -> Vec<Vec<u8>> {
    model.iter().map(|tensor| tensor.bytes().to_vec()).collect()
}

/// Writes a value as an element of a tensor.
pub fn put(dtype: Dtype, value: f64, element: &mut [u8]) {
    match dtype {
        Dtype::F32 => element.copy_from_slice(&(value as f32).to_ne_bytes()),
        Dtype::F64 => element.copy_from_slice(&value.to_ne_bytes()),
        Dtype::F16 => element.copy_from_slice(&half::f16::from_f64(value).to_ne_bytes()),
        _ => element.copy_from_slice(&half::bf16::from_f64(value).to_ne_bytes()),
    }
}

/// True if all bytes besides those of the tensors, which are in order, are `guard`.
pub fn guards_are_whole(
    memory: &[u8],
    tensors: impl IntoIterator<Item = Range<usize>>,
    guard: u8,
) -> bool {
    let mut at = 0;
    let mut whole = |end: usize, next: usize| {
        let before = &memory[std::mem::replace(&mut at, next)..end];
        before.iter().all(|&byte| byte == guard)
    };
    tensors.into_iter().all(|tensor| whole(tensor.start, tensor.end)) && whole(memory.len(), 0)
}
