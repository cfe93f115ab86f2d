//! Averages of modules between threads: values, and what stays as it was.

use std::sync::{Arc, Mutex};

use crate::model::{attributes, builder, ranks, values, Model, PATHS};
use burn::module::{Lora, Module, Param};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{DType, Device, Tensor, TensorData};
use param_averager::{Action, Lend, LocalSgd, ParamAverager, Schedule};
use param_averager_burn::{with_module, BurnParams};

fn devices() -> [Device; 2] {
    [Device::flex(), Device::flex().autodiff()]
}

/// The mean of 0, 1, .. n - 1.
fn mean(n: usize) -> f64 {
    (n as f64 - 1.0) / 2.0
}

#[test]
fn every_rank_has_the_mean_and_parameters_keep_their_attributes() {
    for (n, device) in [2, 4].into_iter().flat_map(|n| devices().map(|device| (n, device))) {
        ranks(n, |communicator| {
            let model = Model::filled(communicator.rank() as f32, &device);
            let before = attributes(&model);
            let mut params = BurnParams::new(model);
            let averager = builder(communicator).build(&mut params).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            assert!(matches!(sgd.step(&mut params).unwrap(), Action::Counted { until_next: 1 }));
            assert!(matches!(sgd.step(&mut params).unwrap(), Action::Averaged(_)));
            let model = params.into_module();
            assert_eq!(attributes(&model), before);
            assert_eq!(before[0].2, device.is_autodiff());
            let found = values(&model);
            assert_eq!(found.len(), PATHS.len());
            assert!(found.iter().flatten().all(|&value| value == mean(n)), "{found:?}");
        });
    }
}

#[test]
fn names_are_paths_in_the_modules_order() {
    let names = Arc::new(Mutex::new(vec![]));
    let seen = names.clone();
    let mut params = BurnParams::new(Model::filled(0.0, &Device::flex())).filter(move |path| {
        seen.lock().unwrap().push(path.to_owned());
        true
    });
    params.lend(&mut |_| {}).unwrap();
    // Asked when the module is checked, and when its values are taken.
    assert_eq!(*names.lock().unwrap(), [PATHS, PATHS].concat());
}

/// A parameter that does not require gradients stays frozen, also after `valid` and `train`.
#[test]
fn frozen_parameters_and_validation_stay_so() {
    let device = Device::flex().autodiff();
    ranks(2, |communicator| {
        let mut model = Model::filled(communicator.rank() as f32, &device);
        model.layers = model.layers.into_iter().map(|layer| layer.no_grad()).collect();
        let before = attributes(&model);
        let mut params = BurnParams::new(model.valid());
        let mut averager = builder(communicator).build(&mut params).unwrap();
        averager.average(&mut params).unwrap();
        assert!(attributes(params.module()).iter().all(|(_, _, requires_grad, _)| !requires_grad));
        params.update(|model| model.train());
        let after = attributes(params.module());
        let grads = |all: &[(_, _, bool, _)]| all.iter().map(|it| it.2).collect::<Vec<_>>();
        assert_eq!(grads(&after), grads(&before));
        averager.average(&mut params).unwrap();
        assert_eq!(grads(&attributes(params.module())), grads(&before));
    });
}

/// By default all ranks begin with rank 0's module, whatever they made.
#[test]
fn ranks_begin_with_rank_0s_module() {
    let began = ranks(4, |communicator| {
        let mut params = BurnParams::new(Model::lazy(&Device::flex().autodiff()));
        let own = values(params.module());
        ParamAverager::builder(communicator).build(&mut params).unwrap();
        (own, values(params.module()))
    });
    assert!(began[1..].iter().all(|(own, _)| *own != began[0].0));
    assert!(began.iter().all(|(_, now)| *now == began[0].0));
}

/// Gradients reach averaged parameters, the optimizer finds its state by their ids, and ranks that
/// train on different data agree after an average.
#[test]
fn training_goes_on_after_an_average() {
    let device = Device::flex().autodiff();
    let model = Model::lazy(&device);
    let trained = ranks(2, |communicator| {
        let shift = communicator.rank() as f32;
        let mut params = BurnParams::new(model.clone());
        let averager = builder(communicator).build(&mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(3));
        let mut optim = AdamWConfig::new().init();
        for _ in 0..10 {
            let x = Tensor::<2>::full([2, 4], 1.0 + shift, &device);
            let grads = params.module().forward(x).mean().backward();
            let grads = GradientsParams::from_grads(grads, params.module());
            assert_eq!(grads.len(), 8, "gradients of four linear layers");
            params.update(|model| optim.step(1e-2, model, grads));
            sgd.step(&mut params).unwrap();
        }
        assert_eq!(sgd.averages(), 3);
        sgd.finish(&mut params).unwrap();
        values(params.module())
    });
    assert_eq!(trained[0], trained[1]);
    assert_ne!(trained[0], values(&model));
}

#[test]
fn a_module_by_value_comes_back_with_the_mean() {
    ranks(4, |communicator| {
        let model = Model::filled(communicator.rank() as f32, &Device::flex());
        let (mut model, averager) =
            with_module(model, |params| builder(communicator).build(params));
        let mut averager = averager.unwrap();
        for _ in 0..2 {
            let made;
            (model, made) = with_module(model, |params| averager.average(params));
            made.unwrap();
        }
        assert!(values(&model).iter().flatten().all(|&value| value == mean(4)));
    });
}

/// A clone shares its values with the module until one of them changes.
#[test]
fn clones_keep_their_values() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut params = BurnParams::new(Model::filled(rank as f32, &Device::flex()));
        let clone = params.module().clone();
        let mut averager = builder(communicator).build(&mut params).unwrap();
        averager.average(&mut params).unwrap();
        assert!(values(params.module()).iter().flatten().all(|&value| value == 0.5));
        assert!(values(&clone).iter().flatten().all(|&value| value == rank as f64));
    });
}

#[derive(Module, Debug)]
struct One {
    weight: Param<Tensor<2>>,
}

/// The dtype of a device's new tensors, f32, is not that of every parameter.
#[test]
fn dtypes_stay() {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        ranks(2, |communicator| {
            let value = 1.0 + communicator.rank() as f64;
            let tensor = Tensor::<2>::full([3, 5], value, (&Device::flex(), dtype));
            let mut params = BurnParams::new(One { weight: Param::from_tensor(tensor) });
            let mut averager = builder(communicator).build(&mut params).unwrap();
            averager.average(&mut params).unwrap();
            assert_eq!(params.module().weight.dtype(), dtype);
            assert!(values(params.module())[0].iter().all(|&value| value == 1.5));
        });
    }
}

/// Values of a transposed tensor are not contiguous: ranks with another layout in memory of the
/// same tensor agree by elements.
#[test]
fn layouts_in_memory_may_differ() {
    let device = Device::flex();
    let rows = || Tensor::<2>::from_data([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], &device);
    let columns = || Tensor::<2>::from_data([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]], &device);
    ranks(2, |communicator| {
        let is_first = communicator.rank() == 0;
        let weight = if is_first { rows() } else { columns().transpose() };
        let mut params = BurnParams::new(One { weight: Param::from_tensor(weight) });
        let mut averager = builder(communicator).build(&mut params).unwrap();
        averager.average(&mut params).unwrap();
        assert_eq!(values(params.module()), [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]);
    });
}

#[test]
fn filtered_parameters_stay_local() {
    ranks(2, |communicator| {
        let rank = communicator.rank() as f64;
        let mut params = BurnParams::new(Model::filled(rank as f32, &Device::flex()))
            .filter(|path| !path.ends_with("bias"));
        let mut averager = builder(communicator).build(&mut params).unwrap();
        averager.average(&mut params).unwrap();
        for (path, found) in PATHS.iter().zip(values(params.module())) {
            let expected = if path.ends_with("bias") { rank } else { 0.5 };
            assert!(found.iter().all(|&value| value == expected), "{path}: {found:?}");
        }
    });
}

/// Adapters are parameters of their own. The frozen base can be left out.
#[test]
fn adapters_of_lora_are_averaged() {
    let device = Device::flex().autodiff();
    let adapters = ranks(2, |communicator| {
        let rank = communicator.rank() as f64;
        let mut linear: Linear = LinearConfig::new(8, 8).with_bias(false).init(&device);
        linear.weight = Param::from_tensor(Tensor::full([8, 8], rank, &device));
        let linear = linear.apply_lora(Lora::new(2, 4.0));
        let mut params = BurnParams::new(linear).filter(|path| path.starts_with("weight."));
        let averager = builder(communicator).build(&mut params).unwrap();
        LocalSgd::new(averager, Schedule::every(1)).step(&mut params).unwrap();
        let found = values(params.module());
        assert!(found[0].iter().all(|&value| value == rank), "the base stays local");
        assert!(params.module().weight.adapter().is_some());
        found[1..].to_vec()
    });
    assert_eq!((adapters[0].len(), &adapters[0]), (2, &adapters[1]));
}

#[derive(Module, Debug)]
struct Normed {
    norm: BatchNorm,
}

/// Claims of the crate's page about running statistics.
#[test]
fn statistics_of_batch_norm_stay_local_until_validation() {
    let device = Device::flex().autodiff();
    let found = ranks(2, |communicator| {
        let rank = communicator.rank() as f32;
        let input = || {
            let values: Vec<f32> = (0..16).map(|i| rank * 10.0 + i as f32).collect();
            Tensor::<2>::from_data(TensorData::new(values, [8, 2]), &device)
        };
        let mut params = BurnParams::new(Normed { norm: BatchNormConfig::new(2).init(&device) });
        let averager = builder(communicator).build(&mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        for _ in 0..3 {
            params.module().norm.forward(input());
            sgd.step(&mut params).unwrap();
        }
        let running = |module: &Normed| {
            let mean = module.norm.running_mean.value_sync().into_data();
            mean.iter::<f64>().collect::<Vec<_>>()
        };
        let local = running(params.module());
        params.update(|model| model.valid());
        assert_eq!(running(params.module()), local);
        // Without a step since the last average, `finish` would move nothing.
        sgd.averager().average(&mut params).unwrap();
        (local, running(params.module()))
    });
    let [(local_0, mean_0), (local_1, mean_1)] = &found[..] else { panic!("two ranks") };
    assert_ne!(local_0, local_1);
    assert_eq!(mean_0, mean_1);
    for ((a, b), mean) in local_0.iter().zip(local_1).zip(mean_0) {
        assert!(((a + b) / 2.0 - mean).abs() < 1e-5);
    }
}

/// A parameter without elements is no obstacle.
#[test]
fn an_empty_parameter_stays_empty() {
    ranks(2, |communicator| {
        let rank = communicator.rank() as f32;
        let empty = One { weight: Param::from_tensor(Tensor::zeros([0, 4], &Device::flex())) };
        let mut params = BurnParams::new((empty, Model::filled(rank, &Device::flex())));
        let mut averager = builder(communicator).build(&mut params).unwrap();
        averager.average(&mut params).unwrap();
        assert_eq!(params.module().0.weight.dims(), [0, 4]);
        assert!(values(&params.module().1).iter().flatten().all(|&value| value == 0.5));
    });
}
