//! Programs of the ranks that mpirun starts.

use std::io::Write;
use std::time::{Duration, Instant};

use mpi::Threading;
use param_averager::{
    Builder, Communicator, Device, Error, Hierarchy, LocalSgd, MpiHosts, Outer, ParamAverager,
    Schedule,
};

/// Values of a model: more than a piece of what hosts exchange at once.
const ELEMENTS: usize = 3_000_001;
const ROUNDS: usize = 5;

/// Runs a role, and ends the process.
pub fn run(role: &str) -> ! {
    let result = match role {
        "averages" => averages(),
        #[cfg(feature = "cuda")]
        "devices" => devices(),
        "without" => without(),
        "cut" => cut(),
        "killed" => killed(),
        "threads" => threads(),
        other => panic!("no role {other}"),
    };
    if let Err(error) = result {
        println!("error: {error}");
        std::io::stdout().flush().unwrap();
        std::process::exit(1);
    }
    std::process::exit(0) // without MPI_Finalize, which a role has called that needs it
}

fn start() -> Result<(Communicator, MpiHosts), Error> {
    let communicator = Communicator::from_env(Device::cpu())?;
    let link = MpiHosts::new(&communicator)?;
    Ok((communicator, link))
}

fn world() -> (usize, usize) {
    let of = |name| std::env::var(name).unwrap().parse::<usize>().unwrap();
    match std::env::var_os("OMPI_COMM_WORLD_RANK") {
        Some(_) => (of("OMPI_COMM_WORLD_RANK"), of("OMPI_COMM_WORLD_SIZE")),
        None => (of("PMI_RANK"), of("PMI_SIZE")),
    }
}

/// Averages of all ranks with weights and an outer optimizer, and each rank's digest of its values.
fn averages() -> Result<(), Error> {
    let (_universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
    let (communicator, link) = start()?;
    let hosts = communicator.hosts();
    let (own, all) = world();
    let mut model = vec![own as f32; ELEMENTS];
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut model)?;
    assert!(model.iter().all(|&value| value == 0.0), "the values of host 0");
    let weights: f64 = (1..=all).map(|weight| weight as f64).sum();
    for round in 0..ROUNDS {
        let value = |rank: usize, i: usize| ((i % 1000) * (rank + 1) + round) as f32 * 0.001;
        model.iter_mut().enumerate().for_each(|(i, at)| *at = value(own, i));
        let report = averager.average_weighted(&mut model, (own + 1) as f64)?;
        assert_eq!((report.hosts, report.world_size), (hosts, all / hosts));
        for i in (0..1000).chain(ELEMENTS - 1000..ELEMENTS) {
            let weighted = |rank: usize| (rank + 1) as f64 * f64::from(value(rank, i));
            let mean = (0..all).map(weighted).sum::<f64>() / weights;
            let found = f64::from(model[i]);
            assert!((found - mean).abs() <= 3e-7 * mean.abs(), "{i}: {found}, not {mean}");
        }
    }
    println!("rank {own} of {all} on {hosts} hosts: {:016x}", digest(&model));
    let mut sgd = LocalSgd::new(averager, Schedule::every(2));
    for step in 0..5 {
        model.iter_mut().for_each(|value| *value += (own * step) as f32);
        sgd.step(&mut model)?;
    }
    sgd.finish(&mut model)?;
    println!("rank {own} trained: {:016x}", digest(&model));
    Ok(())
}

/// Averages of all ranks, each on a device of its host's.
#[cfg(feature = "cuda")]
fn devices() -> Result<(), Error> {
    use param_averager::{CudaParams, CudaTensorMut};
    const EACH: usize = 50_001;
    let (_universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
    let (own, all) = world();
    let communicator = Communicator::from_env(Device::cuda(own % 2))?;
    let link = MpiHosts::new(&communicator)?;
    let hosts = communicator.hosts();
    let stream = cudarc::driver::CudaContext::new(own % 2).unwrap().new_stream().unwrap();
    let mut model = stream.alloc_zeros::<f32>(EACH).unwrap();
    let mut params = CudaParams::new(&stream);
    params.push(CudaTensorMut::from(&mut model));
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut params)?;
    for round in 0..ROUNDS {
        let value = |rank: usize, i: usize| ((i % 1000) * (rank + 1) + round) as f32;
        let values: Vec<f32> = (0..EACH).map(|i| value(own, i)).collect();
        stream.memcpy_htod(&values, &mut model).unwrap();
        let mut params = CudaParams::new(&stream);
        params.push(CudaTensorMut::from(&mut model));
        let report = averager.average(&mut params)?;
        assert_eq!((report.hosts, report.world_size), (hosts, all / hosts));
        for (i, found) in stream.clone_dtoh(&model).unwrap().into_iter().enumerate() {
            let mean = (0..all).map(|rank| value(rank, i)).sum::<f32>() / all as f32;
            assert_eq!(found, mean, "{i}"); // of whole numbers, and of quarters
        }
    }
    println!("rank {own} of {all} on {hosts} hosts has averaged on a device");
    Ok(())
}

fn digest(model: &[f32]) -> u64 {
    let step =
        |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0000_01b3);
    model.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Ranks on several hosts, and an averager of one.
fn without() -> Result<(), Error> {
    let communicator = Communicator::from_env(Device::cpu())?;
    let mut model = vec![0.0f32; 10];
    ParamAverager::builder(communicator).build(&mut model).map(drop)
}

fn short(builder: Builder) -> Builder {
    builder.timeout(Duration::from_secs(8)).outer(Outer::diloco())
}

/// Averages until the link is cut: then an error, with the values as they were.
fn cut() -> Result<(), Error> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
    std::mem::forget(universe); // never finalised: that would wait for the other host
    let (communicator, link) = start()?;
    let (own, _) = world();
    let mut model = vec![0.0f32; ELEMENTS];
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = short(builder).build(&mut model)?;
    println!("rank {own} begins");
    std::io::stdout().flush().unwrap();
    for round in 0.. {
        model.fill((own + round) as f32);
        let before = Instant::now();
        let made = averager.average(&mut model);
        let Err(error) = made else { continue };
        let waited = before.elapsed();
        assert!(waited < Duration::from_secs(11), "{waited:?}: {error}");
        let unchanged = model.iter().all(|&value| value == (own + round) as f32);
        assert!(unchanged, "rank {own}: {error}");
        println!("rank {own} unchanged in round {round} after {} s: {error}", waited.as_secs());
        std::io::stdout().flush().unwrap();
        // mpirun ends all ranks of a host with the first that exits without MPI_Finalize.
        std::thread::sleep(Duration::from_secs(5));
        break;
    }
    Ok(())
}

/// Averages until mpirun ends all ranks, since one has died.
fn killed() -> Result<(), Error> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
    std::mem::forget(universe);
    let (communicator, link) = start()?;
    let (own, _) = world();
    let mut model = vec![0.0f32; 1000];
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = short(builder).build(&mut model)?;
    for round in 0.. {
        if (own, round) == (1, 20) {
            println!("rank 1 dies after {round} averages");
            std::io::stdout().flush().unwrap();
            std::thread::sleep(Duration::from_millis(500)); // mpirun reads it
                                                            // SAFETY: no memory is involved.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        averager.average(&mut model)?;
    }
    Ok(())
}

/// Averages on a thread that MPI must not be called on.
fn threads() -> Result<(), Error> {
    let (_universe, _) = mpi::initialize_with_threading(Threading::Funneled).expect("MPI");
    let (communicator, link) = start()?;
    std::thread::spawn(move || {
        let mut model = vec![0.0f32; 10];
        let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
        builder.build(&mut model).map(drop)
    })
    .join()
    .expect("no panic")
}
