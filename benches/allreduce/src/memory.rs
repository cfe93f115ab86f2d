//! The ranks' parameters: one block of memory a rank, allocated and touched once, with the tensors
//! placed in it.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout as Block};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use param_averager::{Device, Dtype, Parameters, TensorMut};

use crate::layout::Layout;

/// Tensors start at multiples of this, and at least as much lies between two: they are not one flat
/// buffer.
const GAP: usize = 64;
const PAGE: usize = 4096;

/// Memory of one rank.
#[derive(Debug)]
pub struct Arena {
    start: *mut u8,
    block: Block,
}

// Plain memory. Who may touch it when is settled by `Crew`: its members between two orders,
// everybody else otherwise.
unsafe impl Send for Arena {}
unsafe impl Sync for Arena {}

impl Arena {
    /// `bytes` of memory, each page touched by the thread that calls.
    pub fn new(bytes: usize) -> Self {
        let block = Block::from_size_align(bytes.max(1), PAGE)
            .expect("less than half of the address space");
        // SAFETY: not of size 0.
        let start = unsafe { alloc_zeroed(block) };
        if start.is_null() {
            handle_alloc_error(block);
        }
        for page in (0..block.size()).step_by(PAGE) {
            // SAFETY: inside of the block. Volatile: the compiler knows that it is zero already.
            unsafe { start.add(page).write_volatile(0) };
        }
        Arena { start, block }
    }

    pub fn start(&self) -> *mut u8 {
        self.start
    }

    pub fn bytes(&self) -> usize {
        self.block.size()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated so.
        unsafe { dealloc(self.start, self.block) }
    }
}

/// A tensor and where it lies in its rank's arena.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    pub name: String,
    pub offset: usize,
    pub elements: usize,
    pub dtype: Dtype,
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

/// Places the same bytes without gaps, one tensor a dtype.
pub fn place_flat(layout: &Layout) -> Arc<[Placed]> {
    let mut end = 0;
    let placed = Dtype::ALL.into_iter().filter_map(|dtype| {
        let elements: u64 =
            layout.tensors.iter().filter(|t| t.dtype == dtype).map(|t| t.elements()).sum();
        let offset = end;
        end = (end + elements as usize * dtype.size()).next_multiple_of(GAP);
        (elements > 0).then(|| Placed {
            name: format!("flat {dtype}"),
            offset,
            elements: elements as usize,
            dtype,
        })
    });
    placed.collect()
}

/// One rank's tensors, as a member of a crew sees them.
#[derive(Clone, Debug)]
pub struct Replica {
    pub arena: Arc<Arena>,
    pub tensors: Arc<[Placed]>,
}

impl Replica {
    /// One of its tensors.
    pub fn tensor(&mut self, index: usize) -> TensorMut<'_> {
        self.placed(index)
    }

    /// The same; for one borrow, each is to be asked for once.
    fn placed(&self, index: usize) -> TensorMut<'_> {
        let Placed { name, offset, elements, dtype } = &self.tensors[index];
        // SAFETY: placed inside of the arena, which is initialised; a member has its rank's arena
        // to itself, see `Arena`.
        let tensor = unsafe {
            TensorMut::from_raw_parts(
                self.arena.start().add(*offset),
                *elements,
                *dtype,
                Device::cpu(),
            )
        };
        tensor.named(name)
    }
}

impl Parameters for Replica {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let replica: &'a Replica = self;
        (0..replica.tensors.len()).for_each(|index| visit(replica.placed(index)))
    }
}

/// Arenas kept from one table to the next, since touching memory for the first time is slow.
#[derive(Default)]
pub struct Pool {
    arenas: Vec<Arc<Arena>>,
}

impl Pool {
    /// One arena of at least `bytes` for each of `count`.
    pub fn get(&mut self, count: usize, bytes: usize) -> Vec<Arc<Arena>> {
        let too_small = |arena: &Arc<Arena>| arena.bytes() < bytes;
        if self.arenas.iter().take(count).any(too_small) {
            self.arenas.clear(); // before the new ones are there
        }
        let have = self.arenas.len();
        let new: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (have..count).map(|_| scope.spawn(|| Arc::new(Arena::new(bytes)))).collect();
            threads.into_iter().map(|thread| thread.join().expect("only touches memory")).collect()
        });
        self.arenas.extend(new);
        self.arenas[..count].to_vec()
    }
}

/// Bytes from the start of each arena to the end of the last tensor, for all ranks.
pub fn arena_bytes(layout: &Layout, ranks: usize) -> u64 {
    place(layout).1 as u64 * ranks as u64
}

/// Calls `f(0..count)` from all cores and adds up what it returns.
pub fn on_all_cores(count: usize, f: impl Fn(usize) -> u64 + Sync) -> u64 {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut sum = 0;
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= count {
                return sum;
            }
            sum += f(piece);
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (1..cores().min(count)).map(|_| scope.spawn(work)).collect();
        work() + threads.into_iter().map(|thread| thread.join().expect("adds numbers")).sum::<u64>()
    })
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get())
}

/// Memory that can be allocated and memory in all, if this system says so.
pub fn available() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(
            line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?
                * 1024,
        )
    };
    let (free, all) = (field("MemAvailable")?, field("MemTotal")?);
    // A container may be allowed less.
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max").unwrap_or(u64::MAX);
    let used = number("/sys/fs/cgroup/memory.current").unwrap_or(0);
    Some((free.min(limit.saturating_sub(used)), all.min(limit)))
}

/// Bytes of memory that this process holds now; `most_resident` is of the time from here on.
pub fn resident_afresh() -> Option<u64> {
    std::fs::write("/proc/self/clear_refs", "5").ok()?; // resets VmHWM
    status_bytes("VmRSS:")
}

/// The most bytes of memory that this process has held since `resident_afresh`.
pub fn most_resident() -> Option<u64> {
    status_bytes("VmHWM:")
}

fn status_bytes(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
