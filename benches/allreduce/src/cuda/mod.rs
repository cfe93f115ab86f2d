//! Ranks that are threads of this process with CUDA devices: `--backend cuda`.
//!
//! Each has a stream of its own, and time is between events on those streams: the slowest rank's,
//! from the event before the call to the event behind its last kernel. Everything is allocated
//! before any rank averages and freed when all are done, since to free is to wait for every kernel,
//! also for one that waits for a peer.

mod flatten;
mod gpu;
mod nccl;
pub mod probe;
mod rank;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use param_averager::{Algorithm, Communicator, Device};

use crate::cli::Args;
use crate::crew::{Crew, Make};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::memory::{arenas, place, Arena, Flat};
use crate::plan::{Group, Section};
use crate::record::{Details, Record};
use crate::rows::{Kind, Row};
use crate::run::{Ranks, Replicas};
use crate::verify::Found;
use gpu::{DeviceMemory, Gpu, Machine};
use nccl::{Loaded, Nccl};
use rank::Rank;

/// Tensors start at multiples of this in the flat buffer, too, so that every copy moves packs of 16
/// bytes: the best that a flatten can do. What lies between is averaged along.
const ALIGNMENT: usize = 16;

/// Constants of a run, and the present group.
pub struct Cuda {
    machine: Machine,
    args: Args,
    /// NCCL, or why it can't be used, by the number of ranks.
    nccl: BTreeMap<usize, Result<Arc<Nccl>, String>>,
    /// Host memory of the replicas.
    arenas: Vec<Arc<Arena>>,
    /// Dropped before the memory that the rows' threads use, which the ranks have.
    rows: Vec<Entry>,
    ranks: Vec<Rank>,
}

struct Entry {
    row: Row,
    /// Its threads, or `None`: it can't be measured, as the note says.
    crew: Option<Crew>,
    note: Option<String>,
    /// Algorithm that `Algorithm::Auto` chose.
    ran: Arc<OnceLock<Algorithm>>,
}

/// The ordinal of each rank's device: one each where there are enough, else they take turns.
fn devices(ranks: usize, visible: usize) -> Vec<usize> {
    (0..ranks).map(|rank| rank % visible.max(1)).collect()
}

/// How a row's ranks are placed on devices.
fn placement(ranks: usize, visible: usize) -> &'static str {
    if ranks <= visible {
        "one rank a GPU"
    } else {
        "several ranks on one GPU"
    }
}

impl Cuda {
    pub fn open(args: &Args, sections: &[Section]) -> Result<Self, Failure> {
        let machine = Machine::open()?;
        let mut groups = sections.iter().flat_map(|section| &section.groups);
        let sharing = |group: &Group| group.ranks > machine.visible();
        if groups.any(|group| sharing(group) && group.rows.iter().any(|row| row.is_nccl())) {
            nccl::allow_sharing();
        }
        let (args, nccl) = (args.clone(), BTreeMap::new());
        Ok(Cuda { machine, args, nccl, arenas: vec![], rows: vec![], ranks: vec![] })
    }

    /// Longest time that NCCL may take for one thing.
    fn limit(&self) -> Duration {
        self.args.options.timeout.unwrap_or(Duration::from_secs(60))
    }

    /// NCCL for so many ranks, or why it can't be used.
    fn load_nccl(&mut self, ranks: usize) -> Result<Loaded, String> {
        let (visible, limit) = (self.machine.visible(), self.limit());
        let load = || {
            if self.args.nccl_probe.is_none() {
                probe::ask(ranks, limit)?;
            }
            let loaded = Nccl::load(placement(ranks, visible), ranks > visible);
            loaded.map(Arc::new).map_err(|why| format!("{}: {why}", placement(ranks, visible)))
        };
        let nccl = self.nccl.entry(ranks).or_insert_with(load).clone()?;
        Ok((nccl.clone(), nccl.unique_id()?))
    }

    /// Starts a row's threads. With a note about them, if there is one.
    fn crew(
        &mut self,
        row: Row,
        ran: &Arc<OnceLock<Algorithm>>,
    ) -> Result<(Crew, Option<String>), Failure> {
        let ranks = self.ranks.len();
        let direct = matches!(row.kind, Kind::Average { algorithm: Algorithm::Direct, .. });
        if direct && ranks > 1 && self.machine.visible() > 1 {
            return Err(Failure::Unmeasured("it is for ranks on one device".into()));
        }
        if row.needs_kernels() {
            flatten::IMAGE.map_err(|reason| Failure::Unmeasured(reason.into()))?;
        }
        let nccl = row.is_nccl().then(|| self.load_nccl(ranks).map_err(Failure::Unmeasured));
        let nccl = nccl.transpose()?;
        let on: Vec<_> = self.ranks.iter().map(|rank| Device::cuda(rank.gpu.ordinal)).collect();
        let member = |communicator: Communicator| -> Make {
            let rank = self.ranks[communicator.rank()].clone();
            let (ran, nccl) = (ran.clone(), nccl.clone());
            Box::new(move || rank.work(row, communicator, &ran, nccl))
        };
        let members = Communicator::from_devices(&on)?.into_iter().map(member).collect();
        let limit = if nccl.is_some() { self.limit() } else { Duration::MAX };
        Ok((Crew::new(members, limit)?, nccl.map(|(nccl, _)| nccl.what.clone())))
    }

    /// The note of a row that can't be measured. A failure of one row of NCCL's is one of all; the
    /// run ends only if a call never comes back, or for other rows.
    fn excuse(&mut self, row: Row, failure: Failure) -> Result<String, Failure> {
        match failure {
            Failure::Late(_) => Err(failure),
            reason if row.is_nccl() => {
                self.nccl.insert(self.ranks.len(), Err(reason.to_string()));
                Ok(format!("NCCL not measured: {reason}"))
            }
            Failure::Unmeasured(reason) => Ok(format!("{} not measured: {reason}", row.label())),
            other => Err(other),
        }
    }
}

impl Ranks for Cuda {
    fn describe(&self, ranks: usize) -> String {
        let visible = self.machine.visible();
        let name = |ordinal: usize| format!("cuda:{ordinal} ({})", self.machine.names[ordinal]);
        let on = (0..visible.min(ranks)).map(name).collect::<Vec<_>>().join(", ");
        match ranks <= visible {
            true => format!("{}: {on}", placement(ranks, visible)),
            false => format!("{ranks} ranks on {on}, which they share"),
        }
    }

    fn preamble(&self) -> Vec<(String, bool)> {
        let text = "# simulated: no GPU; figures of time are left out".to_string();
        self.machine.simulated.then_some((text, true)).into_iter().collect()
    }

    /// For what is uploaded and compared alone.
    fn memory(&self, group: &Group, layout: &Layout) -> u64 {
        place(layout).1 as u64 * group.ranks as u64
    }

    fn enter(&mut self, group: &Group) -> Result<(), Failure> {
        let (tensors, bytes) = place(&group.layout);
        let flat = Flat::new(&tensors, ALIGNMENT);
        let second = group.rows.iter().any(|row| row.spare_blocks(1) > 0);
        let second = second.then(|| flat.bytes.max(group.layout.bytes() as usize));
        let kernels = flatten::IMAGE.is_ok() && group.rows.iter().any(|row| row.needs_kernels());
        for (rank, ordinal) in devices(group.ranks, self.machine.visible()).into_iter().enumerate()
        {
            let gpu = Gpu::open(&self.machine, rank, ordinal)?;
            let own = Arc::new(DeviceMemory::new(&gpu, bytes)?);
            let second = second.map(|bytes| DeviceMemory::new(&gpu, bytes)).transpose()?;
            let kernels = match (&second, kernels) {
                (Some(second), true) => Some(flatten::Kernels::new(&gpu, &flat, &own, second)?),
                _ => None,
            };
            self.ranks.push(Rank {
                gpu,
                tensors: tensors.clone(),
                flat: flat.clone(),
                own,
                second: second.map(Arc::new),
                kernels: kernels.map(Arc::new),
                options: self.args.options.clone(),
                ranks: group.ranks,
            });
        }
        self.arenas = arenas(group.ranks, bytes);
        for &row in &group.rows {
            let ran = Arc::default();
            let (crew, note) = match self.crew(row, &ran) {
                Ok((crew, note)) => (Some(crew), note),
                Err(failure) => (None, Some(self.excuse(row, failure)?)),
            };
            self.rows.push(Entry { row, crew, note, ran });
        }
        Ok(())
    }

    fn leave(&mut self) {
        self.rows.clear();
        self.ranks.clear();
        self.arenas.clear();
    }

    fn replicas(&self, _row: usize) -> Replicas {
        let tensors = self.ranks[0].tensors.clone();
        Replicas { first: 0, arenas: self.arenas.clone(), tensors }
    }

    fn upload(&mut self) -> Result<(), Failure> {
        for (rank, arena) in self.ranks.iter().zip(&self.arenas) {
            // SAFETY: initialised, and no other thread uses it now.
            let from = unsafe { std::slice::from_raw_parts(arena.as_ptr(), arena.len()) };
            rank.own.upload(from)?;
        }
        Ok(())
    }

    fn download(&mut self) -> Result<(), Failure> {
        for (rank, arena) in self.ranks.iter().zip(&self.arenas) {
            // SAFETY: as above.
            let to = unsafe { std::slice::from_raw_parts_mut(arena.as_mut_ptr(), arena.len()) };
            rank.own.download(to)?;
        }
        Ok(())
    }

    fn run(&mut self, row: usize, iterations: u32) -> Result<Vec<Duration>, Failure> {
        let entry = &mut self.rows[row];
        let (of, Some(crew)) = (entry.row, &mut entry.crew) else { return Ok(vec![]) };
        if of.spare_blocks(1) > 0 {
            // The bytes that copies left between the tensors of a flat buffer may be NaN.
            let mut second = self.ranks.iter().filter_map(|rank| rank.second.as_ref());
            second.try_for_each(|memory| memory.zero())?;
        }
        let ran = match self.nccl.get(&self.ranks.len()) {
            Some(Err(reason)) if of.is_nccl() => Err(Failure::Unmeasured(reason.clone())),
            _ => crew.run(iterations),
        };
        ran.or_else(|failure| {
            let note = Some(self.excuse(of, failure)?);
            (self.rows[row].crew, self.rows[row].note) = (None, note);
            Ok(vec![])
        })
    }

    fn complete(&mut self, row: usize, found: Option<Found>, record: &mut Record) {
        let (entry, simulated) = (&self.rows[row], self.machine.simulated);
        if let (Kind::Average { commit, .. }, Some(&ran)) = (entry.row.kind, entry.ran.get()) {
            record.row = Row::average(ran, commit);
        }
        if simulated || entry.crew.is_none() {
            record.times.clear();
        }
        record.details = Details::Cuda {
            device: self.machine.names.first().cloned().unwrap_or_default(),
            placement: placement(record.ranks, self.machine.visible()),
            simulated,
            ulps: found.map(|found| found.ulps),
            note: entry.note.clone(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_devices_of_their_own_where_there_are_enough() {
        assert_eq!(devices(2, 4), [0, 1]);
        assert_eq!(devices(4, 2), [0, 1, 0, 1]);
        assert_eq!(devices(3, 1), [0; 3]);
        assert_eq!(placement(2, 2), "one rank a GPU");
        assert_eq!(placement(2, 1), "several ranks on one GPU");
        assert_eq!(placement(1, 1), "one rank a GPU");
    }
}
