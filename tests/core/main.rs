//! Averages of ranks that are threads on CPUs, through the public API.

mod accuracy;
mod average;
mod equal;
mod exchange;
mod extremes;
mod faults;
mod lend;
mod local_sgd;
mod names;
mod notices;
mod outer;
mod outer_failures;
mod outer_fixture;
mod outer_promises;
mod outer_reference;
mod outer_resume;
mod public_api;
mod refusals;
mod resume;
mod run;
mod schedules;
mod stage;
mod stage_vetoes;
mod start;
mod telemetry;
mod uneven;
