//! Pieces of a shard, and the weighted mean of all hosts' values of one.

use crate::stage::Values;

/// Bytes of a piece of the shard, on one host.
const PIECE: usize = 4 << 20;
/// Bytes of a host's part of a piece at least, so that with many hosts an exchange is not made of
/// the latency of its messages.
const PART: usize = 16 << 10;
/// Elements that are summed at a time.
const TILE: usize = 256;

/// Bytes of a piece.
pub(super) fn piece(hosts: usize) -> usize {
    PIECE.max(hosts * PART)
}

/// Value in the type of sums.
pub(super) trait Value: bytemuck::Pod {
    fn of<'a>(values: Values<'a>) -> Option<&'a mut [Self]>;
    fn wide(self) -> f64;
    fn narrow(wide: f64) -> Self;
    fn bits(self) -> u64;
}

impl Value for f32 {
    fn of(values: Values<'_>) -> Option<&mut [f32]> {
        match values {
            Values::F32(values) => Some(values),
            Values::F64(_) => None,
        }
    }
    fn wide(self) -> f64 {
        self.into()
    }
    fn narrow(wide: f64) -> f32 {
        wide as f32
    }
    fn bits(self) -> u64 {
        self.to_bits().into()
    }
}

impl Value for f64 {
    fn of(values: Values<'_>) -> Option<&mut [f64]> {
        match values {
            Values::F64(values) => Some(values),
            Values::F32(_) => None,
        }
    }
    fn wide(self) -> f64 {
        self
    }
    fn narrow(wide: f64) -> f64 {
        wide
    }
    fn bits(self) -> u64 {
        self.to_bits()
    }
}

/// Place in a list of slices that are passed through from the first value to the last.
#[derive(Default)]
pub(super) struct Place {
    slice: usize,
    at: usize,
}

impl Place {
    /// Passes on over the next `count` values, run by run. `f` gets the number of values before.
    pub(super) fn each<T>(
        &mut self,
        slices: &mut [&mut [T]],
        count: usize,
        mut f: impl FnMut(usize, &mut [T]),
    ) {
        let mut done = 0;
        while done < count {
            let rest = &mut slices[self.slice][self.at..];
            let length = rest.len().min(count - done);
            f(done, &mut rest[..length]);
            done += length;
            self.at += length;
            if self.at == slices[self.slice].len() {
                *self = Place { slice: self.slice + 1, at: 0 };
            }
        }
    }
}

/// Weighted means of `mean.len()` values of each host, which follow one another.
pub(super) fn mean_of<T: Value>(values: &[T], weights: &[f64], mean: &mut [T]) {
    let part = mean.len();
    let most = weights.iter().copied().fold(0.0, f64::max);
    // Scales: weights relative to the largest, times a power of two by which no sum overflows where
    // the mean does not.
    let power = 1.0 / weights.len().next_power_of_two() as f64;
    let scale = |(host, weight): (usize, &f64)| (host, weight / most * power);
    let counted = weights.iter().enumerate().filter(|(_, &weight)| weight > 0.0);
    let counted: Vec<(usize, f64)> = counted.map(scale).collect();
    let total: f64 = counted.iter().map(|(_, weight)| weight).sum();
    let Some(&(first, _)) = counted.first() else { return };
    for (tile, means) in mean.chunks_mut(TILE).enumerate() {
        let length = means.len();
        let of = |host: usize| &values[host * part + tile * TILE..][..length];
        let (mut sums, mut differs) = ([0.0; TILE], [0; TILE]);
        for &(host, weight) in &counted {
            for ((value, one), (sum, differs)) in
                of(host).iter().zip(of(first)).zip(sums.iter_mut().zip(&mut differs))
            {
                *sum += weight * value.wide();
                *differs |= value.bits() ^ one.bits();
            }
        }
        for ((mean, one), (sum, differs)) in
            means.iter_mut().zip(of(first)).zip(sums.iter().zip(&differs))
        {
            *mean = if *differs == 0 { *one } else { T::narrow(sum / total) };
        }
    }
}
