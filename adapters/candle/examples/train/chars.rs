//! The next character of a novel: a transformer of two layers.

use candle_core::{DType, Device, Module, Result, Tensor, D};
use candle_nn::{embedding, linear_no_bias, loss, ops, Embedding, Init, Linear, VarBuilder};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::{Options, Shards, Task};

/// 331,382 characters of Moby-Dick; see the README beside the file.
const TEXT: &str = include_str!("../data/moby_dick.txt");
/// Characters that the last part of the text has, on which no rank trains.
const TEST: usize = 33_000;
/// Windows that are tested.
const WINDOWS: usize = 48;
const CONTEXT: usize = 64;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const LAYERS: usize = 2;

pub struct Chars {
    characters: Embedding,
    places: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    out: Linear,
    /// -inf where a place would see a later one.
    mask: Tensor,
    /// Characters as numbers: this rank's part, and those for the test.
    training: Vec<u32>,
    test: Vec<u32>,
    random: StdRng,
}

struct Block {
    norms: [Tensor; 2],
    attention: [Linear; 4],
    hidden: [Linear; 2],
}

impl Task for Chars {
    const NAME: &'static str = "chars";
    const LEARNING_RATE: f64 = 3e-3;
    const BATCH: usize = 8;

    fn steps(epochs: f64, ranks: usize) -> u64 {
        let windows = (TEXT.len() - TEST) / CONTEXT / Self::BATCH;
        (epochs * windows as f64 / ranks as f64) as u64
    }

    fn new(vars: VarBuilder<'_>, rank: usize, options: &Options) -> Result<Self> {
        let mut alphabet: Vec<u8> = TEXT.bytes().collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let number = |byte: u8| alphabet.iter().position(|&it| it == byte).expect("it is there");
        let mut training: Vec<u32> = TEXT.bytes().map(|byte| number(byte) as u32).collect();
        let test = training.split_off(training.len() - TEST);
        // Sorted shards are chapters in a row; mixed ones are windows of all chapters.
        if options.shards == Shards::Sorted {
            let each = training.len() / options.ranks;
            training = training[rank * each..][..each].to_vec();
        }
        let norm = |vars: VarBuilder<'_>| vars.get_with_hints(WIDTH, "gain", Init::Const(1.0));
        let mut blocks = vec![];
        for at in 0..LAYERS {
            let vars = vars.pp(format!("block{at}"));
            let linear = |from, to, name: &str| linear_no_bias(from, to, vars.pp(name));
            let square = |name: &str| linear(WIDTH, WIDTH, name);
            blocks.push(Block {
                norms: [norm(vars.pp("norm0"))?, norm(vars.pp("norm1"))?],
                attention: [square("q")?, square("k")?, square("v")?, square("o")?],
                hidden: [linear(WIDTH, 4 * WIDTH, "up")?, linear(4 * WIDTH, WIDTH, "down")?],
            });
        }
        let later = (0..CONTEXT).flat_map(|to| {
            (0..CONTEXT).map(move |from| if from > to { f32::NEG_INFINITY } else { 0.0 })
        });
        Ok(Chars {
            characters: embedding(alphabet.len(), WIDTH, vars.pp("embedding"))?,
            places: vars.get_with_hints(
                (CONTEXT, WIDTH),
                "embedding.places",
                Init::Randn { mean: 0.0, stdev: 0.05 },
            )?,
            blocks,
            norm: norm(vars.pp("norm"))?,
            out: linear_no_bias(WIDTH, alphabet.len(), vars.pp("out"))?,
            mask: Tensor::from_iter(later, &Device::Cpu)?.reshape((CONTEXT, CONTEXT))?,
            training,
            test,
            random: StdRng::seed_from_u64(options.seed << 8 | rank as u64),
        })
    }

    fn next_loss(&mut self) -> Result<Tensor> {
        let ends = self.training.len() - CONTEXT;
        let starts: Vec<usize> =
            (0..Self::BATCH).map(|_| self.random.random_range(0..ends)).collect();
        Ok(self.loss(&self.training, &starts)?.0)
    }

    fn test(&self) -> Result<(f32, f32)> {
        let apart = (self.test.len() - CONTEXT - 1) / WINDOWS;
        let starts: Vec<usize> = (0..WINDOWS).map(|window| window * apart).collect();
        let (loss, right) = self.loss(&self.test, &starts)?;
        Ok((loss.to_scalar()?, right.to_scalar()?))
    }
}

impl Chars {
    /// Mean loss (nats per character) and accuracy on windows of the text.
    fn loss(&self, text: &[u32], starts: &[usize]) -> Result<(Tensor, Tensor)> {
        let windows = |shift: usize| -> Result<Tensor> {
            let window = |&start: &usize| text[start + shift..][..CONTEXT].iter().copied();
            let all: Vec<u32> = starts.iter().flat_map(window).collect();
            Tensor::from_vec(all, (starts.len(), CONTEXT), &Device::Cpu)
        };
        let next = windows(1)?.flatten_all()?;
        let scores = self.forward(&windows(0)?)?.flatten(0, 1)?;
        let right = scores.argmax(D::Minus1)?.eq(&next)?.to_dtype(DType::F32)?.mean_all()?;
        Ok((loss::cross_entropy(&scores, &next)?, right))
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.characters.forward(x)?.broadcast_add(&self.places)?;
        for block in &self.blocks {
            x = (&x + block.attend(&norm(&x, &block.norms[0])?, &self.mask)?)?;
            let [up, down] = &block.hidden;
            let hidden = up.forward(&norm(&x, &block.norms[1])?)?.relu()?;
            x = (x + down.forward(&hidden)?)?;
        }
        self.out.forward(&norm(&x, &self.norm)?)
    }
}

impl Block {
    fn attend(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (windows, places, width) = x.dims3()?;
        let heads = |of: &Linear| -> Result<Tensor> {
            let split = (windows, places, HEADS, width / HEADS);
            of.forward(x)?.reshape(split)?.transpose(1, 2)?.contiguous()
        };
        let [q, k, v, o] = &self.attention;
        let scores = (heads(q)?.matmul(&heads(k)?.t()?)? / ((width / HEADS) as f64).sqrt())?;
        let weights = ops::softmax(&scores.broadcast_add(mask)?, D::Minus1)?;
        let seen =
            weights.matmul(&heads(v)?)?.transpose(1, 2)?.reshape((windows, places, width))?;
        o.forward(&seen)
    }
}

/// Root mean square normalisation.
fn norm(x: &Tensor, gain: &Tensor) -> Result<Tensor> {
    let size = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
    x.broadcast_div(&size)?.broadcast_mul(gain)
}
