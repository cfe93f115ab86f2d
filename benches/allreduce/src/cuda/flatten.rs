//! Flatten, unflatten and scale on the device's processors, by the kernels of `flatten.cu`.

use std::sync::Arc;

use cudarc::driver::{CudaFunction, CudaModule, CudaStream, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

use super::gpu::{Clock, DeviceMemory, Gpu};
use crate::averager::Direction;
use crate::failure::Failure;
use crate::memory::Flat;

// IMAGE: the kernels as build.rs made them, or why there are none.
include!(concat!(env!("OUT_DIR"), "/flatten.rs"));

/// Threads of a block, and packs of 16 bytes that each has in flight: those of `flatten.cu`.
const THREADS: u32 = 512;
const PACKS: u32 = 4;
/// For each processor: so many threads as it holds.
const BLOCKS_PER_PROCESSOR: u32 = 4;

/// A row of the table: where a piece lies in the tensors, where in the flat buffer, its bytes.
type Row = [u64; 3];

/// The kernels of one rank and its table of pieces.
pub struct Kernels {
    gpu: Gpu,
    copy: CudaFunction,
    /// A dtype, its kernel that scales, and its first row and number of rows.
    dtypes: Vec<(CudaFunction, u64, u32)>,
    blocks: u32,
    _table: DeviceMemory,
}

impl Kernels {
    /// For these two blocks of memory of a rank.
    pub fn new(
        gpu: &Gpu,
        flat: &Flat,
        own: &DeviceMemory,
        buffer: &DeviceMemory,
    ) -> Result<Self, Failure> {
        let pieces = flat.pieces((16 * PACKS * THREADS) as usize);
        let row = |tensor: usize, flat: usize, bytes: usize| -> Row {
            [own.address + tensor as u64, buffer.address + flat as u64, bytes as u64]
        };
        let rows: Vec<Row> = pieces.iter().map(|p| row(p.tensor, p.flat, p.bytes)).collect();
        let table = DeviceMemory::new(gpu, size_of_val(&rows[..]))?;
        table.upload(bytemuck::cast_slice(&rows))?;
        let image = Ptx::from_binary(IMAGE.map_err(|reason| gpu.failed(reason))?.to_vec());
        let module = gpu.check("cuModuleLoadData of flatten.cu", gpu.context.load_module(image))?;
        let (mut dtypes, mut first) = (vec![], table.address);
        for rows in pieces.chunk_by(|a, b| a.dtype == b.dtype) {
            let kernel = function(gpu, &module, &format!("scale_{}", rows[0].dtype))?;
            dtypes.push((kernel, first, rows.len() as u32));
            first += (rows.len() * size_of::<Row>()) as u64;
        }
        let copy = function(gpu, &module, "move_bytes")?;
        let blocks = gpu.processors()? * BLOCKS_PER_PROCESSOR;
        let kernels = Kernels { gpu: gpu.clone(), copy, dtypes, blocks, _table: table };
        // A driver may load a kernel when it is first launched, and wait for all others then, which
        // may be waiting for this rank.
        let clock = Clock::new(gpu)?;
        for kernel in kernels.dtypes.iter().map(|(kernel, ..)| kernel).chain([&kernels.copy]) {
            kernels.launch(kernel, (0, 0), Direction::InPlace, 1.0, &clock.stream)?;
        }
        gpu.check("cuStreamSynchronize", clock.stream.synchronize())?;
        Ok(kernels)
    }

    /// Enqueues a move of all pieces. With a scale, each element is multiplied by it.
    pub fn enqueue(
        &self,
        direction: Direction,
        scale: Option<f64>,
        stream: &CudaStream,
    ) -> Result<(), Failure> {
        for (scales, first, count) in &self.dtypes {
            let kernel = if scale.is_some() { scales } else { &self.copy };
            self.launch(kernel, (*first, *count), direction, scale.unwrap_or(1.0), stream)?;
        }
        Ok(())
    }

    fn launch(
        &self,
        kernel: &CudaFunction,
        (first, count): (u64, u32),
        direction: Direction,
        scale: f64,
        stream: &CudaStream,
    ) -> Result<(), Failure> {
        // Places in a row.
        let (from, to): (u32, u32) = match direction {
            Direction::Flatten => (0, 1),
            Direction::Unflatten => (1, 0),
            Direction::InPlace => (0, 0),
        };
        let grid_dim = (count.clamp(1, self.blocks), 1, 1);
        let config = LaunchConfig { grid_dim, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut launch = stream.launch_builder(kernel);
        launch.arg(&first).arg(&count).arg(&from).arg(&to).arg(&scale);
        // SAFETY: the parameters are those of the kernel; the rows are inside of the table, and
        // what they name is inside of the two blocks of memory, which the row's crew keeps.
        let launched = unsafe { launch.launch(config) };
        self.gpu.check("cuLaunchKernel", launched).map(drop)
    }
}

fn function(gpu: &Gpu, module: &Arc<CudaModule>, name: &str) -> Result<CudaFunction, Failure> {
    gpu.check(name, module.load_function(name))
}
