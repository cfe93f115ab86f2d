//! Outer optimizers against torch's own, recorded in `fixtures/torch_sgd.txt` by the script beside.

use param_averager::{Dtype, Outer, ParamAverager};
use test_support::{ranks, ulp};

fn numbers(line: &str) -> Vec<f32> {
    line.split(' ').map(|bits| f32::from_bits(u32::from_str_radix(bits, 16).unwrap())).collect()
}

/// Ten rounds of each case. On a CPU torch rounds `parameters - lr · gradient` once, and
/// `gradient + mu · velocity` too; the kernels round each product. So bits differ, by at most 2 ulp
/// of the largest number that went into the element.
#[test]
fn steps_are_those_of_torch_within_2_ulp() {
    let text = include_str!("fixtures/torch_sgd.txt");
    let mut lines = text.lines().filter(|line| !line.starts_with('#')).peekable();
    let (mut cases, mut worst) = (0, 0.0f64);
    while let Some(head) = lines.next() {
        let [name, lr, mu] = head.split(' ').collect::<Vec<_>>()[..] else { panic!("{head}") };
        let (lr, mu) = (lr.parse().unwrap(), mu.parse().unwrap());
        let outer = match name {
            "sgd" => Outer::sgd(lr),
            "momentum" => Outer::momentum(lr, mu),
            "nesterov" => Outer::nesterov(lr, mu),
            other => panic!("{other}"),
        };
        let begin = numbers(lines.next().unwrap());
        let rounds: Vec<(Vec<f32>, Vec<f32>)> = (0..10)
            .map(|_| (numbers(lines.next().unwrap()), numbers(lines.next().unwrap())))
            .collect();
        // One rank's mean is its own values. Two ranks' is exact here: both have the same.
        for world in [1, 2] {
            let results = ranks(world, |communicator| {
                let mut model = begin.clone();
                let builder = ParamAverager::builder(communicator).outer(outer);
                let mut averager = builder.build(&mut model).unwrap();
                assert_eq!(model, begin);
                let after = |(mean, _): &(Vec<f32>, Vec<f32>)| {
                    model.copy_from_slice(mean);
                    averager.average(&mut model).unwrap();
                    model.clone()
                };
                rounds.iter().map(after).collect::<Vec<_>>()
            });
            for result in results {
                let mut most: Vec<f64> = begin.iter().map(|x| f64::from(x.abs())).collect();
                for (got, (mean, want)) in result.iter().zip(&rounds) {
                    for (i, most) in most.iter_mut().enumerate() {
                        let (mean, want) = (f64::from(mean[i]), f64::from(want[i]));
                        *most = most.max(mean.abs()).max(want.abs());
                        let off = (f64::from(got[i]) - want).abs() / ulp(Dtype::F32, *most);
                        worst = worst.max(off);
                        assert!(off <= 2.0, "{head}: {} instead of {want}, {off} ulp", got[i]);
                    }
                }
            }
        }
        cases += 1;
    }
    assert_eq!(cases, 7);
    println!("torch: at most {worst} ulp");
}
