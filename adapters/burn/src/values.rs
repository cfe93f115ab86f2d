//! Values of parameters, taken out of a module and put back.

use std::mem;

use burn_core::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn_core::tensor::{bf16, f16, Bool, DType, Device, Int, Tensor, TensorData};
use param_averager::{LendError, TensorMut};

/// Text about a module that is gone.
pub(crate) const GONE: &str = "the module is gone: a closure of BurnParams::update, or burn, \
    failed while it had it. Load a checkpoint and pass it to BurnParams::replace";

/// True for the paths of parameters that are averaged.
pub(crate) type Keep = dyn Fn(&str) -> bool + Send;

/// Path of the parameter that a traversal is at.
#[derive(Default)]
struct Path(Vec<String>);

impl Path {
    fn enter(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    fn name(&self) -> String {
        self.0.join(".")
    }
}

/// Checks that every parameter that is averaged has a mean, before a module is taken apart.
pub(crate) fn check<M: Module>(module: &M, keep: &Keep) -> Result<(), LendError> {
    let mut check = Check { path: Path::default(), keep, kept: 0, refused: None };
    module.visit(&mut check);
    match check.refused {
        Some(refused) => Err(refused),
        None if check.kept == 0 => Err(LendError::new(
            "the module has no float parameter to average: declare its tensors as Param, and let \
             BurnParams::filter keep some",
        )),
        None => Ok(()),
    }
}

struct Check<'k> {
    path: Path,
    keep: &'k Keep,
    kept: usize,
    refused: Option<LendError>,
}

impl Check<'_> {
    /// Counts a parameter. `holds` is what it holds, if that has no mean.
    fn note(&mut self, holds: Option<String>) {
        let name = self.path.name();
        if self.refused.is_some() || !(self.keep)(&name) {
            return;
        }
        self.kept += 1;
        self.refused = holds.map(|holds| {
            LendError::new(format!(
                "parameter `{name}` holds {holds}, and averages are of f32, f64, f16 and bf16: \
                 leave it out by BurnParams::filter on every rank"
            ))
        });
    }
}

impl ModuleVisitor for Check<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.note(match param.dtype() {
            DType::F32 | DType::F64 | DType::F16 | DType::BF16 => None,
            DType::QFloat(_) => Some("quantised values".to_owned()),
            other => Some(format!("values of dtype {other:?}")),
        });
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        self.note(Some("integers".to_owned()));
    }

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
        self.note(Some("booleans".to_owned()));
    }
}

/// Values of one parameter.
struct Values {
    name: String,
    /// Number of float parameters before it in the module.
    index: usize,
    data: TensorData,
    device: Device,
    requires_grad: bool,
}

/// A module whose values are out of it, until this is dropped.
pub(crate) struct Lending<'p, M: Module> {
    home: &'p mut Option<M>,
    /// The module, with empty tensors in the place of the values. `None`: gone.
    module: Option<M>,
    values: Vec<Values>,
}

impl<'p, M: Module> Lending<'p, M> {
    /// Takes the values out of the module at `home`.
    pub(crate) fn begin(home: &'p mut Option<M>, keep: &Keep) -> Result<Self, LendError> {
        let mut take = Take { path: Path::default(), keep, index: 0, values: vec![], failed: None };
        let module = home.take().map(|module| module.map(&mut take));
        match take.failed {
            // Its device is lost, and the values with it.
            Some(failed) => Err(failed),
            None => Ok(Lending { home, module, values: take.values }),
        }
    }

    /// The values as tensors of an average.
    pub(crate) fn tensors(&mut self) -> Result<Vec<TensorMut<'_>>, LendError> {
        self.values.iter_mut().map(Values::tensor).collect()
    }
}

impl<M: Module> Drop for Lending<'_, M> {
    fn drop(&mut self) {
        let mut put = Put { index: 0, values: mem::take(&mut self.values).into_iter().peekable() };
        *self.home = self.module.take().map(|module| module.map(&mut put));
    }
}

impl Values {
    fn tensor(&mut self) -> Result<TensorMut<'_>, LendError> {
        let tensor = match self.data.dtype() {
            DType::F64 => self.data.as_mut_slice::<f64>().map(TensorMut::from),
            DType::F16 => self.data.as_mut_slice::<f16>().map(TensorMut::from),
            DType::BF16 => self.data.as_mut_slice::<bf16>().map(TensorMut::from),
            _ => self.data.as_mut_slice::<f32>().map(TensorMut::from),
        };
        match tensor {
            Ok(tensor) => Ok(tensor.named(&self.name)),
            Err(error) => Err(LendError::new(format!(
                "parameter `{}` can't be written in host memory: {error}",
                self.name
            ))),
        }
    }
}

/// Takes values out, and leaves an empty tensor in the place of each.
struct Take<'k> {
    path: Path,
    keep: &'k Keep,
    index: usize,
    values: Vec<Values>,
    failed: Option<LendError>,
}

impl ModuleMapper for Take<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (name, index) = (self.path.name(), self.index);
        self.index += 1;
        if !(self.keep)(&name) {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        let (device, dtype, requires_grad) =
            (tensor.device(), tensor.dtype(), tensor.is_require_grad());
        let place = Tensor::empty([0; D], (&device, dtype));
        match tensor.try_into_data() {
            Ok(data) => self.values.push(Values { name, index, data, device, requires_grad }),
            Err(error) => {
                self.failed.get_or_insert_with(|| {
                    LendError::new(format!("parameter `{name}` can't be read: {error}; {GONE}"))
                });
            }
        }
        Param::from_mapped_value(id, place, mapper)
    }
}

/// Puts values back.
struct Put {
    index: usize,
    values: std::iter::Peekable<std::vec::IntoIter<Values>>,
}

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let index = self.index;
        self.index += 1;
        let Some(values) = self.values.next_if(|values| values.index == index) else {
            return param;
        };
        let (id, _, mapper) = param.consume();
        let dtype = values.data.dtype();
        let tensor = Tensor::from_data(values.data, (&values.device, dtype));
        // On a device without autodiff nothing requires gradients, and `mapper` knows what did.
        let tensor = if values.requires_grad { tensor.require_grad() } else { tensor };
        Param::from_mapped_value(id, tensor, mapper)
    }
}
