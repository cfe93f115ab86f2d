//! Flatten, unflatten and scale on the device's processors, for the baselines: copy engines are
//! many times slower at many small tensors, and a baseline that is slow for no reason proves
//! nothing.
//!
//! Written as PTX, which the driver compiles: the bench's binary has no nvcc to rely on.

use std::ffi::{c_void, CString};
use std::sync::Arc;

use cudarc::driver::{result, sys};
use param_averager::Dtype;

use super::device::{DeviceMemory, Gpu, Stream};
use super::flat::Flat;
use crate::failure::Failure;

/// Of a block.
pub const THREADS: u32 = 512;
/// Packs of 16 bytes that a thread has in flight.
const PACKS: u32 = 4;
/// For each processor: so many threads as it holds.
const BLOCKS_PER_PROCESSOR: u32 = 4;
/// A row of the table: where a piece lies in the tensors, where in the flat buffer, its bytes.
const ROW: usize = 24;

/// Between which of the two places a launch moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Flatten,
    Unflatten,
    /// From the tensors to themselves, which makes sense with a scale.
    InPlace,
}

/// The kernels of one rank and its table of pieces.
#[derive(Debug)]
pub struct Kernels {
    gpu: Gpu,
    module: sys::CUmodule,
    copy: sys::CUfunction,
    scales: Vec<(Dtype, sys::CUfunction)>,
    table: DeviceMemory,
    /// First row and number of rows of each dtype.
    rows: Vec<(Dtype, usize, usize)>,
    blocks: u32,
}

// SAFETY: handles, which the driver lets every thread use.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// For these two blocks of memory of a rank.
    pub fn new(
        gpu: &Gpu,
        flat: &Flat,
        own: &DeviceMemory,
        buffer: &DeviceMemory,
    ) -> Result<Arc<Self>, Failure> {
        let pieces = flat.pieces();
        let table: Vec<u64> = pieces
            .iter()
            .flat_map(|piece| {
                let places =
                    [own.address() + piece.tensor as u64, buffer.address() + piece.flat as u64];
                [places[0], places[1], piece.bytes as u64]
            })
            .collect();
        let memory = DeviceMemory::new(gpu, ROW * pieces.len())?;
        memory.upload(bytemuck::cast_slice(&table))?;
        let rows = Dtype::ALL.into_iter().filter_map(|dtype| {
            let first = pieces.iter().position(|piece| piece.dtype == dtype)?;
            Some((dtype, first, pieces.iter().filter(|piece| piece.dtype == dtype).count()))
        });
        let image = CString::new(ptx()).expect("text without zeros");
        // SAFETY: a context is bound by now; the image is PTX that ends in a zero.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = gpu.check("cuModuleLoadData of the bench's own PTX", module)?;
        let mut kernels = Kernels {
            gpu: gpu.clone(),
            module,
            copy: std::ptr::null_mut(),
            scales: vec![],
            table: memory,
            rows: rows.collect(),
            blocks: gpu.processors()? * BLOCKS_PER_PROCESSOR,
        };
        kernels.copy = kernels.function("pab_copy")?;
        for (dtype, name, _, _) in SCALES {
            kernels.scales.push((dtype, kernels.function(&format!("pab_scale_{name}"))?));
        }
        kernels.warm_up()?;
        Ok(Arc::new(kernels))
    }

    /// Launches each with nothing to do. A driver may load a kernel when it is first launched and
    /// wait for all others then, which may be waiting for this rank.
    fn warm_up(&self) -> Result<(), Failure> {
        let stream = Stream::new(&self.gpu)?;
        for function in self.scales.iter().map(|&(_, function)| function).chain([self.copy]) {
            self.launch(function, 0, 0, Way::InPlace, 1.0, &stream)?;
        }
        self.gpu.check("cuCtxSynchronize", result::ctx::synchronize())
    }

    fn function(&self, name: &str) -> Result<sys::CUfunction, Failure> {
        let c_name = CString::new(name).expect("no zero in it");
        // SAFETY: the module is loaded.
        self.gpu.check(name, unsafe { result::module::get_function(self.module, c_name) })
    }

    /// Enqueues a move of all pieces; with a scale, each element is multiplied by it, in f32 (f64
    /// for f64), and rounded.
    pub fn enqueue(&self, way: Way, scale: Option<f64>, stream: &Stream) -> Result<(), Failure> {
        for &(dtype, first, count) in &self.rows {
            let scaling = self.scales.iter().find(|(of, _)| *of == dtype && scale.is_some());
            let function = scaling.map_or(self.copy, |&(_, function)| function);
            self.launch(function, first, count, way, scale.unwrap_or(1.0), stream)?;
        }
        Ok(())
    }

    fn launch(
        &self,
        function: sys::CUfunction,
        first: usize,
        count: usize,
        way: Way,
        mut scale: f64,
        stream: &Stream,
    ) -> Result<(), Failure> {
        // Where in a row the addresses lie.
        let (mut from, mut to): (u32, u32) = match way {
            Way::Flatten => (0, 8),
            Way::Unflatten => (8, 0),
            Way::InPlace => (0, 0),
        };
        let (mut table, mut rows) = (self.table.address() + (ROW * first) as u64, count as u32);
        let mut parameters: [*mut c_void; 5] = [
            (&raw mut table).cast(),
            (&raw mut rows).cast(),
            (&raw mut from).cast(),
            (&raw mut to).cast(),
            (&raw mut scale).cast(),
        ];
        let grid = (rows.clamp(1, self.blocks), 1, 1);
        // SAFETY: the parameters are those of the kernel, which the driver copies now; the rows are
        // inside of the table, and what they point at is inside of the two blocks of memory, which
        // whoever measures keeps until all is done.
        let launched = unsafe {
            result::launch_kernel(function, grid, (THREADS, 1, 1), 0, stream.raw, &mut parameters)
        };
        self.gpu.check("cuLaunchKernel", launched)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: loaded by `new`. An error leaves nothing to do.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// Each dtype's name in kernels, the PTX type that a single element is moved as, and the bytes of
/// an element.
const SCALES: [(Dtype, &str, &str, u32); 4] = [
    (Dtype::F32, "f32", "b32", 4),
    (Dtype::F64, "f64", "b64", 8),
    (Dtype::F16, "f16", "b16", 2),
    (Dtype::Bf16, "bf16", "b16", 2),
];

/// All kernels.
fn ptx() -> String {
    let mut text = ".version 7.0\n.target sm_80\n.address_size 64\n".to_string();
    text += &kernel("pab_copy", "b8", 1, None);
    for (dtype, name, element, bytes) in SCALES {
        text += &kernel(&format!("pab_scale_{name}"), element, bytes, Some(dtype));
    }
    text
}

/// One kernel: block b takes rows b, b + blocks, … of the table. A row is a piece of at most PACKS
/// packs for each thread, all of which are loaded before the first is stored; then a tail of less
/// than a pack, an element a thread.
fn kernel(name: &str, element: &str, element_bytes: u32, scaled: Option<Dtype>) -> String {
    let (mut registers, mut loads, mut stores) = (String::new(), String::new(), String::new());
    for k in 0..PACKS {
        let pack = [0, 1, 2, 3].map(|word| format!("%x{k}{word}"));
        let words = pack.join(", ");
        registers +=
            &format!("    .reg .pred %in{k};\n    .reg .b32 {words};\n    .reg .b64 %at{k};\n");
        loads += &format!(
            "    add.u32 %n, %lane, {first};\n    setp.lt.u32 %in{k}, %n, \
             %packs;\n    mul.wide.u32 %at{k}, %n, 16;\n    \
             add.u64 %a, %src, %at{k};\n    @%in{k} ld.global.v4.b32 {{{words}}}, [%a];\n",
            first = k * THREADS,
        );
        stores += &scaled.map_or(String::new(), |dtype| scale_pack(dtype, &pack));
        stores += &format!(
            "    add.u64 %a, %dst, %at{k};\n    @%in{k} st.global.v4.b32 [%a], {{{words}}};\n"
        );
    }
    // A register is 16 bits at least.
    let of = if element == "b8" { "b16" } else { element };
    let one = scaled.map_or(String::new(), scale_element);
    format!(
        "
.visible .entry {name}(.param .u64 table, .param .u32 rows, .param .u32 from, .param .u32 to, \
.param .f64 scale)
.maxntid {THREADS}, 1, 1
{{
    .reg .pred %p;
    .reg .b32 %row, %rows, %step, %from, %to, %lane, %packs, %rest, %n, %word;
    .reg .b64 %table, %at, %from64, %to64, %src, %dst, %bytes, %a, %pair;
    .reg .b16 %low, %high;
    .reg .f32 %f0, %f1, %s;
    .reg .f64 %d, %s64;
    .reg .{of} %one;
{registers}    ld.param.u64 %table, [table];
    ld.param.u32 %rows, [rows];
    ld.param.u32 %from, [from];
    ld.param.u32 %to, [to];
    ld.param.f64 %s64, [scale];
    cvt.rn.f32.f64 %s, %s64;
    cvta.to.global.u64 %table, %table;
    cvt.u64.u32 %from64, %from;
    cvt.u64.u32 %to64, %to;
    mov.u32 %lane, %tid.x;
    mov.u32 %row, %ctaid.x;
    mov.u32 %step, %nctaid.x;
NEXT:
    setp.ge.u32 %p, %row, %rows;
    @%p bra END;
    mul.wide.u32 %at, %row, {ROW};
    add.u64 %at, %table, %at;
    add.u64 %a, %at, %from64;
    ld.global.u64 %src, [%a];
    add.u64 %a, %at, %to64;
    ld.global.u64 %dst, [%a];
    ld.global.u64 %bytes, [%at+16];
    cvt.u32.u64 %rest, %bytes;
    shr.u32 %packs, %rest, 4;
    and.b32 %rest, %rest, 15;
{loads}{stores}    mul.lo.u32 %n, %lane, {element_bytes};
    setp.ge.u32 %p, %n, %rest;
    @%p bra SKIP;
    shl.b32 %word, %packs, 4;
    add.u32 %n, %n, %word;
    cvt.u64.u32 %at, %n;
    add.u64 %a, %src, %at;
    ld.global.{element} %one, [%a];
{one}    add.u64 %a, %dst, %at;
    st.global.{element} [%a], %one;
SKIP:
    add.u32 %row, %row, %step;
    bra NEXT;
END:
    ret;
}}
"
    )
}

/// Multiplies all elements of a pack.
fn scale_pack(dtype: Dtype, pack: &[String; 4]) -> String {
    let words = pack.iter().map(|x| match dtype {
        Dtype::F32 => format!(
            "    mov.b32 %f0, {x};\n    mul.rn.f32 %f0, %f0, %s;\n    mov.b32 \
            {x}, %f0;\n"
        ),
        Dtype::Bf16 => format!(
            "    shl.b32 %word, {x}, 16;\n    mov.b32 %f0, %word;\n    and.b32 %word, {x}, \
             0xffff0000;\n    \
             mov.b32 %f1, %word;\n    mul.rn.f32 %f0, %f0, %s;\n    mul.rn.f32 %f1, %f1, %s;\n    \
             cvt.rn.bf16x2.f32 {x}, %f1, %f0;\n"
        ),
        _ => format!(
            "    mov.b32 {{%low, %high}}, {x};\n    cvt.f32.f16 %f0, %low;\n    cvt.f32.f16 %f1, \
             %high;\n    \
             mul.rn.f32 %f0, %f0, %s;\n    mul.rn.f32 %f1, %f1, %s;\n    cvt.rn.f16.f32 %low, \
             %f0;\n    \
             cvt.rn.f16.f32 %high, %f1;\n    mov.b32 {x}, {{%low, %high}};\n"
        ),
    });
    if dtype != Dtype::F64 {
        return words.collect();
    }
    let halves = pack.chunks_exact(2).map(|two| {
        let (low, high) = (&two[0], &two[1]);
        format!(
            "    mov.b64 %d, {{{low}, {high}}};\n    mul.rn.f64 %d, %d, %s64;\n    mov.b64 \
             {{{low}, {high}}}, %d;\n"
        )
    });
    halves.collect()
}

/// Multiplies the element in `%one`.
fn scale_element(dtype: Dtype) -> String {
    let lines = match dtype {
        Dtype::F32 => {
            "    mov.b32 %f0, %one;\n    mul.rn.f32 %f0, %f0, %s;\n    mov.b32 %one, \
            %f0;\n"
        }
        Dtype::F64 => {
            "    mov.b64 %d, %one;\n    mul.rn.f64 %d, %d, %s64;\n    mov.b64 %one, \
            %d;\n"
        }
        Dtype::Bf16 => {
            "    mov.b16 %low, 0;\n    mov.b32 %word, {%low, %one};\n    mov.b32 %f0, %word;\n    \
             mul.rn.f32 %f0, %f0, %s;\n    cvt.rn.bf16.f32 %one, %f0;\n"
        }
        _ => {
            "    cvt.f32.f16 %f0, %one;\n    mul.rn.f32 %f0, %f0, %s;\n    cvt.rn.f16.f32 %one, \
            %f0;\n"
        }
    };
    lines.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use std::process::Command;

    /// By the assembler beside the nvcc that builds the crate; a driver's compiler takes the same
    /// language.
    #[test]
    fn the_ptx_assembles_for_every_architecture_without_spills() {
        let nvcc = std::env::var("NVCC").unwrap_or_default();
        let ptxas = Path::new(&nvcc).with_file_name("ptxas");
        if nvcc.is_empty() || !ptxas.is_file() {
            return eprintln!(
                "SKIPPED the_ptx_assembles_for_every_architecture_without_spills: NVCC names no \
                 nvcc"
            );
        }
        let folder = std::env::temp_dir().join(format!("pa-bench-ptx-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let source = folder.join("bench.ptx");
        std::fs::write(&source, ptx()).unwrap();
        for arch in ["sm_80", "sm_90", "sm_120"] {
            let mut command = Command::new(&ptxas);
            command
                .args(["-v", "--warn-on-spills", "-arch", arch, "-o"])
                .arg(folder.join("bench.cubin"));
            let output = command.arg(&source).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{arch}: {said}");
            assert_eq!(
                said.matches("0 bytes spill stores, 0 bytes spill loads").count(),
                5,
                "{arch}: {said}"
            );
        }
        std::fs::remove_dir_all(folder).unwrap();
    }
}
