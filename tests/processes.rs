//! Ranks that are processes: they find one another, average, and go on when one of them is killed
//! or stopped.
//!
//! Every rank is this very test program, run with `PA_TEST_ROLE`; see `worker`.
#![cfg(target_os = "linux")]

#[path = "processes/admissions.rs"]
mod admissions;
mod common;
#[path = "processes/crew.rs"]
mod crew;
#[path = "processes/deaths.rs"]
mod deaths;
#[path = "processes/forks.rs"]
mod forks;
#[path = "processes/jobs.rs"]
mod jobs;
#[path = "processes/joins.rs"]
mod joins;
#[path = "processes/launchers.rs"]
mod launchers;
#[path = "processes/limited.rs"]
mod limited;
#[path = "processes/limits.rs"]
mod limits;
#[path = "processes/meeting.rs"]
mod meeting;
#[path = "processes/model.rs"]
mod model;
#[path = "processes/namespaces.rs"]
mod namespaces;
#[path = "processes/pairs.rs"]
mod pairs;
#[path = "processes/roles.rs"]
mod roles;
#[path = "processes/stops.rs"]
mod stops;
#[path = "processes/worker.rs"]
mod worker;

const WORKER: &str = "worker";

/// Not a test by itself: what a rank does, in a process of its own.
#[test]
fn worker() {
    match std::env::var("PA_TEST_ROLE").as_deref() {
        Ok("limited") => std::process::exit(limited::limited()),
        Ok("limited_threads") => std::process::exit(limited::limited_threads()),
        Ok("copies") => std::process::exit(admissions::copies()),
        Ok("lets_in") => std::process::exit(admissions::lets_in()),
        Ok("joins_only") => std::process::exit(admissions::joins_only()),
        Ok(role) => worker::run(role),
        Err(_) => {}
    }
}
