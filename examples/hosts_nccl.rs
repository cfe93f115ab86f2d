//! Ranks on CUDA devices of several hosts, started by torchrun, averaged over NCCL.
//!
//!     cargo build --release --example hosts_nccl --features nccl
//!     export PARAM_AVERAGER_HOSTS=agents   # each agent of torchrun is a host
//!     torchrun --no-python --nnodes 2 --node-rank 0 --nproc-per-node 2 \
//!         --master-addr host0 --rdzv-id RUN target/release/examples/hosts_nccl
//!     # the same on host1, with --node-rank 1

use param_averager::{
    Communicator, CudaParams, CudaTensorMut, Device, Hierarchy, NcclHosts, ParamAverager,
};

fn main() {
    if let Err(error) = train() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

fn train() -> Result<(), Box<dyn std::error::Error>> {
    let rank = std::env::var("LOCAL_RANK");
    let rank = rank.map_err(|_| "LOCAL_RANK is not set: start this program by torchrun")?;
    let device: usize = rank.parse()?;
    let communicator = Communicator::from_env(Device::cuda(device))?; // the ranks of this host
    let stream = cudarc::driver::CudaContext::new(device)?.new_stream()?;
    let (rank, ranks, hosts) =
        (communicator.rank(), communicator.world_size(), communicator.hosts());
    let host = communicator.host().ok_or("no number of this host")?;
    let link = NcclHosts::from_env(&communicator)?;

    let mut weight = stream.alloc_zeros::<f32>(1000)?;
    let mut params = CudaParams::new(&stream);
    params.push(CudaTensorMut::from(&mut weight).named("weight"));
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = builder.build(&mut params)?;
    // In the place of optimizer steps: the rank's number among all.
    stream.memcpy_htod(&[(host * ranks + rank) as f32; 1000], &mut weight)?;
    let mut params = CudaParams::new(&stream);
    params.push(CudaTensorMut::from(&mut weight).named("weight"));
    averager.average(&mut params)?;
    let mean = stream.clone_dtoh(&weight)?[0];
    println!("rank {rank} of {ranks}, host {host} of {hosts}: {mean}");
    Ok(())
}
