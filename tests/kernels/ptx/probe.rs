//! The kernel that probes a path between two devices, with faults on one side.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::{
    result, sys, CudaContext, CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::Ptx;
use param_averager::__testing::abi::{
    PaLink, PaProbeResult, PaProbeSide, PA_LINE_WORDS, PA_PACK_BYTES,
};

const BLOCKS: u32 = 2;
const PACKS: u32 = 100;
/// With more, the flags of the other direction order the use of a slot, too.
const SLOTS: u32 = 1;
const ROUNDS: u32 = 5;
const DATA: u64 = (BLOCKS * PACKS * SLOTS * PA_PACK_BYTES) as u64;
const FLAGS: u64 = (BLOCKS * PA_LINE_WORDS * 4) as u64;
const BYTES: u64 = DATA + 2 * FLAGS + size_of::<PaProbeResult>() as u64;

#[repr(transparent)]
struct Args(PaProbeSide);
// SAFETY: plain data, and what the kernel takes by value.
unsafe impl DeviceRepr for Args {}

/// A device, with its kernel loaded: that may wait for a kernel that runs.
struct Machine {
    context: Arc<CudaContext>,
    probe: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Machine {
    fn new(ordinal: usize, fatbin: &[u8]) -> Machine {
        let context = CudaContext::new(ordinal).unwrap();
        let module = context.load_module(Ptx::from_binary(fatbin.to_vec())).unwrap();
        let probe = module.load_function("pa_probe").unwrap();
        let stream = context.new_stream().unwrap();
        Machine { context, probe, stream }
    }
}

struct Side<'a> {
    machine: &'a Machine,
    address: u64,
}

impl<'a> Side<'a> {
    /// Zeroed memory for data, flags and the result.
    fn new(machine: &'a Machine) -> Side<'a> {
        machine.context.bind_to_thread().unwrap();
        // SAFETY: a context is bound; own memory.
        let address = unsafe {
            let address = result::malloc_sync(BYTES as usize).unwrap();
            result::memset_d8_sync(address, 0, BYTES as usize).unwrap();
            address
        };
        Side { machine, address }
    }

    /// Arguments of this side. `pushes`: data lie in their reader's memory.
    fn args(&self, other: &Side<'_>, pushes: bool, seeds: (u32, u32)) -> PaProbeSide {
        let (own, theirs) = (self.address, other.address);
        let link = |writer, reader| PaLink {
            slots: if pushes { reader } else { writer },
            filled: reader + DATA,
            drained: writer + DATA + FLAGS,
        };
        PaProbeSide {
            links: [link(theirs, own), link(own, theirs)],
            result: own + DATA + 2 * FLAGS,
            limit_ns: 100_000_000, // 3 s by the simulator's slow clock
            packs: PACKS,
            slots: SLOTS,
            rounds: ROUNDS,
            seed_out: seeds.0,
            seed_in: seeds.1,
            reserved: 0,
        }
    }

    fn launch(&self, args: PaProbeSide) {
        let (grid_dim, block_dim) = ((BLOCKS, 1, 1), (64, 1, 1));
        let args = Args(args);
        let mut builder = self.machine.stream.launch_builder(&self.machine.probe);
        builder.arg(&args);
        let config = LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 };
        // SAFETY: the memory is laid out as kernels/abi.h says.
        unsafe { builder.launch(config) }.unwrap();
    }

    /// Packs that were wrong, and blocks that were late, when all kernels have ended.
    fn result(&self) -> (u32, u32) {
        self.machine.context.synchronize().unwrap();
        let mut found = PaProbeResult { wrong: 0, late: 0, ns: 0 };
        let from = self.address + DATA + 2 * FLAGS;
        // SAFETY: own memory.
        unsafe { result::memcpy_dtoh_sync(bytemuck::bytes_of_mut(&mut found), from) }.unwrap();
        assert!(found.late > 0 || found.ns > 0);
        (found.wrong, found.late)
    }
}

pub fn run(fatbin: &[u8]) {
    let machines = [0, 1].map(|ordinal| Machine::new(ordinal, fatbin));
    let [one, other] = machines.each_ref().map(|machine| &machine.context);
    for (from, to) in [(one, other), (other, one)] {
        from.bind_to_thread().unwrap();
        // SAFETY: both contexts live.
        unsafe { sys::cuCtxEnablePeerAccess(to.cu_ctx(), 0) }.result().unwrap();
    }
    for pushes in [true, false] {
        let both = |seeds: [(u32, u32); 2]| {
            let [one, other] = machines.each_ref().map(Side::new);
            one.launch(one.args(&other, pushes, seeds[0]));
            other.launch(other.args(&one, pushes, seeds[1]));
            [one.result(), other.result()]
        };
        assert_eq!(both([(1, 2), (2, 1)]), [(0, 0); 2]);
        // The other side writes something else: every pack is wrong, and none is late.
        assert_eq!(both([(1, 3), (2, 1)]), [(BLOCKS * ROUNDS * PACKS, 0), (0, 0)]);
        // There is no other side: every block gives up, in time.
        let [one, other] = machines.each_ref().map(Side::new);
        let start = Instant::now();
        one.launch(one.args(&other, pushes, (1, 2)));
        assert_eq!(one.result(), (0, BLOCKS));
        assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());
    }
}
