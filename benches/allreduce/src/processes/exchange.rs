//! Messages between ranks, by averages: each rank writes its numbers in a row of its own, and zeros
//! in all others. The mean, times the number of ranks, is what all wrote.

use std::time::Duration;

use param_averager::{Communicator, ParamAverager, Start};

use crate::failure::Failure;

/// Numbers of a message. Each travels as two of 32 bits, which an f64 holds exactly, and the mean
/// of them up to a rounding.
const MOST: usize = 4;
const HALVES: usize = 2 * MOST;

/// The least time to wait: others may be busy with what they don't share, such as a check. A rank
/// that is gone is seen at once.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Exchange {
    averager: ParamAverager,
    /// One tensor, with a row for each rank.
    table: Vec<Vec<f64>>,
}

impl Exchange {
    /// Collective, as `tell`.
    pub fn new(communicator: Communicator, timeout: Option<Duration>) -> Result<Self, Failure> {
        let timeout = timeout.map_or(10 * PATIENCE, |timeout| timeout.max(PATIENCE));
        let mut table = vec![vec![0.0; communicator.world_size() * HALVES]];
        let builder = ParamAverager::builder(communicator)
            .start_from(Start::Own)
            .timeout(timeout)
            .channels(1);
        Ok(Exchange { averager: builder.build(&mut table)?, table })
    }

    /// The messages of all ranks, by rank. Also a barrier.
    pub fn tell(&mut self, mine: [u64; MOST]) -> Result<Vec<[u64; MOST]>, Failure> {
        let (rank, ranks) = (self.averager.rank(), self.averager.world_size());
        self.table[0].fill(0.0);
        let row = &mut self.table[0][rank * HALVES..][..HALVES];
        for (halves, number) in row.chunks_exact_mut(2).zip(mine) {
            halves.copy_from_slice(&[(number >> 32) as f64, (number as u32).into()]);
        }
        self.averager.average(&mut self.table)?;
        let whole = |half: f64| (half * ranks as f64).round() as u64;
        let row =
            |row: &[f64]| std::array::from_fn(|i| whole(row[2 * i]) << 32 | whole(row[2 * i + 1]));
        Ok(self.table[0].chunks_exact(HALVES).map(row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_learn_every_bit_of_every_number() {
        for ranks in [1, 2, 3, 7] {
            let world = vec![param_averager::Device::cpu(); ranks];
            let told = |rank: u64| [u64::MAX - rank, rank, 0, 0x0123_4567_89ab_cdef ^ rank];
            std::thread::scope(|scope| {
                for communicator in Communicator::from_devices(&world).unwrap() {
                    scope.spawn(move || {
                        let mine = told(communicator.rank() as u64);
                        let all = Exchange::new(communicator, None).unwrap().tell(mine).unwrap();
                        assert_eq!(all, (0..ranks as u64).map(told).collect::<Vec<_>>());
                    });
                }
            });
        }
    }
}
