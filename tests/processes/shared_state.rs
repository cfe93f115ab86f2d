//! State of the outer optimizer that outlives its rank. Each rank compares every average with that
//! of a world of one rank, in its own process, which has lost nothing: in each round all ranks have
//! the same values, so their mean is exact, whatever their number is.

use param_averager::*;
use rustix::mm::{mprotect, MprotectFlags};
use test_support::process::{start_all, RankProcess};
use test_support::rank::{builder, die, join, number, say};
use test_support::{bits, Guarded, Random};

const ROUNDS: u64 = 7;
/// Round in which ranks die.
const LAST: u64 = 4;
/// Rounds before which the ranks save and load, if they do.
const SAVES: u64 = 1;
const LOADS: u64 = 3;

type Model = Vec<Guarded>;
/// Ranks that die, and where they do.
type Deaths<'a> = &'a [(usize, &'a str)];

fn model() -> Model {
    match is_large() {
        true => vec![Guarded::new(Dtype::F32, 300_000, 0)],
        false => Dtype::ALL.iter().map(|&dtype| Guarded::new(dtype, 3001, 0)).collect(),
    }
}

/// True for a state of many messages, in chunks that are as large as by default.
fn is_large() -> bool {
    number("PA_TEST_LARGE_STATE").is_some()
}

fn fill(model: &mut Model, round: u64) {
    let mut random = Random(round);
    for tensor in model {
        (0..tensor.elements).for_each(|i| tensor.set(i, random.below(64) as f64));
    }
}

fn averager(world: Communicator, model: &mut Model) -> LocalSgd {
    let outer = match number("PA_TEST_MOMENTS") {
        Some(2) => Outer::adam(2.0, 0.5, 0.75, 1.0),
        Some(3) => Outer::nesterov(0.5, 0.75).keeping(0.25),
        _ => Outer::nesterov(0.5, 0.75),
    };
    let options = builder(world).start_from(Start::Rank(0)).outer(outer);
    let options = options.share_outer_state(number("PA_TEST_SHARES") == Some(1));
    let channels = number("PA_TEST_CHANNELS").unwrap_or(2) as u32;
    let options = if is_large() { options.chunk_bytes(256 << 10) } else { options };
    let averager = options.channels(channels).build(model).unwrap();
    LocalSgd::new(averager, Schedule::every(1))
}

/// True if the step of an average was made that this rank has seen fail.
fn is_committed(error: &Error) -> bool {
    let Error::PeerLost { committed, .. } = error else { panic!("{error}") };
    *committed
}

/// Averager of a world of one rank.
fn alone(model: &mut Model) -> LocalSgd {
    averager(Communicator::from_devices(&[Device::cpu()]).unwrap().remove(0), model)
}

/// Makes the second half of the largest memory that this process shares read-only: a step that it
/// makes ends the process on the way.
fn forbid_half_of_the_state() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains("/memfd:"));
    let range = |line: &str| {
        let (begin, end) = line.split(' ').next()?.split_once('-')?;
        Some([begin, end].map(|address| usize::from_str_radix(address, 16).unwrap()))
    };
    let all: Vec<[usize; 2]> = shared.filter_map(range).collect();
    let most = all.iter().map(|[begin, end]| end - begin).max().unwrap();
    for [begin, end] in all.into_iter().filter(|[begin, end]| end - begin == most) {
        let page = rustix::param::page_size();
        let half = begin + most / 2 / page * page;
        // SAFETY: memory of this process, which dies of it.
        unsafe { mprotect(half as *mut _, end - half, MprotectFlags::READ) }.unwrap();
    }
}

/// Number of elements that are not those of `one`, but those of `other`, and of those of neither.
fn count_of_others(model: &Model, one: &Model, other: &Model) -> [usize; 2] {
    let mut counts = [0, 0];
    for ((tensor, one), other) in model.iter().zip(one).zip(other) {
        for i in (0..tensor.elements).filter(|&i| tensor.get(i) != one.get(i)) {
            counts[usize::from(tensor.get(i) != other.get(i))] += 1;
        }
    }
    counts
}

/// Role: averages, and dies at the place that `PA_TEST_ENDS` names.
pub fn shared_state() -> i32 {
    let ends = std::env::var("PA_TEST_ENDS").unwrap_or_default();
    let (mut model, mut of_one, mut of_late) = (model(), model(), model());
    let mut sgd = averager(join().unwrap(), &mut model);
    say(&format!("bytes {}", sgd.averager().memory_overhead()));
    // The second one does not make the last step before the death.
    let (mut one, mut late) = (alone(&mut of_one), alone(&mut of_late));
    let is_half_made = number("PA_TEST_CHANNELS").is_some(); // the average that ranks die in
    let (mut round, mut lost, mut differs, mut saved) = (0, 0.0f64, false, None);
    while round < ROUNDS {
        if round == SAVES && number("PA_TEST_LOADS").is_some() {
            saved = Some([sgd.save().unwrap(), one.save().unwrap()]);
        }
        if let (LOADS, Some([states, of_one])) = (round, saved.take_if(|_| round == LOADS)) {
            if ends == "before the load" {
                die();
            }
            sgd.load(&states).unwrap();
            one.load(&of_one).unwrap();
            if ends == "after the load" {
                die();
            }
        }
        let step = match &ends[..] {
            _ if round != LAST => 0,
            "between averages" => die(),
            "in the reduce" => 4,
            "in the step" => {
                forbid_half_of_the_state();
                0
            }
            "in the gather" => sgd.averager().steps() * 3 / 4, // the reduce takes half of them
            _ => 0,
        };
        // SAFETY: the ring; no peer touches this rank's tensors.
        unsafe { sgd.averager().leave_before_step(step) };
        fill(&mut model, round);
        let made = sgd.averager().average(&mut model);
        if step > 0 {
            assert!(made.is_err());
            die();
        }
        let is_step = made.as_ref().err().is_none_or(is_committed);
        assert_eq!(is_step && made.is_err(), is_half_made && round == LAST, "{made:?}");
        if is_step {
            fill(&mut of_one, round);
            one.averager().average(&mut of_one).unwrap();
            if round != LAST {
                fill(&mut of_late, round);
                late.averager().average(&mut of_late).unwrap();
            }
            round += 1;
        }
        if made.is_ok() {
            differs |= bits(&model) != bits(&of_one);
            if is_half_made && round > LAST {
                let [late, neither] = count_of_others(&model, &of_one, &of_late);
                say(&format!("late {late}"));
                say(&format!("neither {neither}"));
            }
            continue;
        }
        // All ranks begin again with the outer parameters.
        let report = loop {
            sgd.averager().recover(&mut model).unwrap();
            if ends == "before the anchor" {
                die();
            }
            model = of_one.iter().map(Guarded::copy).collect();
            match sgd.averager().broadcast(0, &mut model) {
                Ok(report) => break report,
                Err(error) => assert!(!is_committed(&error), "{error}"),
            }
        };
        one.averager().broadcast(0, &mut of_one).unwrap();
        of_late = of_one.iter().map(Guarded::copy).collect();
        late.averager().broadcast(0, &mut of_late).unwrap();
        if ends == "after the anchor" {
            die();
        }
        lost = lost.max(report.lost_state);
        if number("PA_TEST_SAVES_AGAIN").is_some() {
            let state = sgd.save().unwrap();
            say(&format!("loads again: {:?}", sgd.load(&state)));
        }
    }
    say(&format!("done {} {lost} {differs}", sgd.world_size()));
    0
}

/// Runs n ranks of which some die. Returns the share that the others have lost, and whether an
/// average had other bits for that.
fn run(n: usize, deaths: Deaths<'_>, variables: &[(&'static str, &str)]) -> (f64, bool) {
    end(n, deaths, variables).0
}

/// As `run`. The last result is a rank that has not died.
fn end(
    n: usize,
    deaths: Deaths<'_>,
    variables: &[(&'static str, &str)],
) -> ((f64, bool), RankProcess) {
    let mut ranks = start_all("shared_state", n, |rank| {
        let end = deaths.iter().find(|(dies, _)| *dies == rank).map(|&(_, end)| end);
        let end = end.map(|end| ("PA_TEST_ENDS", end));
        let all = variables.iter().copied().chain(end);
        all.map(|(name, value)| (name, value.to_owned())).collect()
    });
    let mut results = vec![];
    for (rank, process) in ranks.iter_mut().enumerate() {
        let dies = deaths.iter().any(|&(dies, _)| dies == rank);
        let code = process.end();
        assert_eq!(code, (!dies).then_some(0), "rank {rank} of {deaths:?}: {:#?}", process.output);
        results.extend(process.said("done"));
    }
    assert_eq!(results.len(), n - deaths.len());
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{deaths:?}: {results:?}");
    let [left, lost, differs] = results[0].split(' ').collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!(left.parse(), Ok(n - deaths.len()));
    let result = (lost.parse().unwrap(), differs.parse().unwrap());
    ranks.retain(|rank| !rank.said("done").is_empty());
    (result, ranks.remove(0))
}

const SHARES: (&str, &str) = ("PA_TEST_SHARES", "1");

/// The averages after a death have the bits that they would have had without it.
pub fn nothing_of_a_lost_state_is_lost() {
    let cases: [(usize, Deaths<'_>, &str); 6] = [
        (4, &[(1, "between averages")], "1"),
        (3, &[(0, "between averages")], "2"),
        (2, &[(0, "between averages")], "1"),
        (3, &[(2, "in the reduce")], "1"),
        (4, &[(0, "between averages"), (2, "between averages")], "2"),
        (4, &[(3, "between averages"), (1, "in the reduce")], "1"),
    ];
    for (n, deaths, moments) in cases {
        let result = run(n, deaths, &[SHARES, ("PA_TEST_MOMENTS", moments)]);
        assert_eq!(result, (0.0, false), "{n} ranks, {deaths:?}, {moments}");
    }
}

/// There is one copy of the state, which two ranks map.
pub fn a_shared_state_takes_no_more_memory() {
    let bytes = |variables: &[_]| end(3, &[], variables).1.said("bytes");
    assert_eq!(bytes(&[SHARES]), bytes(&[]));
}

/// The rank that dies has made its step, and the others have only a part of the result.
pub fn a_step_that_was_made_is_not_lost_with_its_average() {
    for moments in ["1", "2"] {
        let more = [SHARES, ("PA_TEST_MOMENTS", moments), ("PA_TEST_CHANNELS", "1")];
        assert_eq!(run(3, &[(1, "in the gather")], &more), (0.0, false), "{moments}");
    }
}

/// The rank dies while it makes its step: each number of its state is that before it or that after
/// it.
pub fn a_step_that_was_made_in_part_leaves_whole_numbers() {
    for moments in ["1", "2"] {
        let more = [SHARES, ("PA_TEST_MOMENTS", moments), ("PA_TEST_CHANNELS", "1")];
        let ((lost, differs), rank) = end(3, &[(1, "in the step")], &more);
        assert!(lost == 0.0 && differs, "{lost}, {differs}");
        let counts = |what: &str| -> Vec<usize> {
            rank.said(what).iter().map(|count| count.parse().unwrap()).collect()
        };
        // A third of four times 3,001 elements was the rank's. Of Adam's two moments of an element,
        // one may be before the step and one after it: of those whose step was being made.
        let (late, most) = (counts("late"), if moments == "2" { 64 } else { 0 });
        assert!(!late.is_empty() && late.iter().all(|n| (100..3500).contains(n)), "{late:?}");
        let neither = counts("neither");
        assert!(neither.iter().all(|&n| n <= most), "{neither:?}");
        println!("{moments}: {late:?}, {neither:?}");
    }
}

/// A rank's state is lost if the next rank of the ring is lost, too, or if states are not shared.
pub fn the_state_of_a_rank_and_of_the_next_one_can_be_lost() {
    let neighbours = [(1, "between averages"), (2, "between averages")];
    let (lost, differs) = run(4, &neighbours, &[SHARES]);
    assert!((0.2..0.3).contains(&lost) && differs, "{lost}, {differs}");
    let (lost, differs) = run(3, &neighbours[..1], &[]);
    assert!((0.3..0.37).contains(&lost) && differs, "{lost}, {differs}");
}

/// A further rank dies before the first step that is made without the first one.
pub fn states_are_passed_on_until_a_step_is_made() {
    for end in ["before the anchor", "after the anchor"] {
        let result = run(4, &[(1, "between averages"), (3, end)], &[SHARES]);
        assert_eq!(result, (0.0, false), "{end}");
    }
    // Rank 2 had the state of rank 1.
    let (lost, differs) = run(4, &[(1, "between averages"), (2, "after the anchor")], &[SHARES]);
    assert!((0.2..0.3).contains(&lost) && differs, "{lost}, {differs}");
}

/// A rank that dies about its load may have another state than the others.
pub fn a_state_that_may_not_be_loaded_is_lost() {
    let more = [SHARES, ("PA_TEST_LOADS", "1")];
    for end in ["before the load", "after the load"] {
        let (lost, differs) = run(3, &[(1, end)], &more);
        assert!((0.3..0.37).contains(&lost) && differs, "{end}: {lost}, {differs}");
    }
    assert_eq!(run(3, &[(1, "between averages")], &more), (0.0, false), "after a step");
}

/// Streams of states that differ much in length, and own parts that lie across their ends.
pub fn a_large_state_is_carried_over() {
    for (ranks, dies) in [(3, 1), (4, 1)] {
        let more = [SHARES, ("PA_TEST_LARGE_STATE", "1")];
        assert_eq!(run(ranks, &[(dies, "between averages")], &more), (0.0, false), "{ranks}");
    }
}

pub fn ranks_that_keep_a_share_lose_nothing() {
    let more = [SHARES, ("PA_TEST_MOMENTS", "3")];
    for (ranks, deaths) in [
        (4, &[(1, "between averages")][..]),
        (3, &[(2, "in the reduce")]),
        (4, &[(1, "between averages"), (3, "after the anchor")]),
    ] {
        assert_eq!(run(ranks, deaths, &more), (0.0, false), "{deaths:?}");
    }
}

/// A state that is saved after a recovery, before the next step, is whole.
pub fn a_state_saved_after_a_recovery_can_be_loaded() {
    for shares in ["1", "0"] {
        let more = [("PA_TEST_SHARES", shares), ("PA_TEST_SAVES_AGAIN", "1")];
        let (_, rank) = end(2, &[(0, "between averages")], &more);
        let said = rank.said("loads again:");
        let is_ok = said.iter().all(|line| line.starts_with("Ok"));
        assert!(is_ok && !said.is_empty(), "{shares}: {said:?}");
    }
}
