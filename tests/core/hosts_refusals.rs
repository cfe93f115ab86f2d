//! Options and calls that averages of several hosts refuse.

use param_averager::{
    Builder, Compression, Hierarchy, LocalSgd, Outer, Overlap, ParamAverager, Schedule, Start,
    ThreadHosts,
};
use test_support::ranks;

use crate::hosts::{builder, on_hosts};

#[test]
fn done_is_refused() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![1.0f32; 10];
        let averager = builder(communicator, link).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(4));
        let error = sgd.done(&mut model).unwrap_err().to_string();
        assert!(error.contains("`hosts`") && error.contains("LocalSgd::finish"), "{error}");
        sgd.finish(&mut model).unwrap();
    });
}

#[test]
fn options_that_do_not_fit_are_refused() {
    use param_averager::Algorithm::Direct;
    type With = fn(Builder) -> Builder;
    let refused: [(With, &str); 7] = [
        (|builder| builder.algorithm(Direct), "`algorithm` is Direct, with 2 hosts"),
        (|builder| builder.all_or_nothing(false), "`all_or_nothing` is false, with 2 hosts"),
        (|builder| builder.start_from(Start::Own), "`start_from` is Own, with 2 hosts"),
        (|builder| builder.compression(Compression::Int8), "`compression` is Int8, with 2 hosts"),
        (|builder| builder.overlap(Overlap::default().delay(1)), "`overlap` is"),
        (
            |builder| {
                let link = ThreadHosts::new(2, 1).remove(0).remove(0);
                builder.hosts(link, Hierarchy::Outer { every: 0 })
            },
            "`hosts` is Outer { every: 0 }: every: 1 or more",
        ),
        (
            |builder| {
                let link = ThreadHosts::new(2, 1).remove(0).remove(0);
                builder.hosts(link, Hierarchy::Outer { every: 2 }).outer(Outer::diloco())
            },
            "with 2 hosts: Outer::mean with Hierarchy::Outer",
        ),
    ];
    for (with, text) in refused {
        let error = ranks(2, |communicator| {
            let link = ThreadHosts::new(2, 1).remove(0).remove(0);
            let builder = with(builder(communicator, link));
            builder.build(&mut vec![0.0f32; 10]).map(drop).unwrap_err().to_string()
        });
        assert!(error[0].contains(text), "{}", error[0]);
    }
}

#[test]
fn schedules_that_adapt_are_refused_where_hosts_average_alone() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![0.0f32; 10];
        let hierarchy = Hierarchy::Outer { every: 2 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let averager = builder.build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::overhead(0.05));
        let mut steps = (0..10).map(|_| sgd.step(&mut model));
        let error = steps.find_map(Result::err).expect("an error").to_string();
        assert!(error.contains("`hosts` is 2, Outer { every: 2 }, with "), "{error}");
    });
}

#[test]
fn ranks_that_recover_are_refused() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![0.0f32; 10];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        let error = averager.admit_joiner(&mut model).unwrap_err().to_string();
        assert!(error.contains("restart all hosts from a checkpoint"), "{error}");
    });
}
