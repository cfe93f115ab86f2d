//! Checkpoints of a world that is killed between a save and the next average.

use std::path::PathBuf;
use std::time::Duration;

use param_averager::{LocalSgd, ParamAverager, Schedule, Start};
use test_support::process::{name, start, RankProcess};
use test_support::rank::{die, join, number, say};
use test_support::Random;

const ELEMENTS: usize = 100;

/// File of a rank's checkpoint after a step.
fn file(rank: usize, step: u64) -> PathBuf {
    PathBuf::from(std::env::var("PA_TEST_DIR").unwrap()).join(format!("{rank}-{step}"))
}

/// Trains up to step 40, from a checkpoint if there is one, and writes one after every third step.
pub fn saves() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = vec![rank as f64; ELEMENTS];
    let loaded = number("PA_TEST_FROM").map(|step| std::fs::read(file(rank, step)).unwrap());
    let (values, state) = loaded.as_deref().unwrap_or(&[0; 8 * ELEMENTS]).split_at(8 * ELEMENTS);
    if loaded.is_some() {
        let values = values.chunks_exact(8).map(|x| f64::from_le_bytes(x.try_into().unwrap()));
        model = values.collect();
    }
    let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
    let averager = builder.start_from(Start::Own).build(&mut model).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::quadratic(0.3, 2).after_warmup(3));
    if loaded.is_some() {
        sgd.load(state).unwrap();
    }
    let lost = |error| {
        say(&format!("lost {error}"));
        3 // and the whole world is started again
    };
    while sgd.position() < 40 {
        if rank == 1 && Some(sgd.position()) == number("PA_TEST_DIES_AT") {
            die();
        }
        let mut random = Random((rank as u64) << 32 | sgd.position());
        model.iter_mut().for_each(|x| *x = 0.9 * *x + random.value());
        sgd.set_learning_rate(0.2 / (1.0 + sgd.position() as f64 / 8.0));
        if let Err(error) = sgd.step_weighted(&mut model, 1.0 + random.below(9) as f64) {
            return lost(error);
        }
        if sgd.position().is_multiple_of(3) {
            let mut bytes: Vec<u8> = model.iter().flat_map(|x| x.to_le_bytes()).collect();
            bytes.extend(sgd.save().unwrap());
            std::fs::write(file(rank, sgd.position()), bytes).unwrap();
        }
    }
    if let Err(error) = sgd.finish(&mut model) {
        return lost(error);
    }
    let bits = model.iter().fold(0u64, |hash, x| hash.rotate_left(7) ^ x.to_bits());
    let h = (sgd.local_steps(), sgd.averages());
    say(&format!("end {} {h:?} {} {bits:x}", sgd.position(), sgd.steps()));
    0
}

/// Runs a world to its end.
fn run(directory: &tempdir::Directory, more: &[(&'static str, String)]) -> Vec<RankProcess> {
    let name = name();
    let rank = |rank: usize| {
        let own = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".into()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_DIR", directory.0.display().to_string()),
        ];
        start("saves", &[&own[..], more].concat())
    };
    let mut ranks: Vec<RankProcess> = (0..2).map(rank).collect();
    for rank in &mut ranks {
        rank.end();
    }
    ranks
}

mod tempdir {
    /// Directory of checkpoints, which goes with the test.
    pub struct Directory(pub std::path::PathBuf);

    impl Directory {
        pub fn new(name: &str) -> Directory {
            let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

pub fn a_world_killed_after_a_save_loads_it_and_ends_as_one_that_ran_through() {
    let directory = tempdir::Directory::new(&name());
    let through = run(&directory, &[]);
    let expected = [0, 1].map(|rank| through[rank].said("end"));
    assert_eq!(expected[0].len(), 1, "{:#?}", through[0].output);
    assert_eq!(expected[0], expected[1], "positions, H, steps and parameters");
    // Killed at the first step after a save, at the second and at the third: before an average, and
    // after one that the state does not have.
    for dies_at in [6, 7, 8, 9, 12, 13, 14, 21, 30, 32, 39] {
        let directory = tempdir::Directory::new(&name());
        let died = run(&directory, &[("PA_TEST_DIES_AT", dies_at.to_string())]);
        assert!(died[1].said("end").is_empty(), "{:#?}", died[1].output);
        assert_eq!(died[0].said("lost").len(), 1, "{:#?}", died[0].output);
        let resumed = run(&directory, &[("PA_TEST_FROM", (dies_at / 3 * 3).to_string())]);
        for rank in 0..2 {
            assert_eq!(resumed[rank].said("end"), expected[rank], "killed at {dies_at}");
        }
    }
}
