//! Exact references for results.

use param_averager::Dtype;

/// The distance between a number of this magnitude and the next one of that dtype.
pub fn ulp(dtype: Dtype, magnitude: f64) -> f64 {
    let (bits, least, _) = format(dtype);
    let exponent =
        if magnitude > 0.0 { (magnitude.log2().floor() as i32).max(least) } else { least };
    f64::from(exponent - bits).exp2() // powi would take the reciprocal of infinity
}

/// Mantissa bits, exponent of the smallest normal number, and of the largest.
pub fn format(dtype: Dtype) -> (i32, i32, i32) {
    match dtype {
        Dtype::F32 => (23, -126, 127),
        Dtype::F64 => (52, -1022, 1023),
        Dtype::F16 => (10, -14, 15),
        _ => (7, -126, 127),
    }
}

/// The mean with compensated sums, and the largest magnitude that went in. A rank whose weight is
/// zero does not count.
pub fn mean(values: &[f64], weights: &[f64]) -> (f64, f64) {
    let (mut sum, mut lost, mut total, mut most) = (0.0f64, 0.0, 0.0, 0.0f64);
    for (&x, &w) in values.iter().zip(weights).filter(|(_, &w)| w > 0.0) {
        let term = x * w;
        lost += f64::mul_add(x, w, -term);
        let next = sum + term;
        lost += if sum.abs() >= term.abs() { (sum - next) + term } else { (term - next) + sum };
        sum = next;
        total += w;
        most = most.max(x.abs());
    }
    ((sum + lost) / total, most)
}

/// FNV-1a over these words: equal for equal models.
pub fn fnv1a(words: impl IntoIterator<Item = u64>) -> u64 {
    words
        .into_iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, word| (hash ^ word).wrapping_mul(0x100_0000_01b3))
}
