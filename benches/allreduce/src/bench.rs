//! Measures a group: its methods turn by turn, so that all meet the machine in the same moods, then
//! checks each.

use std::sync::Arc;

use indicatif::ProgressBar;

use crate::cli::Backend;
use crate::failure::Failure;
use crate::layout::Layout;
use crate::memory::{arena_bytes, available, cores, place, Arena, Placed, Pool};
use crate::methods::{Method, Options};
use crate::plan::{Group, Section};
use crate::records::Record;
use crate::reference::{Check, Wire};

/// Each method's iterations are made in so many turns.
pub const TURNS: u32 = 3;

/// What stays the same for a run.
pub struct Bench {
    options: Options,
    check: bool,
    sabotage: bool,
    pool: Pool,
    progress: ProgressBar,
    /// Of the next check's data.
    seed: u64,
}

impl Bench {
    pub fn new(options: Options, check: bool, sabotage: bool, progress: ProgressBar) -> Self {
        Bench { options, check, sabotage, pool: Pool::default(), progress, seed: 0 }
    }

    /// Steps of the progress bar that `run` makes.
    pub fn steps(group: &Group) -> u64 {
        group.methods.len() as u64 * u64::from(TURNS + 1)
    }

    /// A record for each method.
    pub fn run(&mut self, group: &Group) -> Result<Vec<Record>, Failure> {
        let Group { layout, ranks, methods, iterations, warmup } = group;
        let (placed, bytes) = place(layout);
        let spare = methods.iter().map(|method| method.spare_arenas(*ranks)).max().unwrap_or(0);
        let arenas = self.pool.get(ranks + spare, bytes);
        let (arenas, spare) = arenas.split_at(*ranks);
        let crews =
            methods.iter().map(|method| method.crew(self.options, layout, &placed, arenas, spare));
        let crews = crews.collect::<Result<Vec<_>, _>>()?;

        // What lies there may be of another dtype, and NaNs and subnormals are slow on some
        // machines. Where dtypes are mixed, a flat buffer has them in other places.
        let mixed = layout.dtype().is_none();
        self.fill(methods[0], layout, &placed, arenas);
        let mut times = vec![vec![]; methods.len()];
        for turn in 0..TURNS {
            let (before, share) = self::turn(turn, *iterations, *warmup);
            for ((crew, method), times) in crews.iter().zip(methods).zip(&mut times) {
                self.progress.set_message(format!(
                    "{}, {ranks} ranks: {}",
                    layout.name,
                    method.label()
                ));
                if share > 0 {
                    if mixed {
                        self.fill(*method, layout, &placed, arenas);
                    }
                    times.extend_from_slice(&crew.run(before + share)?[before as usize..]);
                }
                self.progress.inc(1);
            }
        }
        let mut wrong = vec![];
        for (crew, method) in crews.iter().zip(methods) {
            self.progress.set_message(format!(
                "{}, {ranks} ranks: checking {}",
                layout.name,
                method.label()
            ));
            wrong.push(if self.check {
                let check = self.fill(*method, layout, &placed, arenas);
                crew.run(1)?;
                if self.sabotage {
                    sabotage(arenas);
                }
                // SAFETY: the crews rest between their orders.
                Some(unsafe { check.found() }.wrong)
            } else {
                None
            });
            self.progress.inc(1);
        }
        times.iter_mut().for_each(|times| times.sort());

        let mut records: Vec<Record> = methods
            .iter()
            .zip(times)
            .zip(wrong)
            .map(|((&method, times), wrong)| Record {
                method,
                layout: layout.name.clone(),
                tensors: layout.tensors.len(),
                dtype: layout.dtype_name(),
                ranks: *ranks,
                elements: layout.elements(),
                bytes: layout.bytes(),
                times,
                wrong,
                limit: None,
                device: None,
                apart: None,
            })
            .collect();
        let limit = records
            .iter()
            .find(|record| record.method == Method::OnePassLimit)
            .and_then(Record::time);
        records.iter_mut().for_each(|record| record.limit = limit);
        Ok(records)
    }

    /// Who is where, for the table.
    pub fn who(&self, ranks: usize) -> String {
        who(&self.options, ranks)
    }

    /// Gives every rank fresh data, and says how to check what becomes of it. The crews rest.
    fn fill(
        &mut self,
        method: Method,
        layout: &Layout,
        placed: &Arc<[Placed]>,
        arenas: &[Arc<Arena>],
    ) -> Check {
        self.seed += 1;
        let weighted = self.options.weighted && !method.is_baseline();
        let weight = |rank| if weighted { rank as f64 + 1.0 } else { 1.0 };
        let check = Check {
            seed: self.seed,
            arenas: arenas.to_vec(),
            first: 0,
            tensors: method.tensors(layout, placed),
            weights: (0..arenas.len()).map(weight).collect(),
            more_roundings: if weighted { 3 } else { u8::from(method.is_limit()) },
            wire: if method.is_ring() && self.options.narrow_wire {
                Wire::Narrow
            } else {
                Wire::Wide
            },
        };
        // SAFETY: the crews rest between their orders.
        unsafe { check.fill() };
        check
    }
}

/// Iterations of a turn that do not count, and that do.
pub fn turn(turn: u32, iterations: u32, warmup: u32) -> (u32, u32) {
    (if turn == 0 { warmup } else { warmup / 4 }, (iterations + TURNS - 1 - turn) / TURNS)
}

/// Ranks, their threads and cores.
pub fn who(options: &Options, ranks: usize) -> String {
    let threads = options.threads(ranks);
    format!(
        "{ranks} ranks x {threads} thread{} on {} cores{}",
        if threads == 1 { "" } else { "s" },
        cores(),
        if ranks * threads as usize > cores() { ", which they share" } else { "" }
    )
}

/// Changes the last bit of the last rank's first element.
pub fn sabotage(arenas: &[Arc<Arena>]) {
    if let Some(arena) = arenas.last() {
        // SAFETY: it has a byte at least, and the crews rest.
        unsafe { *arena.start() ^= 1 };
    }
}

/// Memory of the host for a group's tensors, second copies and shards. With ranks on CUDA devices:
/// for what is uploaded and compared alone.
fn needed_bytes(backend: Backend, group: &Group, layout: &Layout) -> u64 {
    if backend == Backend::Cuda {
        return arena_bytes(layout, group.ranks);
    }
    let extra: u64 =
        group.methods.iter().map(|method| method.memory_overhead(layout, group.ranks)).sum();
    arena_bytes(layout, group.ranks) + extra
}

/// Refuses what does not fit in memory, before anything is allocated.
pub fn fits(backend: Backend, sections: &[Section]) -> Result<(), Failure> {
    let Some((free, _)) = available() else { return Ok(()) };
    let needs = |group: &&Group| needed_bytes(backend, group, &group.layout);
    let Some(group) = sections.iter().flat_map(|section| &section.groups).max_by_key(needs) else {
        return Ok(());
    };
    // the rest is for slots, tables and everybody else
    let (need, budget) = (needs(&group), free / 10 * 9);
    if need <= budget {
        return Ok(());
    }
    let scale = group.layout.scale.unwrap_or(1.0);
    let fits = |factor: f64| {
        needed_bytes(backend, group, &group.layout.clone().scaled(factor / scale)) <= budget
    };
    let smaller = (1..=6)
        .flat_map(|digits| (1..=9).rev().map(move |first| f64::from(first) / 10f64.powi(digits)));
    let instead = match smaller.filter(|&factor| factor < scale).find(|&factor| fits(factor)) {
        _ if group.layout.name == "flat" => "use a smaller -e, or fewer ranks with -g".into(),
        Some(factor) => format!("shrink it with --scale {factor}, or use fewer ranks with -g"),
        None => "use fewer ranks with -g".to_string(),
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    Err(Failure::Failed(format!(
        "{} on {} ranks needs {:.1} GiB of memory, of which {:.1} GiB for each rank's tensors, but \
         {:.1} GiB are \
         available: {instead}",
        group.layout.name,
        group.ranks,
        gib(need),
        gib(group.layout.bytes()),
        gib(free)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(layout: Layout, ranks: usize) -> Vec<Section> {
        let methods = vec![Method::DIRECT, Method::FlattenRing];
        let groups = vec![Group { layout, ranks, methods, iterations: 1, warmup: 0 }];
        vec![Section { heading: String::new(), groups }]
    }

    #[test]
    fn what_does_not_fit_is_refused_with_a_scale_that_fits() {
        let layout = Layout::load("llama3-8b").unwrap();
        if available().is_none_or(|(free, _)| free > 16 * 2 * layout.bytes()) {
            return;
        }
        let error = fits(Backend::Cpu, &section(layout.clone(), 16)).unwrap_err().to_string();
        let scale =
            error.split("--scale ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
        fits(Backend::Cpu, &section(layout.scaled(scale), 16)).unwrap();
        let error =
            fits(Backend::Cpu, &section(Layout::flat(1 << 47, param_averager::Dtype::F32), 2))
                .unwrap_err();
        assert!(error.to_string().contains("smaller -e"), "{error}");
    }
}
