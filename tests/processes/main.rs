//! Ranks that are processes: they find one another, average, and go on when one of them is killed
//! or stopped.
//!
//! Every rank is this very test program, run with `PA_TEST_ROLE`; see `worker`.
#![cfg(target_os = "linux")]

mod admissions;
#[path = "../common/mod.rs"]
mod common;
mod crew;
mod deaths;
mod forks;
mod jobs;
mod joins;
mod launchers;
mod limited;
mod limits;
mod meeting;
mod model;
mod namespaces;
mod pairs;
mod roles;
mod stops;
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
