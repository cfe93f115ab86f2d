//! Ranks that are threads, and a model.

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor};
use param_averager::{Builder, Communicator, ParamAverager, Result, Start};

/// Calls `rank` on a thread for each of `n` ranks, and returns what they return, by rank.
pub fn ranks<T: Send>(n: usize, rank: impl Fn(Communicator) -> T + Sync) -> Vec<T> {
    let devices = vec![param_averager::Device::cpu(); n];
    Communicator::run(&devices, |communicator| Result::<T>::Ok(rank(communicator))).unwrap()
}

/// An averager's builder with a short timeout, so that no test waits for ten minutes. Each rank
/// begins with its own values.
pub fn builder(communicator: Communicator) -> Builder {
    let timeout = std::time::Duration::from_secs(60);
    ParamAverager::builder(communicator).start_from(Start::Own).timeout(timeout)
}

/// A module with all kinds of containers.
#[derive(Module, Debug)]
pub struct Model {
    pub first: Linear,
    pub layers: Vec<Linear>,
    pub pair: (Param<Tensor<1>>, [Linear; 1]),
    pub absent: Option<Linear>,
    pub present: Option<Param<Tensor<3>>>,
    /// `Some` can't be averaged.
    pub count: Option<Param<Tensor<1, Int>>>,
    /// Not a parameter.
    pub width: usize,
}

/// Paths of a model's float parameters, in order.
pub const PATHS: [&str; 10] = [
    "first.weight",
    "first.bias",
    "layers.0.weight",
    "layers.0.bias",
    "layers.1.weight",
    "layers.1.bias",
    "pair.0",
    "pair.1.0.weight",
    "pair.1.0.bias",
    "present",
];

impl Model {
    /// A model of which every value is `value`.
    pub fn filled(value: f32, device: &Device) -> Model {
        let linear = || Linear {
            weight: Param::from_tensor(Tensor::full([4, 4], value, device)),
            bias: Some(Param::from_tensor(Tensor::full([4], value, device))),
        };
        Model {
            first: linear(),
            layers: vec![linear(), linear()],
            pair: (Param::from_tensor(Tensor::full([5], value, device)), [linear()]),
            absent: None,
            present: Some(Param::from_tensor(Tensor::full([2, 3, 1], value, device))),
            count: None,
            width: 4,
        }
    }

    /// A model with random values, made when they are first read.
    pub fn lazy(device: &Device) -> Model {
        let linear = || LinearConfig::new(4, 4).init(device);
        Model { first: linear(), layers: vec![linear(), linear()], ..Model::filled(0.0, device) }
    }

    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.layers.iter().fold(self.first.forward(x), |x, layer| layer.forward(x));
        self.pair.1[0].forward(x)
    }
}

/// Collects all values of float parameters, as f64.
pub fn values<M: Module>(module: &M) -> Vec<Vec<f64>> {
    struct Collect(Vec<Vec<f64>>);
    impl burn::module::ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push(param.val().into_data().iter::<f64>().collect());
        }
    }
    let mut collect = Collect(vec![]);
    module.visit(&mut collect);
    collect.0
}

/// Attributes of each float parameter that an average keeps: id, device, requirement of gradients,
/// shape.
pub fn attributes<M: Module>(module: &M) -> Vec<(u64, String, bool, Vec<usize>)> {
    struct Collect(Vec<(u64, String, bool, Vec<usize>)>);
    impl burn::module::ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let (device, shape) = (format!("{:?}", param.device()), param.dims().to_vec());
            self.0.push((param.id.val(), device, param.is_require_grad(), shape));
        }
    }
    let mut collect = Collect(vec![]);
    module.visit(&mut collect);
    collect.0
}
