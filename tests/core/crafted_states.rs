//! States with a right checksum and any content, as someone makes them on purpose: loading one ends
//! in an error at most, and takes no more memory than its own size warrants.

use param_averager::__testing::checksum;
use param_averager::{
    Communicator, Device, Error, LocalSgd, Outer, ParamAverager, Schedule, StateError,
};

use super::peak_of;

/// Numbers that no count of a state is, and some at the bounds of those that one may be.
const ABSURD: [u64; 14] = [
    0,
    1,
    2,
    15,
    16,
    17,
    1024,
    1025,
    1 << 16,
    u32::MAX as u64 - 15,
    u32::MAX as u64,
    1 << 40,
    u64::MAX / 2 + 1,
    u64::MAX,
];

/// Bytes of a state beside its sections.
const BEFORE: usize = 8 + 4 + 8;

/// A state of these sections, in the format that `src/saved.rs` describes.
fn state(sections: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut all = b"PASGD\r\n\0".to_vec();
    all.extend(1u32.to_le_bytes());
    all.extend([0; 8]);
    all.extend((sections.len() as u32).to_le_bytes());
    for (tag, content) in sections {
        all.push(1);
        all.extend((tag.len() as u32).to_le_bytes());
        all.extend((content.len() as u64).to_le_bytes());
        all.extend(tag.as_bytes());
        all.extend(content);
    }
    all.extend([0; 8]);
    sealed(all)
}

/// Bytes with the length and the checksum of a state.
fn sealed(mut all: Vec<u8>) -> Vec<u8> {
    let length = all.len();
    all[12..20].copy_from_slice(&(length as u64).to_le_bytes());
    let checksum = checksum(&all[..length - 8]);
    all[length - 8..].copy_from_slice(&checksum.to_le_bytes());
    all
}

/// The content of each section.
fn sections(state: &[u8]) -> Vec<(String, Vec<u8>)> {
    let word = |at: usize, bytes: usize| {
        let mut word = [0; 8];
        word[..bytes].copy_from_slice(&state[at..at + bytes]);
        u64::from_le_bytes(word) as usize
    };
    let mut at = BEFORE + 4;
    (0..word(BEFORE, 4))
        .map(|_| {
            let (tag, length) = (word(at + 1, 4), word(at + 5, 8));
            let begin = at + 13 + tag;
            at = begin + length;
            let tag = String::from_utf8(state[begin - tag..begin].to_vec()).unwrap();
            (tag, state[begin..at].to_vec())
        })
        .collect()
}

/// A `LocalSgd` with a model of this many elements, alone, after two outer steps.
fn trained(elements: usize, use_it: impl Fn(LocalSgd, Vec<f32>) + Sync) {
    Communicator::run(&[Device::cpu()], |communicator| -> param_averager::Result<()> {
        let mut model = vec![0f32; elements];
        let builder = ParamAverager::builder(communicator).outer(Outer::diloco());
        let averager = builder.build(&mut model)?;
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        for _ in 0..2 {
            model.fill(1.0);
            sgd.step(&mut model)?;
        }
        use_it(sgd, model);
        Ok(())
    })
    .unwrap();
}

/// Memory for a refused state: its parts, once and as they are parsed, and an error's text.
fn most(state: &[u8]) -> i64 {
    3 * state.len() as i64 + (8 << 10)
}

/// A state of a large model whose shard is cut off or empty, with any division: the model's size is
/// no reason to allocate.
pub fn refused_states_allocate_no_more_than_their_size() {
    trained(4 << 20, |mut sgd, _| {
        let good = sgd.save().unwrap();
        let all = sections(&good);
        let [course, outer] = &all[..] else { panic!("{} sections", all.len()) };
        assert_eq!((course.0.as_str(), outer.0.as_str()), ("course", "outer"));
        let words = u32::from_le_bytes(outer.1[..4].try_into().unwrap()) as usize + 4;
        let header = words + 3 * 4 + 1 + 4 + 2; // world, channels, chunk, ring, position, flags
        let mut worst = 0;
        for length in [0, 1, 4096] {
            let cut = outer.1[..header + length].to_vec();
            for of_two in 0..ABSURD.len() * ABSURD.len() {
                let absurd = [of_two / ABSURD.len(), of_two % ABSURD.len()].map(|at| ABSURD[at]);
                for (first, second) in [(0, 4), (4, 8), (0, 8), (8, 13)] {
                    let mut changed = cut.clone();
                    for (at, value) in [(first, absurd[0]), (second, absurd[1])] {
                        changed[words + at..][..4].copy_from_slice(&(value as u32).to_le_bytes());
                    }
                    let bytes = state(&[("course", course.1.clone()), ("outer", changed)]);
                    let (made, peak) = peak_of(|| sgd.load(&bytes));
                    let Err(Error::InvalidState { cause, .. }) = made else { panic!("{made:?}") };
                    let is_named =
                        matches!(cause, StateError::Corrupt | StateError::MissingShards { .. });
                    assert!(is_named, "{cause}");
                    assert!(peak <= most(&bytes), "{peak} bytes for {}: {absurd:?}", bytes.len());
                    worst = worst.max(peak);
                }
            }
        }
        test_support::note!("{worst} bytes at most for a state of another division");
        sgd.load(&good).unwrap();
    });
}

/// Every number at every place of a state's first bytes.
pub fn any_state_with_a_right_checksum_is_loaded_or_refused() {
    trained(100, |mut sgd, mut model| {
        let good = sgd.save().unwrap();
        let (mut loaded, mut refused) = (0, 0);
        for at in BEFORE..good.len() - 16 {
            for (value, bytes) in
                ABSURD.iter().flat_map(|value| [(value, 1), (value, 4), (value, 8)])
            {
                let mut changed = good.clone();
                changed[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
                let changed = sealed(changed);
                let (made, peak) = peak_of(|| sgd.load(&changed));
                match made {
                    Err(Error::InvalidState { .. }) => {
                        refused += 1;
                        assert!(peak <= most(&changed), "byte {at}, {value}: {peak} bytes");
                        continue;
                    }
                    made => made.unwrap(),
                }
                loaded += 1;
                assert!(peak <= 2 * most(&changed), "byte {at}, {value}: {peak} bytes");
                // Whatever it holds, training goes on.
                for _ in 0..2 {
                    sgd.skip(&mut model).unwrap();
                    sgd.is_next_due();
                }
                sgd.save().unwrap();
                sgd.load(&good).unwrap();
            }
        }
        test_support::note!("{loaded} loaded, {refused} refused");
        assert!(loaded > 100 && refused > 1000, "{loaded} {refused}");
    });
}
