//! Probe of a path between two devices: the steps of the ring with known data, see
//! `kernels/probe.h`. Sizes grow while a probe stays quick, so that a fast path is tested with
//! 64 MiB and a slow one, or a simulated one, does not take long.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver::{call, Failed};
use super::{Context, DeviceMemory, Pinned};
use crate::abi::{PaLink, PaProbeResult, PaProbeSide, PA_LINE_WORDS, PA_PACK_BYTES};

const THREADS: u32 = 256;

/// Variable with the time limit of a probe in milliseconds: from the launch of the first kernel to
/// the last wait of either. A simulated device needs more than a real one.
const LIMIT: &str = "PARAM_AVERAGER_P2P_LIMIT_MS";
const DEFAULT_LIMIT: Duration = Duration::from_millis(200);

/// Longest duration of a size after which a larger one is tried.
const QUICK: Duration = Duration::from_millis(20);

/// Amount of data of a probe.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    blocks: u32,
    packs: u32,
    slots: u32,
    rounds: u32,
}

/// 32 KiB, 1 MiB, 16 MiB and 64 MiB of memory. Every slot is used, and some are used again.
pub(super) const SIZES: [Size; 4] = [
    Size { blocks: 4, packs: 256, slots: 2, rounds: 4 },
    Size { blocks: 32, packs: 512, slots: 4, rounds: 6 },
    Size { blocks: 32, packs: 2048, slots: 16, rounds: 24 },
    Size { blocks: 32, packs: 2048, slots: 64, rounds: 80 },
];

impl Size {
    fn data_bytes(self) -> usize {
        (self.blocks * self.slots * self.packs * PA_PACK_BYTES) as usize
    }

    fn flag_bytes(self) -> usize {
        (self.blocks * PA_LINE_WORDS) as usize * 4
    }

    /// Memory of one side: data, two arrays of flags, and the result.
    pub(super) fn bytes(self) -> usize {
        self.data_bytes() + 2 * self.flag_bytes() + size_of::<PaProbeResult>()
    }

    /// Bytes that each side writes after the first round.
    fn timed_bytes(self) -> u64 {
        u64::from(self.rounds - 1) * u64::from(self.blocks * self.packs * PA_PACK_BYTES)
    }
}

/// Place of the data of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// The memory of the side that reads them: the other side writes over the link.
    Push,
    /// The memory of the side that writes them: the other side reads over the link.
    Pull,
}

/// Result of one side of a probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Found {
    /// True if all data arrived, in time.
    pub(super) is_right: bool,
    /// Data read per time, in bytes per nanosecond. 0 if nothing arrived.
    pub(super) rate: f64,
    pub(super) took: Duration,
}

impl Found {
    /// True if a larger size is worth trying.
    pub(super) fn goes_on(&self) -> bool {
        self.is_right && self.took < QUICK
    }

    /// The worse of two results: of two sides, or of two paths that are both needed.
    pub(super) fn worse(&self, other: &Found) -> Found {
        Found {
            is_right: self.is_right && other.is_right,
            rate: self.rate.min(other.rate),
            took: self.took.max(other.took),
        }
    }
}

/// Result of a probe of one path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Probed {
    pub(super) found: Found,
    /// Number of sizes that were tried.
    pub(super) sizes: usize,
}

impl Probed {
    /// True if so much data moved so fast that the rate is one of the path, and not of its latency.
    pub(super) fn is_telling(&self) -> bool {
        self.found.is_right && self.sizes > 2
    }
}

/// Time limit of a probe.
fn limit() -> Duration {
    let set = std::env::var(LIMIT).ok().and_then(|value| value.parse().ok());
    set.map_or(DEFAULT_LIMIT, Duration::from_millis)
}

/// Addresses of one side's memory, which is zeroed: its data, and its flags and result.
#[derive(Clone, Copy)]
pub(super) struct Place {
    data: u64,
    flags: u64,
}

impl Place {
    /// Memory of `size.bytes()` at this address.
    pub(super) fn at(address: u64, size: Size) -> Place {
        Place { data: address, flags: address + size.data_bytes() as u64 }
    }
}

/// Arguments of the side with memory at `own`; the memory of the other side is at `other`.
/// `is_first` differs between the sides.
fn side(path: Path, size: Size, own: Place, other: Place, is_first: bool) -> PaProbeSide {
    let flags = size.flag_bytes() as u64;
    let link = |writer: Place, reader: Place| PaLink {
        slots: match path {
            Path::Push => reader.data,
            Path::Pull => writer.data,
        },
        filled: reader.flags,
        drained: writer.flags + flags,
    };
    let seeds = [0x1234_5678, 0x89ab_cdef];
    PaProbeSide {
        links: [link(other, own), link(own, other)],
        result: own.flags + 2 * flags,
        limit_ns: limit().as_nanos() as u64,
        packs: size.packs,
        slots: size.slots,
        rounds: size.rounds,
        seed_out: seeds[usize::from(is_first)],
        seed_in: seeds[usize::from(!is_first)],
        reserved: 0,
    }
}

/// Loads the probe's code to a device. A first launch may load it, and wait for the kernel of the
/// other side meanwhile.
pub(super) fn warm_up(context: &Context) -> Result<(), Failed> {
    launch(context, &PaProbeSide { rounds: 0, ..bytemuck::Zeroable::zeroed() }, 1)
}

/// Runs one side of a probe and waits for it. The other side runs at the same time, so that nothing
/// is allocated here: that may wait for the other side's kernel.
///
/// `own` is this side's memory, `other` the other side's, mapped here.
pub(super) fn run(
    context: &Context,
    path: Path,
    size: Size,
    [own, other]: [Place; 2],
    is_first: bool,
) -> Result<Found, Failed> {
    let side = side(path, size, own, other, is_first);
    let start = Instant::now(); // by the host's clock: a simulated device may have another
    launch(context, &side, size.blocks)?;
    let took = start.elapsed();
    let mut found = PaProbeResult { wrong: 0, late: 0, ns: 0 };
    read(context, side.result, bytemuck::bytes_of_mut(&mut found))?;
    let rate = match found.ns {
        0 => 0.0,
        ns => size.timed_bytes() as f64 / ns as f64,
    };
    Ok(Found { is_right: found.wrong == 0 && found.late == 0, rate, took })
}

/// Copies memory that the device addresses to the host.
pub(super) fn read(context: &Context, from: u64, to: &mut [u8]) -> Result<(), Failed> {
    context.on_the_side(|stream| {
        // SAFETY: the caller keeps the memory; `to` outlives the copy, which is waited for.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), stream)) }
    })
}

/// Launches the kernel on the context's own stream and waits for it.
fn launch(on: &Context, side: &PaProbeSide, blocks: u32) -> Result<(), Failed> {
    let mut parameters: [*mut c_void; 1] = [std::ptr::from_ref(side).cast_mut().cast()];
    on.on_the_side(|stream| {
        // SAFETY: the kernel takes one PaProbeSide, which the driver copies during the call; the
        // caller keeps the memory it refers to until the kernel has ended.
        unsafe {
            call!(cuLaunchKernel(
                on.probe(),
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                null_mut()
            ))
        }
    })
}

/// Probes a path between two devices of this process, and returns what the slower side found at the
/// largest size that was tried. `allocate` allocates one side, and tells where it is.
fn between<M>(
    one: &Arc<Context>,
    other: &Arc<Context>,
    path: Path,
    allocate: impl Fn(&Arc<Context>, Size) -> Result<(M, Place), Failed>,
) -> Result<Probed, Failed> {
    let mut sizes = 0;
    loop {
        let size = SIZES[sizes];
        let [(_ours, first), (_theirs, second)] = [allocate(one, size)?, allocate(other, size)?];
        let found = both(
            || run(one, path, size, [first, second], true),
            || run(other, path, size, [second, first], false),
        )?;
        sizes += 1;
        let found = found[0].worse(&found[1]);
        if !found.goes_on() || sizes == SIZES.len() {
            return Ok(Probed { found, sizes });
        }
    }
}

/// Runs two functions at the same time. Where launches block, each waits for the kernel of the
/// other.
fn both<T: Send>(
    one: impl FnOnce() -> Result<T, Failed>,
    other: impl FnOnce() -> Result<T, Failed> + Send,
) -> Result<[T; 2], Failed> {
    std::thread::scope(|scope| {
        let theirs = scope.spawn(other);
        let ours = one();
        let theirs = theirs.join().expect("a probe does not panic");
        Ok([ours?, theirs?])
    })
}

/// Throughput of copies between two devices of this process, both ways at once, in bytes per
/// nanosecond.
pub(super) fn copies(
    one: &Arc<Context>,
    other: &Arc<Context>,
    sizes: usize,
) -> Result<f64, Failed> {
    let bytes = SIZES[sizes - 1].data_bytes();
    let allocate = |context| -> Result<[DeviceMemory; 2], Failed> {
        Ok([DeviceMemory::new(context, bytes)?, DeviceMemory::new(context, bytes)?])
    };
    let [ours, theirs] = [allocate(one)?, allocate(other)?];
    let copy = |context: &Arc<Context>, to: &DeviceMemory, from: &DeviceMemory| {
        let (to, from, start) = (to.address(), from.address(), Instant::now());
        context.on_the_side(|stream| {
            // SAFETY: memory of the same size, which outlives the copy; access is enabled.
            unsafe { call!(cuMemcpyDtoDAsync_v2(to, from, bytes, stream)) }
        })?;
        Ok(start.elapsed())
    };
    let took = both(|| copy(one, &theirs[0], &ours[1]), || copy(other, &ours[0], &theirs[1]))?;
    Ok(bytes as f64 / took[0].max(took[1]).as_nanos().max(1) as f64)
}

/// Probes writes to, or reads from, the other device's memory, as the ring makes them: data and
/// flags lie in memory of devices. Access is enabled both ways.
pub(super) fn peer(one: &Arc<Context>, other: &Arc<Context>, path: Path) -> Result<Probed, Failed> {
    between(one, other, path, |context, size| {
        let memory = DeviceMemory::new(context, size.bytes())?;
        let place = Place::at(memory.address(), size);
        Ok((memory, place))
    })
}

/// Probes the same as the direct average does it: flags lie in memory of the host.
pub(super) fn direct(
    one: &Arc<Context>,
    other: &Arc<Context>,
    path: Path,
) -> Result<Probed, Failed> {
    between(one, other, path, |context, size| {
        let data = DeviceMemory::new(context, size.data_bytes())?;
        let flags = Pinned::new(context, size.bytes() - size.data_bytes())?;
        let place = Place { data: data.address(), flags: flags.address() };
        Ok(((data, flags), place))
    })
}

/// Probes page-locked memory of the host.
pub(super) fn host(one: &Arc<Context>, other: &Arc<Context>) -> Result<Probed, Failed> {
    between(one, other, Path::Push, |context, size| {
        let memory = Pinned::new(context, size.bytes())?;
        let place = Place::at(memory.address(), size);
        Ok((memory, place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{PA_IN, PA_OUT};

    #[test]
    fn the_largest_size_covers_64_mib_and_reuses_slots() {
        assert_eq!(SIZES[SIZES.len() - 1].data_bytes(), 64 << 20);
        assert!(SIZES.iter().all(|size| size.rounds > size.slots));
        assert!(SIZES.windows(2).all(|pair| pair[0].bytes() < pair[1].bytes()));
    }

    #[test]
    fn sides_read_what_the_other_side_writes() {
        for path in [Path::Push, Path::Pull] {
            let [here, there] = [1 << 32, 2 << 32].map(|at| Place::at(at, SIZES[1]));
            let a = side(path, SIZES[1], here, there, true);
            let b = side(path, SIZES[1], there, here, false);
            for (writer, reader) in [(&a, &b), (&b, &a)] {
                let ends = [writer.links[PA_OUT as usize], reader.links[PA_IN as usize]];
                assert_eq!(bytemuck::bytes_of(&ends[0]), bytemuck::bytes_of(&ends[1]));
                assert_eq!(writer.seed_out, reader.seed_in);
            }
            assert_ne!(a.seed_out, b.seed_out);
        }
    }
}
