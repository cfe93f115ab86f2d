//! Requirements on the kernels' machine code and PTX. Every check returns its complaints, so that
//! negative controls can ask for some.

use super::flight::batches;
use super::listing::{Instruction, Kernel};
use super::loops;

/// 512 threads a block and one block a multiprocessor of 65,536 registers. More blocks would not
/// help: all of them must be resident at once, and a rank leaves multiprocessors to the trainer's
/// own kernels.
const MOST_REGISTERS: u32 = 65_536 / 512;

/// Minimum of 128-bit loads in flight in a loop that moves packs, on average over its batches.
const IN_FLIGHT: usize = 4;

/// Requirements on one kernel.
pub struct Expected {
    /// Loops that move packs, at least. 0: none is hot, and their loads may be fewer in flight.
    pub hot_loops: usize,
    /// 128-bit loads, at least, in loops or not.
    pub loads: usize,
    /// Flags that the kernel exchanges with other ranks.
    pub talks: Talks,
    /// Steps of the ring; 0: it has none.
    pub steps: usize,
    /// True if codes of packs, and their scales, lie beside packs: accesses of 4 and 8 bytes.
    pub codes: bool,
}

/// Words of other ranks or hosts that a kernel uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talks {
    No,
    /// It publishes, and waits for nobody.
    Publishes,
    Both,
}

/// Numbers for the table, and complaints.
pub struct Findings {
    pub hot_loops: usize,
    /// Fewest 128-bit loads in flight in one of these loops, on average over its batches.
    pub in_flight: Option<usize>,
    pub loads_128: usize,
    pub stores_128: usize,
    pub complaints: Vec<String>,
}

fn describe(instruction: &Instruction) -> String {
    format!("{:#x}: {} {}", instruction.address, instruction.opcode, instruction.operands)
}

pub fn check(kernel: &Kernel, expected: &Expected) -> Findings {
    let mut complaints = vec![];
    resources(kernel, &mut complaints);
    let (hot_loops, in_flight) = memory(kernel, expected, &mut complaints);
    if expected.talks != Talks::No {
        order(kernel, expected.talks, &mut complaints);
    }
    if expected.steps > 0 {
        steps(kernel, expected, &mut complaints);
    }
    let count =
        |is: fn(&Instruction) -> bool| kernel.code.iter().filter(|x| is(x) && x.has("128")).count();
    let loads_128 = count(Instruction::is_load);
    if loads_128 < expected.loads {
        complaints.push(format!("{loads_128} 128-bit loads, {} expected", expected.loads));
    }
    Findings {
        hot_loops,
        in_flight,
        loads_128,
        stores_128: count(Instruction::is_store),
        complaints,
    }
}

fn resources(kernel: &Kernel, complaints: &mut Vec<String>) {
    if kernel.registers > MOST_REGISTERS {
        complaints.push(format!("registers: {}, at most {MOST_REGISTERS} fit", kernel.registers));
    }
    if kernel.stack > 0 || kernel.local > 0 {
        complaints.push(format!("local memory: STACK:{} LOCAL:{}", kernel.stack, kernel.local));
    }
    for instruction in kernel.code.iter().filter(|x| matches!(x.space(), "LDL" | "STL")) {
        complaints.push(format!("local memory: {}", describe(instruction)));
    }
}

/// The number of hot loops, and the fewest loads in flight in one.
fn memory(
    kernel: &Kernel,
    expected: &Expected,
    complaints: &mut Vec<String>,
) -> (usize, Option<usize>) {
    let is_byte = |x: &Instruction| x.is_memory() && (x.has("U8") || x.has("S8"));
    for x in kernel.code.iter().filter(|x| x.is_memory()) {
        if is_byte(x) && x.space().ends_with('G') {
            complaints.push(format!("byte access: {}", describe(x)));
        }
    }
    let mut in_flight = vec![];
    for body in loops::innermost(&kernel.code) {
        let accesses: Vec<&Instruction> =
            body.iter().map(|&i| &kernel.code[i]).filter(|x| x.is_memory()).collect();
        for x in accesses.iter().filter(|x| is_byte(x)) {
            complaints.push(format!("byte access in a loop: {}", describe(x)));
        }
        let loads = accesses.iter().filter(|x| x.is_load() && x.has("128")).count();
        // Arguments, which lie in shared memory, may be loaded by twos.
        if loads >= IN_FLIGHT || accesses.iter().any(|x| x.is_store() && x.has("128")) {
            for x in accesses.iter().filter(|x| x.has("128") && !x.space().ends_with('G')) {
                let what = describe(x);
                complaints.push(format!("generic access, where global memory is meant: {what}"));
            }
        }
        if loads < IN_FLIGHT {
            continue;
        }
        for x in accesses.iter().filter(|x| !x.has("128") && !expected.codes) {
            complaints.push(format!("narrow access in a loop over packs: {}", describe(x)));
        }
        let batches = batches(kernel, &body);
        in_flight.push(batches.iter().sum::<usize>() / batches.len());
        if expected.hot_loops > 0 && in_flight.last() < Some(&IN_FLIGHT) {
            let begin = kernel.code[body[0]].address;
            complaints.push(format!(
                "loads in flight: batches of {batches:?} in the loop at {begin:#x}, {IN_FLIGHT} \
                 expected"
            ));
        }
    }
    if in_flight.len() < expected.hot_loops {
        complaints.push(format!(
            "{} loops with {IN_FLIGHT} or more 128-bit loads, {} expected",
            in_flight.len(),
            expected.hot_loops
        ));
    }
    (in_flight.len(), in_flight.into_iter().min())
}

/// An acquire is a strong load and then an invalidation of the first-level cache; a release is a
/// barrier over all memory and then a strong store.
fn order(kernel: &Kernel, talks: Talks, complaints: &mut Vec<String>) {
    const NEAR: usize = 8; // instructions
    let strong = |x: &Instruction| x.has("STRONG") && x.has("SYS");
    let barrier = |x: &Instruction| x.space() == "MEMBAR" && x.has("SYS");
    let around = |i: usize, back: usize, on: usize| {
        kernel.code[i.saturating_sub(back)..(i + on + 1).min(kernel.code.len())].iter()
    };
    let at = |is: fn(&Instruction) -> bool| {
        kernel.code.iter().enumerate().filter(move |(_, x)| is(x) && strong(x)).map(|(i, _)| i)
    };
    let acquires = at(Instruction::is_load)
        .filter(|&i| around(i, 0, NEAR).any(|x| x.space() == "CCTL" && x.has("IVALL")));
    let releases = at(Instruction::is_store).filter(|&i| around(i, NEAR, 0).any(barrier));
    if acquires.count() == 0 && talks == Talks::Both {
        complaints.push("no acquire at system scope: LDG.*.STRONG.SYS, CCTL.IVALL".into());
    }
    if releases.count() == 0 {
        complaints.push("no release at system scope: MEMBAR.*.SYS, STG.*.STRONG.SYS".into());
    }
}

/// A step of the ring: a block barrier that tells all lanes the result of the wait, and packs that
/// are loaded after it. Nothing is looked up in between, and one system fence ends the step.
fn steps(kernel: &Kernel, expected: &Expected, complaints: &mut Vec<String>) {
    let is_barrier = |x: &Instruction| x.space() == "BAR";
    let is_pack = |x: &Instruction| x.is_load() && x.has("128");
    let is_exit = |x: &Instruction| x.space() == "EXIT" && !x.predicated;
    let mut begins = vec![];
    for (i, x) in kernel.code.iter().enumerate().filter(|(_, x)| is_barrier(x) && x.has("RED")) {
        let after = &kernel.code[i + 1..];
        let end = after.iter().position(|x| is_barrier(x) || is_exit(x) || is_pack(x));
        let Some(end) = end.filter(|&end| is_pack(&after[end])) else { continue };
        begins.push(i);
        for load in after[..end].iter().filter(|x| x.is_load() && !expected.codes) {
            let step = x.address;
            complaints.push(format!("look-up after the wait at {step:#x}: {}", describe(load)));
        }
    }
    if begins.len() != expected.steps {
        complaints.push(format!("{} steps, {} expected", begins.len(), expected.steps));
    }
    for step in begins.windows(2) {
        let code = &kernel.code[step[0]..step[1]];
        let fences = code.iter().filter(|x| x.space() == "MEMBAR" && x.has("SYS")).count();
        if fences != 1 {
            let step = code[0].address;
            complaints.push(format!("fences: {fences} in the step at {step:#x}, 1 expected"));
        }
    }
}

/// Requirements on the PTX of all kernels.
pub fn check_ptx(text: &str) -> Vec<String> {
    let mut complaints = vec![];
    for needed in ["ld.acquire.sys", "st.release.sys"] {
        if !text.contains(needed) {
            complaints.push(format!("no {needed}"));
        }
    }
    for line in text.lines().map(str::trim) {
        // The read-only cache is not coherent with what other ranks write meanwhile.
        if line.contains("ld.global.nc") || (line.starts_with("ld.") && line.contains(".nc.")) {
            complaints.push(format!("not coherent: {line}"));
        }
        if line.contains(".local")
            && (line.contains("ld.") || line.contains("st.") || line.starts_with(".local"))
        {
            complaints.push(format!("local memory: {line}"));
        }
    }
    complaints
}
