//! Averages of burn modules between ranks that are threads.

mod average;
mod digits;
mod errors;
mod model;
mod no_copy;
