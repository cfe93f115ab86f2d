//! What several tests share.
#![allow(dead_code)] // each test uses its own part

use std::sync::atomic::{AtomicU8, Ordering};

use param_averager::{Communicator, Device, Dtype, TensorMut};

/// A test that can't run here says so, on one line that `.ci/run` counts.
pub fn skipped(test: &str, reason: &str) {
    use std::io::Write;
    // Not eprintln: the test harness would capture it. In one piece, since tests run side by side.
    let _ = std::io::stderr().write_all(format!("SKIPPED {test}: {reason}\n").as_bytes());
}

/// Runs `rank` on a thread for each of n CPU ranks, and returns what they return.
pub fn ranks<T: Send>(n: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    ranks_on(Device::cpu(), n, rank)
}

/// The same for n ranks on any device.
pub fn ranks_on<T: Send>(
    device: Device,
    n: usize,
    rank: impl Fn(Communicator) -> T + Sync,
) -> Vec<T> {
    ranks_of(&vec![device; n], rank)
}

/// The same for a rank on each of these devices.
pub fn ranks_of<T: Send>(devices: &[Device], rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let world = Communicator::from_devices(devices).unwrap();
    let rank = &rank;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            world.into_iter().map(|communicator| scope.spawn(move || rank(communicator))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Reproducible numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Between -1 and 1, of many magnitudes.
    pub fn value(&mut self) -> f64 {
        let unit = self.next() as i64 as f64 / i64::MAX as f64;
        unit * 0.5f64.powi(self.below(8) as i32)
    }
}

/// A tensor in memory of its own between guard bytes, at any address that suits its dtype.
pub struct Guarded {
    pub dtype: Dtype,
    pub elements: usize,
    memory: Vec<u64>,
    offset: usize,
    guard: u8,
}

const GUARD: usize = 64;
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
        let mut tensor = Guarded { dtype, elements, memory, offset, guard };
        tensor.bytes_mut().fill(0);
        tensor
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
        let all: &[u8] = bytemuck::cast_slice(&self.memory);
        let end = self.offset + self.elements * self.dtype.size();
        all[..self.offset].iter().chain(&all[end..]).all(|&byte| byte == self.guard)
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
        let at = &mut self.bytes_mut()[i * size..][..size];
        match dtype {
            Dtype::F32 => at.copy_from_slice(&(value as f32).to_ne_bytes()),
            Dtype::F64 => at.copy_from_slice(&value.to_ne_bytes()),
            Dtype::F16 => at.copy_from_slice(&half::f16::from_f64(value).to_ne_bytes()),
            _ => at.copy_from_slice(&half::bf16::from_f64(value).to_ne_bytes()),
        }
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

/// The distance between a number of this magnitude and the next one of that dtype.
pub fn ulp(dtype: Dtype, magnitude: f64) -> f64 {
    let (bits, least) = match dtype {
        Dtype::F32 => (23, -126),
        Dtype::F64 => (52, -1022),
        Dtype::F16 => (10, -14),
        _ => (7, -126),
    };
    let exponent =
        if magnitude > 0.0 { (magnitude.log2().floor() as i32).max(least) } else { least };
    f64::from(exponent - bits).exp2() // powi would take the reciprocal of infinity
}
