//! cudarc's slices as tensors: averages of `CudaSlice`s and `CudaViewMut`s of cudarc 0.19, safely,
//! on a `CudaStream`.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use param_averager::{CudaParams, CudaTensorMut, Device, ParamAverager, Communicator};
//!
//! let world = Communicator::from_devices(&[Device::cuda(0); 2])?;
//! let ranks: Vec<_> = world.into_iter().map(|communicator| std::thread::spawn(move || {
//!     let stream = CudaContext::new(0)?.new_stream()?; // of this rank's own
//!     let mut wte = stream.alloc_zeros::<f32>(1_000_000)?;
//!     let mut layers = vec![stream.alloc_zeros::<f32>(4096)?, stream.alloc_zeros(4096)?];
//!
//!     let mut params = CudaParams::new(&stream);
//!     params.push(CudaTensorMut::from(&mut wte).named("wte"));
//!     params.extend(&mut layers);
//!     let mut averager = ParamAverager::builder(communicator).build(&mut params)?;
//!     // Behind the stream's work, and behind that of other streams on the slices.
//!     let pending = averager.start(&mut params)?;
//!     // Ordered after it, as everything is that cudarc does with the slices.
//!     let mean = stream.clone_dtoh(&wte)?;
//!     println!("{} {:?}", mean[0], pending.wait()?);
//!     Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
//! })).collect();
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # Order of uses
//! cudarc records an event after every use of a slice, and every use on another stream waits for
//! it. An average does the same: its stream first waits for each slice's events, and records the
//! slice's event when the average has been enqueued. So later uses of a slice, and freeing it, come
//! after the average, also if its [`Pending`](crate::Pending) is forgotten. Without such events the
//! average is refused, on every rank: for a slice of another `CudaContext` object, for a slice
//! whose uses are not tracked and which was allocated on another stream, and for a slice whose last
//! use was captured for a graph.
//!
//! # Limits of cudarc
//! * Views of one slice share its events, so ranks need slices of their own, not halves of one.
//! * `wrap_borrowed_stream` makes a stream that cudarc does not count. A context that has no other
//!   stream tracks nothing, and slices must have been allocated on that very stream.
//! * A stream that one thread captures while another enqueues an average on it captures the
//!   average.
//! * A stream that waits for a use of a slice in a capture under way becomes a part of that
//!   capture, although the average is refused.

mod average;

use std::fmt;
use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, CudaViewMut, DevicePtr, DevicePtrMut, DriverError, SyncOnDrop,
};
#[cfg(feature = "half")]
use half::{bf16, f16};

use crate::backend::cuda::is_of_capture;
use crate::tensor::Unordered;
use crate::{Device, Dtype, Element, TensorMut};

/// Borrowed `CudaSlice` or `CudaViewMut` of any dtype: `CudaTensorMut::from(&mut
/// wte).named("wte")`.
pub struct CudaTensorMut<'a> {
    name: Option<&'a str>,
    view: AnyView<'a>,
}

/// View of any dtype. An enum, since a box runs code when it is dropped, and a borrow would last
/// until then.
enum AnyView<'a> {
    F32(CudaViewMut<'a, f32>),
    F64(CudaViewMut<'a, f64>),
    #[cfg(feature = "half")]
    F16(CudaViewMut<'a, f16>),
    #[cfg(feature = "half")]
    Bf16(CudaViewMut<'a, bf16>),
}

impl<'a> CudaTensorMut<'a> {
    /// The same tensor with a name, which ranks compare and errors give.
    pub fn named(mut self, name: &'a str) -> Self {
        self.name = Some(name);
        self
    }
}

macro_rules! elements {
    ($($(#[$on:meta])* $element:ty => $dtype:ident),*) => {
        $(
            $(#[$on])*
            impl<'a> From<&'a mut CudaSlice<$element>> for CudaTensorMut<'a> {
                fn from(slice: &'a mut CudaSlice<$element>) -> Self {
                    slice.as_view_mut().into()
                }
            }

            $(#[$on])*
            impl<'a> From<CudaViewMut<'a, $element>> for CudaTensorMut<'a> {
                fn from(view: CudaViewMut<'a, $element>) -> Self {
                    CudaTensorMut { name: None, view: AnyView::$dtype(view) }
                }
            }
        )*

        impl<'a> AnyView<'a> {
            fn get(&self) -> &(dyn View + 'a) {
                match self {
                    $($(#[$on])* AnyView::$dtype(view) => view,)*
                }
            }

            fn get_mut(&mut self) -> &mut (dyn View + 'a) {
                match self {
                    $($(#[$on])* AnyView::$dtype(view) => view,)*
                }
            }
        }
    };
}
elements!(
    f32 => F32,
    f64 => F64,
    #[cfg(feature = "half")]
    f16 => F16,
    #[cfg(feature = "half")]
    bf16 => Bf16
);

impl fmt::Debug for CudaTensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, view) = (self.name.unwrap_or("tensor"), self.view.get());
        write!(f, "{name}[{}; {}] on {}", view.dtype(), view.elements(), device(view.stream()))
    }
}

/// A model's parameters in cudarc's slices, and the stream that they are averaged on.
///
/// [`average`](crate::ParamAverager::average) runs behind the stream's work, and returns when the
/// average is done. [`start`](crate::ParamAverager::start) returns at once, and the stream's later
/// work comes after the average. The stream belongs to the rank's device, is not being captured,
/// and may be of any kind, the null stream included. For `start` it serves no other rank, and
/// [`RawCudaParams`](crate::RawCudaParams) has the rules for ranks that share a device.
///
/// It can be made again for every average: addresses may change; the number, order, dtypes and
/// sizes of the tensors stay.
#[derive(Debug)]
pub struct CudaParams<'a> {
    stream: &'a Arc<CudaStream>,
    tensors: Vec<CudaTensorMut<'a>>,
}

impl<'a> CudaParams<'a> {
    /// Parameters without tensors yet, averaged behind the work of `stream`, which belongs to this
    /// rank's device.
    pub fn new(stream: &'a Arc<CudaStream>) -> Self {
        CudaParams { stream, tensors: vec![] }
    }

    /// Adds a tensor: a `&mut CudaSlice` or a `CudaViewMut` of f32, f64, f16 or bf16.
    pub fn push(&mut self, tensor: impl Into<CudaTensorMut<'a>>) {
        self.tensors.push(tensor.into());
    }

    /// Makes the stream wait for earlier uses of the tensors. Returns the tensors, and their
    /// events, which the caller records when it has enqueued its work on the stream.
    fn order(&mut self) -> std::result::Result<(Vec<TensorMut<'_>>, Vec<&CudaEvent>), DriverError> {
        let (mut tensors, mut events) = (Vec::with_capacity(self.tensors.len()), vec![]);
        for CudaTensorMut { name, view } in &mut self.tensors {
            let view = view.get_mut();
            let (dtype, elements, on) = (view.dtype(), view.elements(), device(view.stream()));
            let (mut address, mut unordered) = (0, None);
            // A tensor without elements is not touched.
            if elements > 0 {
                match view.order(self.stream)? {
                    Ok((found, event)) => {
                        address = found;
                        events.extend(event);
                    }
                    Err(why) => unordered = Some(why),
                }
            }
            // SAFETY: the view is borrowed mutably for as long, and has that many elements, which
            // are initialised as cudarc or the code that allocated them promises; any bits are a
            // float. `order`'s callers order its uses on the device. An address of 0 is never read:
            // the tensor is refused, or has no elements.
            let tensor =
                unsafe { TensorMut::from_raw_parts(address as *mut u8, elements, dtype, on) };
            let tensor = tensor.unordered(unordered);
            tensors.push(match name {
                Some(name) => tensor.named(name),
                None => tensor,
            });
        }
        Ok((tensors, events))
    }
}

impl<'a, T: Into<CudaTensorMut<'a>>> Extend<T> for CudaParams<'a> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, tensors: I) {
        self.tensors.extend(tensors.into_iter().map(Into::into));
    }
}

fn device(stream: &CudaStream) -> Device {
    Device::cuda(stream.context().ordinal())
}

/// A view without its element type.
trait View {
    fn dtype(&self) -> Dtype;
    fn elements(&self) -> usize;
    /// Stream that the slice was allocated on and will be freed on.
    fn stream(&self) -> &Arc<CudaStream>;
    /// Makes the stream wait for earlier uses of the slice on any stream. Returns the address, and
    /// the event that later uses of the slice wait for; or the reason why that can't be done.
    #[allow(clippy::type_complexity)] // A driver's failure, a refusal, or the result.
    fn order<'s>(
        &'s mut self,
        on: &'s Arc<CudaStream>,
    ) -> std::result::Result<
        std::result::Result<(u64, Option<&'s CudaEvent>), Unordered>,
        DriverError,
    >;
}

impl<T: Element> View for CudaViewMut<'_, T> {
    fn dtype(&self) -> Dtype {
        T::DTYPE
    }

    fn elements(&self) -> usize {
        self.len()
    }

    fn stream(&self) -> &Arc<CudaStream> {
        cudarc::driver::DeviceSlice::stream(self)
    }

    fn order<'s>(
        &'s mut self,
        on: &'s Arc<CudaStream>,
    ) -> std::result::Result<
        std::result::Result<(u64, Option<&'s CudaEvent>), Unordered>,
        DriverError,
    > {
        let context = on.context();
        // Every `CudaContext` object decides by itself whether uses are tracked; two may differ.
        if !Arc::ptr_eq(View::stream(self).context(), context) {
            return Ok(Err(Unordered::OtherContext));
        }
        let on_its_stream = View::stream(self) == on;
        // cudarc waits in `device_ptr`, but does not return a failure, so both events are waited
        // for once more. Nothing is recorded when the guards are dropped, since their events are
        // taken out of them.
        if let SyncOnDrop::Record(read) = &mut self.device_ptr(on).1 {
            if let Some((event, _)) = read.take() {
                if !waits(on, event)? {
                    return Ok(Err(Unordered::InAGraph));
                }
            }
        }
        let (address, mut guard) = self.device_ptr_mut(on);
        let written = match &mut guard {
            SyncOnDrop::Record(written) => written.take().map(|(event, _)| event),
            SyncOnDrop::Sync(_) => None,
        };
        if let Some(event) = written {
            if !waits(on, event)? {
                return Ok(Err(Unordered::InAGraph));
            }
        }
        // On its own stream a slice is used and freed in order, with or without events.
        let tracked = written.is_some() && context.is_managing_stream_synchronization();
        Ok(if tracked || on_its_stream {
            Ok((address, written))
        } else {
            Err(Unordered::Untracked)
        })
    }
}

/// Makes the stream wait for the event. False if the event belongs to a graph.
fn waits(on: &CudaStream, event: &CudaEvent) -> std::result::Result<bool, DriverError> {
    match on.wait(event) {
        // If the event belongs to a capture under way, the stream has become a part of it.
        Ok(()) => is_not_captured(on),
        Err(error) => {
            // cudarc has recorded the same error, and the next caller would get it.
            match on.context().check_err() {
                Err(other) if other != error => on.context().record_err::<()>(Err(other)),
                _ => {}
            }
            let of_a_graph = |error: DriverError| is_of_capture(error.0);
            if of_a_graph(error) || event.try_is_complete().is_err_and(of_a_graph) {
                return Ok(false);
            }
            Err(error)
        }
    }
}

fn is_not_captured(stream: &CudaStream) -> std::result::Result<bool, DriverError> {
    stream
        .capture_status()
        .map(|status| status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}
