//! Ranks that are threads of this process, on CPUs.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use param_averager::{Communicator, Device};

use crate::averager::{self, Direction, Host, Replica};
use crate::cli::Options;
use crate::crew::{Crew, Make};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::limit::Pass;
use crate::memory::{arenas, cores, place, Arena, Flat, Placed, Span};
use crate::plan::Group;
use crate::rows::{Kind, Row};
use crate::run::{Ranks, Replicas};

/// Options of a run, and the rows of the present group.
#[derive(Default)]
pub struct Threads {
    options: Options,
    rows: Vec<(Row, Crew)>,
    arenas: Vec<Arc<Arena>>,
    tensors: Arc<[Placed]>,
    flat: Arc<[Placed]>,
}

impl Threads {
    pub fn new(options: &Options) -> Self {
        Threads { options: options.clone(), ..Default::default() }
    }

    /// The threads of a row, ready to run.
    fn crew(&self, row: Row, flat: &Flat, spare: &[Arc<Arena>]) -> Result<Crew, Failure> {
        if row.is_flat() {
            let between = (row.kind == Kind::TwoPass).then(|| spare[0].clone());
            return Crew::new(self.passes(between), Duration::MAX);
        }
        let world = Communicator::from_devices(&vec![Device::cpu(); self.arenas.len()])?;
        let member = |(rank, communicator): (usize, Communicator)| -> Make {
            let replica = Replica::on_host(&self.arenas[rank], &self.tensors);
            let options = self.options.clone();
            match row.kind {
                Kind::Average { algorithm, commit, step } => Box::new(move || {
                    let builder = options.builder(communicator, algorithm, commit);
                    let (weight, ran) = (options.weight(rank), OnceLock::new());
                    averager::average(Host, builder, step, replica, weight, &ran)
                }),
                Kind::PerTensor => {
                    Box::new(move || averager::per_tensor(Host, &options, communicator, replica))
                }
                Kind::Flatten { .. } => {
                    let buffers = Replica::on_host(&spare[rank], &flat.buffers);
                    let spans = flat.spans.clone();
                    Box::new(move || {
                        let moves = copies(replica, buffers.clone(), spans);
                        averager::flatten(Host, &options, communicator, buffers, moves)
                    })
                }
                _ => unreachable!("{} is a row of --backend cuda", row.label()),
            }
        };
        Crew::new(world.into_iter().enumerate().map(member).collect(), Duration::MAX)
    }

    fn passes(&self, between: Option<Arc<Arena>>) -> Vec<Make> {
        let parts = cores();
        let pass = |part| -> Make {
            let (arenas, buffers) = (self.arenas.clone(), self.flat.clone());
            let pass = Pass { arenas, buffers, part, parts, between: between.clone() };
            Box::new(move || {
                Ok(Box::new(move || {
                    pass.run();
                    Ok(None)
                }))
            })
        };
        (0..parts).map(pass).collect()
    }
}

impl Ranks for Threads {
    fn describe(&self, ranks: usize) -> String {
        describe(&self.options, ranks)
    }

    fn memory(&self, group: &Group, layout: &Layout) -> u64 {
        let ranks = group.ranks;
        let extra: u64 = group.rows.iter().map(|row| row.memory_overhead(layout, ranks)).sum();
        place(layout).1 as u64 * ranks as u64 + extra
    }

    fn enter(&mut self, group: &Group) -> Result<(), Failure> {
        let (tensors, bytes) = place(&group.layout);
        let spare = group.rows.iter().map(|row| row.spare_blocks(group.ranks)).max().unwrap_or(0);
        self.arenas = arenas(group.ranks + spare, bytes);
        let spare = self.arenas.split_off(group.ranks);
        let flat = Flat::new(&tensors, 1); // as a program's own flat buffer, without gaps
        (self.tensors, self.flat) = (tensors, flat.buffers.clone());
        for &row in &group.rows {
            self.rows.push((row, self.crew(row, &flat, &spare)?));
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.rows.clear();
        self.arenas.clear();
    }

    fn replicas(&self, row: usize) -> Replicas {
        let tensors = if self.rows[row].0.is_flat() { &self.flat } else { &self.tensors };
        Replicas { first: 0, arenas: self.arenas.clone(), tensors: tensors.clone() }
    }

    fn run(&mut self, row: usize, iterations: u32) -> Result<Vec<Duration>, Failure> {
        self.rows[row].1.run(iterations)
    }
}

/// Copies all tensors between a replica and flat buffers, one after the other.
fn copies(
    own: Replica,
    flat: Replica,
    spans: Arc<[Span]>,
) -> impl Fn(&Host, Direction) -> Result<(), Failure> {
    move |_, direction| {
        for span in spans.iter() {
            let own = own.start.wrapping_add(span.tensor);
            let flat = flat.start.wrapping_add(span.flat);
            let out = direction == Direction::Flatten;
            let (from, to) = if out { (own, flat) } else { (flat, own) };
            // SAFETY: inside of the two arenas, which this member has to itself.
            unsafe { to.copy_from_nonoverlapping(from, span.bytes) };
        }
        Ok(())
    }
}

/// Ranks, their threads and cores.
pub fn describe(options: &Options, ranks: usize) -> String {
    let threads = options.threads(ranks);
    let shared = ranks * threads as usize > cores();
    format!(
        "{ranks} ranks x {threads} thread{} on {} cores{}",
        if threads == 1 { "" } else { "s" },
        cores(),
        if shared { ", which they share" } else { "" }
    )
}
