//! Roles of ranks.

use std::io::BufRead;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use param_averager::*;
use test_support::rank::{number, say, Tensors};

/// Limit of a call that is to end before it.
const LONG: Duration = Duration::from_secs(60);
/// Bytes of a part. The last are more than a link has room for at first.
const SIZES: [usize; 6] = [0, 1, 7, 4096, 100_003, 3 << 20];

/// Runs a role, and returns the exit code.
pub fn run(role: &str) -> i32 {
    let result = match role {
        "exchange" => exchange(),
        "passed" => passed(),
        "alone" => alone(),
        "endless" => endless(),
        "late" => late(),
        "arrived" => arrived(),
        "aborted" => aborted(),
        "averages" => averages(),
        other => panic!("no role {other}"),
    };
    let Err(error) = result else { return 0 };
    say(&format!("error {error}"));
    3
}

/// The ranks of this host. `PA_NCCL_TIMEOUT_MS` is the wait for others.
fn world() -> Result<Communicator> {
    let timeout = number("PA_NCCL_TIMEOUT_MS").map_or(LONG, Duration::from_millis);
    let device = match number("PA_NCCL_CPU") {
        Some(_) => Device::cpu(),
        None => Device::cuda(number("LOCAL_RANK").expect("torchrun's") as usize % 2),
    };
    Communicator::builder().device(device).timeout(timeout).from_env()?.build()
}

fn start() -> Result<NcclHosts> {
    NcclHosts::from_env(&world()?)
}

fn wait_for_a_line() {
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
}

/// Bytes of a host for another, which repeat after a prime number of them.
fn part(from: usize, to: usize, size: usize) -> Vec<u8> {
    let period = (0..251).map(|at| ((from * 131 + to * 31 + at * 7 + size) % 251) as u8);
    let mut bytes = period.collect::<Vec<u8>>().repeat(size / 251 + 1);
    bytes.truncate(size);
    bytes
}

/// Calls of all sizes, compared byte by byte.
fn carry(link: &mut NcclHosts) -> std::result::Result<(), HostsError> {
    let (host, hosts) = (link.host(), link.hosts());
    let limit = HostsLimit::new(LONG, &|| false);
    for size in SIZES {
        let send: Vec<u8> = (0..hosts).flat_map(|to| part(host, to, size)).collect();
        let mut received = vec![255; hosts * size];
        link.all_to_all(&send, &mut received, &limit)?;
        let expected: Vec<u8> = (0..hosts).flat_map(|from| part(from, host, size)).collect();
        assert!(received == expected, "{size}");
        received.fill(255);
        link.all_gather(&part(host, hosts, size), &mut received, &limit)?;
        let expected: Vec<u8> = (0..hosts).flat_map(|from| part(from, hosts, size)).collect();
        assert!(received == expected, "{size}");
    }
    let wrong = link.all_to_all(&[0; 5], &mut [0; 4], &limit).unwrap_err();
    assert!(wrong.reason.contains("do not have a part for each host"), "{wrong}");
    Ok(())
}

fn of_link(error: HostsError) -> Error {
    Error::Environment { problem: error.reason }
}

fn exchange() -> Result<()> {
    let communicator = world()?;
    let mut link = NcclHosts::from_env(&communicator)?;
    assert_eq!((link.hosts(), Some(link.host())), (communicator.hosts(), communicator.host()));
    carry(&mut link).map_err(of_link)?;
    say("done");
    Ok(())
}

/// The same with an id that host 0 writes into a file.
fn passed() -> Result<()> {
    let communicator = world()?;
    let host = communicator.host().unwrap();
    let file = PathBuf::from(std::env::var_os("PA_NCCL_FILE").unwrap());
    let id = match host {
        0 => {
            let id = NcclId::new()?;
            let whole = file.with_extension("new");
            std::fs::write(&whole, id.to_bytes()).unwrap();
            std::fs::rename(whole, &file).unwrap();
            id
        }
        _ => NcclId::from_bytes(read_when_there(&file)),
    };
    let mut link = NcclHosts::new(&communicator, host, communicator.hosts(), id)?;
    let refused = NcclHosts::new(&communicator, 2, 2, id).unwrap_err();
    assert!(refused.to_string().contains("host 2 of 2"), "{refused}");
    carry(&mut link).map_err(of_link)?;
    say("done");
    Ok(())
}

fn read_when_there(file: &Path) -> [u8; NcclId::BYTES] {
    let begin = Instant::now();
    loop {
        if let Ok(bytes) = std::fs::read(file) {
            return bytes.try_into().unwrap();
        }
        assert!(begin.elapsed() < LONG, "no file");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Host 0 of 2, with an id that no other host has.
fn alone() -> Result<()> {
    NcclHosts::new(&world()?, 0, 2, NcclId::new()?).map(drop)
}

/// Calls until one fails.
fn endless() -> Result<()> {
    let mut link = start()?;
    let limit = HostsLimit::new(LONG, &|| false);
    let (send, mut receive) = ([7; 1000], vec![0; 1000 * link.hosts()]);
    for round in 0.. {
        if let Err(error) = link.all_gather(&send, &mut receive, &limit) {
            return Err(of_link(error));
        }
        if round == 3 {
            say("ready");
        }
    }
    Ok(())
}

/// A call that succeeds, though NCCL has failed when its bytes are there, and one behind it.
fn arrived() -> Result<()> {
    let mut link = start()?;
    let limit = HostsLimit::new(LONG, &|| false);
    let mut received = [0; 2];
    let send = [link.host() as u8 + 1];
    link.all_gather(&send, &mut received, &limit).expect("the bytes that have arrived");
    assert_eq!(received, [1, 2]);
    link.all_gather(&send, &mut received, &limit).map_err(of_link)
}

/// Host 0 waits for a host that comes too late, which gets an error as well.
fn late() -> Result<()> {
    let mut link = start()?;
    let limit = if link.host() == 0 { Duration::from_millis(300) } else { LONG };
    if link.host() > 0 {
        say("ready");
        wait_for_a_line();
    }
    let limit = HostsLimit::new(limit, &|| false);
    let (send, mut receive) = ([7; 1000], vec![0; 1000 * link.hosts()]);
    let mut calls = (0..3).map(|_| link.all_gather(&send, &mut receive, &limit));
    let error = calls.find_map(std::result::Result::err).expect("an error");
    say(&format!("found {error}"));
    let again = link.all_gather(&send, &mut receive, &limit).unwrap_err();
    assert_eq!(again.reason, "the link has ended");
    wait_for_a_line();
    Ok(())
}

/// Host 0 aborts while the other waits for it.
fn aborted() -> Result<()> {
    let mut link = start()?;
    if link.host() == 0 {
        wait_for_a_line();
        link.abort();
        link.abort();
        say("aborted");
        wait_for_a_line();
        return Ok(());
    }
    say("ready");
    let limit = HostsLimit::new(LONG, &|| false);
    let error = link.all_gather(&[1], &mut vec![0; link.hosts()], &limit).unwrap_err();
    say(&format!("found {error}"));
    Ok(())
}

/// Averages, whose number `PA_NCCL_ROUNDS` limits, each of which is checked; the last is dropped
/// if one fails.
fn averages() -> Result<()> {
    let communicator = world()?;
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let (host, hosts) = (communicator.host().unwrap(), communicator.hosts());
    let (own, all) = (host * ranks + rank, hosts * ranks);
    let link = NcclHosts::from_env(&communicator)?;
    let value = |rank: usize, round: usize, at: usize| ((at % 97) * (rank + 1) + round) as f32;
    let values = |round: usize| {
        [5000, 0, 777].map(|length| (0..length).map(|at| value(own, round, at)).collect()).to_vec()
    };
    let mut model = Tensors::new(values(0), communicator.device());
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    let mut averager = builder.allow_unnamed().channels(1).timeout(LONG).build(&mut model)?;
    for round in 0..number("PA_NCCL_ROUNDS").unwrap_or(u64::MAX) as usize {
        model.set(values(round));
        let made = averager.average(&mut model);
        model.download();
        let check = |model: &Tensors, ranks: Range<usize>| {
            for tensor in &model.values {
                for (at, found) in tensor.iter().enumerate() {
                    let sum: f32 = ranks.clone().map(|rank| value(rank, round, at)).sum();
                    let mean = sum / ranks.len() as f32;
                    assert!((found - mean).abs() <= 1e-6 * sum, "{at}: {found}");
                }
            }
        };
        let report = match made {
            Ok(report) => report,
            Err(error) => {
                assert!(matches!(error, Error::HostLost { .. } | Error::StageVetoed { .. }));
                assert_eq!(model.values, values(round), "a tensor has changed: {error}");
                say("unchanged");
                // This host goes on alone, also after a veto of a rank whose link has failed.
                averager.recover_within_host(&mut model)?;
                model.set(values(round));
                let report = averager.average(&mut model)?;
                model.download();
                assert_eq!((report.hosts, report.world_size), (1, ranks));
                check(&model, host * ranks..(host + 1) * ranks);
                say("alone");
                return Err(error);
            }
        };
        assert_eq!((report.hosts, report.world_size), (hosts, ranks));
        check(&model, 0..all);
        if round == 3 {
            say("ready");
        }
    }
    say("done");
    Ok(())
}
