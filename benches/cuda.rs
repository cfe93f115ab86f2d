//! Averages on a CUDA device, measured by criterion: `cargo bench --bench cuda`. Two ranks on
//! device 0, timed by events on their streams. `allreduce-bench --backend cuda` compares them with
//! NCCL and with the limits of the device.
//!
//! Without a device, on a simulated device, or without kernels, the program prints SKIPPED with the
//! reason and succeeds.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use criterion::{Criterion, SamplingMode, Throughput};
use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::{sys, CudaContext};
use param_averager::{
    Algorithm, Builder, Communicator, Device, Dtype, ParamAverager, Parameters, RawCudaParams,
    Start, TensorMut,
};

const RANKS: usize = 2;
const GPU: Device = Device::cuda(0);

/// Type of the driver's cuEventElapsedTime. cudarc calls its second version, and panics if the
/// driver is too old for that.
type ElapsedTime = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// Options of an averager.
type Options = fn(Builder) -> Builder;

/// The function that measures time, or the reason why there is nothing to measure.
fn usable() -> Result<ElapsedTime, String> {
    // Tested through the library, since cudarc panics without a driver.
    Communicator::from_devices(&[GPU]).map_err(|error| error.to_string())?;
    let name = CudaContext::new(0)
        .and_then(|context| context.name())
        .map_err(|error| error.to_string())?;
    if name.contains("cudasim") {
        return Err(format!("{name} is not a GPU, so its times mean nothing"));
    }
    let names =
        if cfg!(windows) { ["nvcuda.dll", "nvcuda"] } else { ["libcuda.so.1", "libcuda.so"] };
    // SAFETY: the driver is loaded already; the function has had this type since CUDA 2.
    let function = unsafe {
        let library = names.iter().find_map(|name| libloading::Library::new(*name).ok());
        let function = library.as_ref().and_then(|library| {
            library.get::<ElapsedTime>(b"cuEventElapsedTime\0").ok().map(|function| *function)
        });
        std::mem::forget(library); // keeps the function valid
        function
    };
    function.ok_or("the driver has no cuEventElapsedTime".into())
}

/// The f32 tensors of a rank, in one block of memory.
struct Model {
    context: Arc<CudaContext>,
    address: u64,
    /// Offset in bytes, and number of elements.
    tensors: Vec<(usize, usize)>,
}

impl Model {
    fn new(layout: &[usize]) -> Model {
        let context = CudaContext::new(0).unwrap();
        context.bind_to_thread().unwrap();
        let mut end = 0;
        let tensors = layout.iter().map(|&elements| {
            let offset = end;
            end = (end + 4 * elements).next_multiple_of(256);
            (offset, elements)
        });
        let tensors = tensors.collect();
        // SAFETY: a context is bound, and the allocation has the size that is set.
        let address = unsafe {
            let address = result::malloc_sync(end).unwrap();
            result::memset_d8_sync(address, 0, end).unwrap();
            address
        };
        result::ctx::synchronize().unwrap();
        Model { context, address, tensors }
    }
}

impl Parameters for Model {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        for &(offset, elements) in &self.tensors {
            let pointer = (self.address + offset as u64) as *mut u8;
            // SAFETY: inside of the allocation, which lives as long as `self`.
            visit(unsafe { TensorMut::from_raw_parts(pointer, elements, Dtype::F32, GPU) });
        }
    }
}

impl Drop for Model {
    fn drop(&mut self) {
        // Freeing waits for every kernel. All ranks are idle here.
        // SAFETY: allocated by `new`. An error leaves nothing to do.
        let _ =
            self.context.bind_to_thread().and_then(|()| unsafe { result::free_sync(self.address) });
    }
}

/// Rank threads that average one layout repeatedly. The time of an iteration is that of its slowest
/// rank.
struct Ranks {
    orders: Vec<Sender<u64>>,
    times: Receiver<Vec<Duration>>,
    threads: Vec<JoinHandle<()>>,
}

impl Ranks {
    fn new(layout: &[usize], options: Options, elapsed: ElapsedTime) -> Self {
        let line = Arc::new(AtomicU64::new(0));
        let (done, times) = channel();
        let (mut orders, mut threads) = (vec![], vec![]);
        for communicator in Communicator::from_devices(&[GPU; RANKS]).unwrap() {
            let (order, ordered) = channel();
            let (line, done, layout) = (line.clone(), done.clone(), layout.to_vec());
            orders.push(order);
            let rank = move || rank(communicator, &layout, options, elapsed, &line, ordered, done);
            threads.push(std::thread::spawn(rank));
        }
        Ranks { orders, times, threads }
    }

    fn time(&self, iterations: u64) -> Duration {
        self.orders.iter().for_each(|order| order.send(iterations).unwrap());
        let each: Vec<Vec<Duration>> = (0..RANKS).map(|_| self.times.recv().unwrap()).collect();
        (0..iterations as usize).filter_map(|k| each.iter().map(|times| times[k]).max()).sum()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.orders.clear();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

/// Averages as often as `ordered` says. `line` counts arrivals of all ranks at the start line.
fn rank(
    communicator: Communicator,
    layout: &[usize],
    options: Options,
    elapsed: ElapsedTime,
    line: &AtomicU64,
    ordered: Receiver<u64>,
    done: Sender<Vec<Duration>>,
) {
    let mut model = Model::new(layout);
    let stream = result::stream::create(StreamKind::NonBlocking).unwrap();
    let [start, stop] =
        [(); 2].map(|()| result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).unwrap());
    let mut averager =
        options(ParamAverager::builder(communicator).start_from(Start::Own).allow_unnamed())
            .build(&mut model)
            .unwrap();
    for iterations in ordered {
        let mut times = vec![];
        for _ in 0..iterations {
            let round = line.fetch_add(1, Ordering::AcqRel) / RANKS as u64;
            while line.load(Ordering::Acquire) < (round + 1) * RANKS as u64 {
                std::hint::spin_loop();
            }
            let mut milliseconds = 0.0;
            // SAFETY: the stream and the tensors belong to this rank and outlive the wait; the
            // events are recorded and complete before they are compared.
            unsafe {
                result::event::record(start, stream).unwrap();
                let pending =
                    averager.start(&mut RawCudaParams::new(stream.cast(), &mut model)).unwrap();
                result::event::record(stop, stream).unwrap();
                pending.wait().unwrap();
                result::event::synchronize(stop).unwrap();
                elapsed(&mut milliseconds, start, stop).result().unwrap();
            }
            times.push(Duration::from_secs_f64(f64::from(milliseconds) / 1e3));
        }
        done.send(times).unwrap();
    }
    // SAFETY: created above, and no work of theirs is running.
    unsafe {
        result::event::destroy(start).unwrap();
        result::event::destroy(stop).unwrap();
        result::stream::destroy(stream).unwrap();
    }
}

fn average(criterion: &mut Criterion, elapsed: ElapsedTime) {
    let ways: [(&str, Options); 3] = [
        ("direct", |builder| builder.algorithm(Algorithm::Direct)),
        ("ring", |builder| builder.algorithm(Algorithm::Ring)),
        ("ring_no_commit", |builder| builder.algorithm(Algorithm::Ring).all_or_nothing(false)),
    ];
    for (name, layout) in common::layouts() {
        let mut group =
            criterion.benchmark_group(format!("cuda/{name}/f32/{RANKS}_ranks_on_one_gpu"));
        group.throughput(Throughput::Bytes(4 * layout.iter().sum::<usize>() as u64));
        group
            .sampling_mode(SamplingMode::Flat)
            .sample_size(10)
            .measurement_time(Duration::from_secs(3));
        for (way, options) in ways {
            let ranks = Ranks::new(&layout, options, elapsed);
            group.bench_function(way, |bencher| {
                bencher.iter_custom(|iterations| ranks.time(iterations))
            });
        }
        group.finish();
    }
}

fn main() {
    match usable() {
        Err(reason) => println!("SKIPPED cuda: {reason}"),
        Ok(elapsed) => {
            let mut criterion = Criterion::default().configure_from_args();
            average(&mut criterion, elapsed);
            criterion.final_summary();
        }
    }
}
