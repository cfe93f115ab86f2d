//! Coded averages of processes, of copies and in place: segment by segment where they share a
//! device.

use param_averager::*;

use super::ranks::hash;
use super::{Case, ONE, TWO};
use crate::cuda::model::{Model, Shape};
use test_support::rank::{builder, device, join, say};
use test_support::ranks;

/// Model of two fragments, the first of which is one tensor.
const SHAPES: [Shape; 3] = [(Dtype::F32, 3001, 1), (Dtype::F32, 64, 0), (Dtype::F32, 2500, 3)];

pub fn coded_averages_have_the_bits_of_the_cpu() {
    let one = Case { devices: &[0, 0], hidden: false, link: "auto", settings: &[ONE] };
    let cases = [
        one,
        Case { devices: &[0; 3], ..one },
        Case { devices: &[0, 1], settings: &[TWO], ..one },
        Case { devices: &[0, 1], settings: &[TWO], link: "host", ..one },
    ];
    for case in cases {
        let Some(mut all) = case.start("coded-copies", |_| vec![]) else { return };
        let expected = ranks(all.len(), |communicator| {
            let of = |communicator| {
                let builder = test_support::options(communicator).channels(2);
                builder.chunk_bytes(1 << 10)
            };
            series(Device::cpu(), &communicator, &of).unwrap()
        });
        for rank in &mut all {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            let number: usize = rank.said("rank")[0].parse().unwrap();
            assert_eq!(rank.said("bits"), expected[number], "not the bits of the CPU");
        }
    }
}

/// Role: prints the bits of a series.
pub fn rank() -> Result<()> {
    let communicator = join()?;
    say(&format!("rank {}", communicator.rank()));
    for bits in series(device(), &communicator, &builder)? {
        say(&format!("bits {bits}"));
    }
    Ok(())
}

/// Bits of this rank's tensors after averages of both fragments' copies, one of which fails once,
/// and after one in place, by each code and with and without an outer optimizer.
fn series(
    on: Device,
    communicator: &Communicator,
    builder: &dyn Fn(Communicator) -> Builder,
) -> Result<Vec<String>> {
    const FAILS: usize = 2;
    let (rank, world) = (communicator.rank(), communicator.world_size());
    let (mut bits, mut kept) = (vec![], vec![]);
    for (code, outer) in [
        (Compression::Bf16, Outer::mean()),
        (Compression::Int8, Outer::mean()),
        (Compression::Int8, Outer::diloco()),
    ] {
        let model = |round: usize| Model::new(on, &SHAPES, (100 * round + rank) as u64);
        let mut models: Vec<Model> = (0..6).map(model).collect();
        let builder = builder(communicator.clone()).reject_non_finite(true);
        let builder = builder.compression(code).outer(outer);
        let builder = builder.overlap(Overlap::default().fragments(2).delay(1));
        let mut averager = builder.start_from(Start::Rank(0)).build(&mut models[0])?;
        for (round, model) in models[1..].iter_mut().enumerate() {
            let is_odd = round == FAILS && rank + 1 == world;
            if is_odd {
                model.set(0, 300, f32::NAN);
            }
            for fragment in [1, 0, 1] {
                let average = averager.start_overlapped(fragment, model)?;
                match averager.finish_overlapped(average, model) {
                    Ok(report) => assert_eq!(report.compression, code),
                    Err(Error::NonFinite { .. }) if round == FAILS && fragment == 0 => {}
                    Err(error) => return Err(error),
                }
            }
            model.download();
            bits.push(format!("{:x}", hash(model.bytes())));
            if is_odd {
                model.set(0, 300, 1.0);
            }
            assert_eq!(averager.average(model)?.compression, code);
            model.download();
            assert!(model.guards_are_whole());
            bits.push(format!("{:x}", hash(model.bytes())));
        }
        kept.push((averager, models)); // freed when all are done
    }
    // A device frees memory when its kernels are done, also those that wait for a peer.
    kept.iter_mut().try_for_each(|(averager, _)| averager.barrier())?;
    Ok(bits)
}
