//! 16-byte loads in flight: those that a loop issues before it uses one. A lane waits for memory
//! once for each such batch, so that what a multiprocessor reads per second follows from its size.

use super::listing::{Instruction, Kernel};
use std::collections::BTreeSet;

/// Registers that an instruction names. A register of several words is named by its first.
fn registers(operands: &str) -> BTreeSet<u32> {
    let words = operands.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|word| word.strip_prefix('R')?.parse().ok()).collect()
}

/// The registers that a 16-byte load writes, and then those of its address.
fn of_load(load: &Instruction) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let (to, from) = load.operands.split_once(',').unwrap_or((&load.operands, ""));
    let to = registers(to).into_iter().flat_map(|first| first..first + 4).collect();
    (to, registers(from))
}

/// Sizes of the batches of 16-byte loads in a loop, in the order of addresses. A batch ends where
/// an instruction uses or overwrites what a load of it brings. Branches are passed over: the lanes
/// of a block take them together.
pub fn batches(kernel: &Kernel, body: &[usize]) -> Vec<usize> {
    let (mut batches, mut size, mut awaited) = (vec![], 0, BTreeSet::new());
    for instruction in body.iter().map(|&i| &kernel.code[i]) {
        let is_wide_load = instruction.is_load() && instruction.has("128");
        let (brings, uses) = match is_wide_load {
            true => of_load(instruction),
            false => (BTreeSet::new(), registers(&instruction.operands)),
        };
        if uses.union(&brings).any(|register| awaited.contains(register)) {
            batches.push(std::mem::take(&mut size));
            awaited.clear();
        }
        size += usize::from(is_wide_load);
        awaited.extend(brings);
    }
    batches.extend((size > 0).then_some(size));
    batches
}
