//! Ranks on CUDA devices: `--backend cuda`.
//!
//! Ranks are threads here, too, each with a stream of its own, and time is what events on those
//! streams say: the slowest rank's, from the event before the call to the event behind its last
//! kernel. Everything is allocated before anybody averages and freed when all are done, since to
//! free is to wait for every kernel, also for one that waits for a peer.

mod average;
mod bench;
mod crews;
mod device;
mod flat;
mod kernels;
mod limits;
mod nccl;
mod nccl_rows;
mod probe;
mod replica;
mod show;

pub use bench::Bench;
pub use device::Machine;
pub use nccl_rows::nccl_limit;
pub use probe::{answer as answer_nccl_probe, prepare as prepare_nccl};
pub use show::devices as show_devices;

/// The ordinal of each rank's device: one each where there are enough, else they take turns.
pub fn devices(ranks: usize, visible: usize) -> Vec<usize> {
    (0..ranks).map(|rank| rank % visible.max(1)).collect()
}

/// Whether these ranks are on one device, all of them.
pub fn on_one(ranks: usize, visible: usize) -> bool {
    ranks == 1 || visible <= 1
}

/// What a row's ranks have to do with devices.
pub fn placement(ranks: usize, visible: usize) -> &'static str {
    if ranks <= visible {
        "one rank a GPU"
    } else {
        "several ranks on one GPU"
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
        assert!(on_one(1, 4) && on_one(4, 1) && !on_one(2, 2) && !on_one(4, 2));
        assert_eq!(placement(2, 2), "one rank a GPU");
        assert_eq!(placement(2, 1), "several ranks on one GPU");
        assert_eq!(placement(1, 1), "one rank a GPU");
    }
}
