//! Coded averages, computed anew in f32: the scheme of `kernels/coded.h` with the layout of
//! `src/bucket.rs`, element by element. The kernels must have the same bits.

use param_averager::Compression;

/// Elements of a pack, and of a code's block.
const PACK: usize = 4;
const BLOCK: usize = 128;

fn align(packs: usize) -> usize {
    packs.next_multiple_of(8)
}

/// Numbers of an outer optimizer with momentum, as `kernels/stage.h` has them.
#[derive(Clone, Copy, Debug)]
pub struct Momentum {
    pub lr: f32,
    pub a: f32,
    pub b: f32,
    pub mu: f32,
}

/// What all ranks have, in the order of elements, with the padding of packs.
#[derive(Clone)]
pub struct Oracle {
    pub code: Compression,
    /// False in the control: what a code rounds away is forgotten.
    pub feeds_back: bool,
    outer: Option<Momentum>,
    /// Each chunk's elements, and the rank that owns it.
    chunks: Vec<(std::ops::Range<usize>, usize)>,
    /// The values that all ranks have had last.
    pub reference: Vec<f32>,
    /// The owner's exact values.
    target: Vec<f32>,
    velocity: Vec<f32>,
    /// Of each rank.
    residual: Vec<Vec<f32>>,
}

impl Oracle {
    pub fn new(
        code: Compression,
        world: usize,
        (channels, chunk_bytes): (usize, usize),
        outer: Option<Momentum>,
        values: Vec<f32>,
    ) -> Oracle {
        let packs = values.len() / PACK;
        let each = align(packs.div_ceil(channels));
        let chunk = align(chunk_bytes.div_ceil(16)).min(align(each.div_ceil(world)));
        let mut chunks = vec![];
        for channel in 0..channels {
            let (mut begin, end) = ((channel * each).min(packs), ((channel + 1) * each).min(packs));
            while begin < end {
                let next = (begin + chunk * world).min(end);
                let part = align((next - begin).div_ceil(world));
                for owner in 0..world {
                    let from = (begin + owner * part).min(next);
                    let to = (from + part).min(next);
                    chunks.push((from * PACK..to * PACK, owner));
                }
                begin = next;
            }
        }
        let zeros = vec![0.0; values.len()];
        Oracle {
            code,
            feeds_back: true,
            outer,
            chunks,
            target: values.clone(),
            velocity: zeros.clone(),
            residual: vec![zeros; world],
            reference: values,
        }
    }

    /// An average that has failed, or one in full, after which there are no residuals.
    pub fn forget(&mut self) {
        self.residual.iter_mut().for_each(|residual| residual.fill(0.0));
        if self.outer.is_none() {
            self.target.clone_from(&self.reference);
        }
    }

    /// An average in full that has given all ranks these values, and the outer steps their begin.
    pub fn restart(&mut self, values: Vec<f32>) {
        self.forget();
        self.target.clone_from(&values);
        self.reference = values;
    }

    /// What the ranks have after an average of these values.
    pub fn average(&mut self, values: &[Vec<f32>], weights: Option<&[f64]>) {
        let shares = shares(values.len(), weights);
        let world = values.len();
        for (range, owner) in self.chunks.clone() {
            let mut sum: Option<Vec<f32>> = None;
            for hop in 1..=world {
                let rank = (owner + hop) % world;
                let residual = &mut self.residual[rank][range.clone()];
                if let Some(share) = shares[rank] {
                    let reference = &self.reference[range.clone()];
                    let own = &values[rank][range.clone()];
                    for ((d, x), a) in residual.iter_mut().zip(own).zip(reference) {
                        *d += (x - a) * share;
                    }
                }
                let mut with_own = residual.to_vec();
                if let Some(came) = sum {
                    with_own.iter_mut().zip(came).for_each(|(own, came)| *own += came);
                }
                if hop == world {
                    residual.fill(0.0);
                    sum = Some(with_own);
                    break;
                }
                let sent = coded(self.code, &with_own);
                for ((d, v), sent) in residual.iter_mut().zip(&with_own).zip(&sent) {
                    *d = if self.feeds_back { v - sent } else { 0.0 };
                }
                sum = Some(sent);
            }
            let target = &mut self.target[range.clone()];
            for ((i, t), sum) in range.clone().zip(target.iter_mut()).zip(sum.unwrap()) {
                let mean = *t + sum;
                *t = match self.outer {
                    None => mean,
                    Some(Momentum { lr, a, b, mu }) => {
                        let delta = *t - mean;
                        self.velocity[i] = self.velocity[i] * mu + delta;
                        *t - (delta * a + self.velocity[i] * b) * lr
                    }
                };
            }
            let reference = &mut self.reference[range.clone()];
            let missing: Vec<f32> = target.iter().zip(&*reference).map(|(t, a)| t - a).collect();
            let sent = coded(self.code, &missing);
            reference.iter_mut().zip(sent).for_each(|(a, sent)| *a += sent);
            if !self.feeds_back {
                target.copy_from_slice(reference);
            }
        }
    }
}

/// Each rank's share of the mean; `None` for a rank that does not count.
fn shares(world: usize, weights: Option<&[f64]>) -> Vec<Option<f32>> {
    let even = vec![1.0; world];
    let weights = weights.unwrap_or(&even);
    let most = weights.iter().copied().fold(0.0, f64::max);
    let count = weights.iter().filter(|&&w| w > 0.0).count();
    let part = 1.0 / count.next_power_of_two() as f64;
    let scales = weights.iter().map(|w| (*w > 0.0).then(|| (w / most * part) as f32));
    let scales: Vec<Option<f32>> = scales.collect();
    let divisor: f64 = scales.iter().flatten().map(|&scale| f64::from(scale)).sum();
    scales.iter().map(|scale| scale.map(|scale| scale / divisor as f32)).collect()
}

/// What a chunk's values are after their way over the wire.
pub fn coded(code: Compression, values: &[f32]) -> Vec<f32> {
    match code {
        Compression::Bf16 => values.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
        Compression::Int8 => values.chunks(BLOCK).flat_map(int8).collect(),
        _ => values.to_vec(),
    }
}

fn int8(block: &[f32]) -> Vec<f32> {
    let most = block.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    if most < 2.0f32.powi(-100) {
        return vec![0.0; block.len()];
    }
    let (scale, factor) = (most / 127.0, 127.0 / most);
    block.iter().map(|x| (x * factor).round_ties_even() * scale).collect()
}
