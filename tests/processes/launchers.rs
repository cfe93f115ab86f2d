//! Environment variables of launchers: each rank meets, or fails within seconds with what to set.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use test_support::process::{command, name, spawn, start, start_all, RankProcess};
use test_support::Skip;

fn said(variables: &[(&str, &str)]) -> RankProcess {
    let variables: Vec<_> =
        variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    let mut rank = start("launched", &variables);
    assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    rank
}

pub fn slurm_shell_is_no_rank() {
    let sbatch = [("SLURM_PROCID", "0"), ("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "2")];
    let pty = [
        ("SLURM_PROCID", "0"),
        ("SLURM_JOB_ID", "7"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "1"),
        ("SLURM_PTY_PORT", "4711"),
    ];
    for variables in [&sbatch[..], &pty] {
        let rank = said(variables);
        assert_eq!(rank.said("is_launched"), ["false"]);
        assert!(
            rank.said("error")[0].contains("a Slurm shell and not a rank"),
            "{:?}",
            rank.output
        );
    }
    assert_eq!(said(&[]).said("is_launched"), ["false"]);
    // Neither a rank nor alone: an error, in the place of training alone.
    let half = said(&[("WORLD_SIZE", "2"), ("MASTER_PORT", "1")]);
    assert_eq!(half.said("is_launched"), ["true"]);
    assert!(half.said("error")[0].contains("WORLD_SIZE is set, but RANK is not"));
    assert_eq!(said(&[("RANK", "0"), ("WORLD_SIZE", "1")]).said("is_launched"), ["true"]);
}

pub fn environment_errors_are_reported_at_once() {
    let rank = said(&[("RANK", "0"), ("WORLD_SIZE", "17"), ("MASTER_PORT", "1")]);
    assert!(
        rank.said("error")[0].contains("WORLD_SIZE is 17: a world has 1 to 16 ranks"),
        "{:?}",
        rank.output
    );
    let two = [("RANK", "0"), ("WORLD_SIZE", "2")];
    let agents = [
        &two[..],
        &[("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "192.0.2.1"), ("MASTER_PORT", "1")],
    ]
    .concat();
    assert!(said(&agents).said("error")[0].contains("set MASTER_ADDR to localhost"));
    // Bytes that are not UTF-8, for each variable that is read.
    for variable in ["RANK", "WORLD_SIZE", "MASTER_PORT", "PARAM_AVERAGER_RENDEZVOUS"] {
        let mut command =
            command(&[], "launched", &[("RANK", "0".into()), ("WORLD_SIZE", "2".into())]);
        command.env("MASTER_PORT", "1").env(variable, OsString::from_vec(b"0\xff".into()));
        let mut rank = spawn(command);
        assert_eq!(rank.end(), Some(0));
        let error = &rank.said("error")[0];
        assert!(
            error.starts_with(&format!("{variable} is")) && error.contains("not UTF-8"),
            "{error}"
        );
    }
}

pub fn one_rank_alone_needs_no_port() {
    for _ in 0..2 {
        let variables = [("RANK", "0".to_owned()), ("WORLD_SIZE", "1".to_owned())];
        let mut ranks = [start("meet", &variables), start("meet", &variables)];
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("averaged"), ["1"]);
        }
    }
}

pub fn agents_of_torchrun_on_one_host_meet() {
    let by_name = name();
    for more in [("MASTER_ADDR", "127.0.0.1"), ("PARAM_AVERAGER_RENDEZVOUS", by_name.as_str())] {
        let port = name();
        let rank = |rank: usize| {
            let variables = [
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", "4".into()),
                ("LOCAL_WORLD_SIZE", "2".into()),
                ("MASTER_PORT", port.clone()),
                ("TORCHELASTIC_RUN_ID", "run".into()),
                ("TORCHELASTIC_RESTART_COUNT", "0".into()),
                (more.0, more.1.into()),
            ];
            start("meet", &variables)
        };
        for mut rank in (0..4).map(rank).collect::<Vec<_>>() {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        }
    }
}

/// A wrapper script between the process manager and each rank; the manager is found by its
/// program's name.
pub fn ranks_of_mpich_meet_through_wrappers() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name());
    std::fs::create_dir_all(&folder).unwrap();
    let own = std::env::current_exe().unwrap();
    for (proxy, meets) in [("hydra_pmi_proxy", true), ("pmi_proxy", true), ("another", false)] {
        let script = folder.join(proxy);
        let rank = format!("sh -c '{} rank; exit $?'", own.display());
        let ranks = format!(
            "#!/bin/sh\nfor r in 0 1; do PMI_RANK=$r PMI_SIZE=2 MPI_LOCALNRANKS=2 {rank} & \
             done\nwait\n"
        );
        std::fs::write(&script, ranks).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = std::process::Command::new(&script);
        command
            .env("PA_TEST_ROLE", "meet")
            .env("PA_TEST_MEET_MS", if meets { "20000" } else { "500" });
        let mut manager = spawn(command);
        assert_eq!(manager.end(), Some(0));
        if meets {
            assert_eq!(manager.said("averaged"), ["2", "2"], "{proxy}: {:#?}", manager.output);
            continue;
        }
        // Each wrapper is taken for the manager; the timeout names the source of the name.
        assert_eq!(manager.said("error").len(), 2, "{:#?}", manager.output);
        let says_so =
            |error: &String| error.contains("made from the process that has started this one");
        assert!(manager.said("error").iter().all(says_so), "{:#?}", manager.output);
    }
    std::fs::remove_dir_all(folder).unwrap();
}

pub fn waiting_rank_says_for_what_and_what_to_set() {
    let port = name();
    let rank = |rank: usize| {
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "3".to_owned()),
            ("MASTER_PORT", port.clone()),
            ("PA_TEST_MEET_MS", "17000".to_owned()),
        ];
        start("meet", &variables)
    };
    let mut alone = start(
        "meet",
        &[
            ("RANK", "1".into()),
            ("WORLD_SIZE", "2".into()),
            ("MASTER_PORT", name()),
            ("PA_TEST_MEET_MS", "17000".into()),
        ],
    );
    let mut ranks = [rank(0), rank(1)];
    for (rank, waits) in [(0, "rank 0 of 3 waits for ranks 2"), (1, "rank 1 of 3 waits for rank 0")]
    {
        assert_eq!(ranks[rank].end(), Some(3));
        let notices = ranks[rank].said("stderr: param-averager: after 10s,");
        assert!(notices.len() == 1 && notices[0].starts_with(waits), "{notices:?}");
        assert!(
            notices[0].contains("made from MASTER_PORT")
                && notices[0].contains("set PARAM_AVERAGER_RENDEZVOUS")
        );
    }
    assert_eq!(alone.end(), Some(3));
    assert_eq!(alone.said("stderr: param-averager: after 10s,").len(), 1, "{:#?}", alone.output);
}

pub fn names_have_a_maximum_length() {
    for (bytes, is_right) in [(1024, true), (1025, false), (100_000, false)] {
        // Control characters take the most space in a message.
        let mut name = name();
        name += &"\u{1}".repeat(bytes - name.len());
        let begin = Instant::now();
        let mut ranks = start_all("meet", 2, |_| vec![("PA_TEST_NAME", name.clone())]);
        if !is_right {
            ranks.push(start(
                "hold",
                &[("PA_TEST_JOIN", "1".into()), ("PA_TEST_NAME", name.clone())],
            ));
        }
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(if is_right { 0 } else { 3 }), "{:#?}", rank.output);
            assert!(
                is_right
                    || rank.said("error")[0]
                        .contains(&format!("has {bytes} bytes, but the limit is 1024"))
            );
        }
        assert!(begin.elapsed() < Duration::from_secs(19), "{:?}", begin.elapsed());
    }
}

/// A user of this test alone: limits count all threads of a user.
const USER: u32 = 54_323;

/// Skips where this program can't run as another user.
pub fn another_user() -> Skip {
    if !rustix::process::getuid().is_root() {
        return Some("only root can run a process as another user".to_owned());
    }
    let own = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new(own);
    let runs = command.arg("--list").uid(USER).stdout(Stdio::null()).status().is_ok();
    (!runs).then(|| "other users can't run programs in this folder".to_owned())
}

/// A user that may start no more threads: all ranks fail at once.
pub fn rank_0_without_threads_says_so() {
    let name = name();
    let rank = |rank: usize, more: &[(&str, String)]| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".into()),
            ("PA_TEST_NAME", name.clone()),
        ];
        let mut command = command(&[], "hold", &[&variables[..], more].concat());
        command.uid(USER);
        spawn(command)
    };
    // One more thread than the process has: the listener.
    let mut first = rank(0, &[("PA_TEST_MORE_THREADS", "1".into())]);
    first.wait_for("limited");
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    let mut second = rank(1, &[]);
    for rank in [&mut first, &mut second] {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        assert!(error.contains("can't start a thread") && error.contains("ulimit -u"), "{error}");
    }
    assert!(begin.elapsed() < Duration::from_secs(19), "{:?}", begin.elapsed());
}
