//! Unknown processes that connect to the socket of a world, as `fuzz/` has them.

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

use fuzz::{frames, play, rendezvous, Act};
use proptest::collection::vec;
use proptest::prelude::*;

/// Acts without a valid `Hello`, but with many that nearly are one.
fn act() -> impl Strategy<Value = Act> {
    let bytes =
        prop_oneof![vec(any::<u8>(), 0..100), vec(any::<u8>(), 5000), Just(b"PAVG\x07".to_vec())];
    let files = prop_oneof![4 => Just(0), 1 => any::<u8>()];
    let half_a_hello =
        (files.clone(), 1u8..100).prop_map(|(files, keep)| Act::Send { kind: 0, files, keep });
    let other =
        (1u8..6, files.clone()).prop_map(|(kind, files)| Act::Send { kind, files, keep: 0 });
    prop_oneof![
        5 => Just(Act::Connect),
        1 => any::<u8>().prop_map(Act::Flood),
        1 => any::<u8>().prop_map(Act::Turn),
        3 => (files, bytes).prop_map(|(files, bytes)| Act::Write { files, bytes }),
        3 => half_a_hello,
        2 => other,
        2 => (0u8..50).prop_map(Act::Pause),
        1 => Just(Act::Close),
        1 => Just(Act::Join),
    ]
}

fn config() -> ProptestConfig {
    // each case may take 20 s
    ProptestConfig { cases: 50, max_shrink_iters: 5, ..ProptestConfig::default() }
}

pub fn ranks_meet_whatever_unknown_processes_do() {
    proptest!(config(), |(ranks in 2usize..5, script in vec(act(), 0..40))| play(ranks, &script));
}

pub fn bytes_for_the_fuzzer_do_no_harm() {
    proptest!(config(), |(data in vec(any::<u8>(), 0..60))| {
        frames(&data);
        rendezvous(&data);
    });
}
