//! Recovery within a host, of ranks that had a link to another one. The other host is one that has
//! what this one has: its values do not change the mean.

use std::sync::atomic::{AtomicBool, Ordering};

use param_averager::*;
use test_support::process::start_all;
use test_support::rank::{builder, die, join, say};

/// Set when the other host is lost.
static IS_CUT: AtomicBool = AtomicBool::new(false);

/// Link to a host whose ranks have what those of this one have.
#[derive(Default)]
struct Mirror {
    /// Values whose mean the other host has to send next.
    theirs: Option<Vec<u8>>,
}

fn unless_cut() -> Result<(), HostsError> {
    match IS_CUT.load(Ordering::Relaxed) {
        true => Err(HostsError::new(Some(1), "the link was cut")),
        false => Ok(()),
    }
}

impl Hosts for Mirror {
    fn hosts(&self) -> usize {
        2
    }
    fn host(&self) -> usize {
        0
    }
    fn all_to_all(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        _: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let (ours, theirs) = send.split_at(send.len() / 2);
        self.theirs = Some(theirs.to_vec());
        receive.chunks_mut(ours.len()).for_each(|from| from.copy_from_slice(ours));
        unless_cut()
    }
    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        _: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        let (ours, theirs) = receive.split_at_mut(send.len());
        ours.copy_from_slice(send);
        theirs.copy_from_slice(self.theirs.take().as_deref().unwrap_or(send));
        unless_cut()
    }
    fn abort(&mut self) {}
}

/// The values of a round are the same on all ranks, and so are exactly their mean.
fn train(model: &mut [f32], round: usize) {
    (0..).zip(model).for_each(|(at, weight)| *weight += ((at * 7 + round * 13) % 64) as f32);
}

/// Role: averages; loses the other host, or the last rank dies, or this host leaves the other, in
/// round 3; goes on alone, as a rank that has lost nothing.
pub fn leaves_hosts() -> i32 {
    const ROUNDS: usize = 6;
    let reason = std::env::var("PA_TEST_LEAVES_HOSTS").unwrap();
    let dies = reason == "death";
    let options = |world| {
        let options = builder(world).start_from(Start::Rank(0)).share_outer_state(true);
        options.outer(Outer::nesterov(0.5, 0.75))
    };
    let [mut model, mut expected] = [vec![0.0f32; 5000], vec![0.0; 5000]];
    let world = join().unwrap();
    let (rank, ranks) = (world.rank(), world.world_size());
    let averager =
        options(world).hosts(Mirror::default(), Hierarchy::Every).build(&mut model).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(1));
    let alone = Communicator::from_devices(&[Device::cpu()]).unwrap().remove(0);
    let mut reference = options(alone).build(&mut expected).unwrap();
    for round in 0..ROUNDS {
        train(&mut model, round);
        train(&mut expected, round);
        if round == 3 && dies && rank + 1 == ranks {
            die();
        }
        IS_CUT.store(round == 3 && reason == "cut", Ordering::Relaxed);
        let made = match round == 3 && reason == "wish" {
            true => {
                say("lost nothing");
                sgd.recover_within_host(&mut model)
            }
            false => sgd.step(&mut model),
        };
        let made = match made {
            Err(error) if round == 3 => {
                assert!(error.is_fatal() && error.tensors() == TensorState::Unchanged, "{error}");
                say(&format!("lost {error}"));
                let refused = sgd.recover(&mut model).unwrap_err();
                assert!(refused.to_string().contains("recover_within_host"), "{refused}");
                sgd.recover_within_host(&mut model).unwrap()
            }
            made => made.unwrap(),
        };
        // Outer steps begin from the mean of the first average after a recovery.
        match round == 3 {
            true => reference.broadcast(0, &mut expected).map(drop).unwrap(),
            false => reference.average(&mut expected).map(drop).unwrap(),
        }
        let Action::Averaged(report) = made else { panic!("{made:?}") };
        let left = if dies && round > 2 { ranks - 1 } else { ranks };
        let hosts = if round > 2 { 1 } else { 2 };
        assert_eq!((report.world_size, report.hosts, report.lost_state), (left, hosts, 0.0));
        assert!(model == expected, "rank {rank}, round {round}");
    }
    say("done");
    0
}

pub fn ranks_recover_within_their_host() {
    for (reason, lost) in [("cut", "host 1"), ("death", "rank 2"), ("wish", "nothing")] {
        let variables = |_| vec![("PA_TEST_LEAVES_HOSTS", reason.to_owned())];
        let mut ranks = start_all("leaves_hosts", 3, variables);
        for (index, rank) in ranks.iter_mut().enumerate() {
            let killed = reason == "death" && index == 2;
            assert_eq!(rank.end() == Some(0), !killed, "{:#?}", rank.output);
            if !killed {
                let said = rank.said("lost");
                assert!(said.len() == 1 && said[0].contains(lost), "{said:?}");
                assert_eq!(rank.said("done").len(), 1);
            }
        }
    }
}
