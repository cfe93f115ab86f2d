//! Outer optimizers of processes with a device each: deaths, joins, and graphs after a recovery.

use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;

use super::{one, Case};
use crate::cuda::model::{ordinal, Model};
use test_support::process::{check_survivors, check_velocity, name, start_and_kill};
use test_support::rank::{builder, device, die, join, number, say};
use test_support::simulator::{environment, Setting};
use test_support::{seed, Random};

pub const THREE: Setting<'_> = ("CUDASIM_DEVICES", "3");
pub const FOUR: Setting<'_> = ("CUDASIM_DEVICES", "4");

/// Kills at any time: the velocity of an element goes on, or begins at 0 where its rank was lost,
/// and reports tell the share that was lost.
pub fn kills_carry_the_velocity_over() {
    let mut chance = Random(seed());
    let mut lost_most = 0.0f64;
    for (n, settings) in [(3, [THREE]), (4, [FOUR])] {
        let Some(environment) = environment(&settings) else { return };
        let pause = Duration::from_millis(200);
        let (mut ranks, alive) = start_and_kill("outer", n, &mut chance, pause, |rank| {
            [environment.clone(), vec![("PA_TEST_DEVICE", rank.to_string())]].concat()
        });
        lost_most = lost_most.max(check_velocity(&mut ranks, &alive));
    }
    assert!(lost_most > 0.2, "a fourth of the state at least is lost with one of four ranks");
}

/// A process on a third device gets its shard of the velocity, and nothing is lost.
pub fn a_joiner_takes_over_its_shard_of_the_velocity() {
    joins("0");
}

/// The same where states are in memory of the host.
pub fn a_process_joins_ranks_that_share_their_states() {
    joins("1");
}

fn joins(shares: &str) {
    let Some(environment) = environment(&[THREE]) else { return };
    let name = name();
    let until = [("PA_TEST_FINAL", "3"), ("PA_TEST_ROUNDS", "5"), ("PA_TEST_SHARES", shares)];
    let environment =
        [environment, until.map(|(name, is)| (name, is.to_owned())).to_vec()].concat();
    let first = |origin: usize| one("outer", &environment, &name, origin, origin, Some(2));
    let mut ranks = vec![first(0), first(1)];
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.push(one("outer", &environment, &name, 2, 2, None));
    let lost = check_velocity(&mut ranks, &[0, 1, 2]);
    assert_eq!(lost, 0.0);
}

pub fn a_capture_before_the_first_average_since_a_recovery_is_refused() {
    let case = Case { devices: &[0, 1, 2], hidden: false, link: "auto", settings: &[THREE] };
    for shares in ["0", "1"] {
        let shares = |_| vec![("PA_TEST_SHARES", shares.to_owned())];
        let Some(mut ranks) = case.start("captures", shares) else { return };
        assert_eq!(ranks[2].end(), None, "{:#?}", ranks[2].output);
        check_survivors(&mut ranks, 2);
    }
}

const ELEMENTS: usize = 5000;

/// Role: recovers from the death of rank 2, and captures steps of the outer optimizer.
pub fn captures() -> Result<()> {
    /// As in `cuda::graphs`.
    const MODE: sys::CUstreamCaptureMode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    let communicator = join()?;
    let (rank, on) = (communicator.rank(), device());
    let mut model = Model::new(on, &[(Dtype::F32, ELEMENTS, 0)], 1);
    let weights = model.tensor_address(0);
    let stream = CudaContext::new(ordinal(on)).unwrap().new_stream().unwrap();
    let raw = stream.cu_stream();
    let fill = |value: f32| {
        // SAFETY: own memory and stream, which live until all is done.
        unsafe { sys::cuMemsetD32Async(weights, value.to_bits(), ELEMENTS, raw) }.result().unwrap();
    };
    // SAFETY: as above.
    let mut params = unsafe { RawCudaParams::new(raw.cast(), &mut model) };
    let options = builder(communicator).start_from(Start::Rank(0)).outer(Outer::sgd(0.5));
    let options = options.share_outer_state(number("PA_TEST_SHARES") == Some(1));
    let mut averager = options.build(&mut params)?;
    averager.average(&mut params)?;
    if rank == 2 {
        die(); // peers complete the average without it
    }
    let error = averager.average(&mut params).unwrap_err();
    say(&format!("failed {error:?}"));
    averager.recover(&mut params)?;
    // SAFETY: as above.
    let begin = || unsafe { result::stream::begin_capture(raw, MODE) }.unwrap();
    // SAFETY: as above.
    let end = || unsafe { result::stream::end_capture(raw) }.unwrap();

    begin();
    let error = averager.start(&mut params).map(drop).unwrap_err();
    let Error::InvalidOption { option: "stream", found, .. } = &error else { panic!("{error}") };
    assert!(found.contains("before the first average since a recovery"), "{found}");
    assert!(error.tensors() == TensorState::Unchanged && !error.is_fatal(), "{error}");
    let (graph, mut nodes) = (end(), usize::MAX);
    // SAFETY: a graph of this function.
    unsafe {
        sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result().unwrap();
        result::graph::destroy(graph).unwrap();
    }
    assert_eq!(nodes, 0);

    let theta = 8.0;
    fill(theta);
    averager.average(&mut params)?; // gives the anchor
    begin();
    drop(averager.start(&mut params)?);
    let mut ready = std::ptr::null_mut();
    // SAFETY: a graph of this function.
    unsafe {
        let graph = end();
        sys::cuGraphInstantiateWithFlags(&mut ready, graph, 0).result().unwrap();
        result::graph::destroy(graph).unwrap();
    }
    averager.barrier()?; // instantiating may wait for the device
    fill(averager.rank() as f32);
    // SAFETY: as above.
    unsafe {
        sys::cuGraphLaunch(ready, raw).result().unwrap();
        averager.graph_outcome(raw.cast())?;
    }
    model.download();
    let step = (theta - 0.5 * (theta - 0.5)).to_ne_bytes();
    assert!(model.tensor(0).chunks_exact(4).all(|element| element == step));
    averager.barrier()?;
    // SAFETY: no replay is under way.
    unsafe { sys::cuGraphExecDestroy(ready) }.result().unwrap();
    say(&format!("agreed {:?}", model.tensor(0)));
    say("done");
    Ok(())
}
