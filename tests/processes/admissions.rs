//! Effects of an admission on the models of the members, and the errors when it fails half way.

use std::io::BufRead;
use std::time::Duration;

use half::{bf16, f16};
use param_averager::{
    Action, Error, Lend, LendError, Loan, LocalSgd, Parameters, Schedule, TensorMut, TensorState,
};
use rustix::process::Signal;

use test_support::process::{name, start, start_and_join, RankProcess};
use test_support::rank::{builder, is_late, join, number, say};
use test_support::Random;
use test_support::{count, seed};

/// A model of every dtype.
struct Mixed {
    f32: Vec<f32>,
    f64: Vec<f64>,
    f16: Vec<f16>,
    bf16: Vec<bf16>,
}

impl Mixed {
    /// Finite numbers of all magnitudes, different for each origin.
    fn new(origin: u64) -> Mixed {
        let mut random = Random(origin);
        let mut bits = || random.next_u64();
        let f32 = (0..1500).map(|_| f32::from_bits(bits() as u32 & 0xbf7f_ffff)).collect();
        let f64 = (0..300).map(|_| f64::from_bits(bits() & 0xbfef_ffff_ffff_ffff)).collect();
        let f16 = (0..4000).map(|_| f16::from_bits(bits() as u16 & 0xbbff)).collect();
        let bf16 = (0..4000).map(|_| bf16::from_bits(bits() as u16 & 0xbf7f)).collect();
        Mixed { f32, f64, f16, bf16 }
    }

    fn digest(&self) -> u64 {
        let all = self.f32.iter().map(|x| u64::from(x.to_bits()));
        let all = all.chain(self.f64.iter().map(|x| x.to_bits()));
        let all = all.chain(self.f16.iter().map(|x| u64::from(x.to_bits())));
        let all = all.chain(self.bf16.iter().map(|x| u64::from(x.to_bits())));
        all.fold(0xcbf2_9ce4_8422_2325, |hash: u64, x| (hash ^ x).wrapping_mul(0x100_0000_01b3))
    }
}

impl Parameters for Mixed {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        visit(TensorMut::from(&mut self.f32));
        visit(TensorMut::from(&mut self.f64));
        visit(TensorMut::from(&mut self.f16));
        visit(TensorMut::from(&mut self.bf16));
    }
}

/// Averages until a process waits to join, takes models of its own, and admits that process by the
/// first of two averagers; the second gets `StaleView`.
pub fn copies() -> i32 {
    let communicator = join().unwrap();
    let origin = number("PA_TEST_ORIGIN").unwrap_or(communicator.rank() as u64);
    let own = || [Mixed::new(origin), Mixed::new(origin + 100)];
    let mut models = own();
    let mut build = |index: usize| builder(communicator.clone()).build(&mut models[index]).unwrap();
    let [mut first, mut second] = [build(0), build(1)];
    if !is_late() {
        say("ready");
        while !first.average(&mut models[0]).unwrap().join_pending {}
        models = own();
        first.admit_joiner(&mut models[0]).unwrap();
        let error = second.average(&mut models[1]).unwrap_err();
        assert!(matches!(error, Error::StaleView { .. }), "{error}");
        second.recover(&mut models[1]).unwrap();
        for (model, before) in models.iter().zip(own()) {
            assert_eq!(
                model.digest(),
                before.digest(),
                "the admission has changed a model of rank {origin}"
            );
        }
    }
    let [one, other] = models.each_ref().map(Mixed::digest);
    say(&format!("has {one:x} {other:x} of {}", second.world_size()));
    second.average(&mut models[1]).unwrap(); // no rank leaves before
    0
}

/// Steps of Local SGD until one returns more than a plain average, with the mean of two ranks'
/// elements expected after each. A line on the standard input aborts the world.
pub fn admits() -> i32 {
    let communicator = join().unwrap();
    let origin = communicator.rank();
    let mut model = vec![vec![0.0f32; 3000]];
    let mut sgd =
        LocalSgd::new(builder(communicator).build(&mut model).unwrap(), Schedule::every(1));
    let handle = sgd.averager().abort_handle();
    std::thread::spawn(move || {
        if std::io::stdin().lock().read_line(&mut String::new()).is_ok_and(|bytes| bytes > 0) {
            handle.abort();
        }
    });
    say("ready");
    loop {
        model[0].fill(origin as f32);
        let result = sgd.step(&mut model);
        let is_mean = model[0].iter().all(|&x| x == 0.5);
        match result {
            Ok(Action::Averaged(report)) if !report.join_pending => assert!(is_mean),
            Ok(action) => {
                assert!(is_mean);
                assert_eq!(action.report().map(|report| report.world_size), Some(2), "{action:?}");
                say(&format!("action {action:?}"));
                return 0;
            }
            Err(error) => {
                assert!(is_mean && error.tensors() != TensorState::Unchanged, "{error:?}");
                say(&format!("error {error:?}"));
                let Error::AfterAverage { averaged: Some(report), .. } = error else { return 7 };
                assert!(report.join_pending && report.world_size == 2);
                return 0;
            }
        }
    }
}

/// A model that fails after an average that it was lent for, as one that is copied back may: after
/// the first and the third loan of a step, if it `fails`. The second one is for a build.
struct FailsLate {
    model: Vec<Vec<f32>>,
    fails: bool,
    loans: u32,
}

impl Lend for FailsLate {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        average(Loan::new(&mut self.model));
        self.loans += 1;
        match self.fails && self.loans % 2 == 1 {
            true => Err(LendError::new("the copy failed")),
            false => Ok(()),
        }
    }
}

/// Steps of Local SGD until the world has three ranks, and one more. Rank 1's model fails late in
/// every step but the last.
pub fn fails_late() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = FailsLate { model: vec![vec![0.0; 3000]], fails: false, loans: 0 };
    let mut sgd =
        LocalSgd::new(builder(communicator).build(&mut model).unwrap(), Schedule::every(1));
    say("ready");
    model.fails = rank == 1;
    while sgd.averager().world_size() < 3 {
        model.loans = 0;
        match sgd.step(&mut model) {
            Ok(Action::Averaged(_) | Action::Admitted { .. }) if rank == 0 => {}
            Err(Error::AfterAverage { averaged: Some(_), cause }) if rank == 1 => {
                assert!(matches!(*cause, Error::LendFailed { rank: 1, .. }), "{cause:?}");
            }
            made => panic!("{made:?}"),
        }
    }
    model.fails = false;
    model.model[0].fill(rank as f32);
    sgd.step(&mut model).unwrap();
    assert!(model.model[0] == [1.0; 3000]);
    say(&format!("position {}", sgd.position()));
    0
}

/// Joins, and builds nothing.
pub fn joins_only() -> i32 {
    let communicator = join().unwrap();
    say(&format!("joined as {}", communicator.rank()));
    std::thread::sleep(Duration::from_secs(60));
    drop(communicator);
    0
}

/// Two ranks that admit a process, which has joined and does not build its averager.
fn half_way_in(name: &str) -> (Vec<RankProcess>, RankProcess) {
    let member = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".to_owned()),
            ("PA_TEST_NAME", name.to_owned()),
        ];
        start("admits", &variables)
    };
    let mut members = vec![member(0), member(1)];
    members.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let mut joiner =
        start("joins_only", &[("PA_TEST_JOIN", "1".to_owned()), ("PA_TEST_NAME", name.to_owned())]);
    joiner.wait_for("joined as 2");
    (members, joiner)
}

pub fn admission_changes_no_other_model() {
    for n in [1, 2, 8] {
        let mut ranks = start_and_join("copies", n, &[]);
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        }
        let has: Vec<String> = ranks.iter().map(|rank| rank.said("has")[0].clone()).collect();
        let digest = |origin: usize| Mixed::new(origin as u64).digest();
        let of = |rank: usize| format!("{:x} {:x} of {}", digest(rank), digest(rank + 100), n + 1);
        for (rank, has) in has[..n].iter().enumerate() {
            assert_eq!(*has, of(rank));
        }
        assert_eq!(has[n], of(0), "the joiner has a copy of rank 0's model");
    }
}

/// A rank whose `lend` fails after the average takes part in the admission all the same.
pub fn late_failure_of_a_model_does_not_stop_an_admission() {
    let mut ranks = start_and_join("fails_late", 2, &[]);
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    let positions = ranks.iter().map(|rank| rank.said("position")[0].clone());
    let positions: Vec<_> = positions.collect();
    assert!(positions.iter().all(|position| *position == positions[0]), "{positions:?}");
}

/// The average that was due was made, so no error may say that nothing was changed.
pub fn abort_during_an_admission_reports_both_halves() {
    let (mut members, joiner) = half_way_in(&name());
    members[0].ask_to_end();
    for rank in &mut members {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        let error = rank.said("error").join("");
        assert!(
            error.contains("AfterAverage") && error.contains("cause: Aborted"),
            "{:#?}",
            rank.output
        );
    }
    drop(joiner);
}

/// The joiner never builds, or dies: the members have averaged, and report it, also the last
/// member.
pub fn lost_joiner_does_not_hide_the_average() {
    for last in [false, true] {
        let (mut members, joiner) = half_way_in(&name());
        if last {
            members[1].signal(Signal::KILL);
        }
        joiner.signal(Signal::KILL);
        for rank in &mut members[..if last { 1 } else { 2 }] {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            let action = &rank.said("action")[0];
            assert!(action.starts_with("Averaged"), "{action}");
        }
    }
}

/// Members have their own elements or the mean over all members, whenever the joiner dies, also
/// without all-or-nothing: never the mean of a half-written model.
pub fn joiner_killed_at_any_time_leaves_whole_models() {
    let rounds = count(2, 12);
    let mut chance = Random(seed());
    let name = name();
    let more = [("PA_TEST_ALL_OR_NOTHING", "0".to_owned()), ("PA_TEST_REFILL", "1".to_owned())];
    let mut ranks: Vec<RankProcess> = (0..2)
        .map(|rank| {
            let variables = [
                ("PA_TEST_RANK", rank.to_string()),
                ("PA_TEST_WORLD", "2".to_owned()),
                ("PA_TEST_NAME", name.clone()),
            ];
            start("survive", &[&variables[..], &more].concat())
        })
        .collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    for _ in 0..rounds {
        let variables = [
            ("PA_TEST_JOIN", "1".to_owned()),
            ("PA_TEST_ORIGIN", "2".to_owned()),
            ("PA_TEST_NAME", name.clone()),
        ];
        let mut joiner = start("survive", &[&variables[..], &more].concat());
        std::thread::sleep(Duration::from_micros(chance.below(40_000)));
        joiner.signal(Signal::KILL);
        assert_eq!(joiner.end(), None, "{:#?}", joiner.output);
    }
    ranks.iter_mut().for_each(|rank| rank.ask_to_end());
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}
