//! Handwritten digits: a perceptron of four layers.

use candle_core::{Device, Module, Result, Tensor, D};
use candle_nn::{linear, loss, Linear, VarBuilder};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::SeedableRng;

use super::{Options, Shards, Task};

/// 1,797 images of 8 x 8 pixels; see the README beside the file.
const DATA: &str = include_str!("../../../../examples/data/digits.txt");
const PIXELS: usize = 64;
const TRAINING: usize = 1437;

pub struct Digits {
    layers: Vec<Linear>,
    training: Vec<Sample>,
    test: (Tensor, Tensor),
    /// Samples of this rank that the present pass has not seen.
    left: Vec<usize>,
    mine: Vec<usize>,
    random: StdRng,
}

struct Sample {
    pixels: Vec<f32>,
    label: u32,
}

impl Task for Digits {
    const NAME: &'static str = "digits";
    const LEARNING_RATE: f64 = 1e-3;
    const BATCH: usize = 16;

    fn steps(epochs: f64, ranks: usize) -> u64 {
        (epochs * (TRAINING / ranks / Self::BATCH) as f64) as u64
    }

    fn new(vars: VarBuilder<'_>, rank: usize, options: &Options) -> Result<Self> {
        let sizes = [PIXELS, 64, 64, 64, 10];
        let layer = |at: usize| linear(sizes[at], sizes[at + 1], vars.pp(format!("layer{at}")));
        let layers = (0..4).map(layer).collect::<Result<_>>()?;
        let (test, training): (Vec<_>, Vec<_>) = samples().enumerate().partition(is_test);
        let training: Vec<Sample> = training.into_iter().map(|(_, sample)| sample).collect();
        let test: Vec<_> = test.into_iter().map(|(_, sample)| sample).collect();
        // The same number for every rank, mixed or by label.
        let each = training.len() / options.ranks;
        let mut order: Vec<usize> = (0..training.len()).collect();
        let mine = match options.shards {
            Shards::Mixed => {
                order.into_iter().skip(rank).step_by(options.ranks).take(each).collect()
            }
            Shards::Sorted => {
                order.sort_by_key(|&index| training[index].label);
                order[rank * each..][..each].to_vec()
            }
        };
        let test = batch(test.iter())?;
        let random = StdRng::seed_from_u64(options.seed << 8 | rank as u64);
        Ok(Digits { layers, training, test, left: vec![], mine, random })
    }

    fn next_loss(&mut self) -> Result<Tensor> {
        if self.left.len() < Self::BATCH {
            self.left = self.mine.clone();
            self.left.shuffle(&mut self.random);
        }
        let chosen = self.left.split_off(self.left.len() - Self::BATCH);
        let (x, y) = batch(chosen.iter().map(|&index| &self.training[index]))?;
        loss::cross_entropy(&self.forward(&x)?, &y)
    }

    fn test(&self) -> Result<(f32, f32)> {
        let (x, y) = &self.test;
        let scores = self.forward(x)?;
        let right = scores.argmax(D::Minus1)?.eq(y)?.to_dtype(candle_core::DType::F32)?;
        let loss = loss::cross_entropy(&scores, y)?;
        Ok((loss.to_scalar()?, right.mean_all()?.to_scalar()?))
    }
}

impl Digits {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (last, hidden) = self.layers.split_last().expect("four layers");
        let x = hidden.iter().try_fold(x.clone(), |x, layer| layer.forward(&x)?.relu())?;
        last.forward(&x)
    }
}

fn samples() -> impl Iterator<Item = Sample> {
    DATA.lines().map(|line| {
        let (pixels, label) = line.split_at(PIXELS);
        let pixels = pixels.bytes().map(|byte| f32::from(byte - b'a') / 16.0).collect();
        Sample { pixels, label: label.parse().expect("a digit") }
    })
}

fn is_test((index, _): &(usize, Sample)) -> bool {
    index % 5 == 0
}

fn batch<'s>(samples: impl Iterator<Item = &'s Sample>) -> Result<(Tensor, Tensor)> {
    let (mut pixels, mut labels) = (vec![], vec![]);
    for sample in samples {
        pixels.extend_from_slice(&sample.pixels);
        labels.push(sample.label);
    }
    let count = labels.len();
    let x = Tensor::from_vec(pixels, (count, PIXELS), &Device::Cpu)?;
    Ok((x, Tensor::from_vec(labels, count, &Device::Cpu)?))
}
