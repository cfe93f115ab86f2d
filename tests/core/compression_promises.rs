//! Compression: what is made in full, what is refused, and what goes with the rest of the API.

use param_averager::{
    Builder, Compression, Error, LocalSgd, Outer, ParamAverager, Report, Schedule,
};
use test_support::{ranks, Random};

use crate::compression::CODES;

/// A difference that f32 does not hold has no code, though its tensors are finite.
#[test]
fn differences_that_overflow_are_refused() {
    for code in CODES {
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![-3e38f32; 300];
            let builder = ParamAverager::builder(communicator).compression(code);
            let mut averager = builder.build(&mut model).unwrap();
            if rank == 1 {
                model[200] = 3e38;
            }
            let before = model.clone();
            let error = averager.average(&mut model).unwrap_err();
            assert!(matches!(error, Error::NonFinite { rank: 1, element: 200, .. }), "{error}");
            assert_eq!(model, before);
            model[200] = -3e38;
            averager.average(&mut model).unwrap();
            assert_eq!(model, [-3e38; 300]);
        });
    }
}

/// Averages that give the ranks values are made in full, bit for bit.
#[test]
fn copies_and_first_averages_are_in_full() {
    for code in CODES {
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut random = Random(rank as u64);
            let mut values = || -> Vec<f32> { (0..500).map(|_| random.value() as f32).collect() };
            let mut model = values();
            let mut averager =
                test_support::options(communicator).compression(code).build(&mut model).unwrap();
            let of = |report: Report| report.compression;
            assert_eq!(of(averager.average(&mut model).unwrap()), Compression::None);
            assert_eq!(of(averager.average(&mut model).unwrap()), code);
            model = values();
            let own = model.clone();
            assert_eq!(of(averager.broadcast(1, &mut model).unwrap()), Compression::None);
            assert!(rank != 1 || model == own, "a copy has the bits of its source");
            let copied = model.clone();
            assert_eq!(of(averager.average(&mut model).unwrap()), code);
            assert_eq!(model, copied, "without a difference nothing changes");
        });
    }
}

/// After a load, outer steps begin from parameters that the ranks have not had last: that average
/// is made in full.
#[test]
fn the_first_average_after_a_load_is_in_full() {
    let build = |communicator, model: &mut Vec<f32>| {
        let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
        let averager = builder.outer(Outer::diloco()).build(model).unwrap();
        LocalSgd::new(averager, Schedule::every(1))
    };
    let step = |sgd: &mut LocalSgd, model: &mut Vec<f32>, rank: usize| {
        model.iter_mut().enumerate().for_each(|(i, x)| *x += (i * (rank + 1)) as f32 * 1e-3);
        sgd.step(model).unwrap().report().unwrap().compression
    };
    let saved = ranks(2, |communicator| {
        let (rank, mut model) = (communicator.rank(), vec![1.0f32; 700]);
        let mut sgd = build(communicator, &mut model);
        for _ in 0..3 {
            assert_eq!(step(&mut sgd, &mut model, rank), Compression::Int8);
        }
        (sgd.save().unwrap(), model)
    });
    let models = ranks(2, |communicator| {
        let rank = communicator.rank();
        let (bytes, mut model) = saved[rank].clone();
        let mut sgd = build(communicator, &mut vec![0.0f32; 700]);
        sgd.load(&bytes).unwrap();
        assert_eq!(step(&mut sgd, &mut model, rank), Compression::None);
        assert_eq!(step(&mut sgd, &mut model, rank), Compression::Int8);
        model
    });
    assert_eq!(models[0], models[1]);
    assert!(models[0].iter().all(|x| x.is_finite()));
}

/// A rank that makes a coded average and one that makes it in full are told so.
#[test]
fn ranks_that_code_and_do_not_are_told_so() {
    for ends in [false, true] {
        code_and_do_not(ends);
    }
}

/// `ends`: the rank that does not code has ended its steps.
fn code_and_do_not(ends: bool) {
    ranks(2, |communicator| {
        let (rank, mut model) = (communicator.rank(), vec![1.0f32; 100]);
        let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
        let averager = builder.outer(Outer::diloco()).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        let bytes = sgd.save().unwrap();
        if rank == 1 {
            sgd.load(&bytes).unwrap(); // on this rank alone
        }
        let before = model.clone();
        let made = match rank {
            1 if ends => sgd.done(&mut model),
            _ => sgd.step(&mut model),
        };
        let error = made.unwrap_err();
        let is_typed = matches!(error, Error::SchedulesDiffer { .. } | Error::CallsDiffer { .. });
        let text = error.to_string();
        assert!(is_typed && text.contains(", coded") && text.contains(", in full"), "{text}");
        assert_eq!(model, before);
    });
}

/// An average in full that is refused after its sums leaves nothing of them to the next coded one.
#[test]
fn a_refused_copy_does_not_spoil_the_next_average() {
    ranks(3, |communicator| {
        let (rank, mut model) = (communicator.rank(), vec![1.0f32; 1000]);
        let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
        let mut averager = builder.build(&mut model).unwrap();
        for round in 0..2 {
            let report = averager.average(&mut model).unwrap();
            assert_eq!(report.compression, Compression::Int8);
            if rank == 0 {
                model[17] = f32::NAN;
            }
            let error = averager.broadcast(0, &mut model).unwrap_err();
            assert!(matches!(error, Error::NonFinite { rank: 0, element: 17, .. }), "{error}");
            model.fill((1 + round + rank) as f32);
        }
        averager.average(&mut model).unwrap();
        assert!(model.iter().all(|x| (x - 3.0).abs() < 3.0 * 3.0 / 254.0), "{:?}", &model[..20]);
    });
}

#[test]
fn what_can_not_be_coded_is_refused() {
    let refused = |option: &'static str, found: &'static str, set: fn(Builder) -> Builder| {
        ranks(2, move |communicator| {
            let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
            let error = set(builder).build(&mut vec![0.0f32; 8]).unwrap_err();
            let Error::InvalidOption { option: named, found: text, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!((*named, &text[..]), (option, found));
        });
    };
    refused("algorithm", "Direct, with Compression::Int8", |builder| {
        builder.algorithm(param_averager::Algorithm::Direct)
    });
    refused("all_or_nothing", "false, with Compression::Int8", |b| b.all_or_nothing(false));
    refused("reject_non_finite", "false, with Compression::Int8", |b| b.reject_non_finite(false));
    refused("stage", "one, with Compression::Int8", |builder| builder.stage(|_| Ok(())));
    refused("outer", "sgd(1).keeping(0.5), with Compression::Int8", |builder| {
        builder.outer(Outer::ease(0.5))
    });
    ranks(2, |communicator| {
        let mut model = (vec![0.0f32; 8], vec![half::bf16::ZERO; 9]);
        let builder = ParamAverager::builder(communicator).compression(Compression::Bf16);
        let error = builder.build(&mut model).unwrap_err().to_string();
        assert!(error.contains("Bf16, with tensor 1") && error.contains("bf16"), "{error}");
    });
    ranks(2, |communicator| {
        let code = [Compression::None, Compression::Int8][communicator.rank()];
        let builder = ParamAverager::builder(communicator).compression(code);
        let error = builder.build(&mut vec![0.0f32; 8]).unwrap_err();
        assert!(matches!(&error, Error::OptionsDiffer { .. }), "{error}");
    });
}

/// The reference and the residual, with a word for each channel, are all that compression adds.
#[test]
fn memory_is_8_bytes_for_an_element() {
    const N: usize = 1 << 16;
    let of = |code| {
        ranks(2, move |communicator| {
            let builder = ParamAverager::builder(communicator).compression(code);
            let builder = builder.algorithm(param_averager::Algorithm::Ring).channels(2);
            builder.build(&mut vec![0.0f32; N]).unwrap().memory_overhead()
        })[0]
    };
    assert_eq!(of(Compression::Int8) - of(Compression::None), 8 * N + 2 * 4);
}

/// A rank without a peer has nothing to send.
#[test]
fn a_world_of_one_codes_nothing() {
    ranks(1, |communicator| {
        let mut model = vec![1.0f32; 100];
        let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
        let mut averager = builder.outer(Outer::sgd(0.5)).build(&mut model).unwrap();
        model.fill(2.0);
        let report = averager.average(&mut model).unwrap();
        assert_eq!((report.compression, model), (Compression::None, vec![1.5; 100]));
    });
}

/// Ranks with different numbers of steps: those that have ended take part without news.
#[test]
fn ranks_that_are_done_take_part() {
    let models = ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 300];
        let builder = ParamAverager::builder(communicator).compression(Compression::Int8);
        let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(2));
        for _ in 0..[2, 6, 10][rank] {
            model.iter_mut().for_each(|x| *x += 1.0);
            sgd.step(&mut model).unwrap();
        }
        sgd.done(&mut model).unwrap();
        model
    });
    assert_eq!(models[0], models[1]);
    assert_eq!(models[0], models[2]);
    let plain = 2.0 + 2.0 + 2.0 + 2.0 + 2.0; // a rank that is done counts in no mean
    assert!(models[0].iter().all(|x| (x - plain).abs() < 0.1), "{}", models[0][0]);
}
