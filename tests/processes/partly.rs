//! A rank that is left alone by an average that had begun to write.

use param_averager::*;
use rustix::mm::{mmap_anonymous, mprotect, MapFlags, MprotectFlags, ProtFlags};

use test_support::process::start_all;
use test_support::rank::{builder, die, join, number, say};

/// 100 chunks of 1 KiB for each of two ranks: more than the slots of their mailboxes hold.
const ELEMENTS: usize = 200 * 256;

/// Tensor in memory of its own, which can be made read-only.
struct Mapped(*mut f32);

impl Mapped {
    fn new() -> Mapped {
        let (access, private) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping, which stays until the process ends.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), 4 * ELEMENTS, access, private) };
        Mapped(mapped.unwrap().cast())
    }

    /// From now on the first write to it ends the process.
    fn make_read_only(&mut self) {
        // SAFETY: own memory, which no reference is to.
        unsafe { mprotect(self.0.cast(), 4 * ELEMENTS, MprotectFlags::READ) }.unwrap();
    }

    fn values(&mut self) -> &mut [f32] {
        // SAFETY: own memory of this length.
        unsafe { std::slice::from_raw_parts_mut(self.0, ELEMENTS) }
    }
}

impl Parameters for Mapped {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        // SAFETY: as above.
        visit(unsafe {
            TensorMut::from_raw_parts(self.0.cast(), ELEMENTS, Dtype::F32, Device::cpu())
        });
    }
}

/// Role: of three ranks, rank 2 dies after an average, and rank 1 when it writes the result of the
/// recovery's.
pub fn left_alone() -> i32 {
    let has_outer = number("PA_TEST_OUTER") == Some(1);
    let outer = if has_outer { Outer::momentum(0.5, 0.5) } else { Outer::mean() };
    let (mut model, communicator) = (Mapped::new(), join().unwrap());
    let rank = communicator.rank();
    let options = builder(communicator).start_from(Start::Rank(0)).outer(outer);
    let mut sgd = LocalSgd::new(options.build(&mut model).unwrap(), Schedule::every(1));
    model.values().fill(-1.0); // θ is 0, so all velocities are 1
    sgd.step(&mut model).unwrap();
    if rank == 2 {
        die();
    }
    let own = 8.0 + 16.0 * rank as f32;
    model.values().fill(own);
    let error = sgd.step(&mut model).unwrap_err();
    assert!(matches!(error, Error::PeerLost { rank: 2, committed: false, .. }), "{error}");
    if rank == 1 {
        model.make_read_only();
    }
    let action = sgd.recover(&mut model).unwrap();
    assert_eq!(action, Action::PartlyAveraged);
    let anchor = model.values().to_vec();
    let written = anchor.iter().filter(|x| **x == 16.0).count();
    let unwritten = anchor.iter().filter(|x| **x == 8.0).count();
    assert_eq!(written + unwritten, ELEMENTS);
    say(&format!("written {written}"));

    model.values().iter_mut().for_each(|x| *x -= 4.0);
    let action = sgd.step(&mut model).unwrap();
    if !has_outer {
        assert_eq!(action, Action::Alone);
        return 0;
    }
    let report = action.report().unwrap_or_else(|| panic!("{action:?}"));
    let mut lost = 0;
    for (x, anchor) in model.values().iter().zip(&anchor) {
        let moved = anchor - x;
        assert!(moved == 2.25 || moved == 2.0, "moved by {moved}"); // (1 / 2 + 4) / 2, or 4 / 2
        lost += usize::from(moved == 2.0);
    }
    let share = lost as f64 / ELEMENTS as f64;
    assert!((report.lost_state - share).abs() < 1e-6, "{} for {share}", report.lost_state);
    assert!((0.5..0.8).contains(&share), "two of three ranks' shards are lost: {share}");
    say(&format!("lost {share}"));
    0
}

pub fn a_rank_that_is_left_alone_by_half_an_average_says_so() {
    for outer in ["0", "1"] {
        let mut ranks = start_all("left_alone", 3, |_| vec![("PA_TEST_OUTER", outer.to_owned())]);
        for rank in [2, 1] {
            assert_eq!(ranks[rank].end(), None, "{:#?}", ranks[rank].output);
        }
        assert_eq!(ranks[0].end(), Some(0), "{:#?}", ranks[0].output);
        assert_eq!(ranks[0].said("lost").len(), outer.parse::<usize>().unwrap());
    }
}
