//! Role of a rank whose averages are coded, in a world that loses ranks and gets new ones: every
//! element is within the bound of what the ranks have added, and all ranks have the same bits after
//! an average in place. With `PA_TEST_COPIES` every other one is of a copy.

use param_averager::*;

use super::model::Tensors;
use super::worker::{builder, device, die, join, number, say};
use crate::Random;

const SIZES: [usize; 3] = [3001, 7, 1500];
/// The largest of what a rank adds in a round.
const MOST: u64 = 63;

/// What a rank adds in a round: small integers.
fn way(origin: u32, round: u64) -> Vec<Vec<f32>> {
    let mut random = Random(round << 8 | u64::from(origin));
    let tensor = |size| (0..size).map(|_| random.below(MOST + 1) as f32).collect();
    SIZES.into_iter().map(tensor).collect()
}

/// How far a coded average of n ranks is from the mean at most: n codes, of this one and of those
/// before; 1.1 for residuals and what f32 rounds.
fn bound(ranks: u32) -> f64 {
    2.0 * 1.1 * f64::from(ranks) * MOST as f64 / 254.0
}

fn digest(model: &[Vec<f32>]) -> u64 {
    let mix = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0193);
    model.iter().flatten().fold(0xcbf2_9ce4, mix)
}

/// A rank between two averages.
struct Trainer {
    averager: ParamAverager,
    model: Tensors,
    origin: u32,
    round: u64,
    /// The ranks of this view, as a mask, and the values that all had after the last average; none
    /// before the first one.
    view: Option<(u64, Vec<Vec<f32>>)>,
    /// Step of its third coded average before which it dies.
    dies_at: Option<u32>,
    coded: u32,
    copies: bool,
}

impl Trainer {
    /// The first average of a view: of equal values, in full.
    fn begin(&mut self) -> Result<Report> {
        let mut numbers = [f64::from(1u32 << self.origin)];
        self.averager.all_reduce_scalars(&mut numbers, Reduction::Sum)?;
        let mut farthest = [self.round as f64];
        self.averager.all_reduce_scalars(&mut farthest, Reduction::Max)?;
        self.round = farthest[0] as u64 + 1;
        let values = way(63, self.round);
        self.model.set(values.clone());
        let report = self.averager.average(&mut self.model)?;
        self.model.download();
        assert_eq!((report.compression, &self.model.values), (Compression::None, &values));
        say(&format!("agreed {:x}", digest(&values)));
        self.view = Some((numbers[0] as u64, values));
        Ok(report)
    }

    fn step(&mut self) -> Result<Report> {
        let Some((members, before)) = self.view.take() else { return self.begin() };
        self.round += 1;
        let origins = || (0..64u32).filter(|origin| members >> origin & 1 == 1);
        let ways: Vec<_> = origins().map(|origin| way(origin, self.round)).collect();
        let own = way(self.origin, self.round);
        let moved = |way: &[Vec<f32>]| -> Vec<Vec<f32>> {
            let add = |(x, way): (&f32, &f32)| x + way;
            let of = |(x, way): (&Vec<f32>, &Vec<f32>)| x.iter().zip(way).map(add).collect();
            before.iter().zip(way).map(of).collect()
        };
        let own = moved(&own);
        self.model.set(own.clone());
        self.coded += 1;
        let dies = self.dies_at.filter(|_| self.coded == 3);
        if let Some(step) = dies {
            // SAFETY: processes average by the ring: no peer touches the tensors.
            unsafe { self.averager.leave_before_step(step) };
        }
        let is_of_copy = self.copies && self.round.is_multiple_of(2);
        let made = match is_of_copy {
            true => self
                .averager
                .start_overlapped(0, &mut self.model)
                .and_then(|average| self.averager.finish_overlapped(average, &mut self.model)),
            false => self.averager.average(&mut self.model),
        };
        self.model.download();
        if let Some(step) = dies {
            if made.is_err() {
                die();
            }
            say(&format!("no step {step}: it has {}", self.averager.steps()));
            std::process::exit(4);
        }
        assert!(
            !is_of_copy
                || made
                    .as_ref()
                    .err()
                    .is_none_or(|error| { error.tensors() == TensorState::Unchanged })
        );
        let written = match &made {
            Ok(_) => Some(true),
            Err(error) if error.tensors() == TensorState::Unchanged => Some(false),
            Err(_) => None, // each element is either
        };
        let bound = bound(members.count_ones());
        for (t, (got, own)) in self.model.values.iter().zip(&own).enumerate() {
            for (i, (got, own)) in got.iter().zip(own).enumerate() {
                let sum: f32 = ways.iter().map(|way| way[t][i]).sum();
                let mean = before[t][i] + sum / ways.len() as f32;
                let is_mean = f64::from((got - mean).abs()) <= bound;
                let is_own = got.to_bits() == own.to_bits();
                let fits = match written {
                    Some(true) => is_mean,
                    Some(false) => is_own,
                    None => is_mean || is_own,
                };
                assert!(fits, "{t}, {i}: {got}, own {own}, mean {mean} ± {bound}: {written:?}");
            }
        }
        let report = made?;
        assert_eq!(report.compression, Compression::Int8);
        assert_eq!(report.world_size as u32, members.count_ones());
        self.view = Some((members, self.model.values.clone()));
        Ok(report)
    }
}

/// Role: averages in code and checks every element, until `PA_TEST_ROUNDS` rounds have had
/// `PA_TEST_FINAL` ranks. Dies before step `PA_TEST_DIE_AT` of its third coded average.
pub fn coded() -> i32 {
    let origin = number("PA_TEST_ORIGIN").or(number("PA_TEST_RANK")).unwrap() as u32;
    let mut model = Tensors::new(way(origin, 0), device());
    let copies = number("PA_TEST_COPIES") == Some(1);
    let options = |communicator| {
        let overlap = Overlap::default().delay(u64::from(copies));
        let builder = builder(communicator).reject_non_finite(true).overlap(overlap);
        builder.compression(Compression::Int8)
    };
    let averager = match join().and_then(|world| options(world).build(&mut model)) {
        Ok(averager) => averager,
        Err(error) => {
            say(&format!("error {error}"));
            return 3;
        }
    };
    let dies_at = number("PA_TEST_DIE_AT").map(|step| step as u32);
    let mut trainer =
        Trainer { averager, model, origin, round: 0, view: None, dies_at, coded: 0, copies };
    let left = number("PA_TEST_FINAL").unwrap() as usize;
    let mut good = 0;
    say("ready");
    loop {
        match trainer.step() {
            Ok(report) => {
                good = if report.world_size == left { good + 1 } else { 0 };
                let is_in_place = !copies || trainer.round % 2 == 1;
                if is_in_place && good > number("PA_TEST_ROUNDS").unwrap_or(4) {
                    let digest = digest(&trainer.model.values);
                    say(&format!("done {} {digest:x}", trainer.round));
                    return 0;
                }
                if report.join_pending {
                    trainer.averager.admit_joiner(&mut trainer.model).unwrap();
                    trainer.view = None;
                }
            }
            Err(error) if error.is_fatal() => {
                say(&format!("failed {error:?}"));
                trainer.view = None;
                match trainer.averager.recover(&mut trainer.model) {
                    Ok(()) => {}
                    Err(Error::Excluded { .. }) => return 5,
                    Err(error) => panic!("recover: {error}"),
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
}
