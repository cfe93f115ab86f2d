//! A trainer in plain Rust: a network with two hidden layers learns handwritten digits.
//!
//!     cargo run --release --example digits -- --ranks 4 --every 8 --seed 1
//!     cargo run --release --example digits -- --ranks 4 --processes
//!     cargo run --release --example digits -- --ranks 4 --every 32 --sorted --outer diloco
//!     torchrun --no-python --nproc-per-node 4 target/release/examples/digits
//!
//! Lines that belong to param-averager: `Parameters for Layer`, and those with `averager` or `sgd`.

mod trainer;

use param_averager::{Communicator, LocalSgd, ParamAverager, Parameters, Schedule, TensorMut};
use trainer::{Data, Error, Options, Random, Sample, Trained, CLASSES, PIXELS};

struct Layer {
    names: [String; 2],
    /// A row for each output.
    weight: Vec<f32>,
    bias: Vec<f32>,
}

impl Parameters for Layer {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        visit(TensorMut::from(&mut self.weight[..]).named(&self.names[0]));
        visit(TensorMut::from(&mut self.bias[..]).named(&self.names[1]));
    }
}

impl Layer {
    fn new(index: usize, inputs: usize, outputs: usize, random: &mut Random) -> Layer {
        Layer {
            names: [format!("{index}.weight"), format!("{index}.bias")],
            weight: random.uniform(inputs * outputs, (6.0 / inputs as f32).sqrt()),
            bias: vec![0.0; outputs],
        }
    }

    fn forward(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(x.len()).zip(&self.bias);
        rows.map(|(row, bias)| bias + row.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()).collect()
    }

    /// Adds `scale` times the gradient for input `x` to the parameters, where `slope` is that of
    /// the outputs.
    fn add(&mut self, scale: f32, slope: &[f32], x: &[f32]) {
        for ((row, bias), slope) in
            self.weight.chunks_exact_mut(x.len()).zip(&mut self.bias).zip(slope)
        {
            row.iter_mut().zip(x).for_each(|(w, x)| *w += scale * slope * x);
            *bias += scale * slope;
        }
    }

    /// Slope of the inputs, where `slope` is that of the outputs.
    fn backward(&self, slope: &[f32], inputs: usize) -> Vec<f32> {
        let mut sum = vec![0.0; inputs];
        for (row, slope) in self.weight.chunks_exact(inputs).zip(slope) {
            sum.iter_mut().zip(row).for_each(|(sum, w)| *sum += slope * w);
        }
        sum
    }
}

/// Inputs of each layer, and the last one's outputs.
fn forward(layers: &[Layer], sample: &Sample) -> Vec<Vec<f32>> {
    let mut values = vec![sample.pixels.to_vec()];
    for (index, layer) in layers.iter().enumerate() {
        let mut out = layer.forward(&values[index]);
        if index + 1 < layers.len() {
            out.iter_mut().for_each(|value| *value = value.max(0.0));
        }
        values.push(out);
    }
    values
}

/// Probability of each digit.
fn softmax(outputs: &[f32]) -> Vec<f32> {
    let largest = outputs.iter().fold(f32::MIN, |a, &b| a.max(b));
    let exp: Vec<f32> = outputs.iter().map(|value| (value - largest).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|value| value / sum).collect()
}

/// A step of stochastic gradient descent.
fn step(layers: &mut [Layer], batch: &[Sample], rate: f32) {
    let mut slopes = vec![]; // of each layer's outputs and inputs, by sample
    for sample in batch {
        let values = forward(layers, sample);
        let mut slope = softmax(&values[layers.len()]);
        slope[usize::from(sample.digit)] -= 1.0;
        for index in (0..layers.len()).rev() {
            let mut inner = layers[index].backward(&slope, values[index].len());
            inner.iter_mut().zip(&values[index]).for_each(|(d, x)| *d *= f32::from(*x > 0.0));
            slopes.push((index, slope, values[index].clone()));
            slope = inner;
        }
    }
    for (index, slope, x) in slopes {
        layers[index].add(-rate / batch.len() as f32, &slope, &x);
    }
}

fn train(communicator: Communicator, options: Options) -> Result<Trained, Error> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let data = Data::digits();
    let mut mine = data.shard(rank, ranks, options.sorted);
    let mut random = Random::new(options.seed); // the same on every rank
    let sizes = [PIXELS, 64, 64, CLASSES];
    let layer = |index| Layer::new(index, sizes[index], sizes[index + 1], &mut random);
    let mut model: Vec<Layer> = (0..sizes.len() - 1).map(layer).collect();

    let builder = ParamAverager::builder(communicator).outer(options.outer);
    let averager = builder.build(&mut model)?;
    let mut sgd = LocalSgd::new(averager, Schedule::every(options.every));
    let mut order = Random::new(options.seed * 1000 + rank as u64); // another one on every rank
    for _epoch in 0..options.epochs {
        order.shuffle(&mut mine);
        for batch in mine.chunks_exact(options.batch) {
            step(&mut model, batch, 0.2);
            sgd.step(&mut model)?; // averages every H steps
        }
    }
    sgd.finish(&mut model)?;

    let digit = |sample: &Sample| {
        let outputs = forward(&model, sample).pop().expect("outputs");
        (0..CLASSES).max_by(|&a, &b| outputs[a].total_cmp(&outputs[b])).expect("ten digits")
    };
    let right = data.test.iter().filter(|sample| digit(sample) == usize::from(sample.digit));
    let loss = |sample: &Sample| {
        let outputs = forward(&model, sample).pop().expect("outputs");
        f64::from(-softmax(&outputs)[usize::from(sample.digit)].max(f32::MIN_POSITIVE).ln())
    };
    Ok(Trained {
        accuracy: right.count() as f64 / data.test.len() as f64,
        loss: data.train.iter().map(loss).sum::<f64>() / data.train.len() as f64,
        averages: sgd.averages(),
    })
}

fn main() -> Result<(), Error> {
    let options = Options::from_arguments()?;
    trainer::run("plain Rust", options, |communicator| train(communicator, options))
}
