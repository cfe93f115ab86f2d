//! Averages of candle's variables between ranks that are threads, on CPUs.

use std::sync::mpsc::channel;
use std::time::Duration;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor, Var};
use candle_nn::{linear_no_bias, Init, VarBuilder, VarMap};
use param_averager::{
    Communicator, Error, Lend, LendError, Loan, LocalSgd, ParamAverager, Result, Schedule, Start,
    TensorState,
};
use param_averager_candle::VarParams;

/// Results of a world's ranks.
fn ranks<T: Send>(count: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let world = Communicator::from_devices(&vec![param_averager::Device::cpu(); count]).unwrap();
    std::thread::scope(|scope| {
        let rank = &rank;
        let threads: Vec<_> =
            world.into_iter().map(|communicator| scope.spawn(move || rank(communicator))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Averager of ranks that keep their own values at the start, so that a mean can be seen.
fn build(communicator: Communicator, params: &mut impl Lend) -> Result<ParamAverager> {
    let builder = ParamAverager::builder(communicator).start_from(Start::Own);
    builder.timeout(Duration::from_secs(60)).build(params)
}

fn var(values: &[f64], dtype: DType) -> Var {
    let values = Tensor::new(values, &Device::Cpu).unwrap();
    Var::from_tensor(&values.to_dtype(dtype).unwrap()).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn params<const N: usize>(vars: [(&str, Var); N]) -> VarParams {
    VarParams::from_vars(vars.map(|(name, var)| (name.to_owned(), var))).unwrap()
}

/// Address of a variable's elements.
fn address(var: &Var) -> usize {
    match &*var.storage_and_layout().0 {
        Storage::Cpu(CpuStorage::F32(values)) => values.as_ptr().addr(),
        _ => panic!("no f32 on a CPU"),
    }
}

#[test]
fn every_dtype_becomes_the_mean_in_place() {
    let dtypes = [DType::F32, DType::F64, DType::F16, DType::BF16];
    for count in [2, 4] {
        let found = ranks(count, |communicator| {
            let rank = communicator.rank() as f64;
            let vars = dtypes.map(|dtype| var(&[rank, 8.0, 4.0 * rank], dtype));
            let scalar = Var::new(rank as f32, &Device::Cpu).unwrap();
            let none = Var::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
            let shown = vars[0].as_tensor().clone(); // what a model holds
            let names = ["f32", "f64", "f16", "bf16"].map(str::to_owned);
            let named = names.into_iter().zip(vars.clone());
            let rest = [("scalar".to_owned(), scalar.clone()), ("none".to_owned(), none)];
            let mut params = VarParams::from_vars(named.chain(rest)).unwrap();
            let before = address(&vars[0]);
            let report = build(communicator, &mut params).unwrap().average(&mut params).unwrap();
            assert_eq!(report.bytes, 3 * (4 + 8 + 2 + 2) + 4);
            assert_eq!(address(&vars[0]), before, "candle's own memory has the mean");
            assert_eq!(values(&shown), values(&vars[0]));
            (vars.map(|var| values(&var)), values(&scalar))
        });
        let mean = (count - 1) as f64 / 2.0;
        for (vars, scalar) in found {
            assert_eq!(vars, dtypes.map(|_| vec![mean, 8.0, 4.0 * mean]), "{count} ranks");
            assert_eq!(scalar, [mean]);
        }
    }
}

/// First program of a user. Layers of one size in the order of a HashMap, which is another one on
/// every rank, used to be averaged with each other.
#[test]
fn layers_of_one_size_keep_their_places_in_20_of_20_runs() {
    for _run in 0..20 {
        let found = ranks(2, |communicator| {
            let varmap = VarMap::new();
            let builder = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
            let layers: Vec<_> = (0..4)
                .map(|layer| linear_no_bias(8, 8, builder.pp(format!("l{layer}"))).unwrap())
                .collect();
            // Layer i holds i on every rank, which every mean of the same layer is.
            for (name, var) in varmap.data().lock().unwrap().iter() {
                let layer: f32 = name[1..2].parse().unwrap();
                var.set(&Tensor::full(layer, (8, 8), &Device::Cpu).unwrap()).unwrap();
            }
            let mut params = VarParams::new(&varmap).unwrap();
            build(communicator, &mut params).unwrap().average(&mut params).unwrap();
            layers.iter().map(|layer| values(layer.weight())).collect::<Vec<_>>()
        });
        for layers in found {
            for (layer, values) in layers.iter().enumerate() {
                assert_eq!(values, &[layer as f64; 64]);
            }
        }
    }
}

/// candle's generator has no seed on CPUs, so every rank makes other weights.
#[test]
fn every_rank_begins_with_rank_0s_weights() {
    let found = ranks(4, |communicator| {
        let varmap = VarMap::new();
        let builder = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
        let layer = linear_no_bias(8, 8, builder).unwrap();
        let before = values(layer.weight());
        let mut params = VarParams::new(&varmap).unwrap();
        ParamAverager::builder(communicator).build(&mut params).unwrap();
        (before, values(layer.weight()))
    });
    for (rank, (before, after)) in found.iter().enumerate() {
        assert_eq!(after, &found[0].0);
        assert_eq!(before == after, rank == 0);
    }
}

#[test]
fn variables_are_sorted_by_name_and_filtered() {
    let varmap = VarMap::new();
    for name in ["head.bias", "block.2", "head.weight", "block.10"] {
        varmap.get(2, name, Init::Const(1.0), DType::F32, &Device::Cpu).unwrap();
    }
    let all = VarParams::new(&varmap).unwrap();
    let names: Vec<_> = all.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["block.10", "block.2", "head.bias", "head.weight"]);
    let head = all.clone().filter(|name, _| name.starts_with("head"));
    let names: Vec<_> = head.iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["head.bias", "head.weight"]);
    assert_eq!((all.len(), head.len(), head.is_empty()), (4, 2, false));
    assert!(head.filter(|_, _| false).is_empty());
}

#[test]
fn a_filtered_variable_stays_local() {
    let found = ranks(2, |communicator| {
        let rank = communicator.rank() as f64;
        let (shared, own) = (var(&[rank], DType::F32), var(&[rank], DType::F32));
        let vars = params([("shared", shared.clone()), ("own", own.clone())]);
        let mut vars = vars.filter(|name, _| name != "own");
        build(communicator, &mut vars).unwrap().average(&mut vars).unwrap();
        (values(&shared), values(&own))
    });
    assert_eq!(found, [(vec![0.5], vec![0.0]), (vec![0.5], vec![1.0])]);
}

#[test]
fn ranks_with_other_names_are_refused() {
    let errors = ranks(2, |communicator| {
        let name = ["q", "k"][communicator.rank()];
        build(communicator, &mut params([(name, var(&[1.0], DType::F32))])).unwrap_err()
    });
    for error in errors {
        assert!(matches!(error, Error::LayoutsDiffer { .. }), "{error}");
        assert!(error.to_string().contains('q') && error.to_string().contains('k'), "{error}");
    }
}

/// Variables that can't be lent, with what their error names.
type Refused = (VarParams, &'static [&'static str]);

fn refused() -> Vec<Refused> {
    let float = || var(&[1.0], DType::F32);
    let integer = Var::new(&[1u32], &Device::Cpu).unwrap();
    let tied = float();
    let (late, poisoned) = (VarMap::new(), VarMap::new());
    let cases: Vec<Refused> = vec![
        (params([("w", float()), ("steps", integer)]), &["`steps`", "u32", "filter"]),
        (params([("head", tied.clone()), ("wte", tied)]), &["`head`", "`wte`", "one storage"]),
        (params([("w", float()), ("w", float())]), &["`w`", "two variables"]),
        (params([]), &["no variables"]),
        (VarParams::new(&late).unwrap(), &["has 1 variables and had 0"]),
        (VarParams::new(&poisoned).unwrap(), &["poisoned"]),
    ];
    late.get(1, "late", Init::Const(1.0), DType::F32, &Device::Cpu).unwrap();
    poison(&poisoned);
    cases
}

fn poison(varmap: &VarMap) {
    std::thread::scope(|scope| {
        let holder = scope.spawn(|| {
            let _held = varmap.data().lock().unwrap();
            panic!("on purpose");
        });
        assert!(holder.join().is_err());
    });
}

#[test]
fn a_rank_that_cannot_lend_tells_all_ranks() {
    for case in 0..refused().len() {
        for count in [2, 4] {
            let errors = ranks(count, |communicator| {
                let rank = communicator.rank();
                let good = || params([("w", var(&[rank as f64], DType::F32))]);
                let bad = || refused().swap_remove(case).0;
                let mut first = if rank == 1 { bad() } else { good() };
                build(communicator, &mut first).unwrap_err()
            });
            expect(&errors, refused()[case].1);

            // The same once training goes on, and an average after it.
            let errors = ranks(count, |communicator| {
                let rank = communicator.rank();
                let own = var(&[rank as f64], DType::F32);
                let mut good = params([("w", own.clone())]);
                let averager = build(communicator, &mut good).unwrap();
                let mut sgd = LocalSgd::new(averager, Schedule::every(1));
                let mut bad = refused().swap_remove(case).0;
                let failing = if rank == 1 { &mut bad } else { &mut good };
                let error = sgd.step(failing).unwrap_err();
                assert_eq!(values(&own), [rank as f64], "{error}");
                sgd.step(&mut good).unwrap();
                assert_eq!(values(&own), [(count - 1) as f64 / 2.0]);
                error
            });
            expect(&errors, refused()[case].1);
        }
    }
}

fn expect(errors: &[Error], texts: &[&str]) {
    for error in errors {
        let Error::LendFailed { rank: 1, .. } = error else { panic!("{error:?}") };
        assert_eq!(error.tensors(), TensorState::Unchanged);
    }
    let own = errors[1].to_string();
    assert!(texts.iter().all(|text| own.contains(text)), "{own}");
}

#[test]
fn a_poisoned_map_is_an_error() {
    let varmap = VarMap::new();
    poison(&varmap);
    let error = VarParams::new(&varmap).unwrap_err();
    assert!(error.to_string().contains("poisoned"), "{error}");
}

/// Otherwise the second rank would wait for a lock that the first one holds while it waits for the
/// second.
#[test]
fn variables_that_ranks_share_are_refused_at_once() {
    let varmap = VarMap::new();
    varmap.get(2, "shared", Init::Const(1.0), DType::F32, &Device::Cpu).unwrap();
    let errors = ranks(2, |communicator| {
        let mut params = VarParams::new(&varmap).unwrap();
        let made = build(communicator, &mut params);
        made.and_then(|mut averager| averager.average(&mut params)).unwrap_err()
    });
    assert!(errors.iter().all(|it| matches!(it, Error::LendFailed { .. })), "{errors:?}");
    assert!(errors.iter().any(|it| it.to_string().contains("`shared`")), "{errors:?}");
    // The entry of a loan that has ended is gone.
    let mut params = VarParams::new(&varmap).unwrap();
    params.lend(&mut |_| ()).unwrap();
    params.lend(&mut |_| ()).unwrap();
}

/// A loan that does something first, while all variables are locked.
struct Before<'v, F>(&'v mut VarParams, F);

impl<F: FnMut()> Lend for Before<'_, F> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        let Before(params, first) = self;
        params.lend(&mut |loan| {
            first();
            average(loan);
        })
    }
}

#[test]
fn another_thread_sees_a_variable_before_or_after_the_average() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let own = var(&[rank as f64; 1000], DType::F32);
        let mut params = params([("w", own.clone())]);
        let mut averager = build(communicator, &mut params).unwrap();
        let (lent, is_lent) = channel();
        std::thread::scope(|scope| {
            let var = &own;
            let reader = scope.spawn(move || {
                is_lent.recv().unwrap();
                values(var)
            });
            let first = || lent.send(()).unwrap();
            averager.average(&mut Before(&mut params, first)).unwrap();
            assert_eq!(reader.join().unwrap(), [0.5; 1000]);
        });
    });
}

#[test]
fn a_panic_in_a_loan_unlocks_all() {
    let own = var(&[1.0], DType::F32);
    let mut params = params([("w", own.clone())]);
    let lend = std::panic::AssertUnwindSafe(|| params.lend(&mut |_| panic!("on purpose")));
    assert!(std::panic::catch_unwind(lend).is_err());
    assert_eq!(values(&own), [1.0]);
    params.lend(&mut |_| ()).unwrap();
}

/// Nested operations take stack. 4,000 of them would overflow a thread of Rust's usual 2 MiB.
#[test]
fn twenty_thousand_variables_fit_into_a_small_stack() {
    const COUNT: usize = 20_000;
    let world = Communicator::from_devices(&[param_averager::Device::cpu(); 2]).unwrap();
    let threads = world.into_iter().map(|communicator| {
        let small = std::thread::Builder::new().stack_size(512 << 10);
        let rank = communicator.rank() as f64;
        let train = move || {
            let vars = (0..COUNT)
                .map(|index| (format!("layer.{index}"), var(&[rank, index as f64], DType::F32)));
            let mut params = VarParams::from_vars(vars).unwrap();
            build(communicator, &mut params).unwrap().average(&mut params).unwrap();
            for (name, var) in params.iter() {
                let index: f64 = name["layer.".len()..].parse().unwrap();
                assert_eq!(values(var), [0.5, index]);
            }
        };
        small.spawn(train).unwrap()
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().unwrap();
    }
}
