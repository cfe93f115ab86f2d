//! Ranks that are threads on CPUs.

use std::hint::black_box;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use param_averager::{Builder, Communicator, Device, ParamAverager, Start};

/// Rank threads that average one layout of f32 tensors repeatedly. All start together, and rank 0
/// measures the time.
pub struct Ranks {
    orders: Vec<Sender<u64>>,
    times: Receiver<Duration>,
    threads: Vec<JoinHandle<()>>,
}

impl Ranks {
    pub fn new(
        n: usize,
        layout: &[usize],
        options: impl Fn(Builder) -> Builder + Copy + Send + 'static,
    ) -> Self {
        let barrier = Arc::new(Barrier::new(n));
        let (done, times) = channel();
        let (mut orders, mut threads) = (vec![], vec![]);
        for communicator in Communicator::from_devices(&vec![Device::cpu(); n]).unwrap() {
            let (order, ordered) = channel();
            let (barrier, done, layout) = (barrier.clone(), done.clone(), layout.to_vec());
            orders.push(order);
            threads.push(std::thread::spawn(move || {
                let rank = communicator.rank();
                let mut model: Vec<Vec<f32>> =
                    layout.iter().map(|&len| vec![rank as f32; len]).collect();
                let builder =
                    ParamAverager::builder(communicator).start_from(Start::Own).allow_unnamed();
                let mut averager = options(builder).build(&mut model).unwrap();
                for iterations in ordered {
                    barrier.wait();
                    let start = Instant::now();
                    for _ in 0..iterations {
                        black_box(averager.average(&mut model).unwrap());
                    }
                    barrier.wait(); // ends with the slowest rank
                    if rank == 0 {
                        done.send(start.elapsed()).unwrap();
                    }
                }
            }));
        }
        Ranks { orders, times, threads }
    }

    /// Time of so many averages.
    pub fn time(&self, iterations: u64) -> Duration {
        self.orders.iter().for_each(|order| order.send(iterations).unwrap());
        self.times.recv().unwrap()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.orders.clear();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}
