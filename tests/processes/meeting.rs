//! Rendezvous of ranks, and the errors of ranks that do not meet.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::time::{Duration, Instant};

use test_support::process::{name, start, start_all, RankProcess};
use test_support::Skip;

/// Asserts that all ranks fail, with an error that holds each of these.
fn all_fail(mut ranks: Vec<RankProcess>, with: &[&str]) {
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let errors = rank.said("error");
        for with in with {
            assert!(errors[0].contains(with), "{errors:?} without {with:?}");
        }
    }
}

pub fn worlds_of_2_3_4_and_8_processes_average() {
    for n in [2, 3, 4, 8] {
        let mut ranks = start_all("meet", n, |_| vec![]);
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("averaged"), [n.to_string()]);
        }
    }
}

pub fn the_environment_of_torchrun_is_enough() {
    let port = name();
    let ranks = (0..3).map(|rank: usize| {
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "3".into()),
            ("LOCAL_RANK", rank.to_string()),
            ("LOCAL_WORLD_SIZE", "3".into()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", port.clone()),
        ];
        start("meet", &variables)
    });
    for mut rank in ranks.collect::<Vec<_>>() {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    let mut alone = start("meet", &[("RANK", "0".into())]);
    assert_eq!(alone.end(), Some(3));
    assert!(alone.said("error")[0].contains("WORLD_SIZE is not"), "{:?}", alone.output);
}

pub fn open_mpi_starts_ranks() {
    let program = std::env::current_exe().unwrap();
    let mut mpirun = std::process::Command::new("mpirun");
    mpirun.args(["--oversubscribe", "-n", "3"]).arg(program);
    mpirun
        .env("PA_TEST_ROLE", "meet")
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    let output = mpirun.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("@averaged 3").count(), 3, "{said}");
}

const TORCHRUN: &str = "PA_TEST_TORCHRUN";

/// Skips unless a variable says where torchrun is.
pub fn torchrun() -> Skip {
    let there = std::env::var_os(TORCHRUN).is_some();
    (!there).then(|| format!("no torchrun: set {TORCHRUN}=/path/to/torchrun"))
}

/// Two starts: one rank fails in the first, and torchrun starts all again.
pub fn torchrun_starts_ranks() {
    let torchrun = std::env::var(TORCHRUN).unwrap();
    let program = std::env::current_exe().unwrap();
    let mut torchrun = std::process::Command::new(torchrun);
    torchrun.args(["--standalone", "--nproc-per-node", "3", "--max-restarts", "1", "--no-python"]);
    torchrun.arg(program).env("PA_TEST_ROLE", "restart");
    let output = torchrun.output().expect("PA_TEST_TORCHRUN is a torchrun");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said} {}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("@averaged 3").count(), 3, "{said}");
    assert_eq!(said.matches("@failing").count(), 1, "{said}");
}

pub fn ranks_that_disagree_are_named_on_every_rank() {
    let world =
        |n| move |rank| if rank == 2 { vec![("PA_TEST_WORLD", format!("{n}"))] } else { vec![] };
    all_fail(
        start_all("meet", 3, world(4)),
        &["rank 2 has the world size \"4\", rank 0 has \"3\""],
    );
    let twice = |rank| if rank == 2 { vec![("PA_TEST_RANK", "1".to_owned())] } else { vec![] };
    all_fail(start_all("meet", 3, twice), &["two processes claim rank 1"]);
    let layout =
        |rank| if rank == 1 { vec![("PA_TEST_ELEMENTS", "999".to_owned())] } else { vec![] };
    all_fail(
        start_all("meet", 3, layout),
        &["rank 1 builds its averager with", "999", "rank 0 has", "1000"],
    );
    let options = |rank| if rank == 2 { vec![("PA_TEST_SLOTS", "8".to_owned())] } else { vec![] };
    all_fail(
        start_all("meet", 3, options),
        &["rank 2 builds its averager with slots = 8, rank 0 with slots = 4"],
    );
}

/// The error names rank 1 once.
pub fn a_rank_that_refuses_by_itself_is_named_on_every_rank() {
    let wrong = |rank| if rank == 1 { vec![("PA_TEST_SLOTS", "3".to_owned())] } else { vec![] };
    let mut ranks = start_all("meet", 3, wrong);
    for (rank, process) in ranks.iter_mut().enumerate() {
        assert_eq!(process.end(), Some(3), "{:#?}", process.output);
        let error = &process.said("error")[0];
        let begin = if rank == 1 {
            "rank 1: the option"
        } else {
            "rank 1 can't build its averager: the option"
        };
        assert!(error.starts_with(begin) && error.matches("rank 1").count() == 1, "{error}");
    }
}

pub fn ranks_that_do_not_come_are_named() {
    let soon = |_| vec![("PA_TEST_MEET_MS", "500".to_owned()), ("PA_TEST_WORLD", "5".to_owned())];
    let mut ranks = start_all("meet", 3, soon);
    ranks.iter_mut().for_each(|process| assert_eq!(process.end(), Some(3)));
    let errors: Vec<String> = ranks.iter().map(|process| process.said("error").remove(0)).collect();
    // A rank's own timeout may end before rank 0's, and a rank may come late or after rank 0 left.
    let is_of_rank_0 = |error: &String| error.contains("did not arrive within 500ms: ");
    let named: Vec<usize> =
        (0..5).filter(|rank| *rank > 2 || *rank > 0 && !is_of_rank_0(&errors[*rank])).collect();
    for (rank, error) in errors.iter().enumerate() {
        let Some((_, late)) = error.split_once("did not arrive within 500ms: ") else {
            let is_alone = error.contains("was not found") || error.contains("has left");
            assert!(rank > 0 && is_alone, "{error}");
            continue;
        };
        let late = late.split_once("; ").map_or(late, |(late, _)| late);
        let late: Vec<usize> = late.split(", ").map(|rank| rank.parse().unwrap()).collect();
        assert!(late.ends_with(&[3, 4]), "{error}");
        // A rank that was told rank 0's error had arrived.
        assert!(late.iter().all(|rank| named.contains(rank)), "{errors:#?}");
    }
    let late = |_| vec![("PA_TEST_MEET_MS", "300".to_owned()), ("PA_TEST_RANK", "1".to_owned())];
    all_fail(
        start_all("meet", 1, |rank| [late(rank), vec![("PA_TEST_WORLD", "2".to_owned())]].concat()),
        &["rank 0 of the world", "within 300ms"],
    );
}

/// A rank that runs out of file descriptors at any point reports it, and no rank hangs.
pub fn a_rank_may_have_too_few_file_descriptors() {
    for short in [0, 2] {
        let mut good = 0;
        for most in 4..40 {
            let limit = |rank| {
                if rank == short {
                    vec![("PA_TEST_FILES", most.to_string())]
                } else {
                    vec![]
                }
            };
            // The others wait for that long where rank 0 cannot report to them, see below.
            let is_silent = short == 0 && most < 6;
            let timeout = if is_silent { "2000" } else { "20000" };
            let soon = |rank| [limit(rank), vec![("PA_TEST_MEET_MS", timeout.to_owned())]].concat();
            let mut ranks = start_all("meet", 3, soon);
            let codes: Vec<_> = ranks.iter_mut().map(|rank| rank.end()).collect();
            let outputs: Vec<_> = ranks.iter().map(|rank| rank.output.clone()).collect();
            if codes.iter().all(|&code| code == Some(0)) {
                good += 1;
                continue;
            }
            assert!(codes.iter().all(|&code| code == Some(3)), "{most}: {codes:?} {outputs:#?}");
            let why = ranks[short].said("error");
            let is_named = ["ulimit -n", "open files"].iter().any(|what| why[0].contains(what));
            assert!(is_named, "{most}: {outputs:#?}");
            // Rank 0 needs a socket to listen on, one to answer on, and one more for what comes
            // with a hello: without these it cannot report to the others, which wait until their
            // timeout.
            let names = |rank: &RankProcess| {
                let error = &rank.said("error")[0];
                error.contains("ulimit -n") && error.contains(&format!("rank {short} "))
            };
            assert!(ranks.iter().all(names) || is_silent, "{most}: {outputs:#?}");
        }
        assert!(good > 0 && good < 36, "{good} of 36");
    }
}

/// Many connections that send nothing, half a message, or garbage neither delay ranks nor become
/// peers.
pub fn foreign_connections_are_not_waited_for() {
    let name = name();
    let variables = |rank: usize| {
        vec![
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
        ]
    };
    let mut host = start("meet", &variables(0));
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut connections = vec![];
    // The name follows the user id, which another namespace may map to another number.
    let socket = loop {
        let known = std::fs::read_to_string("/proc/net/unix").unwrap();
        let is_it = |path: &&str| {
            path.starts_with("@param-averager/") && path.ends_with(&format!("/{name}"))
        };
        if let Some(path) = known.split_whitespace().find(is_it) {
            break path[1..].to_owned();
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    };
    let address = SocketAddr::from_abstract_name(socket).unwrap();
    while connections.len() < 300 {
        match UnixStream::connect_addr(&address) {
            Ok(mut stream) => {
                let said: &[u8] = match connections.len() % 4 {
                    0 => b"",
                    1 => b"PAVG",
                    2 => b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    _ => b"PAVG\x07\x00\x01\x00\0\0\0\0\0\0\0\0\x02\0\0\0{}",
                };
                let _ = stream.write_all(said);
                connections.push(stream);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
        assert!(Instant::now() < deadline);
    }
    let mut other = start("meet", &variables(1));
    assert_eq!(
        (host.end(), other.end()),
        (Some(0), Some(0)),
        "{:#?} {:#?}",
        host.output,
        other.output
    );
}

/// The longest and the shortest timeout that a caller can give.
pub fn timeouts_of_any_length_work() {
    let most = ("PA_TEST_MEET_MS", u64::MAX.to_string());
    let name = name();
    let first = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".into()),
            ("PA_TEST_NAME", name.clone()),
        ];
        start("survive", &[&variables[..], &[most.clone(), ("PA_TEST_FINAL", "3".into())]].concat())
    };
    let mut ranks = vec![first(0), first(1)];
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let late = [
        ("PA_TEST_JOIN", "1".into()),
        ("PA_TEST_ORIGIN", "2".into()),
        ("PA_TEST_NAME", name.clone()),
    ];
    ranks.push(start(
        "survive",
        &[&late[..], &[most.clone(), ("PA_TEST_FINAL", "3".into())]].concat(),
    ));
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    let least = ("PA_TEST_MEET_MS", "0".to_owned());
    // A rank may find the other listening, and then see it leave.
    for rank in &mut start_all("meet", 2, |_| vec![least.clone()]) {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        assert!(error.contains("within 0ns") || error.contains("has left the world"), "{error}");
    }
    all_fail(vec![start("meet", &[&late[..], &[least]].concat())], &["within 0ns"]);
}
