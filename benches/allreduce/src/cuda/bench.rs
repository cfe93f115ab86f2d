//! Measures a group on CUDA devices, as `crate::bench` does on CPUs: turn by turn, then each
//! method's result.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use indicatif::ProgressBar;
use param_averager::Algorithm;

use super::crews::{crew, Shared};
use super::device::{DeviceMemory, Gpu, Machine, Pinned};
use super::flat::Flat;
use super::kernels::Kernels;
use super::limits::PINNED_BYTES;
use super::nccl::{Member, Nccl};
use super::nccl_rows::{self, nccl_limit, within};
use super::{devices, on_one, placement, probe};
use crate::bench::{sabotage, TURNS};
use crate::crew::Crew;
use crate::failure::Failure;
use crate::memory::{place, Arena, Placed, Pool};
use crate::methods::{Method, Options};
use crate::plan::Group;
use crate::records::{OnDevice, Record};
use crate::reference::{Check, Found, Wire};

/// What stays the same for a run.
pub struct Bench {
    machine: Machine,
    options: Options,
    check: bool,
    sabotage: bool,
    pool: Pool,
    progress: ProgressBar,
    /// Of the next check's data.
    seed: u64,
    /// How long NCCL may take for one thing.
    limit: Duration,
    /// What NCCL is, or why it can't be used, by the number of ranks.
    nccl: BTreeMap<usize, Result<String, String>>,
}

/// A method and what it has come to.
struct Entry {
    method: Method,
    /// None: it can't be measured, as the note says.
    crew: Option<Arc<Crew>>,
    note: Option<String>,
    /// What `Algorithm::Auto` was.
    ran: Arc<OnceLock<Algorithm>>,
    times: Vec<Duration>,
    found: Option<Found>,
}

impl Entry {
    fn give_up(&mut self, reason: &str) {
        (self.crew, self.found) = (None, None);
        self.times.clear();
        let what = if self.method.is_nccl() { "NCCL" } else { self.method.label() };
        self.note = Some(format!("{what} not measured: {reason}"));
    }
}

impl Bench {
    pub fn new(
        machine: Machine,
        options: Options,
        check: bool,
        sabotage: bool,
        progress: ProgressBar,
    ) -> Self {
        let (pool, nccl, limit) = (Pool::default(), BTreeMap::new(), nccl_limit(options.timeout));
        Bench { machine, options, check, sabotage, pool, progress, seed: 0, limit, nccl }
    }

    /// A record for each method.
    pub fn run(&mut self, group: &Group) -> Result<Vec<Record>, Failure> {
        let Group { layout, ranks, methods, iterations, warmup } = group;
        let (tensors, bytes) = place(layout);
        let mut shared = self.share(group, tensors, bytes)?;
        let arenas = self.pool.get(*ranks, bytes);
        self.fill(methods[0], &shared, &arenas)?;
        let mut entries = methods
            .iter()
            .map(|&method| self.enter(method, &shared))
            .collect::<Result<Vec<_>, _>>()?;
        for turn in 0..TURNS {
            let share = (iterations + TURNS - 1 - turn) / TURNS;
            for entry in &mut entries {
                let label = entry.method.label();
                self.progress.set_message(format!("{}, {ranks} ranks: {label}", layout.name));
                if share > 0 {
                    let before = if turn == 0 { *warmup } else { warmup / 4 };
                    let times = self.measure(entry, &shared, before + share)?;
                    entry.times.extend(times.into_iter().skip(before as usize));
                }
                self.progress.inc(1);
            }
        }
        for entry in &mut entries {
            self.progress.set_message(format!(
                "{}, {ranks} ranks: checking {}",
                layout.name,
                entry.method.label()
            ));
            if self.check && entry.crew.is_some() && !entry.method.is_limit() {
                let check = self.fill(entry.method, &shared, &arenas)?;
                self.measure(entry, &shared, 1)?;
                shared.own.iter().zip(&arenas).try_for_each(|(own, arena)| {
                    // SAFETY: nobody else uses the arenas now, and they are initialised.
                    own.download(unsafe { std::slice::from_raw_parts_mut(arena.start(), bytes) })
                })?;
                if self.sabotage {
                    sabotage(&arenas);
                }
                // SAFETY: as above.
                entry.found = entry.crew.is_some().then(|| unsafe { check.found() });
            }
            self.progress.inc(1);
        }
        let records = self.records(group, &mut entries);
        let hung = entries.iter().any(|entry| entry.method.is_nccl() && entry.crew.is_none());
        drop(entries);
        nccl_rows::part(std::mem::take(&mut shared.members), &shared.gpus, hung, self.limit);
        Ok(records)
    }

    /// Runs a crew. What goes wrong with NCCL is its rows' note, and the end of the others' only if
    /// it never comes back.
    fn measure(
        &mut self,
        entry: &mut Entry,
        shared: &Shared,
        iterations: u32,
    ) -> Result<Vec<Duration>, Failure> {
        if let (true, Some(Err(reason))) =
            (entry.method.is_nccl(), self.nccl.get(&shared.gpus.len()))
        {
            // What went wrong in one row is wrong for all.
            entry.give_up(reason);
        }
        let Some(crew) = entry.crew.clone() else { return Ok(vec![]) };
        if matches!(
            entry.method,
            Method::FlattenRing | Method::CopiesRing | Method::Nccl { flat: true, .. }
        ) {
            // What the copies of the limits left between its tensors may be NaN.
            shared.flats.iter().try_for_each(|flat| flat.zero())?;
        }
        if !entry.method.is_nccl() {
            return crew.run(iterations);
        }
        // Its waits for the device end by themselves. Those on the host do not.
        match within(2 * self.limit + Duration::from_secs(1) * iterations, move || {
            crew.run(iterations)
        }) {
            Some(Ok(times)) => Ok(times),
            Some(Err(failure)) => {
                entry.give_up(&failure.to_string());
                self.nccl.insert(shared.gpus.len(), Err(failure.to_string()));
                Ok(vec![])
            }
            None => Err(Failure::Failed(format!(
                "NCCL did not come back from a call, though it did when it was tried ({}): run \
                 again without it, with \
                 --baseline=limit,per-tensor,flatten",
                entry.note.as_deref().unwrap_or("NCCL")
            ))),
        }
    }

    /// Allocates what the group's methods need, and brings NCCL's ranks together.
    fn share(
        &mut self,
        group: &Group,
        tensors: Arc<[Placed]>,
        bytes: usize,
    ) -> Result<Shared, Failure> {
        let Group { layout, ranks, methods, .. } = group;
        let ordinals = devices(*ranks, self.machine.visible()).into_iter().enumerate();
        let gpus = ordinals.map(|(rank, ordinal)| Gpu::open(&self.machine, rank, ordinal));
        let gpus = gpus.collect::<Result<Vec<_>, _>>()?;
        let memory = |bytes: usize| {
            let each = gpus.iter().map(|gpu| DeviceMemory::new(gpu, bytes).map(Arc::new));
            each.collect::<Result<Vec<_>, _>>()
        };
        let own = memory(bytes)?;
        let flat = Flat::new(&tensors);
        let (mut flats, mut kernels, mut pinned) = (vec![], vec![], vec![]);
        if methods.iter().any(|method| method.needs_flat()) {
            flats = memory(flat.bytes.max(layout.bytes() as usize))?;
            for (gpu, (own, buffer)) in gpus.iter().zip(own.iter().zip(&flats)) {
                kernels.push(Kernels::new(gpu, &flat, own, buffer)?);
            }
        }
        if methods.contains(&Method::HostCopies) {
            let bytes = PINNED_BYTES.min(layout.bytes() as usize);
            for gpu in &gpus {
                pinned
                    .push([Arc::new(Pinned::new(gpu, bytes)?), Arc::new(Pinned::new(gpu, bytes)?)]);
            }
        }
        let members =
            if methods.iter().any(|method| method.is_nccl()) { self.join(&gpus) } else { vec![] };
        Ok(Shared { gpus, tensors, own, flat, flats, kernels, pinned, members })
    }

    /// NCCL's ranks, if it can be used with so many. `self.nccl` knows it afterwards.
    fn join(&mut self, gpus: &[Gpu]) -> Vec<Arc<Member>> {
        let (machine, ranks, limit) = (&self.machine, gpus.len(), self.limit);
        let known = self.nccl.entry(ranks).or_insert_with(|| probe::ask(machine, ranks, limit));
        if known.is_err() {
            return vec![];
        }
        match Nccl::load(ranks > machine.visible())
            .and_then(|nccl| nccl_rows::join(&nccl, gpus, limit))
        {
            Ok(members) => members,
            Err(reason) => {
                *known = Err(reason);
                vec![]
            }
        }
    }

    /// Starts a method's crew, or says why it has none.
    fn enter(&self, method: Method, shared: &Shared) -> Result<Entry, Failure> {
        let ran = Arc::new(OnceLock::new());
        let mut entry = Entry { method, crew: None, note: None, ran, times: vec![], found: None };
        if method.is_nccl() {
            match self.nccl.get(&shared.gpus.len()) {
                Some(Ok(what)) => entry.note = Some(what.clone()),
                Some(Err(reason)) => {
                    entry.give_up(reason);
                    return Ok(entry);
                }
                None => return Ok(entry), // `join` has asked
            }
        }
        if method == Method::DIRECT && !on_one(shared.gpus.len(), self.machine.visible()) {
            entry.give_up("it is for ranks on one device");
            return Ok(entry);
        }
        entry.crew = Some(Arc::new(crew(method, self.options, self.limit, shared, &entry.ran)?));
        Ok(entry)
    }

    /// Gives every rank fresh data, and says how to check what becomes of it. The crews rest.
    fn fill(
        &mut self,
        method: Method,
        shared: &Shared,
        arenas: &[Arc<Arena>],
    ) -> Result<Check, Failure> {
        self.seed += 1;
        let weighted = self.options.weighted && !method.is_baseline();
        let weight = |rank| if weighted { rank as f64 + 1.0 } else { 1.0 };
        let wire = match method {
            Method::Nccl { .. } => Wire::NarrowAndScaled,
            _ if method.is_ring() && self.options.narrow_wire => Wire::Narrow,
            _ => Wire::Wide,
        };
        let check = Check {
            seed: self.seed,
            arenas: arenas.to_vec(),
            first: 0,
            tensors: shared.tensors.clone(),
            weights: (0..arenas.len()).map(weight).collect(),
            more_roundings: if weighted { 3 } else { u8::from(method.is_nccl()) },
            wire,
        };
        // SAFETY: nobody else uses the arenas now.
        unsafe { check.fill() };
        shared.own.iter().zip(arenas).try_for_each(|(own, arena)| {
            // SAFETY: as above; they are initialised.
            own.upload(unsafe { std::slice::from_raw_parts(arena.start(), arena.bytes()) })
        })?;
        Ok(check)
    }

    fn records(&self, group: &Group, entries: &mut [Entry]) -> Vec<Record> {
        let Group { layout, ranks, .. } = group;
        let (visible, simulated) = (self.machine.visible(), self.machine.simulated);
        let name = devices(*ranks, visible)
            .first()
            .map_or(String::new(), |&first| self.machine.names[first].clone());
        let record = |entry: &mut Entry| {
            let mut times = if simulated { vec![] } else { std::mem::take(&mut entry.times) };
            times.sort();
            let method = match (entry.method, entry.ran.get()) {
                (Method::Average { commit, .. }, Some(&algorithm)) => {
                    Method::Average { algorithm, commit }
                }
                (method, _) => method,
            };
            Record {
                method,
                layout: layout.name.clone(),
                tensors: layout.tensors.len(),
                dtype: layout.dtype_name(),
                ranks: *ranks,
                elements: layout.elements(),
                bytes: layout.bytes(),
                times,
                wrong: entry.found.map(|found| found.wrong),
                limit: None,
                apart: None,
                device: Some(OnDevice {
                    name: name.clone(),
                    placement: placement(*ranks, visible),
                    simulated,
                    ulps: entry.found.map(|found| found.ulps),
                    note: entry.note.clone(),
                }),
            }
        };
        let mut records: Vec<Record> = entries.iter_mut().map(record).collect();
        let limit = records
            .iter()
            .find(|record| record.method == Method::DeviceCopy)
            .and_then(Record::time);
        records.iter_mut().for_each(|record| record.limit = limit);
        records
    }

    /// Who is where, for the table.
    pub fn who(&self, ranks: usize) -> String {
        let names = |ordinals: Vec<usize>| {
            let each = ordinals
                .into_iter()
                .map(|ordinal| format!("cuda:{ordinal} ({})", self.machine.names[ordinal]));
            each.collect::<Vec<_>>().join(", ")
        };
        let visible = self.machine.visible();
        let on = names((0..visible.min(ranks)).collect());
        if ranks <= visible {
            format!("one rank a GPU: {on}")
        } else {
            format!("{ranks} ranks on {on}, which they share")
        }
    }
}
