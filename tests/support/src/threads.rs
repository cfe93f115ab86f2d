//! Ranks that are threads of this process.

use param_averager::{Communicator, Device};

/// Runs `rank` on a thread for each of n CPU ranks, and returns what they return.
pub fn ranks<T: Send>(n: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    ranks_on(Device::cpu(), n, rank)
}

/// [`ranks`] on any device.
pub fn ranks_on<T: Send>(
    device: Device,
    n: usize,
    rank: impl Fn(Communicator) -> T + Sync,
) -> Vec<T> {
    ranks_of(&vec![device; n], rank)
}

/// [`ranks`] with a rank on each of these devices.
pub fn ranks_of<T: Send>(devices: &[Device], rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let world = Communicator::from_devices(devices).unwrap();
    let rank = &rank;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            world.into_iter().map(|communicator| scope.spawn(move || rank(communicator))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
