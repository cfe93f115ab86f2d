use super::*;

fn due(schedule: Schedule) -> Vec<u64> {
    let mut decisions = Decisions::new(schedule, Course::default());
    (1..=12).filter(|_| decisions.step(1).is_some()).collect()
}

pub(super) fn begun(schedule: Schedule, position: u64) -> Course {
    Course { position, ..Course::begin(&schedule, 0) }
}

#[test]
fn every_h_steps() {
    assert_eq!(due(Schedule::every(4)), [4, 8, 12]);
    assert_eq!(due(Schedule::every(1)), (1..=12).collect::<Vec<_>>());
    assert_eq!(due(Schedule::every(9).at_most(4)), [4, 8, 12]);
}

#[test]
fn every_step_before_the_warmup_ends() {
    assert_eq!(due(Schedule::every(4).after_warmup(3)), [1, 2, 3, 7, 11]);
    assert_eq!(due(Schedule::quadratic(0.1, 4).after_warmup(3)), [1, 2, 3, 7, 11]);
}

/// PyTorch's two conditions, with steps counted from 0.
#[test]
fn post_local_averages_at_the_steps_of_pytorch() {
    for (start, h) in [(0, 4), (3, 4), (5, 1), (2, 3)] {
        let gradients = |step| step < start;
        let parameters = |step: u64| step >= start && (step - start).is_multiple_of(h);
        let expected: Vec<u64> =
            (0..12).filter(|&s| gradients(s) || parameters(s)).map(|s| s + 1).collect();
        assert_eq!(due(Schedule::every(h).post_local(start)), expected, "{start} {h}");
    }
    assert_eq!(Schedule::every(4).post_local(100), Schedule::every(4).after_warmup(101));
}

/// At each step PyTorch's `HierarchicalModelAverager`, with steps counted from 0, takes the largest
/// period that divides it after the warm-up.
#[test]
fn levels_average_at_the_steps_of_pytorch() {
    for (periods, start) in [([2, 4, 8], 0), ([1, 3, 6], 5), ([3, 6, 12], 1)] {
        let levels = Schedule::hierarchical(periods).map(|level| level.post_local(start));
        for step in 0..60u64 {
            let pytorch = step
                .checked_sub(start)
                .and_then(|after| (0..3).rev().find(|&level| after.is_multiple_of(periods[level])));
            // Up to there gradients are all-reduced, which the last level stands for.
            let expected = if step < start { Some(2) } else { pytorch };
            // The first parameters are averaged by the last level as well: 0 is a multiple of all.
            let position = step + 1;
            for (level, schedule) in levels.iter().enumerate() {
                let found = begun(*schedule, position).due(schedule, 1).is_some();
                assert_eq!(found, expected == Some(level), "{schedule} after {position}");
            }
        }
    }
    let [inner, outer] = Schedule::hierarchical([2, 8]);
    assert_eq!((due(inner), outer), (vec![2, 4, 6, 10, 12], Schedule::every(8)));
    assert_eq!(due(inner.after_warmup(3)), [5, 7, 9]);
    assert_eq!(inner.to_string(), "every(2) without every(8)");
}

#[test]
fn each_fragment_is_due_once_a_round() {
    for (h, fragments, warmup) in [(8, 4, 0), (7, 3, 2), (5, 5, 0), (100, 7, 9), (3, 1, 1)] {
        let schedule = Schedule::every(h).after_warmup(warmup);
        let expected = |position: u64| match position {
            0 => None,
            _ if position <= warmup => Some(Due::Whole),
            _ => {
                let step = (position - warmup - 1) % h + 1;
                let mut all = (0..fragments).filter(|p| (p + 1) * h / fragments == step);
                all.next().map(|p| match fragments {
                    1 => Due::Whole,
                    _ => Due::Fragment(p as usize),
                })
            }
        };
        for position in 0..3 * h + warmup {
            let course = begun(schedule, position);
            let found = course.due(&schedule, fragments as u32);
            assert_eq!(found, expected(position), "{schedule} / {fragments} at {position}");
            let next = (position + 1..).find(|&step| expected(step).is_some()).unwrap();
            let until = course.until_next(&schedule, fragments as u32);
            assert_eq!(position + until, next, "{schedule} / {fragments} after {position}");
        }
    }
}

#[test]
fn steps_until_the_next_average_are_those_to_the_next_one_that_is_due() {
    let [level, _] = Schedule::hierarchical([3, 6]);
    for schedule in [
        Schedule::every(4),
        Schedule::every(1),
        Schedule::every(5).after_warmup(3),
        level,
        level.after_warmup(4),
        level.at_most(2),
    ] {
        for position in 0..40 {
            let is_due = |&step: &u64| begun(schedule, step).due(&schedule, 1).is_some();
            let next = (position + 1..).find(is_due).unwrap();
            let found = begun(schedule, position).until_next(&schedule, 1);
            assert_eq!(position + found, next, "{schedule} after {position}");
        }
    }
}

#[test]
fn schedules_show_as_they_are_built() {
    for (schedule, shown) in [
        (Schedule::every(8), "every(8)"),
        (Schedule::every(8).after_warmup(100), "every(8).after_warmup(100)"),
        (Schedule::every(8).post_local(100), "every(8).after_warmup(101)"),
        (Schedule::quadratic(0.0175, 4), "quadratic(0.0175, 4)"),
        (Schedule::quadratic(1.0, 4).at_most(64), "quadratic(1, 4).at_most(64)"),
        (Schedule::overhead(Schedule::OVERHEAD), "overhead(0.05).at_most(200)"),
        (Schedule::budget(12.5e6).after_warmup(2), "budget(12500000).after_warmup(2)"),
    ] {
        assert_eq!(schedule.to_string(), shown);
    }
}

/// Position 4 of a schedule, as the reason to average.
fn reason(schedule: Schedule) -> Reason {
    Reason { schedule, course: begun(schedule, 4), rate: None, unfit: None }
}

#[test]
fn digests_tell_schedules_decisions_rates_and_places_apart() {
    let a = reason(Schedule::every(4));
    let adapts = reason(Schedule::overhead(0.05));
    let course = |anchor, local_steps| Course { anchor, local_steps, ..adapts.course };
    let rate = |rate| Reason { rate: Some(rate), ..reason(Schedule::quadratic(1.0, 4)) };
    let digests = [
        a.digest(8),
        a.digest(12),
        a.digest(place::FINISH),
        reason(Schedule::every(5)).digest(8),
        reason(Schedule::every(4).after_warmup(1)).digest(8),
        reason(Schedule::every(4).at_most(8)).digest(8),
        adapts.digest(8),
        reason(Schedule::overhead(0.06)).digest(8),
        reason(Schedule::budget(0.05).at_most(200)).digest(8),
        Reason { course: course(1, 10), ..adapts }.digest(8),
        Reason { course: course(0, 11), ..adapts }.digest(8),
        reason(Schedule::quadratic(1.0, 4)).digest(8),
        reason(Schedule::quadratic(1.0, 5)).digest(8),
        reason(Schedule::quadratic(2.0, 4)).digest(8),
        rate(Rate::Known(0.1)).digest(8),
        rate(Rate::Known(0.1 + 1e-17)).digest(8) ^ 1, // the same number
        rate(Rate::Known(0.2)).digest(8),
        rate(Rate::Unusable { rank: 0 }).digest(8),
        rate(Rate::Unusable { rank: 1 }).digest(8),
        Reason { unfit: Some(0), ..a }.digest(8),
        Reason { unfit: Some(1), ..a }.digest(8),
        0,
    ];
    for (i, x) in digests.iter().enumerate() {
        assert!(digests[..i].iter().all(|y| x != y), "digest {i}");
    }
}

#[test]
fn reasons_name_what_was_decided() {
    let shown = |schedule, rate, place| Reason { rate, ..reason(schedule) }.at(place);
    assert_eq!(shown(Schedule::every(4), None, 4), "after step 4 of every(4)");
    assert_eq!(
        Reason { unfit: Some(2), ..reason(Schedule::every(4)) }.at(4),
        "after step 4 of every(4), which does not fit its averager's options"
    );
    assert_eq!(
        shown(Schedule::every(3), None, place::FINISH),
        "in `sync` or `finish` after step 4 of every(3)"
    );
    assert_eq!(
        shown(Schedule::quadratic(0.2, 4), Some(Rate::Known(0.1)), 4),
        "after step 4 of quadratic(0.2, 4), with H = 4 from step 0 and learning rate 0.1"
    );
    assert_eq!(
        shown(Schedule::quadratic(0.2, 4), Some(Rate::Unusable { rank: 1 }), 4),
        "after step 4 of quadratic(0.2, 4), with H = 4 from step 0 and no learning rate"
    );
}

/// Saved states have these words.
#[test]
fn words_of_a_schedule_never_change() {
    let at_most = u64::MAX;
    let bits = f64::to_bits;
    assert_eq!(Schedule::every(8).after_warmup(3).words(), [0, 8, 0, 3, at_most]);
    assert_eq!(Schedule::quadratic(0.2, 4).words(), [1, bits(0.2), 4, 0, at_most]);
    assert_eq!(Schedule::overhead(0.05).words(), [2, bits(0.05), 0, 0, 200]);
    assert_eq!(Schedule::budget(1e6).at_most(9).words(), [3, bits(1e6), 0, 0, 9]);
    assert_eq!(Schedule::divergence(0.05).words(), [4, bits(0.05), 0, 0, u64::MAX]);
    assert_eq!(Schedule::hierarchical([2, 8])[0].words(), [5, 2, 8, 0, at_most]);
}

fn refuses(build: fn() -> Schedule) -> String {
    let panic = std::panic::catch_unwind(build).unwrap_err();
    let text = panic.downcast_ref::<String>().cloned();
    text.or(panic.downcast_ref::<&str>().map(|&text| text.into())).unwrap()
}

#[test]
fn parameters_without_a_meaning_are_refused() {
    for (build, says) in [
        ((|| Schedule::every(0)) as fn() -> Schedule, "at least 1"),
        (|| Schedule::every(1).at_most(0), "at least 1"),
        (|| Schedule::quadratic(1.0, 0), "at least 1"),
        (|| Schedule::quadratic(-1.0, 4), "quadratic(-1, _): alpha is above 0"),
        (|| Schedule::overhead(0.0), "overhead(0): a share is above 0"),
        (|| Schedule::overhead(f64::NAN), "overhead(NaN)"),
        (|| Schedule::budget(f64::INFINITY), "budget(inf)"),
        (|| Schedule::divergence(-0.1), "divergence(-0.1): a share is above 0"),
        (|| Schedule::hierarchical([2, 5])[0], "hierarchical([2, 5]): each period is a multiple"),
        (|| Schedule::hierarchical([4, 4])[0], "a multiple of the one before"),
        (|| Schedule::hierarchical([0, 4])[0], "a multiple of the one before"),
    ] {
        let text = refuses(build);
        assert!(text.contains(says), "{text}");
    }
}
