//! The name of a world: held while the world lives, free for the next run when it ends.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::jobs::LINGER;
use test_support::count;
use test_support::note;
use test_support::process::{command, name, spawn, start, start_all};

/// Two runs of a shell loop with one port and two seeds, in the order in which ranks of the two
/// would pair up across the jobs.
pub fn a_second_job_of_one_port_is_refused_by_the_pid_that_holds_it() {
    let port = name();
    let rank = |rank: usize, job: usize| {
        let variables = [
            ("RANK", rank.to_string()),
            ("WORLD_SIZE", "2".to_owned()),
            ("MASTER_ADDR", "localhost".to_owned()),
            ("MASTER_PORT", port.clone()),
            ("PA_TEST_JOB", job.to_string()),
            ("PA_TEST_LINGER_MS", LINGER.to_owned()),
            ("PA_TEST_PATIENCE_MS", "200".to_owned()),
        ];
        let mut command = command(&[], "job", &variables);
        command.args(["--seed".into(), job.to_string()]);
        spawn(command)
    };
    let mut first = vec![rank(0, 1)];
    first[0].wait_for("notice 0: after 200ms, rank 0 of 2 waits for ranks 1"); // it has the name
    let mut second = vec![rank(0, 2), rank(1, 2)];
    // On most machines they are told so by a rank 0 that waits, else by one whose world has begun.
    std::thread::sleep(Duration::from_millis(500));
    first.push(rank(1, 1));
    for rank in &mut second {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        let holder = format!("process {} ", first[0].child.id());
        assert!(error.contains(&holder), "{error} does not name {holder}");
        let says = |what: &str| error.contains(what);
        assert!(says("its own MASTER_PORT or PARAM_AVERAGER_RENDEZVOUS"), "{error}");
        assert!(says("\"1\" and \"2\"") || says("\"2\" and \"1\""), "{error}");
    }
    for rank in &mut first {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("averaged"), ["1"]);
    }
}

/// A job that is started again while its former run still answers, as one that handles SIGTERM.
pub fn a_job_restarts_while_its_former_run_ends() {
    let name = name();
    let rank = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
        ];
        start("hold", &variables)
    };
    let mut former = [rank(0), rank(1)];
    former.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let mut next = [rank(0), rank(1)];
    std::thread::sleep(Duration::from_millis(300)); // they wait for the name, or come later
    former.iter().for_each(|rank| rank.signal(Signal::KILL));
    next.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    next.iter().for_each(|rank| rank.signal(Signal::KILL));
}

pub fn a_name_is_held_for_the_life_of_a_world() {
    let mut world = start_all("hold", 2, |_| vec![]);
    world.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let about = world[0].said("in")[0].clone();
    let held = about.split('"').nth(1).unwrap().to_owned();
    assert!(about.contains(&format!("process {} ", world[0].child.id())), "{about}");
    let rank = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".into()),
            ("PA_TEST_NAME", held.clone()),
            ("PA_TEST_MEET_MS", "60000".into()),
        ];
        start("hold", &variables)
    };
    for number in [0, 1] {
        let begin = Instant::now();
        let mut second = rank(number);
        assert_eq!(second.end(), Some(3));
        let error = &second.said("error")[0];
        let names = error.contains(&format!("process {} ", world[0].child.id()));
        assert!(names && error.contains("which began"), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    }
    // A stopped rank 0 holds the name, too.
    world[0].signal(Signal::STOP);
    let mut second = rank(0);
    assert_eq!(second.end(), Some(3));
    let error = &second.said("error")[0];
    let pid = format!("is held by process {}, which does not answer", world[0].child.id());
    assert!(error.contains(&pid), "{error}");
    assert!(
        world.iter_mut().all(|rank| rank.child.try_wait().unwrap().is_none()),
        "the world is untouched"
    );
}

/// A process that ends closes its sockets after it has freed its memory: the next rank 0 finds the
/// name taken, and no answer.
pub fn a_job_that_was_killed_restarts_at_once() {
    let restarts = count(1, 4);
    let name = name();
    let rank = |rank: usize, megabytes: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_MEGABYTES", megabytes.to_string()),
        ];
        start("hold", &variables)
    };
    let mut slowest = Duration::ZERO;
    for _ in 0..restarts {
        let mut large = [rank(0, 2000), rank(1, 0)];
        large.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        large.iter().for_each(|rank| rank.signal(Signal::KILL));
        let begin = Instant::now();
        // A job that is ready soon.
        let mut next = [rank(0, 0), rank(1, 0)];
        next.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        slowest = slowest.max(begin.elapsed());
        next.iter().for_each(|rank| rank.signal(Signal::KILL));
    }
    note!("{restarts} restarts at once, the slowest took {slowest:?}");
}
