//! Roles of ranks that are processes, on CPUs and on devices.

mod coded;
mod model;
mod outer;
mod pairs;
mod roles;
mod survive;
mod worker;

pub use model::{bytes_used, Model, Tensors};
pub use worker::{builder, device, die, is_late, join, now_us, number, run, say, Used};
