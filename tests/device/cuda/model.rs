//! A model in memory of the host or of a device, with guard bytes around every tensor.

use cudarc::driver::{result, sys, CudaContext};
use param_averager::{Device, Dtype, Parameters, TensorMut};
use std::ops::Range;
use std::sync::Arc;
use test_support::{guards_are_whole, put, Random, GUARD};

// dtype, elements, and how many elements after a multiple of 16 bytes it begins
pub type Shape = (Dtype, usize, usize);

const GUARD_BYTE: u8 = 0xa5;

struct Tensor {
    dtype: Dtype,
    elements: usize,
    offset: usize,
}

impl Tensor {
    fn bytes(&self) -> Range<usize> {
        self.offset..self.offset + self.elements * self.dtype.size()
    }
}

pub struct Model {
    tensors: Vec<Tensor>,
    /// Contents: on a CPU, the memory itself.
    host: Vec<u64>,
    device: Option<(Arc<CudaContext>, u64)>,
    kind: Kind,
    on: Device,
}

/// Allocator of a model on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `cuMemAlloc`.
    Plain,
    /// The device's current pool, as cudarc's `CudaStream::alloc`.
    Pool,
    /// `cuMemAllocManaged`: memory that a device owns, and that is neither of the former.
    Managed,
}

/// Memory of a CUDA device.
pub fn ordinal(device: Device) -> usize {
    let name = device.to_string();
    name.strip_prefix("cuda:").and_then(|number| number.parse().ok()).expect("a CUDA device")
}

impl Model {
    /// Fresh data, which depends on the seed alone.
    pub fn new(on: Device, shapes: &[Shape], seed: u64) -> Model {
        Model::of(Kind::Plain, on, shapes, seed)
    }

    /// [`Model::new`], in memory of another kind.
    pub fn of(kind: Kind, on: Device, shapes: &[Shape], seed: u64) -> Model {
        let mut end = 0;
        let tensors: Vec<Tensor> = shapes
            .iter()
            .map(|&(dtype, elements, misaligned)| {
                let offset = (end + GUARD).next_multiple_of(16) + misaligned * dtype.size();
                end = offset + elements * dtype.size() + GUARD;
                Tensor { dtype, elements, offset }
            })
            .collect();
        let mut host = vec![u64::from_ne_bytes([GUARD_BYTE; 8]); end.div_ceil(8) + 2];
        let mut random = Random(seed);
        for tensor in &tensors {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut host);
            let size = tensor.dtype.size();
            for element in bytes[tensor.bytes()].chunks_exact_mut(size) {
                put(tensor.dtype, random.value(), element);
            }
        }
        let mut model = Model { tensors, host, device: None, kind, on };
        if on != Device::cpu() {
            let context = CudaContext::new(ordinal(on)).unwrap();
            context.bind_to_thread().unwrap();
            let bytes = model.bytes().len();
            let attached = sys::CUmemAttach_flags::CU_MEM_ATTACH_GLOBAL;
            // SAFETY: a context is bound, and the null stream is its own.
            let address = unsafe {
                match kind {
                    Kind::Plain => result::malloc_sync(bytes),
                    Kind::Pool => result::malloc_async(std::ptr::null_mut(), bytes),
                    Kind::Managed => result::malloc_managed(bytes, attached),
                }
            };
            model.device = Some((context, address.unwrap()));
            model.upload();
        }
        model
    }

    /// Contents, guard bytes included. On a device: those of the last download.
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.host)
    }

    pub fn guards_are_whole(&self) -> bool {
        guards_are_whole(self.bytes(), self.tensors.iter().map(Tensor::bytes), GUARD_BYTE)
    }

    /// Sets an element of an f32 tensor.
    pub fn set(&mut self, tensor: usize, element: usize, value: f32) {
        let at = self.tensors[tensor].offset + 4 * element;
        bytemuck::cast_slice_mut::<u64, u8>(&mut self.host)[at..at + 4]
            .copy_from_slice(&value.to_ne_bytes());
        self.upload();
    }

    /// Sets all elements to small integers, which depend on the seed alone.
    pub fn fill(&mut self, seed: u64) {
        let mut random = Random(seed);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.host);
        for tensor in &self.tensors {
            for element in bytes[tensor.bytes()].chunks_exact_mut(tensor.dtype.size()) {
                put(tensor.dtype, random.below(64) as f64, element);
            }
        }
        self.upload();
    }

    fn upload(&self) {
        if let Some((context, address)) = &self.device {
            context.bind_to_thread().unwrap();
            // SAFETY: own memory, which nothing else uses.
            unsafe { result::memcpy_htod_sync(*address, self.bytes()) }.unwrap();
        }
    }

    /// Frees the device's memory, behind the back of those that use it.
    pub fn free(&mut self) {
        let (context, address) = self.device.as_ref().expect("a device");
        context.bind_to_thread().unwrap();
        // SAFETY: allocated by `of`; a test that does this never drops the model.
        unsafe { result::free_sync(*address) }.unwrap();
    }

    /// Copies the device's memory to the host.
    pub fn download(&mut self) {
        if let Some((context, address)) = &self.device {
            context.bind_to_thread().unwrap();
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.host);
            // SAFETY: as above.
            unsafe { result::memcpy_dtoh_sync(bytes, *address) }.unwrap();
        }
    }

    /// Address of a tensor on a device.
    pub fn tensor_address(&self, index: usize) -> u64 {
        let (_, address) = self.device.as_ref().expect("a device");
        address + self.tensors[index].offset as u64
    }

    pub fn tensor(&self, index: usize) -> &[u8] {
        &self.bytes()[self.tensors[index].bytes()]
    }
}

impl Parameters for Model {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let start = match &self.device {
            Some((_, address)) => *address,
            None => self.host.as_mut_ptr() as u64,
        };
        for tensor in &self.tensors {
            let pointer = (start + tensor.offset as u64) as *mut u8;
            // SAFETY: inside of own memory, which stays as long as `self`.
            visit(unsafe {
                TensorMut::from_raw_parts(pointer, tensor.elements, tensor.dtype, self.on)
            });
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        if let Some((context, address)) = &self.device {
            context.bind_to_thread().unwrap();
            // SAFETY: allocated by `of`.
            match self.kind {
                Kind::Pool => unsafe { result::free_async(*address, std::ptr::null_mut()) },
                _ => unsafe { result::free_sync(*address) },
            }
            .unwrap();
        }
    }
}
