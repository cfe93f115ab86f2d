//! The loops of a kernel's machine code: blocks, dominators, natural loops.

use super::listing::Instruction;
use std::collections::{BTreeMap, BTreeSet};

/// An innermost loop, as indices of its instructions, ascending.
pub type Loop = Vec<usize>;

struct Graph {
    /// Indices of each block's instructions: begin and end.
    blocks: Vec<(usize, usize)>,
    successors: Vec<Vec<usize>>,
    predecessors: Vec<Vec<usize>>,
}

/// Targets of an instruction other than the next one. Calls return, so they count as going on.
/// `BSYNC` meets the other lanes at the address that the `BSSY` of its barrier named.
fn target(code: &[Instruction], i: usize) -> Option<u64> {
    let hex = |text: &str| {
        text.split("0x").nth(1).and_then(|digits| {
            let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
            u64::from_str_radix(&digits[..end], 16).ok()
        })
    };
    match code[i].space() {
        "BRA" => hex(&code[i].operands),
        "BSYNC" => {
            let barrier = code[i].operands.split_whitespace().last()?;
            let opened = code[..i]
                .iter()
                .rev()
                .find(|x| x.space() == "BSSY" && x.operands.starts_with(barrier))?;
            hex(&opened.operands)
        }
        _ => None,
    }
}

fn goes_on(instruction: &Instruction) -> bool {
    let conditional = instruction.predicated || instruction.operands.contains(',');
    match instruction.space() {
        "BRA" => conditional || instruction.opcode.contains("DIV"),
        "EXIT" | "RET" | "BRX" | "JMX" => instruction.predicated,
        _ => true,
    }
}

fn graph(code: &[Instruction]) -> Graph {
    let index: BTreeMap<u64, usize> =
        code.iter().enumerate().map(|(i, x)| (x.address, i)).collect();
    let targets: Vec<Option<usize>> = (0..code.len())
        .map(|i| target(code, i).and_then(|address| index.get(&address).copied()))
        .collect();
    let mut leaders: BTreeSet<usize> = targets.iter().flatten().copied().collect();
    leaders.insert(0);
    for i in 0..code.len() {
        let leaves = targets[i].is_some() || !goes_on(&code[i]);
        if leaves && i + 1 < code.len() {
            leaders.insert(i + 1);
        }
    }
    let begins: Vec<usize> = leaders.into_iter().collect();
    let block_of = |i: usize| begins.partition_point(|&begin| begin <= i) - 1;
    let blocks: Vec<(usize, usize)> = begins
        .iter()
        .enumerate()
        .map(|(b, &begin)| (begin, begins.get(b + 1).copied().unwrap_or(code.len())))
        .collect();
    let mut successors = vec![vec![]; blocks.len()];
    let mut predecessors = vec![vec![]; blocks.len()];
    for (b, &(_, end)) in blocks.iter().enumerate() {
        let mut next: Vec<usize> = targets[end - 1].map(block_of).into_iter().collect();
        if goes_on(&code[end - 1]) && end < code.len() && !next.contains(&(b + 1)) {
            next.push(b + 1);
        }
        for &to in &next {
            predecessors[to].push(b);
        }
        successors[b] = next;
    }
    Graph { blocks, successors, predecessors }
}

/// Each block's immediate dominator (Cooper, Harvey, Kennedy). Blocks that only a call or an
/// indirect branch leads to are roots, beside the first.
fn dominators(g: &Graph) -> Vec<usize> {
    let n = g.blocks.len();
    let root = n; // a block before all roots
    let roots: Vec<usize> = (0..n).filter(|&b| b == 0 || g.predecessors[b].is_empty()).collect();
    let (mut order, mut seen) = (vec![], vec![false; n]);
    for &start in &roots {
        if std::mem::replace(&mut seen[start], true) {
            continue;
        }
        let mut stack = vec![(start, 0)];
        while let Some((block, next)) = stack.pop() {
            match g.successors[block].get(next) {
                Some(&to) => {
                    stack.push((block, next + 1));
                    if !std::mem::replace(&mut seen[to], true) {
                        stack.push((to, 0));
                    }
                }
                None => order.push(block),
            }
        }
    }
    let mut number = vec![usize::MAX; n + 1]; // postorder
    order.iter().enumerate().for_each(|(i, &block)| number[block] = i);
    number[root] = n;
    let mut dominator = vec![usize::MAX; n + 1];
    dominator[root] = root;
    let mut changed = true;
    while std::mem::take(&mut changed) {
        for &block in order.iter().rev() {
            let rooted = roots.contains(&block).then_some(root);
            let known = g.predecessors[block]
                .iter()
                .copied()
                .chain(rooted)
                .filter(|&p| dominator[p] != usize::MAX);
            let new = known.reduce(|mut a, mut b| {
                while a != b {
                    while number[a] < number[b] {
                        a = dominator[a];
                    }
                    while number[b] < number[a] {
                        b = dominator[b];
                    }
                }
                a
            });
            if let Some(new) = new.filter(|&new| dominator[block] != new) {
                dominator[block] = new;
                changed = true;
            }
        }
    }
    dominator
}

/// The loops that hold no other loop.
pub fn innermost(code: &[Instruction]) -> Vec<Loop> {
    let g = graph(code);
    let dominator = dominators(&g);
    let dominates = |a: usize, mut b: usize| {
        while b != a && b < g.blocks.len() && dominator[b] != usize::MAX {
            b = dominator[b];
        }
        a == b
    };
    let mut loops: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new(); // by header
    for block in 0..g.blocks.len() {
        for &header in &g.successors[block] {
            if !dominates(header, block) {
                continue;
            }
            let body = loops.entry(header).or_insert_with(|| BTreeSet::from([header]));
            let mut todo = vec![block];
            while let Some(b) = todo.pop() {
                if body.insert(b) {
                    todo.extend(&g.predecessors[b]);
                }
            }
        }
    }
    let inner = loops.iter().filter(|(header, body)| {
        !loops.keys().any(|other| other != *header && body.contains(other))
    });
    inner
        .map(|(_, body)| body.iter().flat_map(|&b| g.blocks[b].0..g.blocks[b].1).collect())
        .collect()
}
