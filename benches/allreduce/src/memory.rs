//! Host memory of the ranks' replicas: one block for each rank, mapped and touched once, with the
//! tensors placed in it.

use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use param_averager::Dtype;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::layout::Layout;

/// Tensors start at multiples of this, and at least as much lies between two: they are not one flat
/// buffer.
const GAP: usize = 64;

/// Memory of one rank. The measuring loop settles which thread may use it when: those of a crew
/// while it runs, all others otherwise.
pub type Arena = MmapRaw;

/// Zeroes, every page of which is there.
pub fn arena(bytes: usize) -> Arc<Arena> {
    let memory = MmapOptions::new().len(bytes.max(1)).populate().map_anon();
    Arc::new(memory.expect("it was found to fit").into())
}

/// Arenas, mapped at the same time, since touching memory for the first time is slow.
pub fn arenas(count: usize, bytes: usize) -> Vec<Arc<Arena>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(|| arena(bytes))).collect();
        threads.into_iter().map(|thread| thread.join().expect("only maps memory")).collect()
    })
}

/// A tensor and its offset in bytes in its rank's memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    pub name: String,
    pub offset: usize,
    pub elements: usize,
    pub dtype: Dtype,
}

impl Placed {
    pub fn bytes(&self) -> usize {
        self.elements * self.dtype.size()
    }
}

/// Places a layout's tensors one after the other, with gaps. Returns the bytes needed, too.
pub fn place(layout: &Layout) -> (Arc<[Placed]>, usize) {
    let mut end = 0;
    let placed = layout.tensors.iter().map(|tensor| {
        let (offset, elements) = (end, tensor.elements() as usize);
        end = (offset + elements * tensor.dtype.size()).next_multiple_of(GAP) + GAP;
        Placed { name: tensor.name.clone(), offset, elements, dtype: tensor.dtype }
    });
    (placed.collect(), end)
}

/// A flat buffer for each dtype, one after the other in one block of memory.
#[derive(Clone, Debug)]
pub struct Flat {
    pub buffers: Arc<[Placed]>,
    /// The tensors that are not empty, dtype by dtype.
    pub spans: Arc<[Span]>,
    pub bytes: usize,
}

/// A tensor, or a part of one: offsets in its rank's memory and in the flat block.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub tensor: usize,
    pub flat: usize,
    pub bytes: usize,
    pub dtype: Dtype,
}

impl Flat {
    /// Places tensors at multiples of `alignment` bytes in their buffer.
    pub fn new(tensors: &[Placed], alignment: usize) -> Self {
        let (mut buffers, mut spans, mut end) = (vec![], vec![], 0usize);
        for dtype in Dtype::ALL {
            let offset = end.next_multiple_of(GAP);
            end = offset;
            for tensor in tensors.iter().filter(|t| t.dtype == dtype && t.elements > 0) {
                spans.push(Span { tensor: tensor.offset, flat: end, bytes: tensor.bytes(), dtype });
                end = (end + tensor.bytes()).next_multiple_of(alignment);
            }
            if end > offset {
                let elements = (end - offset) / dtype.size();
                buffers.push(Placed { name: format!("flat {dtype}"), offset, elements, dtype });
            }
        }
        Flat { buffers: buffers.into(), spans: spans.into(), bytes: end }
    }

    /// The spans, cut into pieces of at most `most` bytes.
    pub fn pieces(&self, most: usize) -> Vec<Span> {
        let cut = |span: &Span| {
            let Span { tensor, flat, bytes, dtype } = *span;
            (0..bytes).step_by(most).map(move |at| Span {
                tensor: tensor + at,
                flat: flat + at,
                bytes: most.min(bytes - at),
                dtype,
            })
        };
        self.spans.iter().flat_map(cut).collect()
    }
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Brand of each core of this machine.
pub fn cpus() -> Vec<String> {
    let cpus = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(cpus);
    system.cpus().iter().map(|cpu| cpu.brand().trim().to_owned()).collect()
}

/// Bytes of memory that can be allocated, and bytes in all, of this machine or container.
pub fn available() -> Option<(u64, u64)> {
    let mut system = System::new();
    system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
    let (free, all) = (system.available_memory(), system.total_memory());
    // A container may be allowed less. Without a limit, its free memory leaves out the page cache.
    let limits = system.cgroup_limits().filter(|limits| limits.total_memory < all);
    let limits = limits.map_or((free, all), |limits| (limits.free_memory, limits.total_memory));
    (all > 0).then_some((free.min(limits.0), limits.1))
}

/// Bytes for people.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_in_one_piece_and_packs_are_aligned() {
        let place =
            |offset, elements, dtype| Placed { name: String::new(), offset, elements, dtype };
        let tensors = [
            place(0, 3, Dtype::F32),
            place(64, 40_001, Dtype::Bf16),
            place(128_000, 0, Dtype::F32),
            place(128_064, 20_000, Dtype::F32),
        ];
        let flat = Flat::new(&tensors, 16);
        let sizes: Vec<_> = flat.buffers.iter().map(|b| (b.dtype, b.offset, b.elements)).collect();
        assert_eq!(sizes, [(Dtype::F32, 0, 20_004), (Dtype::Bf16, 80_064, 40_008)]);
        assert_eq!((flat.bytes, flat.spans.len()), (160_080, 3));
        let pieces = flat.pieces(32 << 10);
        assert_eq!(pieces.iter().map(|piece| piece.bytes).sum::<usize>(), 12 + 80_000 + 80_002);
        assert!(pieces
            .iter()
            .all(|p| p.bytes <= 32 << 10 && p.flat % 16 == 0 && p.tensor % 16 == 0));
        assert!(pieces.windows(2).all(|two| two[0].flat + two[0].bytes <= two[1].flat));
        let dense = Flat::new(&tensors, 1);
        assert_eq!((dense.buffers[0].elements, dense.buffers[1].elements), (20_003, 40_001));
    }

    #[test]
    fn this_machine_has_memory() {
        let (free, all) = available().expect("a supported system");
        assert!(free > 0 && free <= all, "{free} of {all}");
    }
}
