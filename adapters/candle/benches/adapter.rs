//! An average of a candle model of 120 MB through `VarParams`, beside one of bare slices of the
//! same sizes, in turn: `cargo bench -p param-averager-candle`, `-- --json FILE` writes the times.
//! `cargo test` makes one turn of a small model.

use std::sync::Barrier;
use std::time::Instant;

use candle_core::{DType, Device};
use candle_nn::{linear, VarBuilder, VarMap};
use param_averager::{Communicator, Lend, ParamAverager};
use param_averager_candle::VarParams;
use serde::Serialize;

const RANKS: usize = 2;
const LAYERS: usize = 30;

#[derive(Serialize)]
struct Turn {
    adapter_ms: f64,
    slices_ms: f64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let is_test = !arguments.iter().any(|argument| argument == "--bench"); // as criterion does
    let json = arguments.iter().position(|argument| argument == "--json");
    let (width, turns) = if is_test { (10, 1) } else { (1000, 41) };
    let found = measure(width, turns);

    let median = |value: &dyn Fn(&Turn) -> f64| {
        let mut values: Vec<f64> = found.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let bytes = LAYERS * (width * width + width) * 4;
    println!(
        "{RANKS} ranks, {LAYERS} layers, {:.1} MB, medians of {turns} turns: VarParams {:.3} ms, \
         slices {:.3} ms; median ratio of a turn {:.3}",
        bytes as f64 / 1e6,
        median(&|turn| turn.adapter_ms),
        median(&|turn| turn.slices_ms),
        median(&|turn| turn.adapter_ms / turn.slices_ms),
    );
    if let Some(at) = json {
        let file = std::fs::File::create(&arguments[at + 1]).expect("a path that can be written");
        serde_json::to_writer_pretty(file, &found).expect("a file that can be written");
    }
}

/// Times of both kinds in turn, from the moment that all ranks begin until the slowest is done.
fn measure(width: usize, turns: usize) -> Vec<Turn> {
    let devices = [param_averager::Device::cpu(); RANKS];
    let world = || Communicator::from_devices(&devices).expect("ranks");
    let barrier = Barrier::new(RANKS);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = world()
            .into_iter()
            .zip(world())
            .map(|pair| scope.spawn(|| rank(pair, width, turns, &barrier)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank panicked")).next().expect("rank 0")
    })
}

fn rank(
    (for_adapter, for_slices): (Communicator, Communicator),
    width: usize,
    turns: usize,
    barrier: &Barrier,
) -> Vec<Turn> {
    let varmap = VarMap::new();
    let vars = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    for layer in 0..LAYERS {
        linear(width, width, vars.pp(format!("layer{layer}"))).expect("variables");
    }
    let mut params = VarParams::new(&varmap).expect("variables");
    let sizes = params.iter().map(|(name, var)| (name.to_owned(), vec![0.0f32; var.elem_count()]));
    let mut slices: std::collections::BTreeMap<String, Vec<f32>> = sizes.collect();
    let mut adapter = ParamAverager::builder(for_adapter).build(&mut params).expect("averager");
    let mut bare = ParamAverager::builder(for_slices).build(&mut slices).expect("averager");

    let mut found = vec![];
    for turn in 0..=turns {
        let adapter_ms = time(&mut adapter, &mut params, barrier);
        let slices_ms = time(&mut bare, &mut slices, barrier);
        if turn > 0 {
            found.push(Turn { adapter_ms, slices_ms });
        }
    }
    found
}

fn time(averager: &mut ParamAverager, params: &mut impl Lend, barrier: &Barrier) -> f64 {
    barrier.wait();
    let start = Instant::now();
    averager.average(params).expect("an average");
    barrier.wait();
    start.elapsed().as_secs_f64() * 1e3
}
