//! State of the outer optimizer of processes on devices, in memory of the host that outlives its
//! rank.

use cudarc::driver::CudaContext;
use param_averager::*;

use super::ranks::hash;
use super::{Case, ONE, TWO};
use crate::cuda::model::{ordinal, Model, Shape};
use crate::cuda::outers;
use rustix::mm::{mprotect, MprotectFlags};
use test_support::process::{check_velocity, start_and_kill, RankProcess};
use test_support::rank::{builder, bytes_used, device, die, join, number, say};
use test_support::simulator::environment;
use test_support::{note, ranks, seed, Random};

const SHAPES: [Shape; 4] =
    [(Dtype::F32, 3001, 1), (Dtype::Bf16, 3001, 0), (Dtype::F64, 6000, 0), (Dtype::F16, 65, 3)];
/// Ranks that meet in their streams.
const ALONE: Case =
    Case { devices: &[0, 1, 2], hidden: false, link: "auto", settings: &[super::outer::THREE] };
/// Ranks that share a device, so that each segment is a launch of its own.
const TOGETHER: Case = Case { devices: &[0; 3], hidden: false, link: "auto", settings: &[ONE] };
const BY_THE_HOST: Case =
    Case { devices: &[0, 0, 1], hidden: true, link: "host", settings: &[TWO] };

fn shares() -> bool {
    number("PA_TEST_SHARES") == Some(1)
}

/// Where the state lies makes no difference to any bit, nor to what is saved; only to the memory of
/// the device.
pub fn a_shared_state_has_the_bits_of_one_on_the_device() {
    let two = Case { devices: &[0, 1], settings: &[TWO], ..ALONE };
    for case in [two, TOGETHER, BY_THE_HOST] {
        let run = |shares: &str| {
            let shares = [("PA_TEST_SHARES", shares.to_owned())].to_vec();
            let mut all = case.start("shared-bits", |_| shares.clone())?;
            for rank in &mut all {
                assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            }
            Some(all)
        };
        let (Some(with), Some(without)) = (run("1"), run("0")) else { return };
        let expected = ranks(with.len(), |communicator| {
            let of = |communicator| {
                let builder = test_support::options(communicator).algorithm(Algorithm::Ring);
                builder.channels(2).chunk_bytes(1 << 10)
            };
            series(Device::cpu(), &communicator, &of).unwrap()
        });
        for (with, without) in with.iter().zip(&without) {
            assert_eq!(with.said("bits"), without.said("bits"), "not those of state on the device");
            let number: usize = with.said("rank")[0].parse().unwrap();
            assert_eq!(with.said("bits"), expected[number], "not the bits of the CPU");
            assert_eq!(with.said("overhead"), without.said("overhead"));
            check_bytes(with, without, case.devices.len());
        }
    }
}

/// Asserts that the states of a rank's averagers are not in memory of the device.
fn check_bytes(with: &RankProcess, without: &RankProcess, ranks: usize) {
    let bytes = |rank: &RankProcess| -> usize { rank.said("device")[0].parse().unwrap() };
    let (with, without) = (bytes(with), bytes(without));
    // Bytes of an array of a rank's elements. Three averagers have seven of them; the simulator
    // keeps less than three for its launches.
    let wide = |dtype| if dtype == Dtype::F64 { 8 } else { 4 };
    let array =
        SHAPES.iter().map(|&(dtype, elements, _)| elements * wide(dtype)).sum::<usize>() / ranks;
    assert!(with + 4 * array <= without, "{with} and 4 * {array}, not shared {without}");
}

/// Hashes of this rank's tensors after averages, and of what it saves then, by each optimizer.
fn series(
    on: Device,
    communicator: &Communicator,
    builder: &dyn Fn(Communicator) -> Builder,
) -> Result<Vec<String>> {
    let rank = communicator.rank();
    let (mut bits, mut kept) = (vec![], vec![]);
    for outer in outers() {
        let model = |round: usize| Model::new(on, &SHAPES, (100 * round + rank) as u64);
        let mut models: Vec<Model> = (0..6).map(model).collect();
        let options = builder(communicator.clone()).start_from(Start::Rank(0)).outer(outer);
        let averager = options.share_outer_state(shares()).build(&mut models[0])?;
        if on != Device::cpu() {
            say(&format!("overhead {}", averager.memory_overhead()));
            assert!(averager.ring_order().is_sorted()); // the order of sums on CPUs
        }
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        let mut saved = vec![];
        for (round, model) in models[1..].iter_mut().enumerate() {
            if round == 3 {
                sgd.load(&saved)?; // what there is already
            }
            sgd.averager().average(model)?;
            model.download();
            assert!(model.guards_are_whole());
            bits.push(format!("{:x}", hash(model.bytes())));
            saved = sgd.save()?;
            bits.push(format!("{:x}", hash(&saved)));
        }
        kept.push((sgd, models)); // freed when all are done
    }
    if on != Device::cpu() {
        say(&format!("device {}", bytes_used(&CudaContext::new(ordinal(on)).unwrap())));
    }
    // A device frees memory when its kernels are done, also those that wait for a peer.
    kept.iter_mut().try_for_each(|(sgd, _)| sgd.averager().barrier())?;
    Ok(bits)
}

/// Role: prints the hashes of a series.
pub fn bits() -> Result<()> {
    let communicator = join()?;
    say(&format!("rank {}", communicator.rank()));
    for bits in series(device(), &communicator, &builder)? {
        say(&format!("bits {bits}"));
    }
    // A model without elements has a state of no bytes.
    let mut none = Model::new(device(), &[(Dtype::F32, 0, 0)], 0);
    let options = builder(communicator).start_from(Start::Rank(0)).outer(Outer::diloco());
    options.share_outer_state(shares()).build(&mut none)?.average(&mut none).map(drop)
}

const ROUNDS: u64 = 6;
/// Round in which ranks die.
const LAST: u64 = 3;

fn averager(world: Communicator, model: &mut Model) -> Result<LocalSgd> {
    let outer = match number("PA_TEST_MOMENTS") {
        Some(2) => Outer::adam(2.0, 0.5, 0.75, 1.0),
        _ => Outer::nesterov(0.5, 0.75),
    };
    let options = builder(world).start_from(Start::Rank(0)).outer(outer);
    Ok(LocalSgd::new(options.share_outer_state(shares()).build(model)?, Schedule::every(1)))
}

/// Makes the second half of the largest memory that this process shares read-only: a step that it
/// makes ends the process on the way.
fn forbid_half_of_the_state() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared = maps.lines().filter(|line| line.contains("/memfd:param-averager"));
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

/// Number of elements that are those of none of these models.
fn count_of_others(model: &Model, known: [&Model; 2]) -> usize {
    let others = |tensor: usize| {
        let width = SHAPES[tensor].0.size();
        let elements = move |of: &Model| -> Vec<Vec<u8>> {
            of.tensor(tensor).chunks_exact(width).map(<[u8]>::to_vec).collect()
        };
        let [one, other] = known.map(elements);
        let is_other =
            |(i, element): &(usize, Vec<u8>)| *element != one[*i] && *element != other[*i];
        elements(model).into_iter().enumerate().filter(is_other).count()
    };
    (0..SHAPES.len()).map(others).sum()
}

/// Role: averages, and dies at the place that `PA_TEST_ENDS` names. Compares each average with that
/// of a world of one rank, on the CPU of its own process, which has lost nothing: in each round all
/// ranks have the same values, so their mean is exact, whatever their number is.
pub fn dies() -> Result<()> {
    let ends = std::env::var("PA_TEST_ENDS").unwrap_or_default();
    let fresh = |on| Model::new(on, &SHAPES, 7);
    let (mut model, mut of_one) = (fresh(device()), fresh(Device::cpu()));
    let mut sgd = averager(join()?, &mut model)?;
    let alone = || Communicator::from_devices(&[Device::cpu()]).map(|mut all| all.remove(0));
    let mut one = averager(alone()?, &mut of_one)?;
    // The second one does not make the last step before the death.
    let mut of_late = fresh(Device::cpu());
    let mut late = averager(alone()?, &mut of_late)?;
    // True if the average that ranks die in was committed.
    let is_committed = number("PA_TEST_CHANNELS").is_some();
    let (mut round, mut lost, mut differs) = (0, 0.0f64, false);
    while round < ROUNDS {
        let step = match &ends[..] {
            _ if round != LAST => 0,
            "between averages" => die(),
            "in the reduce" => 4,
            "in the step" => {
                forbid_half_of_the_state();
                0
            }
            // The reduce takes half of them, and the first third of the gather sends own results.
            "in the gather" => sgd.averager().steps() * 7 / 12,
            _ => 0,
        };
        // SAFETY: the ring; no peer touches this rank's tensors.
        unsafe { sgd.averager().leave_before_step(step) };
        model.fill(round);
        let made = sgd.averager().average(&mut model);
        if step > 0 {
            assert!(made.is_err());
            die();
        }
        let is_step = match &made {
            Ok(_) => true,
            Err(Error::PeerLost { committed, .. }) => *committed,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(is_step && made.is_err(), is_committed && round == LAST, "{made:?}");
        if is_step {
            of_one.fill(round);
            one.averager().average(&mut of_one)?;
            if round != LAST {
                of_late.fill(round);
                late.averager().average(&mut of_late)?;
            }
            round += 1;
        }
        if made.is_ok() {
            model.download();
            differs |= model.bytes() != of_one.bytes();
            let others = count_of_others(&model, [&of_one, &of_late]);
            assert!(others == 0 || !shares(), "round {round}: {others} elements of no history");
            continue;
        }
        sgd.averager().recover(&mut model)?;
        // All ranks begin again with values that all of them have.
        model.fill(100 + round);
        of_one.fill(100 + round);
        of_late.fill(100 + round);
        lost = lost.max(sgd.averager().broadcast(0, &mut model)?.lost_state);
        one.averager().broadcast(0, &mut of_one)?;
        late.averager().broadcast(0, &mut of_late)?;
    }
    say(&format!("done {} {lost} {differs}", sgd.world_size()));
    Ok(())
}

/// Runs ranks of which one dies. Returns the share that the others have lost, and whether an
/// average had other bits for that. `None` without a simulator.
fn run(case: Case, dies: usize, end: &str, more: &[(&'static str, &str)]) -> Option<(f64, bool)> {
    let mut all = case.start("shared-dies", |rank| {
        let ends = (rank == dies).then_some(("PA_TEST_ENDS", end));
        let all = more.iter().copied().chain(ends);
        all.map(|(name, value)| (name, value.to_owned())).collect()
    })?;
    let mut results = vec![];
    for (rank, process) in all.iter_mut().enumerate() {
        let code = process.end();
        assert_eq!(code, (rank != dies).then_some(0), "{rank}, {end}: {:#?}", process.output);
        results.extend(process.said("done"));
    }
    assert!(results.len() == 2 && results[0] == results[1], "{end}: {results:?}");
    let [left, lost, differs] = results[0].split(' ').collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!(left, "2");
    Some((lost.parse().unwrap(), differs.parse().unwrap()))
}

const SHARES: (&str, &str) = ("PA_TEST_SHARES", "1");

/// The averages after a death have the bits that they would have had without it.
pub fn nothing_of_a_lost_state_is_lost() {
    for (case, dies, end, moments) in [
        (ALONE, 1, "between averages", "1"),
        (ALONE, 0, "in the reduce", "2"),
        (TOGETHER, 2, "between averages", "2"),
        (TOGETHER, 0, "in the reduce", "1"),
        (BY_THE_HOST, 1, "between averages", "1"),
    ] {
        let more = [SHARES, ("PA_TEST_MOMENTS", moments)];
        let Some(result) = run(case, dies, end, &more) else { return };
        assert_eq!(result, (0.0, false), "{dies} {end}");
    }
    // Otherwise a third is lost with the device, and the comparison shows it.
    let Some((lost, differs)) = run(ALONE, 1, "between averages", &[]) else { return };
    assert!((0.3..0.37).contains(&lost) && differs, "{lost}, {differs}");
}

/// The rank that dies has made its step, and the others have only a part of the result.
pub fn a_step_that_was_made_is_not_lost_with_its_average() {
    for (case, moments) in [(ALONE, "1"), (TOGETHER, "2")] {
        let more = [SHARES, ("PA_TEST_MOMENTS", moments), ("PA_TEST_CHANNELS", "1")];
        let Some(result) = run(case, 1, "in the gather", &more) else { return };
        assert_eq!(result, (0.0, false), "{moments}");
    }
}

/// The process dies while its kernel makes the step: its state is not lost, and is in part that
/// before the step, number by number.
pub fn a_kernel_that_was_cut_off_leaves_its_state() {
    for case in [ALONE, TOGETHER] {
        let more = [SHARES, ("PA_TEST_CHANNELS", "1")];
        let Some((lost, differs)) = run(case, 1, "in the step", &more) else { return };
        assert!(lost == 0.0 && differs, "{lost}, {differs}");
    }
}

/// Kills at any time: nothing is lost, unless a rank and the next one of the ring are.
pub fn kills_lose_nothing_of_shared_states() {
    let mut chance = Random(seed());
    let mut of_neighbours = 0;
    for (n, settings) in [(3, [super::outer::THREE]), (4, [super::outer::FOUR])] {
        let Some(environment) = environment(&settings) else { return };
        let pause = std::time::Duration::from_millis(200);
        let (mut ranks, alive) = start_and_kill("outer", n, &mut chance, pause, |rank| {
            let own = ("PA_TEST_DEVICE", rank.to_string());
            [environment.clone(), vec![own, ("PA_TEST_SHARES", "1".into())]].concat()
        });
        let lost = check_velocity(&mut ranks, &alive);
        let is_dead = |rank: usize| !alive.contains(&(rank % n));
        match (0..n).any(|rank| is_dead(rank) && is_dead(rank + 1)) {
            true => of_neighbours += 1,
            false => assert_eq!(lost, 0.0, "{alive:?} of {n}"),
        }
    }
    note!("{of_neighbours} worlds lost two neighbours");
}
