//! A world, its tensors and its faults: built on any machine, run there, read back.

use super::machines::{Job, Launch, Machine};
use param_averager::__testing::abi::*;
use param_averager::Dtype;
use std::sync::atomic::{AtomicU32, Ordering};
use test_support::{guards_are_whole, ulp, Guarded, Random, GUARD};

const IN: usize = PA_IN as usize;
const OUT: usize = PA_OUT as usize;

/// Kernels that the ranks launch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    Direct,
    Ring,
    /// The ring with the commit.
    Commit,
    /// The same, each segment in a launch of its own.
    Sequenced,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub world: usize,
    /// Dtype, elements, and how many elements after a 16-byte boundary it begins on rank 0. Rank r
    /// adds r times the next.
    pub tensors: Vec<(Dtype, usize, usize, usize)>,
    pub how: How,
    pub wire_f32: bool,
    pub channels: u32,
    pub slots: u32,
    /// Packs.
    pub chunk: u32,
    pub threads: u32,
    pub weights: Option<Vec<f64>>,
    pub counter: u32,
    pub reject: bool,
    pub averages: usize,
    pub timeout_ms: u64,
    /// A NaN: rank, tensor, element.
    pub nan: Option<(usize, usize, usize)>,
    /// A rank that is never launched.
    pub missing: Option<usize>,
    /// A rank that leaves before a step.
    pub fault: Option<(usize, u32)>,
    /// A rank that keeps its tensors.
    pub keeps: Option<usize>,
    /// The host aborts while the ranks wait.
    pub abort: bool,
}

impl Default for Case {
    fn default() -> Self {
        Case {
            world: 2,
            tensors: vec![(Dtype::F32, 3001, 0, 0)],
            how: How::Ring,
            wire_f32: false,
            channels: 2,
            slots: 2,
            chunk: 160,
            threads: 32,
            weights: None,
            counter: 0,
            reject: false,
            averages: 1,
            timeout_ms: 600_000,
            nan: None,
            missing: None,
            fault: None,
            keeps: None,
            abort: false,
        }
    }
}

/// Memory after the run, by rank.
pub struct Outcome {
    pub tensors: Vec<Vec<Vec<u8>>>,
    pub channels: Vec<Vec<PaChannel>>,
}

const LINE: usize = 4 * PA_LINE_WORDS as usize;

/// Value of the bytes beside a rank's tensors. It differs between ranks: the mean of equal bytes
/// would leave them as they were.
fn guard_byte(rank: usize) -> u8 {
    0x21 + 0x11 * rank as u8
}

fn code(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => PA_F32,
        Dtype::F64 => PA_F64,
        Dtype::F16 => PA_F16,
        _ => PA_BF16,
    }
}

/// A tensor in a rank's memory, between guard bytes.
struct Placed {
    memory: u64,
    offset: usize,
    bytes: usize,
}

struct Rank {
    args: PaArgs,
    tensors: Vec<Placed>,
}

impl Case {
    pub fn inputs(&self) -> Vec<Vec<Guarded>> {
        let mut random = Random(self.world as u64 * 1000 + u64::from(self.chunk));
        let tensors = |rank: usize| {
            self.tensors
                .iter()
                .enumerate()
                .map(|(index, &(dtype, elements, _, _))| {
                    let mut tensor = Guarded::random(dtype, elements, 0, &mut random);
                    if let Some((_, _, element)) =
                        self.nan.filter(|&(r, t, _)| (r, t) == (rank, index))
                    {
                        tensor.set(element, f64::NAN);
                    }
                    tensor
                })
                .collect()
        };
        let mut inputs: Vec<Vec<Guarded>> = (0..self.world).map(tensors).collect();
        // Every fifth element is the same everywhere.
        let (first, others) = inputs.split_at_mut(1);
        for (tensor, same) in others.iter_mut().flat_map(|rank| rank.iter_mut().zip(&first[0])) {
            (0..tensor.elements).step_by(5).for_each(|i| tensor.set(i, same.get(i)));
        }
        inputs
    }

    pub fn run(&self, machine: &dyn Machine, inputs: &[Vec<Guarded>]) -> Outcome {
        let (control, host) = (self.control(machine), self.host(machine));
        let mut ranks: Vec<Rank> = (0..self.world)
            .map(|rank| self.rank(machine, rank, (control, host), &inputs[rank]))
            .collect();
        for rank in 0..self.world {
            let (next, previous) = ((rank + 1) % self.world, (rank + self.world - 1) % self.world);
            let drained = |rank: usize| ranks[rank].args.links[OUT].drained;
            let (into_own, out_of_own) = (drained(previous), drained(rank));
            let next = ranks[next].args.links[IN];
            let links = &mut ranks[rank].args.links;
            links[IN].drained = into_own;
            links[OUT] = PaLink { drained: out_of_own, ..next };
        }
        let jobs: Vec<Job> = (0..self.world)
            .filter(|&rank| self.missing != Some(rank))
            .map(|rank| Job {
                rank,
                args: ranks[rank].args,
                launches: self.launches().repeat(self.averages),
                threads: self.threads,
            })
            .collect();
        machine.run(&jobs, &|| {
            if self.abort {
                std::thread::sleep(std::time::Duration::from_millis(300));
                let word = host + std::mem::offset_of!(PaHost, abort) as u64;
                // SAFETY: the word is in host memory that is never freed, and every access to it is
                // atomic.
                let word = unsafe { AtomicU32::from_ptr(word as *mut u32) };
                word.store(PA_ABORTED << 8 | 1, Ordering::Release);
            }
        });
        self.collect(machine, &ranks)
    }

    /// The launches of one average.
    fn launches(&self) -> Vec<Launch> {
        let segments = 2 * self.world as u32 + 1;
        let all_of = |kernel| Launch { kernel, segments: (0, segments) };
        let scan = self.reject.then(|| all_of(PA_SCAN));
        match self.how {
            How::Direct => scan.into_iter().chain([all_of(PA_DIRECT)]).collect(),
            How::Ring => scan.into_iter().chain([all_of(PA_RING)]).collect(),
            How::Commit => vec![all_of(PA_RING_COMMIT)],
            How::Sequenced => (0..segments)
                .map(|at| Launch { kernel: PA_RING_COMMIT, segments: (at, at + 1) })
                .collect(),
        }
    }

    fn control(&self, machine: &dyn Machine) -> u64 {
        let address = machine.allocate_shared(std::mem::size_of::<PaControl>());
        let mut control: PaControl = bytemuck::Zeroable::zeroed();
        control.decision = u64::from(self.counter) << 32 | u64::from(PA_COMMITTED << 8);
        for board in &mut control.board {
            board.arrived = self.counter;
            board.vote = self.counter.wrapping_mul(2);
            board.exited = self.counter.wrapping_mul(2);
        }
        machine.write(0, address, bytemuck::bytes_of(&control));
        address
    }

    fn host(&self, machine: &dyn Machine) -> u64 {
        let address = machine.allocate_shared(std::mem::size_of::<PaHost>());
        let completed = [self.counter; PA_MAX_WORLD as usize];
        let words = PaHost { completed, ..bytemuck::Zeroable::zeroed() };
        machine.write(0, address, bytemuck::bytes_of(&words));
        address
    }

    fn rank(
        &self,
        machine: &dyn Machine,
        rank: usize,
        (control, host): (u64, u64),
        inputs: &[Guarded],
    ) -> Rank {
        let place = |bytes: &[u8]| {
            let address = machine.allocate(rank, bytes.len());
            machine.write(rank, address, bytes);
            address
        };
        let tensors: Vec<Placed> = self
            .tensors
            .iter()
            .zip(inputs)
            .map(|(&(dtype, _, first, each), input)| {
                let offset = GUARD + (first + rank * each) * dtype.size();
                let mut memory = vec![guard_byte(rank); offset];
                memory.extend(input.bytes());
                memory.extend([guard_byte(rank); GUARD]);
                Placed { memory: place(&memory), offset, bytes: input.bytes().len() }
            })
            .collect();
        let mut buckets: Vec<PaBucket> = vec![];
        for dtype in [Dtype::F32, Dtype::F64, Dtype::F16, Dtype::Bf16] {
            let (mut segments, mut packs) = (vec![], 0);
            for (placed, input) in tensors
                .iter()
                .zip(inputs)
                .filter(|(_, input)| input.dtype == dtype && input.elements > 0)
            {
                segments.push(PaSegment {
                    address: placed.memory + placed.offset as u64,
                    elements: input.elements as u64,
                    first_pack: packs,
                });
                packs += placed.bytes.div_ceil(PA_PACK_BYTES as usize) as u64;
            }
            if segments.is_empty() {
                continue;
            }
            let aligned = |packs: u64| packs.next_multiple_of(u64::from(PA_ALIGN_PACKS));
            let channel_packs = aligned(packs.div_ceil(u64::from(self.channels)));
            let round = u64::from(self.chunk) * self.world as u64;
            let shard_packs = channel_packs / round * u64::from(self.chunk)
                + aligned((channel_packs % round).div_ceil(self.world as u64));
            buckets.push(PaBucket {
                segments: place(bytemuck::cast_slice(&segments)),
                packs,
                channel_packs,
                shard: machine.allocate(
                    rank,
                    (u64::from(self.channels) * shard_packs) as usize * PA_PACK_BYTES as usize,
                ),
                shard_packs,
                segment_count: segments.len() as u32,
                dtype: code(dtype),
                chunk: self.chunk,
                wire_f32: u32::from(self.wire_f32 && dtype.size() == 2),
                ..bytemuck::Zeroable::zeroed()
            });
        }
        let mut channel: PaChannel = bytemuck::Zeroable::zeroed();
        (channel.recv_seq, channel.send_seq) = (self.counter, self.counter);
        channel.status.epoch = self.counter;
        channel.segment = PA_NO_SEGMENT;
        let channels = vec![channel; self.channels as usize];
        let counters = vec![self.counter; self.channels as usize * PA_LINE_WORDS as usize];
        // The second word of a line counts sleepers, on a CPU.
        let counters: Vec<u32> = counters
            .iter()
            .enumerate()
            .map(|(i, &value)| if i * 4 % LINE == 0 { value } else { 0 })
            .collect();
        let slot_packs = self.chunk * if self.wire_f32 { 2 } else { 1 };
        // NaN
        let slots =
            vec![0xffu8; (self.channels * self.slots * slot_packs * PA_PACK_BYTES) as usize];
        let mut args: PaArgs = bytemuck::Zeroable::zeroed();
        (args.control, args.host) = (control, host);
        let statuses = vec![channel.status; self.channels as usize];
        let statuses: &[u8] = bytemuck::cast_slice(&statuses);
        args.status = machine.allocate_shared(statuses.len());
        machine.write(rank, args.status, statuses);
        args.channel = place(bytemuck::cast_slice(&channels));
        args.buckets = place(bytemuck::cast_slice(&buckets));
        args.links[IN].slots = place(&slots);
        args.links[IN].filled = place(bytemuck::cast_slice(&counters));
        args.links[OUT].drained = place(bytemuck::cast_slice(&counters));
        args.timeout_ns = self.timeout_ms * 1_000_000;
        args.rank = rank as u32;
        args.world = self.world as u32;
        args.channels = self.channels;
        args.slots = self.slots;
        args.slot_packs = slot_packs;
        args.bucket_count = buckets.len() as u32;
        if self.reject {
            args.flags |= PA_FLAG_REJECT_NON_FINITE;
        }
        if let Some(weights) = &self.weights {
            args.flags |= PA_FLAG_WEIGHTED;
            args.weight = weights[rank];
        }
        if self.keeps == Some(rank) {
            args.flags |= PA_FLAG_KEEP;
        }
        if let Some((_, step)) = self.fault.filter(|&(r, _)| r == rank) {
            args.fault_step = step;
        }
        Rank { args, tensors }
    }

    fn collect(&self, machine: &dyn Machine, ranks: &[Rank]) -> Outcome {
        let mut outcome = Outcome { tensors: vec![], channels: vec![] };
        for (rank, own) in ranks.iter().enumerate() {
            let mut channels: Vec<PaChannel> =
                vec![bytemuck::Zeroable::zeroed(); self.channels as usize];
            machine.read(rank, own.args.channel, bytemuck::cast_slice_mut(&mut channels));
            let mut statuses: Vec<PaStatus> =
                vec![bytemuck::Zeroable::zeroed(); self.channels as usize];
            machine.read(rank, own.args.status, bytemuck::cast_slice_mut(&mut statuses));
            for (status, channel) in statuses.iter().zip(&channels) {
                let shown = bytemuck::bytes_of(status) == bytemuck::bytes_of(&channel.status);
                assert!(shown, "rank {rank}: the host is shown another status, {self:?}");
            }
            outcome.channels.push(channels);
            let read = |placed: &Placed| {
                let mut memory = vec![0; placed.offset + placed.bytes + GUARD];
                machine.read(rank, placed.memory, &mut memory);
                let tensor = placed.offset..placed.offset + placed.bytes;
                let whole = guards_are_whole(&memory, [tensor.clone()], guard_byte(rank));
                assert!(whole, "rank {rank}: written beside a tensor, {self:?}");
                memory[tensor].to_vec()
            };
            outcome.tensors.push(own.tensors.iter().map(read).collect());
        }
        outcome
    }

    /// Asserts that every rank has the f64 mean, as exactly as was promised.
    pub fn check_mean(&self, inputs: &[Vec<Guarded>], outcome: &Outcome) {
        let weights = self.weights.clone().unwrap_or_else(|| vec![1.0; self.world]);
        let total: f64 = weights.iter().sum();
        for (index, &(dtype, elements, _, _)) in self.tensors.iter().enumerate() {
            let mut got = Guarded::new(dtype, elements, 0);
            let written = |rank: &usize| self.keeps != Some(*rank);
            if let Some(keeper) = self.keeps {
                assert!(
                    outcome.tensors[keeper][index] == inputs[keeper][index].bytes(),
                    "written, {self:?}"
                );
            }
            got.bytes_mut()
                .copy_from_slice(&outcome.tensors[(0..self.world).find(written).unwrap()][index]);
            for other in (0..self.world).filter(written).map(|rank| &outcome.tensors[rank]) {
                assert!(other[index] == got.bytes(), "ranks differ in tensor {index}, {self:?}");
            }
            for i in 0..elements {
                let values = || {
                    inputs
                        .iter()
                        .zip(&weights)
                        .filter(|(_, &w)| w > 0.0)
                        .map(|(rank, &w)| (rank[index].get(i), w))
                };
                let mean = values().map(|(x, w)| x * w).sum::<f64>() / total;
                let most = values().map(|(x, _)| x.abs()).fold(0.0, f64::max);
                let one_rounding = dtype.size() == 2 && (self.how == How::Direct || self.wire_f32);
                let allowed =
                    if one_rounding { 1.0 } else { self.world as f64 + 1.0 } * ulp(dtype, most);
                let error = (got.get(i) - mean).abs();
                assert!(
                    error <= allowed,
                    "tensor {index} element {i}: {} for {mean}, {self:?}",
                    got.get(i)
                );
            }
        }
    }
}
