//! The loan: candle lends the memory of a variable to an in-place operation, under its lock. Here
//! each operation makes the next one, so that all variables are locked during the average.

use std::cell::{Cell, RefCell};

use candle_core::{bail, CpuStorage, CudaStorage, Device, InplaceOp1, Layout};
use param_averager::{Lend, LendError, Loan, TensorMut};

use crate::lent::Entry;
use crate::VarParams;

/// Stack that one nested operation may take: 0.7 KiB were measured with candle 0.11.1, 4.4 without
/// optimization.
const LEVEL: usize = 64 << 10;
/// Stack that the average may take.
const AVERAGE: usize = 512 << 10;
/// Size of a stack that is added.
const ADDED: usize = 4 << 20;

impl Lend for VarParams {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        self.check()?;
        let _entry = Entry::new(self)?;
        let lending =
            Lending { params: self, average: RefCell::new(average), ended: Cell::new(Ok(())) };
        lending.nest(0, Tensors::new(self.len()))?;
        lending.ended.into_inner()
    }
}

/// One loan of all variables.
struct Lending<'p> {
    params: &'p VarParams,
    average: RefCell<&'p mut dyn FnMut(Loan<'_>)>,
    /// Result of the average's own loan.
    ended: Cell<Result<(), LendError>>,
}

impl Lending<'_> {
    /// Locks the variables from place `depth` of the order of locks on, and averages.
    fn nest(&self, depth: usize, tensors: Tensors<'_>) -> candle_core::Result<()> {
        match self.params.locking.get(depth) {
            None => {
                let ended = stacker::maybe_grow(AVERAGE, ADDED, || self.average(tensors));
                self.ended.set(ended);
                Ok(())
            }
            Some(&place) => stacker::maybe_grow(LEVEL, ADDED, || {
                let locked = Locked { lending: self, depth, place, tensors: Cell::new(tensors) };
                self.params.vars[place].var.inplace_op1(&locked)
            }),
        }
    }

    fn average(&self, mut tensors: Tensors<'_>) -> Result<(), LendError> {
        let mut average = self.average.borrow_mut();
        match self.params.vars.first().map(|it| it.var.device()) {
            #[cfg(feature = "cuda")]
            Some(Device::Cuda(device)) => {
                let stream = device.cuda_stream();
                let mut params = param_averager::CudaParams::new(&stream);
                params.extend(tensors.cuda.into_iter().flatten());
                params.lend(&mut **average)
            }
            None | Some(Device::Cpu) => {
                average(Loan::new(&mut tensors.host));
                Ok(())
            }
            Some(_) => Err(LendError::new("the variables' device has no average")),
        }
    }
}

/// Tensors that are locked so far, at their places in the order of names.
#[derive(Default)]
struct Tensors<'t> {
    host: Vec<Option<TensorMut<'t>>>,
    #[cfg(feature = "cuda")]
    cuda: Vec<Option<param_averager::CudaTensorMut<'t>>>,
}

impl Tensors<'_> {
    fn new(count: usize) -> Self {
        let mut new = Self::default();
        new.host.resize_with(count, || None);
        #[cfg(feature = "cuda")]
        new.cuda.resize_with(count, || None);
        new
    }
}

/// Text for a variable with gaps, which candle 0.11 has no way to make.
fn gaps(name: &str) -> String {
    format!("the variable `{name}` is not contiguous: make it of `tensor.contiguous()`")
}

/// In-place operation on one variable. While it runs, candle holds the variable's write lock.
struct Locked<'l, 'p, 't> {
    lending: &'l Lending<'p>,
    depth: usize,
    place: usize,
    tensors: Cell<Tensors<'t>>,
}

impl InplaceOp1 for Locked<'_, '_, '_> {
    fn name(&self) -> &'static str {
        "param-averager"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let name = &self.lending.params.vars[self.place].name;
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("{}", gaps(name)) };
        macro_rules! tensor {
            ($($dtype:ident),*) => {
                match storage {
                    $(CpuStorage::$dtype(values) => values.get_mut(from..to).map(TensorMut::from),)*
                    _ => bail!("the storage of `{name}` holds no floats"),
                }
            };
        }
        let Some(tensor) = tensor!(F32, F64, F16, BF16) else {
            bail!("the storage of `{name}` is smaller than the variable")
        };
        let mut tensors: Tensors<'_> = self.tensors.take();
        tensors.host[self.place] = Some(tensor.named(name));
        self.lending.nest(self.depth + 1, tensors)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        use candle_core::cuda_backend::CudaStorageSlice;
        use param_averager::CudaTensorMut;

        let name = &self.lending.params.vars[self.place].name;
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("{}", gaps(name)) };
        macro_rules! tensor {
            ($($dtype:ident),*) => {
                match &mut storage.slice {
                    $(CudaStorageSlice::$dtype(slice) => {
                        slice.try_slice_mut(from..to).map(CudaTensorMut::from)
                    })*
                    _ => bail!("the storage of `{name}` holds no floats"),
                }
            };
        }
        let Some(tensor) = tensor!(F32, F64, F16, BF16) else {
            bail!("the storage of `{name}` is smaller than the variable")
        };
        let mut tensors: Tensors<'_> = self.tensors.take();
        tensors.cuda[self.place] = Some(tensor.named(name));
        self.lending.nest(self.depth + 1, tensors)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda_fwd(&self, _: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        bail!("this build has no average on CUDA devices")
    }
}
