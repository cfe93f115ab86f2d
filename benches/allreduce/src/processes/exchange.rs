//! What ranks tell one another, by averages: each writes its numbers in a row of its own, and zeros
//! in all others. The mean, times the number of ranks, is what everybody wrote.

use std::time::Duration;

use param_averager::{Communicator, Device, ParamAverager, Parameters, TensorMut};

use crate::failure::Failure;

/// Numbers that a rank tells at a time.
pub const MOST: usize = 4;

/// A number is told as two of 32 bits, which an f64 holds exactly, and the mean of them up to a
/// rounding.
const HALVES: usize = 2 * MOST;

/// The least: others may be busy with what they don't share, such as a check. One that is gone is
/// seen at once.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Exchange {
    averager: ParamAverager,
    rank: usize,
    table: Table,
}

struct Table(Vec<f64>);

impl Parameters for Table {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let (start, elements) = (self.0.as_mut_ptr(), self.0.len());
        // SAFETY: memory of the vector, which is borrowed for as long.
        visit(unsafe {
            TensorMut::from_raw_parts(
                start.cast(),
                elements,
                param_averager::Dtype::F64,
                Device::cpu(),
            )
        });
    }
}

impl Exchange {
    /// Collective, as all of this.
    pub fn new(communicator: Communicator, timeout: Option<Duration>) -> Result<Self, Failure> {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        let timeout = timeout.map_or(10 * PATIENCE, |timeout| timeout.max(PATIENCE));
        let mut table = Table(vec![0.0; ranks * HALVES]);
        let averager =
            ParamAverager::builder(communicator).timeout(timeout).channels(1).build(&mut table)?;
        Ok(Exchange { averager, rank, table })
    }

    /// What every rank tells, by rank. Also a barrier.
    pub fn tell(&mut self, mine: [u64; MOST]) -> Result<Vec<[u64; MOST]>, Failure> {
        let ranks = self.table.0.len() / HALVES;
        self.table.0.fill(0.0);
        let row = &mut self.table.0[self.rank * HALVES..][..HALVES];
        for (halves, number) in row.chunks_exact_mut(2).zip(mine) {
            halves.copy_from_slice(&[(number >> 32) as f64, (number as u32).into()]);
        }
        self.averager.average(&mut self.table)?;
        let whole = |half: f64| (half * ranks as f64).round() as u64;
        let row =
            |row: &[f64]| std::array::from_fn(|i| whole(row[2 * i]) << 32 | whole(row[2 * i + 1]));
        Ok(self.table.0.chunks_exact(HALVES).map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use param_averager::Communicator;

    #[test]
    fn everybody_learns_every_bit_of_every_number() {
        for ranks in [1, 2, 3, 7] {
            let world = Communicator::from_devices(&vec![Device::cpu(); ranks]).unwrap();
            let told = |rank: u64| [u64::MAX - rank, rank, 0, 0x0123_4567_89ab_cdef ^ rank];
            std::thread::scope(|scope| {
                for communicator in world {
                    scope.spawn(move || {
                        let rank = communicator.rank() as u64;
                        let all =
                            Exchange::new(communicator, None).unwrap().tell(told(rank)).unwrap();
                        assert_eq!(all, (0..ranks as u64).map(told).collect::<Vec<_>>());
                    });
                }
            });
        }
    }
}
