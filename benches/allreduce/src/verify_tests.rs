//! The check itself: it lets a right mean pass and catches a wrong one.

use half::{bf16, f16};
use param_averager::Dtype;

use super::*;
use crate::layout::{Layout, Tensor};
use crate::memory::{arena, place};

const ELEMENTS: u64 = 70_001; // two pieces, the last ragged

const PLAIN: Roundings = Roundings { more: 0, wire: Wire::Wide, stepped: false };

/// Fresh data of two tensors.
pub fn check(dtype: Dtype, ranks: usize) -> Check {
    let tensor = |name: &str, elements| Tensor { name: name.into(), shape: vec![elements], dtype };
    let (tensors, bytes) = place(&Layout::new("test", vec![tensor("a", 5), tensor("b", ELEMENTS)]));
    let arenas = (0..ranks).map(|_| arena(bytes)).collect();
    let weights = vec![1.0; ranks];
    let check = Check { seed: 7, arenas, first: 0, tensors, weights, roundings: PLAIN };
    // SAFETY: no other thread has the arenas.
    unsafe { check.fill() };
    check
}

/// The elements of a tensor of a rank.
#[allow(clippy::mut_from_ref)] // of memory that the arenas share
fn of<T: Number>(check: &Check, rank: usize, tensor: usize) -> &mut [T] {
    let piece = Piece { tensor, begin: 0, elements: check.tensors[tensor].elements };
    // SAFETY: the tests use one at a time.
    unsafe { &mut *check.elements::<T>(rank, piece) }
}

/// The mean in f64, rounded once.
fn average<T: Number>(check: &Check, round: impl Fn(f64) -> T, back: impl Fn(T) -> f64) {
    let n = check.arenas.len();
    for tensor in 0..check.tensors.len() {
        for k in 0..check.tensors[tensor].elements {
            let sum: f64 = (0..n).map(|rank| back(of::<T>(check, rank, tensor)[k])).sum();
            (0..n).for_each(|rank| of::<T>(check, rank, tensor)[k] = round(sum / n as f64));
        }
    }
}

/// A step of an outer optimizer rounds twice more, and no more than that is let through.
#[test]
fn a_step_has_room_for_two_roundings() {
    let bound = |stepped| Roundings { stepped, ..PLAIN }.bound::<f32>(2.0, 1.0, 2.0);
    assert_eq!(bound(true) - bound(false), 2f64.powi(-21), "an ulp of 4");
    let mut check = check(Dtype::F32, 2);
    average(&check, |x| x as f32 + 1.5 * f32::EPSILON, f64::from);
    // SAFETY: no other thread has the arenas.
    let wrong = |check: &Check| unsafe { check.found() }.wrong;
    let without = wrong(&check);
    check.roundings.stepped = true;
    assert!(without > 0 && wrong(&check) == 0, "{without}");
    average(&check, |x| x as f32 + 8.0 * f32::EPSILON, f64::from);
    assert!(wrong(&check) > ELEMENTS, "{}", wrong(&check));
}

fn catches_what_is_wrong<T: Number>(
    dtype: Dtype,
    round: impl Fn(f64) -> T + Copy,
    back: impl Fn(T) -> f64 + Copy,
    next: impl Fn(T, u64) -> T,
) {
    for ranks in [2, 3, 5] {
        let check = check(dtype, ranks);
        // SAFETY: no other thread has the arenas.
        let wrong = || unsafe { check.found() }.wrong;
        assert!(wrong() > ranks as u64 * ELEMENTS / 2, "nothing has been averaged yet");
        average(&check, round, back);
        assert_eq!(wrong(), 0, "{dtype}, {ranks} ranks");

        // One rank's last element differs in its last bit.
        let last = ELEMENTS as usize - 1;
        let right = of::<T>(&check, 1, 1)[last];
        of::<T>(&check, 1, 1)[last] = next(right, 1);
        assert_eq!(wrong(), 1);
        of::<T>(&check, 1, 1)[last] = right;

        // All ranks agree on a value in the other tensor that is further off than rounding
        // explains: for halves two neighbours on, else so many as make it sure at any mean of
        // inputs that are 16 times as large at most.
        let far = if size_of::<T>() == 2 { 2 } else { 64 * 16 };
        let size = |at: usize| back(of::<T>(&check, 0, 0)[at]).abs();
        let at = (0..5).max_by(|&a, &b| size(a).total_cmp(&size(b))).unwrap();
        let right = of::<T>(&check, 0, 0)[at];
        (0..ranks).for_each(|rank| of::<T>(&check, rank, 0)[at] = next(right, far));
        assert_eq!(wrong(), ranks as u64);
        (0..ranks).for_each(|rank| of::<T>(&check, rank, 0)[at] = right);

        // A NaN, an element that was left out, a rank that was left out.
        of::<T>(&check, 0, 1)[3] = round(f64::NAN);
        assert_eq!(wrong(), ranks as u64, "rank 0 is off, and the others differ from it");
        of::<T>(&check, 0, 1)[3] = of::<T>(&check, 1, 1)[3];
        assert_eq!(wrong(), 0);
        of::<T>(&check, ranks - 1, 1).fill(round(0.25));
        assert!(wrong() > ELEMENTS * 9 / 10);
    }
}

#[test]
fn a_right_mean_passes_and_a_wrong_one_is_caught() {
    let f32_next = |x: f32, k| f32::from_bits(x.to_bits() + k as u32);
    catches_what_is_wrong::<f32>(Dtype::F32, |x| x as f32, f64::from, f32_next);
    catches_what_is_wrong::<f64>(Dtype::F64, |x| x, |x| x, |x, k| f64::from_bits(x.to_bits() + k));
    let f16_next = |x: f16, k| f16::from_bits(x.to_bits() + k as u16);
    catches_what_is_wrong::<f16>(Dtype::F16, f16::from_f64, f64::from, f16_next);
    let bf16_next = |x: bf16, k| bf16::from_bits(x.to_bits() + k as u16);
    catches_what_is_wrong::<bf16>(Dtype::Bf16, bf16::from_f64, f64::from, bf16_next);
}

#[test]
fn the_largest_error_is_in_ulps_of_the_largest_input() {
    let (check, at) = (check(Dtype::Bf16, 3), 12_345);
    let sizes = (0..3).map(|rank| f64::from(of::<bf16>(&check, rank, 1)[at]).abs());
    let largest = sizes.fold(0.0, f64::max);
    average(&check, bf16::from_f64, f64::from);
    // SAFETY: no other thread has the arenas.
    let found = || unsafe { check.found() };
    let ulps = found().ulps;
    assert!(ulps > 0.4 && ulps <= 0.5, "{ulps}: rounded once");
    let off = of::<bf16>(&check, 0, 1)[at].to_f64() + 20.0 * ulp::<bf16>(largest);
    (0..3).for_each(|rank| of::<bf16>(&check, rank, 1)[at] = bf16::from_f64(off));
    assert!((18.0..22.0).contains(&found().ulps), "{}", found().ulps);
    of::<bf16>(&check, 0, 0)[0] = bf16::NAN;
    assert_eq!(found().ulps, f64::INFINITY);
}

#[test]
fn the_wire_widens_the_tolerance_of_halves_only() {
    let on = |wire| Roundings { wire, ..PLAIN };
    let at = |wire| on(wire).bound::<bf16>(4.0, 1.0, 2.0);
    let half_ulp = power(-8);
    assert!((half_ulp..1.01 * half_ulp).contains(&at(Wire::Wide)));
    // Two half ulps of a partial mean of up to 2, and one of the mean, 1.
    let narrow = at(Wire::Narrow) / half_ulp;
    assert!((5.0..5.1).contains(&narrow), "{narrow}");
    // Five ulp of the largest input, which is 2.
    assert_eq!(at(Wire::NarrowAndScaled), 5.0 * 4.0 * half_ulp);
    for wire in [Wire::Wide, Wire::Narrow, Wire::NarrowAndScaled] {
        let f32s = on(wire).bound::<f32>(4.0, 1.0, 2.0);
        assert_eq!(f32s, 4.0 * f64::from(f32::EPSILON) * 2.0);
    }
}

#[test]
fn data_is_fresh_spread_and_different_everywhere() {
    let check = check(Dtype::F32, 2);
    let (a, b) = (of::<f32>(&check, 0, 1).to_vec(), of::<f32>(&check, 1, 1).to_vec());
    let products = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum();
    let mean_of = |sum: f64| sum / a.len() as f64;
    let mean = mean_of(a.iter().map(|&x| f64::from(x)).sum());
    let (variance, covariance) = (mean_of(products(&a, &a)), mean_of(products(&a, &b)));
    assert!(a.iter().all(|x| x.abs() <= 4.0) && mean.abs() < 0.02, "{mean}");
    assert!((1.2..1.5).contains(&variance), "{variance}: 4/3 of four uniform numbers");
    assert!(covariance.abs() < 0.02, "{covariance}: ranks have different values");
    let check = Check { seed: 8, ..check };
    // SAFETY: no other thread has the arenas.
    unsafe { check.fill() };
    assert!(of::<f32>(&check, 0, 1).iter().zip(&a).filter(|(x, y)| x == y).count() < 50);
}

#[test]
fn a_rank_alone_has_the_data_and_the_digest_of_the_rank_among_all() {
    let all = check(Dtype::Bf16, 3);
    for rank in 0..3 {
        let arenas = check(Dtype::Bf16, 1).arenas;
        let alone = Check { arenas, first: rank, ..check(Dtype::Bf16, 3) };
        let same = Check { arenas: vec![all.arenas[rank].clone()], ..check(Dtype::Bf16, 3) };
        // SAFETY: no other thread has the arenas. What the second check wrote is overwritten.
        unsafe { (alone.fill(), all.fill()) };
        // SAFETY: as above.
        let digests = || unsafe { (alone.digest(), same.digest()) };
        assert_eq!(digests().0, digests().1);
        for place in [0, ELEMENTS as usize - 1] {
            let element = &mut of::<bf16>(&same, 0, 1)[place];
            *element = bf16::from_bits(element.to_bits() ^ 1);
            assert_ne!(digests().0, digests().1, "rank {rank}, element {place}");
            *element = bf16::from_bits(element.to_bits() ^ 1);
        }
    }
}
