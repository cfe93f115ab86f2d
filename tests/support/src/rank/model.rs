//! A model whose elements identify their rank, in memory of the host or of a device.

use std::sync::Arc;

use cudarc::driver::{result, CudaContext};
use param_averager::{Device, Dtype, Parameters, TensorMut};

/// Ranks that a test can have.
const MOST: usize = 16;

/// Value of a rank's element. Sums of such values are exact.
fn value(origin: usize, element: usize) -> f32 {
    ((origin * 7919 + element * 31) % 4096) as f32
}

/// Tensors in memory of the host or of a device, with their values on the host.
pub struct Tensors {
    /// Values; those of a device as of the last `set` or `download`.
    pub values: Vec<Vec<f32>>,
    device: Option<OnDevice>,
}

impl Tensors {
    pub fn new(values: Vec<Vec<f32>>, device: Device) -> Tensors {
        let device = (device != Device::cpu()).then(|| OnDevice::new(device, &values));
        let tensors = Tensors { values, device };
        tensors.upload();
        tensors
    }

    /// Replaces all values by others of the same shapes.
    pub fn set(&mut self, values: Vec<Vec<f32>>) {
        let shapes = |of: &[Vec<f32>]| of.iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!(shapes(&values), shapes(&self.values));
        self.values = values;
        self.upload();
    }

    fn upload(&self) {
        if let Some(device) = &self.device {
            device.upload(&self.values);
        }
    }

    /// Copies the device's tensors to the host.
    pub fn download(&mut self) {
        if let Some(device) = &self.device {
            device.download(&mut self.values);
        }
    }

    /// Bytes in use on its device.
    fn device_bytes_used(&self) -> usize {
        self.device.as_ref().map_or(0, OnDevice::bytes_used)
    }
}

pub struct Model {
    pub origin: usize,
    /// The last tensor is a mask of the ranks that took part: 1 at this rank's place.
    tensors: Tensors,
}

impl Model {
    pub fn new(origin: usize, device: Device) -> Model {
        let values = vec![vec![0.0; 5000], vec![], vec![0.0; 777], vec![0.0; MOST]];
        Model { origin, tensors: Tensors::new(values, device) }
    }

    /// Fills all tensors with NaN.
    pub fn spoil(&mut self) {
        self.tensors.values.iter_mut().for_each(|tensor| tensor.fill(f32::NAN));
        self.tensors.upload();
    }

    /// Copies the device's tensors to the host.
    pub fn download(&mut self) {
        self.tensors.download();
    }

    /// Bytes in use on its device.
    pub fn device_bytes_used(&self) -> usize {
        self.tensors.device_bytes_used()
    }

    /// Fills all tensors with this rank's own values.
    pub fn fill(&mut self) {
        let mut element = 0;
        for tensor in &mut self.tensors.values {
            for x in tensor.iter_mut() {
                *x = value(self.origin, element);
                element += 1;
            }
        }
        let mask = self.tensors.values.last_mut().unwrap();
        mask.fill(0.0);
        mask[self.origin] = 1.0;
        self.tensors.upload();
    }

    /// The mean over these ranks.
    fn mean(&self, ranks: &[usize], element: usize) -> f64 {
        let sum: f64 = ranks.iter().map(|&rank| f64::from(value(rank, element))).sum();
        sum / ranks.len() as f64
    }

    fn elements(&self) -> impl Iterator<Item = f32> + '_ {
        let (_, tensors) = self.tensors.values.split_last().expect("the mask");
        tensors.iter().flatten().copied()
    }

    /// True if every element is this rank's own.
    pub fn is_own(&self) -> bool {
        self.elements().enumerate().all(|(element, x)| x == value(self.origin, element))
    }

    /// Asserts that every element is the mean over the ranks that the mask names, and returns them.
    pub fn check(&self) -> Vec<usize> {
        let mask = self.tensors.values.last().unwrap();
        let ranks: Vec<usize> = (0..MOST).filter(|&rank| mask[rank] != 0.0).collect();
        for (element, x) in self.elements().enumerate() {
            let mean = self.mean(&ranks, element);
            assert!(
                (f64::from(x) - mean).abs() <= 1e-3,
                "element {element} is {x}, not {mean}, of {ranks:?}"
            );
        }
        ranks
    }

    /// Asserts that every element is this rank's own or, unless `unchanged`, the mean over `all`
    /// (`None`: unknown ranks).
    pub fn check_failed(&self, unchanged: bool, all: Option<&[usize]>) {
        for (element, x) in self.elements().enumerate() {
            let own = x == value(self.origin, element);
            let mean =
                || all.is_none_or(|all| (f64::from(x) - self.mean(all, element)).abs() <= 1e-3);
            assert!(
                own || !unchanged && mean(),
                "element {element} is {x} after a failure, unchanged: {unchanged}"
            );
        }
    }

    pub fn digest(&self) -> u64 {
        crate::fnv1a(self.tensors.values.iter().flatten().map(|x| u64::from(x.to_bits())))
    }
}

impl Parameters for Model {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        self.tensors.visit(visit);
    }
}

impl Parameters for Tensors {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        match &self.device {
            None => self.values.visit(visit),
            Some(device) => {
                for (tensor, address) in self.values.iter().zip(device.addresses(&self.values)) {
                    // SAFETY: inside of own memory, which stays as long as the process.
                    let tensor = unsafe {
                        TensorMut::from_raw_parts(
                            address as *mut u8,
                            tensor.len(),
                            Dtype::F32,
                            device.device,
                        )
                    };
                    visit(tensor);
                }
            }
        }
    }
}

/// Memory of a device for all tensors, one after the other. Freed with the process.
struct OnDevice {
    device: Device,
    context: Arc<CudaContext>,
    address: u64,
}

impl OnDevice {
    fn new(device: Device, tensors: &[Vec<f32>]) -> OnDevice {
        let name = device.to_string();
        let ordinal = name.strip_prefix("cuda:").and_then(|number| number.parse().ok()).unwrap();
        let context = CudaContext::new(ordinal).unwrap();
        context.bind_to_thread().unwrap();
        let bytes = tensors.iter().map(|tensor| 4 * tensor.len().next_multiple_of(4)).sum();
        // SAFETY: a context is bound.
        let address = unsafe { result::malloc_sync(bytes) }.unwrap();
        OnDevice { device, context, address }
    }

    fn addresses<'a>(&'a self, tensors: &'a [Vec<f32>]) -> impl Iterator<Item = u64> + 'a {
        tensors.iter().scan(self.address, |next, tensor| {
            let address = *next;
            *next += 4 * tensor.len().next_multiple_of(4) as u64;
            Some(address)
        })
    }

    fn upload(&self, tensors: &[Vec<f32>]) {
        self.context.bind_to_thread().unwrap();
        for (tensor, address) in
            tensors.iter().zip(self.addresses(tensors)).filter(|(tensor, _)| !tensor.is_empty())
        {
            // SAFETY: own memory, which nothing else uses.
            unsafe { result::memcpy_htod_sync(address, tensor) }.unwrap();
        }
    }

    fn download(&self, tensors: &mut [Vec<f32>]) {
        self.context.bind_to_thread().unwrap();
        let addresses: Vec<u64> = self.addresses(tensors).collect();
        for (tensor, address) in
            tensors.iter_mut().zip(addresses).filter(|(tensor, _)| !tensor.is_empty())
        {
            // SAFETY: as above.
            unsafe { result::memcpy_dtoh_sync(tensor, address) }.unwrap();
        }
    }

    fn bytes_used(&self) -> usize {
        bytes_used(&self.context)
    }
}

/// Bytes that this process uses, on a simulated device. 0 on a GPU, which reports only the total of
/// all processes.
pub fn bytes_used(context: &CudaContext) -> usize {
    if !context.name().unwrap().contains("cudasim") {
        return 0;
    }
    let (free, all) = context.mem_get_info().unwrap();
    all - free
}
