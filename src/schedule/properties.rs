//! Properties of all schedules.

use proptest::prelude::*;

use super::tests::begun;
use super::*;

/// Numbers of every magnitude, numbers next to a power of two, and numbers next to the ends of the
/// range.
fn near_powers() -> impl Strategy<Value = u64> {
    let near = (0u32..64, -3i64..=3).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off));
    prop_oneof![any::<u64>(), near, 0u64..40, (0u64..40).prop_map(|off| u64::MAX - off)]
}

/// Times, bytes and rates, and numbers that are none of these.
fn measurement() -> impl Strategy<Value = f64> {
    let odd = [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-300, 1e300];
    prop_oneof![4 => 1e-4..1.0f64, 1 => proptest::sample::select(odd.to_vec())]
}

fn schedule() -> impl Strategy<Value = Schedule> {
    let rule = prop_oneof![
        (1u64..6).prop_map(Schedule::every),
        (0.001..1.0f64, 1u64..6).prop_map(|(alpha, base)| Schedule::quadratic(alpha, base)),
        (0.01..2.0f64).prop_map(Schedule::overhead),
        (1.0..1e6f64).prop_map(Schedule::budget),
        (0.01..2.0f64).prop_map(Schedule::divergence),
        (1u64..4, 2u64..4).prop_map(|(h, of)| Schedule::hierarchical([h, of * h])[0]),
    ];
    (rule, 0u64..4, 1u64..40).prop_map(|(rule, w, h)| rule.after_warmup(w).at_most(h))
}

/// Events of one step.
#[derive(Clone, Debug)]
struct Event {
    /// Measurements of each rank.
    measured: Vec<[f64; 2]>,
    rate: f64,
    /// If an average is due: whether it is enqueued, how it ends, and which ranks look at its
    /// outcome at once.
    enqueued: bool,
    end: End,
    looks: Vec<bool>,
    /// True if the ranks make an average outside of the due ones after the step.
    syncs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Averaged,
    /// The same error on all ranks, or nothing to average.
    Refused,
    /// A failure after the commit: some ranks have completed the average. All recover.
    FailedFor(u8),
}

const RANKS: usize = 3;

fn event() -> impl Strategy<Value = Event> {
    let end = prop_oneof![
        6 => Just(End::Averaged),
        1 => Just(End::Refused),
        1 => any::<u8>().prop_map(End::FailedFor),
    ];
    let measured = proptest::collection::vec([measurement(), measurement()], RANKS);
    let looks = proptest::collection::vec(any::<bool>(), RANKS);
    (measured, 1e-4..1.0f64, any::<bool>(), end, looks, any::<bool>()).prop_map(
        |(measured, rate, enqueued, end, looks, syncs)| Event {
            measured,
            rate,
            enqueued,
            end,
            looks,
            syncs,
        },
    )
}

/// The largest of all ranks' measurements, as the kernels' `agree_on_measured`.
fn largest(measured: &[[f64; 2]], of: usize) -> f64 {
    measured.iter().fold(0.0, |most, values| if values[of] > most { values[of] } else { most })
}

proptest! {
    #[test]
    fn any_schedule_and_step_have_an_answer(
        every in near_powers(), warmup in near_powers(), step in near_powers()
    ) {
        let schedule = Schedule::every(every.max(1)).after_warmup(warmup);
        let course = begun(schedule, step);
        let until = course.until_next(&schedule, 1);
        prop_assert!(until >= 1 && until <= every.max(1));
        let is_due = |step| begun(schedule, step).due(&schedule, 1).is_some();
        let next = step.saturating_add(until);
        prop_assert!(is_due(next) || next == u64::MAX);
        // No step in between is due; checked for the first ones.
        for between in (step.saturating_add(1)..next).take(20) {
            prop_assert!(!is_due(between));
        }
        let reason = Reason { schedule, course, rate: None, unfit: None };
        prop_assert_ne!(reason.digest(step), 0);
    }

    #[test]
    fn any_level_and_step_have_an_answer(
        h in near_powers(), factor in 2u64..5, warmup in near_powers(), step in near_powers()
    ) {
        let h = h.max(1);
        prop_assume!(h.checked_mul(factor).is_some());
        let schedule = Schedule::hierarchical([h, h * factor])[0].after_warmup(warmup);
        let until = begun(schedule, step).until_next(&schedule, 1);
        prop_assert!(until >= 1);
        let is_due = |step| begun(schedule, step).due(&schedule, 1).is_some();
        let next = step.saturating_add(until);
        prop_assert!(is_due(next) || next == u64::MAX, "{schedule} after {step}: {next}");
        for between in (step.saturating_add(1)..next).take(20) {
            prop_assert!(!is_due(between));
        }
    }

    #[test]
    fn any_measurement_gives_a_number_of_steps(
        schedule in schedule(), h in near_powers(), step in measurement(),
        average in measurement(), sent in measurement(), rate in measurement()
    ) {
        let agreed = Agreed { measured: [step, average], sent, rate: Some(rate) };
        let mut course = Course { local_steps: h.max(1), ..begun(schedule, 9) };
        course.decide(&schedule, &agreed);
        prop_assert!((1..40).contains(&course.local_steps) || !schedule.adapts());
        // A round of a level may be left out.
        let rounds = if matches!(schedule.rule, Rule::Level { .. }) { 2 } else { 1 };
        let most = course.local_steps.saturating_mul(rounds);
        prop_assert!(course.until_next(&schedule, 1) <= most);
    }

    /// All ranks average after the same steps, for the same reason, whatever they measure, whenever
    /// they look at outcomes, and however averages end.
    #[test]
    fn all_ranks_take_the_same_decisions(
        schedule in schedule(), events in proptest::collection::vec(event(), 1..120)
    ) {
        let mut ranks = vec![Decisions::new(schedule, Course::default()); RANKS];
        // Outcome of an average that was enqueued, until each rank looks at it.
        let mut unseen: Vec<Option<Agreed>> = vec![None; RANKS];
        for event in events {
            let due: Vec<bool> =
                ranks.iter_mut().map(|decisions| decisions.step(1).is_some()).collect();
            prop_assert!(due.iter().all(|&is_due| is_due == due[0]), "{due:?}");
            let settle = |ranks: &mut [Decisions], unseen: &mut [Option<Agreed>], all: bool| {
                for ((rank, seen), looks) in ranks.iter_mut().zip(unseen).zip(&event.looks) {
                    if let Some(agreed) = seen.take_if(|_| all || *looks) {
                        rank.after_enqueued(agreed);
                    }
                }
            };
            settle(&mut ranks, &mut unseen, false);
            let places: &[u64] = match (due[0], event.syncs) {
                (true, false) => &[ranks[0].course.position],
                (true, true) => &[ranks[0].course.position, place::FINISH],
                (false, true) => &[place::FINISH],
                (false, false) => &[],
            };
            for &place in places {
                settle(&mut ranks, &mut unseen, true);
                ranks.iter_mut().for_each(|rank| rank.before(place));
                let digest = |rank: &Decisions| {
                    let Decisions { schedule, course, .. } = rank.clone();
                    Reason { schedule, course, rate: None, unfit: None }.digest(place)
                };
                let digests: Vec<u64> = ranks.iter().map(digest).collect();
                prop_assert!(digests.iter().all(|&digest| digest == digests[0]), "{ranks:?}");
                let agreed = Agreed {
                    measured: [0, 1].map(|of| largest(&event.measured, of)),
                    sent: 1e3,
                    rate: Some(event.rate),
                };
                let is_enqueued = event.enqueued && place != place::FINISH;
                for index in 0..RANKS {
                    let is_made = match event.end {
                        End::Averaged => true,
                        End::Refused => false,
                        End::FailedFor(which) => which & 1 << index == 0,
                    };
                    match is_enqueued {
                        true => unseen[index] = is_made.then_some(agreed),
                        false if is_made => ranks[index].after(place, &agreed),
                        false => {}
                    }
                }
                if matches!(event.end, End::FailedFor(_)) {
                    settle(&mut ranks, &mut unseen, true);
                    let course = Course::farthest(ranks.iter().map(|rank| rank.course));
                    ranks.iter_mut().for_each(|rank| rank.take(course));
                }
            }
        }
    }

    /// Ranks that have gone on to different steps when a peer is lost go on together.
    #[test]
    fn ranks_meet_at_the_farthest_course(
        schedule in schedule(), ahead in 0u64..10, agreed in measurement()
    ) {
        let mut near = Decisions::new(schedule, Course::default());
        while near.step(1).is_none() {}
        let mut far = near.clone();
        let agreed = Agreed { measured: [agreed; 2], sent: agreed, rate: Some(0.1) };
        far.after(far.course.position, &agreed);
        for _ in 0..ahead {
            far.step(1);
        }
        for order in [[&near, &far], [&far, &near]] {
            let met = Course::farthest(order.map(|rank| rank.course));
            prop_assert_eq!(met, far.course);
        }
    }
}
