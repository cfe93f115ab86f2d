//! One rank's parameters in memory of its device.

use std::sync::Arc;

use param_averager::{Device, Parameters, TensorMut};

use super::device::DeviceMemory;
use crate::memory::Placed;

/// As a member of a crew sees them.
#[derive(Clone, Debug)]
pub struct Replica {
    pub memory: Arc<DeviceMemory>,
    pub tensors: Arc<[Placed]>,
    pub device: Device,
}

impl Replica {
    /// One of its tensors.
    pub fn tensor(&mut self, index: usize) -> TensorMut<'_> {
        self.placed(index)
    }

    /// The same; for one borrow, each is to be asked for once.
    fn placed(&self, index: usize) -> TensorMut<'_> {
        let Placed { name, offset, elements, dtype } = &self.tensors[index];
        let pointer = (self.memory.address() + *offset as u64) as *mut u8;
        // SAFETY: placed inside of the memory, which is initialised and lives as long; one crew
        // runs at a time, and its member has its rank's memory to itself.
        let tensor = unsafe { TensorMut::from_raw_parts(pointer, *elements, *dtype, self.device) };
        tensor.named(name)
    }
}

impl Parameters for Replica {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let replica: &'a Replica = self;
        (0..replica.tensors.len()).for_each(|index| visit(replica.placed(index)))
    }
}
