//! An average of a candle model of 120 MB through `VarParams`, beside one of bare slices of the
//! same sizes, in turn: `cargo bench -p param-averager-candle`. `cargo test` makes some turns of a
//! small model.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Var};
use candle_nn::{linear, VarBuilder, VarMap};
use param_averager::{Communicator, Lend, LendError, Loan, ParamAverager};
use param_averager_candle::VarParams;

const RANKS: usize = 2;
const LAYERS: usize = 30;
const WORLDS: usize = 20;

struct Turn {
    adapter_ms: f64,
    slices_ms: f64,
    /// Microseconds of `VarParams` beside the average: checks, locks, and what they lend.
    outside_us: f64,
}

fn main() {
    let is_test = std::env::args().all(|argument| argument != "--bench"); // as criterion does
    let (width, turns) = if is_test { (10, 1) } else { (1000, 41) };
    // Models in other memory each time: the place decides as much as the code.
    let found: Vec<Turn> = (0..WORLDS).flat_map(|_| measure(width, turns)).collect();

    let sorted = |value: &dyn Fn(&Turn) -> f64| {
        let mut values: Vec<f64> = found.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let (adapter, slices) = (sorted(&|turn| turn.adapter_ms), sorted(&|turn| turn.slices_ms));
    let outside = sorted(&|turn| turn.outside_us);
    let ratio = sorted(&|turn| turn.adapter_ms / turn.slices_ms);
    let bytes = LAYERS * (width * width + width) * 4;
    let middle = found.len() / 2;
    println!(
        "{RANKS} ranks, {LAYERS} layers, {:.1} MB, {WORLDS} times {turns} turns, medians: \
         VarParams {:.3} ms (least {:.3}), slices {:.3} ms (least {:.3}); median ratio of a turn \
         {:.3}; the loan takes {:.1} us beside its average",
        bytes as f64 / 1e6,
        adapter[middle],
        adapter[0],
        slices[middle],
        slices[0],
        ratio[middle],
        outside[middle],
    );
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
    let copy = |var: &Var| var.flatten_all().and_then(|it| it.to_vec1::<f32>()).expect("floats");
    let copies = params.iter().map(|(name, var)| (name.to_owned(), copy(var)));
    let mut slices: BTreeMap<String, Vec<f32>> = copies.collect();
    let mut adapter = ParamAverager::builder(for_adapter).build(&mut params).expect("averager");
    let mut bare = ParamAverager::builder(for_slices).build(&mut slices).expect("averager");

    let mut found = vec![];
    for turn in 0..=turns {
        // Each goes first in every other turn.
        let before = (turn % 2 == 0).then(|| time(&mut bare, &mut slices, barrier));
        let (adapter_ms, outside_us) = time(&mut adapter, &mut params, barrier);
        let after = || time(&mut bare, &mut slices, barrier);
        let (slices_ms, _) = before.unwrap_or_else(after);
        if turn > 0 {
            found.push(Turn { adapter_ms, slices_ms, outside_us });
        }
    }
    found
}

/// Milliseconds of all ranks, and microseconds of this rank's loan beside its average.
fn time(averager: &mut ParamAverager, params: &mut impl Lend, barrier: &Barrier) -> (f64, f64) {
    let mut own = Duration::ZERO;
    let mut timed = Timed(params, &mut own);
    barrier.wait();
    let start = Instant::now();
    averager.average(&mut timed).expect("an average");
    let call = start.elapsed();
    barrier.wait();
    (start.elapsed().as_secs_f64() * 1e3, call.saturating_sub(own).as_secs_f64() * 1e6)
}

/// A model, with the time that its average took without the loan.
struct Timed<'p, P>(&'p mut P, &'p mut Duration);

impl<P: Lend> Lend for Timed<'_, P> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        let Timed(params, own) = self;
        params.lend(&mut |loan| {
            let start = Instant::now();
            average(loan);
            **own = start.elapsed();
        })
    }
}
