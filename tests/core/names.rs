//! Names of tensors: no layer is averaged with another one.

use std::collections::BTreeMap;

use param_averager::{
    Error, LocalSgd, ParamAverager, Parameters, Schedule, Start, TensorMut, TensorState,
};
use test_support::ranks;

/// Tensors with names, in the order of the list. An empty name is none.
struct Named(Vec<(&'static str, Vec<f32>)>);

impl Named {
    /// Four layers of one size, each filled with its place in `names`.
    fn of(names: &[&'static str]) -> Self {
        Named(names.iter().zip(0u8..).map(|(name, i)| (*name, vec![i.into(); 64])).collect())
    }
}

impl Parameters for Named {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        for (name, values) in &mut self.0 {
            let tensor = TensorMut::from(&mut values[..]);
            visit(if name.is_empty() { tensor } else { tensor.named(name) });
        }
    }
}

#[test]
fn names_are_compared_at_every_average() {
    type Change = fn(&mut Named);
    let changes: [(Change, &str); 4] = [
        (|model| model.0.swap(1, 2), "passes tensor 2 `v` (f32, 64 elements), as tensor 1"),
        (|model| model.0[3].0 = "out", "passes a tensor of another name, as tensor 3"),
        (|model| model.0[0].0 = "", "passes a tensor without a name, as tensor 0"),
        (|model| model.0[0].0 = "k", "passes tensor 1 `k` (f32, 64 elements), as tensor 0"),
    ];
    for (change, text) in changes {
        let errors = ranks(2, |communicator| {
            let mut model = Named::of(&["q", "k", "v", "o"]);
            let mut averager = ParamAverager::builder(communicator).build(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            let at_fault = averager.rank() == 1;
            if at_fault {
                change(&mut model);
            }
            let before = model.0.clone();
            let error = averager.average(&mut model).unwrap_err();
            assert_eq!(model.0, before, "{error}");
            assert_eq!((error.is_fatal(), error.tensors()), (false, TensorState::Unchanged));
            // The list of the build is right again.
            averager.average(&mut Named::of(&["q", "k", "v", "o"])).unwrap();
            error
        });
        assert_eq!(errors[0], errors[1]);
        assert!(matches!(errors[0], Error::LayoutChanged { rank: 1, .. }), "{}", errors[0]);
        assert!(errors[0].to_string().contains(text), "{}", errors[0]);
    }
}

#[test]
fn names_are_compared_in_every_step_that_averages() {
    let errors = ranks(2, |communicator| {
        let mut model = Named::of(&["q", "k"]);
        let averager = ParamAverager::builder(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        sgd.step(&mut model).unwrap();
        if sgd.averager().rank() == 0 {
            model.0.swap(0, 1);
        }
        sgd.step(&mut model).unwrap_err()
    });
    assert!(errors.iter().all(|error| matches!(error, Error::LayoutChanged { rank: 0, .. })));
}

#[test]
fn unnamed_tensors_of_one_size_are_refused_unless_they_are_allowed() {
    let build = |allow: bool, model: &(dyn Fn() -> Box<dyn Parameters> + Sync)| {
        let errors = ranks(2, |communicator| {
            let builder = ParamAverager::builder(communicator);
            let builder = if allow { builder.allow_unnamed() } else { builder };
            builder.build(&mut model()).map(drop)
        });
        assert_eq!(errors[0], errors[1]);
        errors.into_iter().next().unwrap()
    };
    type Model = fn() -> Box<dyn Parameters>;
    let ambiguous: [Model; 3] = [
        || Box::new(vec![vec![0.0f32; 10]; 3]),
        || Box::new((vec![0.0f32; 10], [0.0f64; 10], [0.0f32; 10])),
        || Box::new((Named::of(&["a", ""]), vec![0.0f32; 64])),
    ];
    for model in ambiguous {
        let error = build(false, &model).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::InvalidTensor { rank: 0, .. }), "{text}");
        for part in ["has no name", "HashMap", "allow_unnamed", "TensorMut::named"] {
            assert!(text.contains(part), "{text}");
        }
        build(true, &model).unwrap();
    }
    let clear: [Model; 4] = [
        || Box::new((vec![0.0f32; 10], [0.0f64; 10], [0.0f32; 11])), // another dtype, another size
        || Box::new(vec![vec![0.0f32; 0]; 3]),                       // nothing to mistake
        || Box::new((Named::of(&["a", ""]), vec![0.0f32; 63])),
        || Box::new(BTreeMap::from([("a", 0), ("b", 1)].map(|(k, _)| (k.into(), vec![0f32; 9])))),
    ];
    for model in clear {
        build(false, &model).unwrap();
    }
}

#[test]
fn names_are_unique() {
    let errors = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = Named::of(&["q", "k", ["v", "q"][rank]]);
        // Of another size all the same: a name stands for one tensor.
        model.0[2].1.truncate(3);
        ParamAverager::builder(communicator).allow_unnamed().build(&mut model).map(drop)
    });
    assert_eq!(errors[0], errors[1]);
    let text = errors[0].clone().unwrap_err().to_string();
    let expected = "rank 1: tensor 2 `q` (f32, 3 elements) has the name of tensor 0 `q`";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn a_map_numbers_the_tensors_of_one_key() {
    let errors = ranks(2, |communicator| {
        let rank = communicator.rank();
        let layer = |name: &str| (name.to_owned(), vec![vec![1.0f32; 8], vec![2.0; 8]]);
        let mut model = BTreeMap::from(["one", "two"].map(layer));
        let mut averager =
            ParamAverager::builder(communicator).start_from(Start::Own).build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        if rank == 0 {
            let layer = model.remove("two").unwrap();
            model.insert("three".into(), layer);
        }
        averager.average(&mut model).unwrap_err()
    });
    let text = errors[1].to_string();
    assert!(text.contains("built for tensor 2 `two` (f32, 8 elements)"), "{text}");
    let nested = ranks(1, |communicator| {
        let inner = || BTreeMap::from(["w", "b"].map(|name| (name.to_owned(), vec![0.0f32; 8])));
        let middle = |key: &str| (key.to_owned(), BTreeMap::from([("x".to_owned(), inner())]));
        let mut model = BTreeMap::from(["one", "two"].map(middle));
        let mut averager = ParamAverager::builder(communicator).build(&mut model).unwrap();
        model.get_mut("two").unwrap().get_mut("x").unwrap().remove("w");
        averager.average(&mut model).unwrap_err().to_string()
    });
    assert!(nested[0].contains("only 3 tensors where its averager was built for 4"), "{nested:?}");
    let twice = ranks(1, |communicator| {
        let mut model = BTreeMap::from([("w".to_owned(), Named::of(&["x", "x"]))]);
        ParamAverager::builder(communicator).build(&mut model).unwrap_err().to_string()
    });
    assert!(twice[0].contains("has the name of tensor 0 `w.x`"), "{}", twice[0]);
}
