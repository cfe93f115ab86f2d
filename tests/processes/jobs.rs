//! Two jobs that use one name: they never mix, never hang, and the errors of each name the other.

use std::process::Command;
use std::time::{Duration, Instant};

use test_support::count;
use test_support::note;
use test_support::process::{command, name, spawn, start, RankProcess};

/// Maximum duration of a process from the start of the last job.
const SOON: Duration = Duration::from_secs(30);

/// Milliseconds for which a world lives after its average: a second job of its name waits for less
/// than that and is then refused, also if a busy machine has delayed it.
pub const LINGER: &str = "8000";

/// A shell that starts two ranks by `line`, in which $r is the rank, and waits for them.
fn shell(line: &str, port: &str, job: usize, more: &[(&str, String)]) -> Command {
    let own = std::env::current_exe().unwrap();
    let own = format!("{} rank", own.display());
    let loops = format!("for r in 0 1; do {} & done; wait", line.replace("TRAINER", &own));
    let mut sh = Command::new("sh");
    sh.args(["-c", &loops]).env("PA_TEST_ROLE", "job").env("PA_TEST_JOB", job.to_string());
    sh.env("WORLD_SIZE", "2").env("MASTER_ADDR", "localhost").env("MASTER_PORT", port);
    for (name, value) in more {
        sh.env(name, value);
    }
    sh
}

/// Runs two shells, the second started so much later. Returns how many ranks of each have averaged.
fn play(one: Command, other: Command, apart: Duration) -> [usize; 2] {
    let mut jobs = vec![spawn(one)];
    std::thread::sleep(apart);
    jobs.push(spawn(other));
    let begin = Instant::now();
    let mut averaged = [0; 2];
    for (job, shell) in jobs.iter_mut().enumerate() {
        assert_eq!(shell.end(), Some(0), "{:#?}", shell.output);
        let (good, errors) = (shell.said("averaged"), shell.said("error"));
        assert_eq!(good.len() + errors.len(), 2, "{:#?}", shell.output);
        for error in &errors {
            let names = error.matches("process ").count() >= 2;
            assert!(
                names && error.contains("claim")
                    || error.contains("seems to belong to another job"),
                "{error}"
            );
        }
        averaged[job] = good.len();
    }
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert!(averaged.iter().all(|count| [0, 2].contains(count)), "{averaged:?}");
    averaged
}

/// A script in which TRAINER is a rank.
fn script(text: &str, port: &str, job: usize) -> Command {
    let mut sh = shell("", port, job, &[]);
    let own = std::env::current_exe().unwrap();
    let own = format!("{} rank", own.display());
    let mut script = Command::new("sh");
    script.args(["-c", &text.replace("TRAINER", &own)]);
    for (name, value) in sh.get_envs() {
        script.env(name, value.unwrap());
    }
    sh.env_clear();
    script
}

/// Ways to start one job in which ranks have different parents, or look for them at different
/// times.
pub fn one_job_meets_however_its_ranks_are_started() {
    for text in [
        // The first looks before the second is there.
        "{ for r in 0 1; do RANK=$r TRAINER & sleep 0.4; done; wait; } | cat",
        // The wrapper does not have the variable.
        "timeout 60 env RANK=0 TRAINER & timeout 60 env RANK=1 TRAINER & wait",
        // The script itself has the variable of rank 0.
        "exec env RANK=0 sh -c 'for r in 0 1; do RANK=$r TRAINER & sleep 0.3; done; wait'",
        // A wrapper takes the rank from another launcher's variable.
        "for r in 0 1; do SLURM_PROCID=$r sh -c 'export RANK=$SLURM_PROCID; TRAINER; exit $?' & \
         done; wait",
        // Rank 0 is the process that has started rank 1.
        "RANK=1 TRAINER & export RANK=0; exec TRAINER",
        "for r in 0 1; do RANK=$r TRAINER 2>&1 | cat & done; wait",
    ] {
        let mut job = spawn(script(text, &name(), 7));
        assert_eq!(job.end(), Some(0), "{text}: {:#?}", job.output);
        assert_eq!(job.said("averaged"), ["7", "7"], "{text}: {:#?}", job.output);
    }
}

/// The first rank of one job and the second of another come first. Their shells have ended, or are
/// subshells of one.
pub fn jobs_of_ended_shells_and_of_one_shell_never_mix() {
    let ended = |job, first: f32, second: f32| {
        let text = format!(
            "(sleep {first}; RANK=0 exec TRAINER) & (sleep {second}; RANK=1 exec TRAINER) &"
        );
        let mut script = script(&text, "", job);
        // as a shell with job control does
        std::os::unix::process::CommandExt::process_group(&mut script, 0);
        script
    };
    for _ in 0..count(1, 3) {
        let port = name();
        let [mut one, mut other] = [ended(10, 0.2, 1.2), ended(20, 1.2, 0.5)];
        one.env("MASTER_PORT", &port);
        other.env("MASTER_PORT", &port);
        play(one, other, Duration::ZERO);
        let job = |job: usize, first: f32, second: f32| {
            format!(
                "(export PA_TEST_JOB={job}; (sleep {first}; RANK=0 exec timeout 60 TRAINER) & \
                 (sleep {second}; RANK=1 exec timeout 60 TRAINER) & wait)"
            )
        };
        let text = format!("{} & {} & wait", job(10, 0.0, 1.0), job(20, 1.0, 0.4));
        let mut both = spawn(script(&text, &name(), 7));
        assert_eq!(both.end(), Some(0), "{:#?}", both.output);
        let averaged = both.said("averaged");
        assert!(averaged.windows(2).all(|pair| pair[0] == pair[1]), "{:#?}", both.output);
        assert_eq!(averaged.len() + both.said("error").len(), 4, "{:#?}", both.output);
    }
}

/// The process that adopts the ranks of ended shells is in their session, as pid 1 of a container
/// may be: only process groups distinguish the jobs.
pub fn jobs_of_ended_shells_never_mix_where_a_process_of_their_session_adopts_them() {
    let port = name();
    let ended = |job: usize, first: f32, second: f32| {
        format!(
            "(export PA_TEST_JOB={job}; (sleep {first}; RANK=0 exec TRAINER) & \
             (sleep {second}; RANK=1 exec TRAINER) &) &"
        )
    };
    // With job control, each line has a process group of its own. dash has that with a terminal
    // only.
    let [one, other] = [ended(10, 0.2, 1.2), ended(20, 1.2, 0.5)];
    let text = format!("exec bash -c 'set -m; {one} {other} wait; exec sleep 4'");
    let mut adopter = script(&text, &port, 7);
    let adopts = || {
        rustix::process::setsid()?;
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(())
    };
    // SAFETY: two system calls.
    unsafe { std::os::unix::process::CommandExt::pre_exec(&mut adopter, adopts) };
    let mut both = spawn(adopter);
    assert_eq!(both.end(), Some(0), "{:#?}", both.output);
    let averaged = both.said("averaged");
    assert!(averaged.windows(2).all(|pair| pair[0] == pair[1]), "{:#?}", both.output);
    assert_eq!(averaged.len() + both.said("error").len(), 4, "{:#?}", both.output);
}

/// Shell loops, subshells and wrappers for each rank.
const LINES: [&str; 4] = [
    "RANK=$r TRAINER",
    "(true; RANK=$r TRAINER; true)",
    "RANK=$r timeout 60 TRAINER",
    "RANK=$r sh -c 'TRAINER; exit $?'",
];

pub fn shell_loops_meet_by_themselves() {
    for line in LINES {
        let mut shell = spawn(shell(line, &name(), 7, &[]));
        assert_eq!(shell.end(), Some(0));
        assert_eq!(shell.said("averaged"), ["7", "7"], "{line}: {:#?}", shell.output);
    }
}

/// The loop ends before its ranks meet, so that their parent is another process.
pub fn ranks_of_an_ended_shell_meet() {
    let own = std::env::current_exe().unwrap();
    let own = format!("{} rank", own.display());
    for late in [0, 1] {
        let line =
            format!("for r in 0 1; do (test $r = {late} && sleep 0.3; RANK=$r exec {own}) & done");
        let mut sh = Command::new("sh");
        sh.args(["-c", &line]).env("PA_TEST_ROLE", "job").env("PA_TEST_JOB", "7");
        sh.env("WORLD_SIZE", "2").env("MASTER_PORT", name());
        let mut shell = spawn(sh);
        assert_eq!(shell.end(), Some(0));
        assert_eq!(shell.said("averaged"), ["7", "7"], "{:#?}", shell.output);
    }
}

pub fn jobs_with_one_name_never_mix() {
    let pairs = count(3, 12);
    let (mut both, mut one, mut neither) = (0, 0, 0);
    for pair in 0..pairs {
        let (port, line) = (name(), LINES[pair % LINES.len()]);
        let linger = [("PA_TEST_LINGER_MS", (pair % 3 * 200).to_string())];
        let job = |job| shell(line, &port, job, &linger);
        match play(job(10), job(20), Duration::from_millis((pair % 5) as u64 * 3)) {
            [2, 2] => both += 1, // one after the other
            [0, 0] => neither += 1,
            _ => one += 1,
        }
    }
    note!("{pairs} pairs: in {both} both jobs ran, in {one} one did, in {neither} none; 0 mixed");
    assert!(one + both > 0, "no job has formed its world");
}

/// Rank 1 of the first job and rank 0 of the second are late; rank 1 of the second arrives in
/// between. On a busy machine the order may be another one, by which another job runs, or none.
pub fn an_early_rank_of_another_job_takes_no_place() {
    let (tries, runs) = (8 * count(1, 3), count(1, 3));
    let mut in_order = 0;
    for _ in 0..tries {
        let port = name();
        let job = |job: usize, late: usize| {
            let line = format!("(test $r = {late} && sleep 0.5; RANK=$r TRAINER; true)");
            shell(&line, &port, job, &[("PA_TEST_LINGER_MS", LINGER.to_owned())])
        };
        in_order += usize::from(play(job(10, 1), job(20, 0), Duration::from_millis(50)) == [2, 0]);
        if in_order == runs {
            return;
        }
    }
    panic!("the first job ran {in_order} times in {tries}");
}

/// Jobs of a sweep, started by one script, differ in an argument.
pub fn jobs_of_one_process_are_distinguished_by_their_arguments() {
    for _ in 0..count(1, 3) {
        let port = name();
        let rank = |rank: usize, job: usize| {
            let variables = [
                ("RANK", rank.to_string()),
                ("WORLD_SIZE", "2".to_owned()),
                ("MASTER_PORT", port.clone()),
                ("PA_TEST_JOB", job.to_string()),
                ("PA_TEST_LINGER_MS", LINGER.to_owned()),
            ];
            let mut command = command(&[], "job", &variables);
            command.args([format!("rank-{rank}"), format!("lr-0.{job}")]);
            spawn(command)
        };
        let mut ranks = [rank(0, 1), rank(1, 2), rank(1, 1), rank(0, 2)];
        let codes: Vec<_> = ranks.iter_mut().map(RankProcess::end).collect();
        assert_eq!((codes[0], codes[1]), (codes[2], codes[3]), "{codes:?}");
        let errors: Vec<String> = ranks.iter().flat_map(|rank| rank.said("error")).collect();
        let outputs: Vec<_> = ranks.iter().map(|rank| &rank.output).collect();
        // On a busy machine both, one after the other.
        assert!(codes.contains(&Some(0)), "{codes:?} {outputs:#?}");
        for error in errors {
            let is_named = error.contains("\"lr-0.1\" and \"lr-0.2\"")
                || error.contains("\"lr-0.2\" and \"lr-0.1\"");
            assert!(is_named && error.contains("PARAM_AVERAGER_RENDEZVOUS"), "{error}");
        }
    }
}

/// Jobs that nothing distinguishes: the second process of a rank fails both meetings.
pub fn duplicate_rank_fails_the_rendezvous_on_every_rank() {
    for twice in [0, 1] {
        let numbers = [0, 1, twice];
        let name = name();
        let rank = |rank: &usize| {
            let variables = [
                ("PA_TEST_RANK", rank.to_string()),
                ("PA_TEST_WORLD", "3".into()),
                ("PA_TEST_NAME", name.clone()),
            ];
            start("hold", &variables)
        };
        let begin = Instant::now();
        let mut ranks: Vec<RankProcess> = numbers.iter().map(rank).collect();
        let pids: Vec<String> =
            ranks.iter().map(|rank| format!("process {} ", rank.child.id())).collect();
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
            let error = &rank.said("error")[0];
            let both = [twice, 2].iter().all(|&at| error.contains(&pids[at]));
            assert!(
                both && error.contains(&format!("two processes claim rank {twice}")),
                "{error}"
            );
        }
        assert!(begin.elapsed() < SOON);
    }
}

pub fn job_names_distinguish_jobs() {
    let name = name();
    let rank = |rank: usize, job: &str| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_JOB", "1".into()),
            ("PA_TEST_JOB_NAME", job.to_owned()),
        ];
        start("job", &variables)
    };
    let mut ranks = [rank(0, "a"), rank(1, "b")];
    for process in &mut ranks {
        assert_eq!(process.end(), Some(3), "{:#?}", process.output);
        let error = &process.said("error")[0];
        assert!(
            error.contains("of job \"a\" and of job \"b\"")
                && error.contains("CommunicatorBuilder::job"),
            "{error}"
        );
    }
    // Ranks that are started by two processes, with other arguments, are one job if the program
    // says so.
    let own = std::env::current_exe().unwrap();
    let start = |rank: usize| {
        let line = format!("{} rank x{}; exit $?", own.display(), rank + 5);
        let mut sh = Command::new("sh");
        sh.args(["-c", &line])
            .env("PA_TEST_ROLE", "job")
            .env("PA_TEST_JOB", "1")
            .env("PA_TEST_JOB_NAME", "c");
        sh.env("PA_TEST_RANK", rank.to_string())
            .env("PA_TEST_WORLD", "2")
            .env("PA_TEST_NAME", &name);
        spawn(sh)
    };
    for mut shell in [start(0), start(1)] {
        assert_eq!(shell.end(), Some(0), "{:#?}", shell.output);
    }
}
