//! A trainer with burn: a network with four hidden layers learns handwritten digits.
//!
//!     cargo run --release -p param-averager-burn --example burn-digits -- --ranks 4 --every 8
//!     cargo run --release -p param-averager-burn --example burn-digits -- --ranks 4 --processes
//!     torchrun --no-python --nproc-per-node 4 target/release/examples/burn-digits
//!
//! Lines that belong to param-averager: those with `params`, `averager` or `sgd`.

#[path = "../../../examples/trainer/mod.rs"]
mod trainer;

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Initializer, Linear, LinearConfig, Relu};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use param_averager::{Communicator, LocalSgd, ParamAverager, Schedule};
use param_averager_burn::BurnParams;
use trainer::{Data, Error, Options, Random, Sample, Trained, CLASSES, PIXELS};

#[derive(Module, Debug)]
struct Mlp {
    layers: Vec<Linear>,
    relu: Relu,
}

impl Mlp {
    fn new(device: &Device) -> Mlp {
        let initializer = Initializer::KaimingUniform { gain: 2f64.sqrt(), fan_out_only: false };
        let sizes = [PIXELS, 64, 64, 64, 64, CLASSES];
        let layer = |sizes: &[usize]| {
            LinearConfig::new(sizes[0], sizes[1]).with_initializer(initializer.clone()).init(device)
        };
        Mlp { layers: sizes.windows(2).map(layer).collect(), relu: Relu::new() }
    }

    fn forward(&self, pixels: Tensor<2>) -> Tensor<2> {
        let (last, hidden) = self.layers.split_last().expect("layers");
        last.forward(hidden.iter().fold(pixels, |x, layer| self.relu.forward(layer.forward(x))))
    }
}

/// Pixels and digits of some samples.
fn tensors(samples: &[Sample], device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let count = samples.len();
    let pixels: Vec<f32> = samples.iter().flat_map(|sample| sample.pixels).collect();
    let digits: Vec<i32> = samples.iter().map(|sample| sample.digit.into()).collect();
    (
        Tensor::from_data(TensorData::new(pixels, [count, PIXELS]), device),
        Tensor::from_data(TensorData::new(digits, [count]), device),
    )
}

fn train(communicator: Communicator, options: Options, model: Mlp) -> Result<Trained, Error> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let data = Data::digits();
    let mut mine = data.shard(rank, ranks, options.sorted);
    let device = Device::flex().autodiff();

    let mut params = BurnParams::new(model);
    let builder = ParamAverager::builder(communicator).outer(options.outer);
    let averager = builder.build(&mut params)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(options.every));
    let mut optim = AdamWConfig::new().with_weight_decay(0.01).init();
    let cross_entropy = CrossEntropyLossConfig::new().init(&device);
    let mut order = Random::new(options.seed * 1000 + rank as u64); // another one on every rank
    for _epoch in 0..options.epochs {
        order.shuffle(&mut mine);
        for batch in mine.chunks_exact(options.batch) {
            let (pixels, digits) = tensors(batch, &device);
            let loss = cross_entropy.forward(params.module().forward(pixels), digits);
            let grads = GradientsParams::from_grads(loss.backward(), params.module());
            params.update(|model| optim.step(1e-3, model, grads));
            sgd.step(&mut params)?; // averages every H steps
        }
    }
    sgd.finish(&mut params)?;

    let model = params.into_module().valid();
    let device = device.inner();
    let (pixels, digits) = tensors(&data.test, &device);
    let right = model.forward(pixels).argmax(1).squeeze_dim::<1>(1).equal(digits).int().sum();
    let (pixels, digits) = tensors(&data.train, &device);
    let loss = CrossEntropyLossConfig::new().init(&device).forward(model.forward(pixels), digits);
    Ok(Trained {
        accuracy: right.into_scalar::<f64>() / data.test.len() as f64,
        loss: loss.into_scalar(),
        averages: sgd.averages(),
    })
}

fn main() -> Result<(), Error> {
    let options = Options::from_arguments()?;
    let device = Device::flex().autodiff();
    device.seed(options.seed); // one generator for all threads, so the model is made before them
    let model = Mlp::new(&device);
    trainer::run("burn", options, |communicator| train(communicator, options, model.clone()))
}
