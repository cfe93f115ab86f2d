//! cudarc's slices as tensors: averages of `CudaSlice`s and `CudaViewMut`s, safely, on a
//! `CudaStream`.
//!
//! ```no_run
//! use cudarc::driver::CudaContext;
//! use param_averager::{CudaParams, CudaTensorMut, Device, ParamAverager, Communicator};
//!
//! let world = Communicator::from_devices(&[Device::cuda(0); 2])?;
//! let ranks: Vec<_> = world.into_iter().map(|communicator| std::thread::spawn(move || {
//!     let stream = CudaContext::new(0)?.new_stream()?; // of this rank's own
//!     let mut wte = stream.alloc_zeros::<f32>(1_000_000)?;
//!     let mut layers = vec![stream.alloc_zeros::<half::bf16>(4096)?, stream.alloc_zeros(4096)?];
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
//! # How it is ordered
//! cudarc records an event after every use of a slice, and every use on another stream waits for it. An average does the
//! same: its stream waits for each slice's events first, and records the slice's event when the average has been enqueued.
//! So later uses of a slice, and freeing it, come after the average, also if its [`Pending`](crate::Pending) is forgotten. Where there are
//! no such events (a slice of another `CudaContext` object, one whose uses are not tracked and which was allocated on
//! another stream, or one whose last use was captured for a graph) the average is refused, on every rank.
//!
//! Four things are cudarc's own limits. Views of one slice share its events, so ranks need slices of their own, not halves
//! of one. `wrap_borrowed_stream` makes a stream that cudarc does not count: while it has no other, it tracks nothing, and
//! slices must have been allocated on that very stream. A stream that is captured by one thread while another enqueues
//! an average on it captures that average. And a stream that waits for what a capture under way does to a slice becomes a
//! part of that capture, although the average is refused.

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

/// A `CudaSlice` or a `CudaViewMut`, borrowed, of any dtype: `CudaTensorMut::from(&mut
/// wte).named("wte")`.
pub struct CudaTensorMut<'a> {
    name: Option<&'a str>,
    view: AnyView<'a>,
}

/// Not a box: nothing runs when it is dropped, so a borrow ends with its last use.
enum AnyView<'a> {
    F32(CudaViewMut<'a, f32>),
    F64(CudaViewMut<'a, f64>),
    #[cfg(feature = "half")]
    F16(CudaViewMut<'a, f16>),
    #[cfg(feature = "half")]
    Bf16(CudaViewMut<'a, bf16>),
}

impl<'a> CudaTensorMut<'a> {
    /// The same tensor with a name, which errors about it will give.
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
/// [`average`](crate::ParamAverager::average) returns when the average is done. The stream may be of
/// any kind, the null stream included; the average runs behind it, on it or on a stream of the
/// averager's own. [`start`](crate::ParamAverager::start) enqueues the average on the stream and
/// returns: it must be of the non-blocking kind, as `CudaContext::new_stream` makes them. Either
/// way the stream is of the rank's device, is not being captured and, unless it is the null stream,
/// no other rank averages on it.
///
/// It can be made anew for every average: addresses may change; the number, order, dtypes and sizes
/// of the tensors may not.
#[derive(Debug)]
pub struct CudaParams<'a> {
    stream: &'a Arc<CudaStream>,
    tensors: Vec<CudaTensorMut<'a>>,
}

impl<'a> CudaParams<'a> {
    /// No tensors yet. The stream is of the device of this rank, and no other rank averages on it.
    pub fn new(stream: &'a Arc<CudaStream>) -> Self {
        CudaParams { stream, tensors: vec![] }
    }

    /// Adds a tensor: a `&mut CudaSlice` or a `CudaViewMut` of f32, f64, f16 or bf16.
    pub fn push(&mut self, tensor: impl Into<CudaTensorMut<'a>>) {
        self.tensors.push(tensor.into());
    }

    /// The tensors, now that the stream waits for what was done to them; and their events, to be
    /// recorded when the stream has been given what is to be done.
    fn order(&mut self) -> std::result::Result<(Vec<TensorMut<'_>>, Vec<&CudaEvent>), DriverError> {
        let (mut tensors, mut events) = (Vec::with_capacity(self.tensors.len()), vec![]);
        for CudaTensorMut { name, view } in &mut self.tensors {
            let view = view.get_mut();
            let (dtype, elements, on) = (view.dtype(), view.elements(), device(view.stream()));
            let (mut address, mut unordered) = (0, None);
            // One without elements is not touched.
            if elements > 0 {
                match view.order(self.stream)? {
                    Ok((found, event)) => {
                        address = found;
                        events.extend(event);
                    }
                    Err(why) => unordered = Some(why),
                }
            }
            // SAFETY: the view is borrowed mutably for as long, and is of so many initialised
            // elements: cudarc's promise, or that of who allocated it; any bits are a float. What
            // it is used for on the device is in the hands of `order`'s callers. An address of 0 is
            // never read: the tensor is refused, or has no elements.
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
    /// It was allocated on it, and will be freed on it.
    fn stream(&self) -> &Arc<CudaStream>;
    /// Makes the stream wait for what was done to the slice on any stream. Returns the address, and
    /// the event that whoever uses the slice later waits for; or why that can't be done.
    #[allow(clippy::type_complexity)] // a driver's failure, or a refusal, or what is wanted
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
        // Each object has its own mind about whether uses are tracked, and two may disagree.
        if !Arc::ptr_eq(View::stream(self).context(), context) {
            return Ok(Err(Unordered::OtherContext));
        }
        let on_its_stream = View::stream(self) == on;
        // cudarc waits in `device_ptr`, but keeps a failure to itself: so both events are waited
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
        // On its own stream it is used and freed in order, events or not.
        let tracked = written.is_some() && context.is_managing_stream_synchronization();
        Ok(if tracked || on_its_stream {
            Ok((address, written))
        } else {
            Err(Unordered::Untracked)
        })
    }
}

/// Makes the stream wait for the event. False: that is one of a graph.
fn waits(on: &CudaStream, event: &CudaEvent) -> std::result::Result<bool, DriverError> {
    match on.wait(event) {
        // Of a capture that goes on: the stream has become a part of it.
        Ok(()) => is_not_captured(on),
        Err(error) => {
            // cudarc has met the same error, and would tell it to whoever comes next.
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
