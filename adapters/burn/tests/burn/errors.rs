//! Errors of one rank reach all, with names, and every module comes back as it was.

use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::model::{attributes, builder, ranks, values, Model};
use burn::module::{Module, Param, Quantizer};
use burn::nn::LinearConfig;
use burn::tensor::quantization::{Calibration, QuantScheme};
use burn::tensor::{Bool, Device, Int, Tensor};
use param_averager::{Error, Lend, LocalSgd, Schedule};
use param_averager_burn::{with_module, BurnParams};

fn integers() -> Option<Param<Tensor<1, Int>>> {
    let tensor = Tensor::from_data([1, 2, 3], &Device::flex());
    Some(Param::initialized(burn::module::ParamId::new(), tensor))
}

/// Asserts that all ranks know that rank 1 could not lend, and it why.
fn is_rank_1s(error: &Error, rank: usize, names: &str) {
    let Error::LendFailed { rank: 1, reason, .. } = error else { panic!("{error:?}") };
    assert!(rank != 1 || reason.contains(names), "{reason}");
    assert!(!error.is_fatal());
}

#[test]
fn a_parameter_without_a_mean_is_an_error_on_all_ranks_and_modules_stay() {
    for n in [2, 4] {
        ranks(n, |communicator| {
            let rank = communicator.rank();
            let mut params = BurnParams::new(Model::filled(rank as f32, &Device::flex()));
            let averager = builder(communicator).build(&mut params).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(1));
            if rank == 1 {
                params.update(|model| Model { count: integers(), ..model });
            }
            let (before, kept) = (values(params.module()), attributes(params.module()));
            is_rank_1s(&sgd.step(&mut params).unwrap_err(), rank, "`count` holds integers");
            assert_eq!((values(params.module()), attributes(params.module())), (before, kept));
            // Without it training goes on.
            params.update(|model| Model { count: None, ..model });
            sgd.step(&mut params).unwrap();
            let mean = (n as f64 - 1.0) / 2.0;
            assert!(values(params.module()).iter().flatten().all(|&value| value == mean));
        });
    }
}

#[test]
fn a_module_by_value_comes_back_with_an_error() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let model = Model::filled(rank as f32, &Device::flex());
        let (mut model, averager) =
            with_module(model, |params| builder(communicator).build(params));
        let mut averager = averager.unwrap();
        if rank == 1 {
            model.count = integers();
        }
        let (model, made) = with_module(model, |params| averager.average(params));
        is_rank_1s(&made.unwrap_err(), rank, "`count` holds integers");
        assert!(values(&model).iter().flatten().all(|&value| value == rank as f64));
    });
}

/// An average that fails after the tensors were lent: a peer's schedule, its size, its NaN.
#[test]
fn modules_stay_when_peers_differ() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut params = BurnParams::new(Model::filled(rank as f32, &Device::flex()));
        let averager = builder(communicator).reject_non_finite(true).build(&mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1 + rank as u64));
        if rank == 1 {
            sgd.step(&mut params).unwrap(); // rank 0 averages at step 1, rank 1 at step 2
        }
        let error = sgd.step(&mut params).unwrap_err();
        assert!(matches!(error, Error::SchedulesDiffer { .. }), "{error}");
        assert!(values(params.module()).iter().flatten().all(|&value| value == rank as f64));

        let nan = |layers: &[_]| layers.len() == 2 && rank == 1;
        params.update(|mut model| {
            if nan(&model.layers) {
                model.layers[1].weight = model.layers[1].weight.clone().map(|w| w * f32::NAN);
            }
            model
        });
        let error = sgd.averager().average(&mut params).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("rank 1") && text.contains("layers.1.weight"), "{text}");
        let others = values(params.module());
        assert!(others.iter().take(4).flatten().all(|&value| value == rank as f64));
    });
}

#[test]
fn other_layers_are_named_when_the_averager_is_built() {
    for error in ranks(2, |communicator| {
        let device = Device::flex();
        let mut model = Model::filled(0.0, &device);
        if communicator.rank() == 1 {
            model.layers[1] = LinearConfig::new(4, 5).init(&device);
        }
        let mut params = BurnParams::new(model);
        builder(communicator).build(&mut params).unwrap_err()
    }) {
        assert!(matches!(error, Error::LayoutsDiffer { .. }), "{error}");
        assert!(error.to_string().contains("layers.1.weight"), "{error}");
    }
}

#[derive(Module, Debug)]
struct Mask {
    kept: Param<Tensor<1, Bool>>,
}

#[test]
fn what_has_no_mean_is_named_with_what_to_do() {
    let device = Device::flex();
    let refused = |error: Result<(), param_averager::LendError>| {
        let text = error.unwrap_err().to_string();
        assert!(text.contains("BurnParams::filter"), "{text}");
        text
    };
    fn lend(params: &mut impl Lend) -> Result<(), param_averager::LendError> {
        params.lend(&mut |_| panic!("lent"))
    }

    let mut quantizer = Quantizer::new(Calibration::MinMax, QuantScheme::default());
    let linear = LinearConfig::new(32, 32).with_bias(false).init(&device);
    let quantised = linear.quantize_weights(&mut quantizer);
    let text = refused(lend(&mut BurnParams::new(quantised)));
    assert!(text.contains("`weight` holds quantised values"), "{text}");

    let kept = Tensor::from_data([true, false], &device);
    let mask = Mask { kept: Param::initialized(burn::module::ParamId::new(), kept) };
    let text = refused(lend(&mut BurnParams::new(mask.clone())));
    assert!(text.contains("`kept` holds booleans"), "{text}");

    let text = refused(lend(&mut BurnParams::new(mask).filter(|_| false)));
    assert!(text.contains("no float parameter"), "{text}");
}

/// The values are put back while a panic of the average unwinds.
#[test]
fn a_panic_in_the_average_loses_nothing() {
    let mut params = BurnParams::new(Model::filled(3.0, &Device::flex().autodiff()));
    let before = (values(params.module()), attributes(params.module()));
    let lent = catch_unwind(AssertUnwindSafe(|| params.lend(&mut |_| panic!("in the average"))));
    assert!(lent.is_err());
    assert_eq!((values(params.module()), attributes(params.module())), before);
}

/// A panic of the optimizer takes the module with it: that is said on every rank, and another
/// module can take its place.
#[test]
fn a_panic_while_the_module_is_away_is_said() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let model = || Model::filled(rank as f32, &Device::flex());
        let mut params = BurnParams::new(model());
        let mut averager = builder(communicator).build(&mut params).unwrap();
        if rank == 1 {
            let step = |_| panic!("in the optimizer");
            assert!(catch_unwind(AssertUnwindSafe(|| params.update(step))).is_err());
            let gone = catch_unwind(AssertUnwindSafe(|| params.module().width)).unwrap_err();
            let text = gone.downcast_ref::<String>().unwrap();
            assert!(text.contains("the module is gone"), "{text}");
        }
        is_rank_1s(&averager.average(&mut params).unwrap_err(), rank, "BurnParams::replace");
        if rank == 1 {
            assert!(params.replace(model()).is_none());
        }
        averager.average(&mut params).unwrap();
        assert!(values(params.module()).iter().flatten().all(|&value| value == 0.5));
    });
}
