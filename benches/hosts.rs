//! Averages over several hosts beside MPI's all-reduce of all ranks: `cargo bench --features mpi
//! --bench hosts`. The hosts are network namespaces of this machine, 2 with 2 ranks each, whose
//! links have a limited rate; ranks share its cores. With `-- --test`, one turn of a small model.
//!
//! The record is `benches/record/2026-11-30-hosts`.

mod common;
#[allow(dead_code)] // the bench cuts no link
#[path = "../tests/mpi/network.rs"]
mod network;

use std::time::{Duration, Instant};

use mpi::topology::Communicator as _;
use mpi::traits::CommunicatorCollectives as _;
use network::{Network, ROLE};
use param_averager::{Communicator, Compression, Device, Hierarchy, MpiHosts, ParamAverager};
use test_support::output_within;

const HOSTS: usize = 2;
const EACH: usize = 2;
/// Turns of each method, of which the first does not count.
const TURNS: usize = 6;
const OURS: &str = "this crate";
const OURS_CODED: &str = "this crate, in int8";
/// No average: what this link gives MPI.
const EXCHANGE: &str = "MPI_Sendrecv of as many bytes as this crate";

type Method<'a> = Box<dyn FnMut(&mut Vec<Vec<f32>>) + 'a>;

fn main() {
    if let Ok(role) = std::env::var(ROLE) {
        return rank(role == "small");
    }
    let is_test = std::env::args().any(|argument| argument == "--test");
    if let Some(missing) = network::missing() {
        println!("SKIPPED: {missing}");
        return;
    }
    let rates: &[(&str, f64)] = match is_test {
        true => &[("10gbit", 10e9)],
        false => &[("1gbit", 1e9), ("10gbit", 10e9)],
    };
    for (rate, bits) in rates {
        let network = Network::new(HOSTS);
        (0..HOSTS).for_each(|host| network.slow(host, rate));
        let role = if is_test { "small" } else { "gpt2" };
        let ended = output_within(network.mpirun(EACH, role), Duration::from_secs(900));
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        println!("{HOSTS} hosts with {EACH} ranks, {rate}/s between them, {role}");
        println!("| method | ms | least … most | / ours | / the link's limit |");
        println!("|---|---|---|---|---|");
        let mut ours = None;
        for line in ended.said.lines().filter_map(|line| line.strip_prefix("row ")) {
            let (name, rest) = line.split_once(": ").expect("a row");
            let of = |word: &str| word.parse::<f64>().expect("a number");
            let words: Vec<f64> = rest.split(' ').map(of).collect();
            let [ms, least, most, bytes] = words[..] else { panic!("{line}") };
            // Least bytes that a host sends: (h − 1)/h of what its ranks have, twice.
            let limit = 2.0 * (HOSTS - 1) as f64 / HOSTS as f64 * bytes * 8.0 / bits * 1e3;
            let ours = *ours.get_or_insert(ms);
            println!(
                "| {name} | {ms:.0} | {least:.0} … {most:.0} | {:.2} | {:.2} |",
                ms / ours,
                ms / limit
            );
        }
    }
}

/// One rank: turns of all methods, one after the other. Rank 0 prints the rows.
fn rank(is_small: bool) {
    let (universe, _) =
        mpi::initialize_with_threading(mpi::Threading::Funneled).expect("MPI is not initialised");
    let all = universe.world();
    let communicator = Communicator::from_env(Device::cpu()).expect("a rank");
    let link = MpiHosts::new(&communicator).expect("a link");
    let [(_, gpt2), _, (_, small)] = common::layouts();
    let layout = if is_small { small } else { gpt2 };
    let mut model: Vec<Vec<f32>> = layout.iter().map(|&n| vec![all.rank() as f32; n]).collect();
    let bytes = 4 * layout.iter().sum::<usize>();
    let coded_link = MpiHosts::new(&communicator).expect("a link");
    let builder = ParamAverager::builder(communicator).allow_unnamed();
    let coded = builder.clone().hosts(coded_link, Hierarchy::Every);
    let mut coded = coded.hosts_compression(Compression::Int8).build(&mut model).expect("built");
    let mut averager = builder.hosts(link, Hierarchy::Every).build(&mut model).expect("built");
    let mut flat = [vec![0.0f32; bytes / 4], vec![0.0f32; bytes / 4]];
    let mut tensor = vec![0.0f32; layout.iter().copied().max().unwrap_or(0)];
    let ranks = all.size() as f32;
    let sum = mpi::collective::SystemOperation::sum();
    // The bytes of an average over all hosts that a rank sends to that of its number.
    let own = bytes / 4 * (HOSTS - 1) / HOSTS * 2 / EACH;
    let mut exchanged = [vec![1.0f32; own], vec![0.0f32; own]];
    let other = all.process_at_rank((all.rank() + EACH as i32) % all.size());
    let mut methods: [(&str, Method); 5] = [
        (
            OURS,
            Box::new(|model| {
                averager.average(model).expect("an average");
            }),
        ),
        (
            OURS_CODED,
            Box::new(|model| {
                coded.average(model).expect("an average");
            }),
        ),
        (
            "flatten, MPI_Allreduce of all ranks",
            Box::new(|model| {
                let [send, receive] = &mut flat;
                let mut at = 0;
                for values in model.iter() {
                    send[at..at + values.len()].copy_from_slice(values);
                    at += values.len();
                }
                all.all_reduce_into(&send[..], &mut receive[..], sum);
                let mut at = 0;
                for values in model.iter_mut() {
                    let sums = &receive[at..at + values.len()];
                    values.iter_mut().zip(sums).for_each(|(value, sum)| *value = sum / ranks);
                    at += values.len();
                }
            }),
        ),
        (
            "MPI_Allreduce of all ranks, a tensor at a time",
            Box::new(|model| {
                for values in model.iter_mut() {
                    let sums = &mut tensor[..values.len()];
                    all.all_reduce_into(&values[..], sums, sum);
                    values.iter_mut().zip(sums).for_each(|(value, sum)| *value = *sum / ranks);
                }
            }),
        ),
        (
            EXCHANGE,
            Box::new(|_| {
                let [send, receive] = &mut exchanged;
                mpi::point_to_point::send_receive_into(&send[..], &other, &mut receive[..], &other);
            }),
        ),
    ];
    let mut seconds = [const { vec![] }; 5];
    let turns = if is_small { 1 } else { TURNS };
    for turn in 0..turns {
        for ((name, method), seconds) in methods.iter_mut().zip(&mut seconds) {
            model.iter_mut().flatten().for_each(|value| *value = all.rank() as f32);
            all.barrier();
            let start = Instant::now();
            method(&mut model);
            all.barrier(); // the time of the last rank
            let took = start.elapsed().as_secs_f64();
            let error = if *name == OURS_CODED { 0.05 } else { 0.0 };
            let is_mean =
                || model.iter().flatten().all(|&value: &f32| (value - 1.5).abs() <= error);
            assert!(*name == EXCHANGE || is_mean(), "{name}");
            if turn > 0 || turns == 1 {
                seconds.push(took);
            }
        }
    }
    if all.rank() == 0 {
        for ((name, _), seconds) in methods.iter().zip(&mut seconds) {
            seconds.sort_by(f64::total_cmp);
            let ms = |at: usize| 1e3 * seconds[at];
            let (middle, last) = (seconds.len() / 2, seconds.len() - 1);
            println!("row {name}: {} {} {} {bytes}", ms(middle), ms(0), ms(last));
        }
    }
}
