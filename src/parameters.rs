//! Lists of tensors that are a model's parameters.

use std::collections::BTreeMap;

#[cfg(feature = "half")]
use half::{bf16, f16};

use crate::TensorMut;

/// A model's parameters: a list of tensors that is the same, pointers aside, on every rank and at
/// every call.
///
/// Implemented for [`TensorMut`], for slices, vectors and arrays of `f32`, `f64` and, with the
/// feature `half`, `f16` and `bf16`, and for slices, vectors, arrays, tuples, `Option`, `Box` and
/// `BTreeMap<String, _>` of implementors: `Vec<Vec<f32>>` is a model. A map names its tensors by
/// their keys. A `HashMap` has another order in every process, so it does not implement it: sort
/// its tensors by name, and name every tensor. Without names only dtypes and numbers of elements
/// could be compared, and layers of one shape in another order would be averaged with each other.
/// So several unnamed tensors of one dtype and size are an error of
/// [`build`](crate::Builder::build), unless the builder
/// [allows them](crate::Builder::allow_unnamed), which suits a `Vec` or an array.
///
/// Implement it for a model of your own by calling `visit` once for each tensor:
///
/// ```
/// use param_averager::{Parameters, TensorMut};
///
/// struct Mlp { weight: Vec<f32>, bias: Vec<f32> }
///
/// impl Parameters for Mlp {
///     fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
///         visit(TensorMut::from(&mut self.weight[..]).named("weight"));
///         visit(TensorMut::from(&mut self.bias[..]).named("bias"));
///     }
/// }
/// ```
///
/// For tensors that must be locked, converted or assembled first, implement [`Lend`](crate::Lend);
/// [`guide::frameworks`](crate::guide::frameworks) has examples.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no list of tensors in host memory",
    note = "lists are `Vec<Vec<f32>>` and the like, or a type that implements `Parameters` by \
            visiting its tensors in one order",
    note = "candle: `VarParams` of the package `param-averager-candle` lends a `VarMap`; burn: \
            `BurnParams` of `param-averager-burn` lends a module",
    note = "tch and others: implement `Lend` for a type of your own that holds the model's \
            tensors sorted by name, and lends them for one average; see `param_averager::Lend`"
)]
pub trait Parameters {
    /// Calls `visit` once for each tensor, always in the same order. It runs in every average while
    /// peers wait, so it should be fast: without allocations and locks.
    ///
    /// The tensors live as long as `self` stays borrowed, since ranks read and write them after
    /// this has returned. A tensor in memory that is freed sooner does not compile:
    ///
    /// ```compile_fail
    /// # use param_averager::{Parameters, TensorMut};
    /// struct Copies(Vec<f32>);
    /// impl Parameters for Copies {
    ///     fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
    ///         visit(TensorMut::from(&mut self.0.clone()[..]));
    ///     }
    /// }
    /// ```
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>));
}

impl<P: Parameters + ?Sized> Parameters for &mut P {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        (**self).visit(visit)
    }
}

impl<P: Parameters + ?Sized> Parameters for Box<P> {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        (**self).visit(visit)
    }
}

/// `None` is a list of no tensors.
impl<P: Parameters> Parameters for Option<P> {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        self.iter_mut().for_each(|part| part.visit(visit))
    }
}

impl<P: Parameters> Parameters for [P] {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        self.iter_mut().for_each(|part| part.visit(visit))
    }
}

impl<P: Parameters> Parameters for Vec<P> {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        self[..].visit(visit)
    }
}

impl<P: Parameters, const N: usize> Parameters for [P; N] {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        self[..].visit(visit)
    }
}

/// Tensors in the order of the keys, which name the tensors that have no name yet. If a value has
/// several, errors number all but the first of them: `key`, `key.1`, `key.2`. Names within a value
/// need be unique among themselves only.
impl<P: Parameters> Parameters for BTreeMap<String, P> {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        for (name, part) in self.iter_mut() {
            let mut unnamed = 0;
            part.visit(&mut |tensor: TensorMut<'a>| {
                if tensor.name().is_some() {
                    return visit(tensor.within(name));
                }
                visit(tensor.named(name).numbered(unnamed));
                unnamed += 1;
            });
        }
    }
}

impl Parameters for TensorMut<'_> {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        visit(self.reborrow())
    }
}

macro_rules! tuples {
    ($(($($part:ident $at:tt),+)),+) => {$(
        impl<$($part: Parameters),+> Parameters for ($($part,)+) {
            fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
                $(self.$at.visit(visit);)+
            }
        }
    )+};
}
tuples!(
    (A 0),
    (A 0, B 1),
    (A 0, B 1, C 2),
    (A 0, B 1, C 2, D 3),
    (A 0, B 1, C 2, D 3, E 4),
    (A 0, B 1, C 2, D 3, E 4, F 5),
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6),
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7)
);

macro_rules! elements {
    ($($(#[$on:meta])* $element:ty),*) => {$(
        $(#[$on])*
        impl Parameters for [$element] {
            fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
                visit(TensorMut::from(self))
            }
        }
        $(#[$on])*
        impl Parameters for Vec<$element> {
            fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
                visit(TensorMut::from(&mut self[..]))
            }
        }
        $(#[$on])*
        impl<const N: usize> Parameters for [$element; N] {
            fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
                visit(TensorMut::from(&mut self[..]))
            }
        }
    )*};
}
elements!(
    f32,
    f64,
    #[cfg(feature = "half")]
    f16,
    #[cfg(feature = "half")]
    bf16
);

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(params: &mut dyn Parameters) -> Vec<(Option<String>, usize)> {
        let mut seen = vec![];
        params.visit(&mut |tensor| seen.push((tensor.name().map(str::to_owned), tensor.len())));
        seen
    }

    #[test]
    fn containers_keep_the_order_of_their_tensors() {
        let mut weights = vec![vec![0.0f32; 3], vec![0.0; 2]];
        let mut rest = (Some([0.0f64; 4]), None::<Vec<f32>>, Box::new(vec![0.0f32; 5]));
        let lengths = |seen: Vec<(_, usize)>| seen.into_iter().map(|(_, n)| n).collect::<Vec<_>>();
        assert_eq!(lengths(seen(&mut (&mut weights, &mut rest))), [3, 2, 4, 5]);
    }

    #[test]
    fn maps_name_their_tensors_and_keep_names() {
        let (mut bias, mut weight) = (vec![0.0f32; 1], vec![0.0f32; 2]);
        let named = TensorMut::from(&mut weight[..]).named("w");
        let map = [("b".to_owned(), TensorMut::from(&mut bias[..])), ("a".to_owned(), named)];
        let found = seen(&mut BTreeMap::from(map));
        assert_eq!(found, [(Some("w".into()), 2), (Some("b".into()), 1)]);
    }
}
