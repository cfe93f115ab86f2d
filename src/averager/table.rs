//! Segment tables: a rank's tensors in the kernels' form, brought up to date at every average.

mod problem;

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub(super) use problem::Problem;
use problem::*;

use crate::abi::{PaBucket, PaSegment, PA_PACK_BYTES};
use crate::backend::{Engine, MemorySpace};
use crate::bucket::{self, Bucket, Place, Shape};
use crate::device::Device;
use crate::hash::fnv1a;
use crate::tensor::{Dtype, Identity, Unordered};
use crate::{Error, Parameters, TensorMut};

/// Tensors that an averager is built for, without their addresses.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    device: Device,
    space: MemorySpace,
    /// Other devices that access the tensors: those of the direct average.
    readers: Vec<usize>,
    /// Number of fragments.
    fragments: u32,
    names: Vec<Name>,
    shapes: Vec<Shape>,
}

/// [`TensorMut::identity`] of a tensor.
#[derive(Clone, Debug)]
struct Name {
    name: String,
    part: u32,
    outer: Option<String>,
    scope: u64,
}

impl Name {
    fn of(Identity { name, part, outer, scope }: Identity<'_>) -> Name {
        Name { name: name.to_owned(), part, outer: outer.map(str::to_owned), scope }
    }

    fn bytes(&self) -> usize {
        self.name.len() + self.outer.as_ref().map_or(0, String::len)
    }

    fn identity(&self) -> Identity<'_> {
        let Name { name, part, outer, scope } = self;
        Identity { name, part: *part, outer: outer.as_deref(), scope: *scope }
    }
}

/// Name as errors show it.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(outer) = &self.outer {
            write!(f, "{outer}.")?;
        }
        f.write_str(&self.name)?;
        match self.part {
            0 => Ok(()),
            part => write!(f, ".{part}"),
        }
    }
}

/// Most elements of a tensor: no memory is longer. Larger numbers come from a wrong length in
/// `TensorMut::from_raw_parts`, and would overflow sums of sizes.
fn most_elements(dtype: Dtype) -> u64 {
    isize::MAX as u64 / dtype.size() as u64
}

/// Tensors, and the place of each in its bucket.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) layout: Arc<Layout>,
    placement: Vec<Place>,
    pub(super) buckets: Vec<Bucket>,
    /// Buckets of each fragment.
    pub(super) fragments: Vec<Range<usize>>,
    /// Buckets in the kernels' form; behind them those of the copies, if averages are made of
    /// copies.
    pub(super) raw: Vec<PaBucket>,
    /// Segments of the copies.
    copies: Vec<Vec<PaSegment>>,
    /// Begin, end and index of each tensor with elements, for `overlap`.
    spans: Vec<(u64, u64, u32)>,
    pub(super) bytes: u64,
    /// True if addresses have changed since the engine last got the tables.
    pub(super) moved: bool,
    /// True if addresses have changed since the tensors were last checked for overlap.
    unchecked: bool,
    /// Pool of tensors that other devices were given access to last, in this `refresh`.
    shared_pool: u64,
}

impl Layout {
    /// Digest of all names, dtypes and sizes, the same in all versions of this crate.
    pub(super) fn digest(&self) -> u64 {
        let tensors = self.names.iter().zip(&self.shapes).flat_map(|(name, shape)| {
            let words = [u64::from(shape.dtype.code()), shape.elements];
            let words = words.map(u64::to_le_bytes).concat();
            name.to_string().into_bytes().into_iter().chain([0]).chain(words)
        });
        fnv1a(tensors)
    }

    /// Layout of no tensors.
    pub(super) fn none(device: Device, space: MemorySpace) -> Layout {
        Layout { device, space, readers: vec![], fragments: 1, names: vec![], shapes: vec![] }
    }

    /// Number of tensors, and bytes of all their names.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.shapes.len(), self.names.iter().map(Name::bytes).sum())
    }

    /// Place of the tensor with this name, as the low bits of a `RENAMED` problem.
    fn place_of(&self, identity: Identity<'_>) -> u64 {
        match self.names.iter().position(|known| known.identity() == identity) {
            _ if identity.name.is_empty() => NO_NAME,
            Some(index) => index as u64,
            None => OTHER_NAME,
        }
    }

    /// The first two tensors that can't be told apart: they share a name, or they share dtype and
    /// size and neither has a name. Unnamed tensors without elements are left out.
    fn twins(&self, allow_unnamed: bool) -> Option<(usize, usize)> {
        let mut seen = HashMap::with_capacity(self.shapes.len());
        (0..self.shapes.len()).find_map(|index| {
            let identity = self.names[index].identity();
            let shape = self.shapes[index];
            let shape = match identity.name {
                "" if allow_unnamed || shape.elements == 0 => return None,
                "" => Some(shape),
                _ => None,
            };
            seen.insert((identity, shape), index).map(|before| (before, index))
        })
    }

    /// The same layout where no other device accesses the tensors.
    pub(super) fn without_readers(&self) -> Layout {
        Layout { readers: vec![], ..self.clone() }
    }

    /// Layout of no tensors on the same device.
    pub(super) fn without_tensors(&self) -> Layout {
        Layout::none(self.device, self.space.clone())
    }
}

impl Table {
    /// Table of these tensors, at their current addresses.
    pub(super) fn new(
        params: &mut dyn Parameters,
        device: Device,
        space: MemorySpace,
        readers: Vec<usize>,
        fragments: u32,
    ) -> (Table, Option<Problem>) {
        let (mut names, mut shapes) = (vec![], vec![]);
        params.visit(&mut |tensor| {
            names.push(Name::of(tensor.identity()));
            let (dtype, elements) = (tensor.dtype(), tensor.len() as u64);
            // `refresh` refuses a tensor that is too long, whatever its shape is here.
            let elements = if elements > most_elements(dtype) { 0 } else { elements };
            shapes.push(Shape { dtype, elements });
        });
        let mut table =
            Table::of(Arc::new(Layout { device, space, readers, fragments, names, shapes }));
        let problem = table.refresh(params).err();
        (table, problem)
    }

    /// Table of these tensors, whose addresses are not known yet.
    pub(super) fn of(layout: Arc<Layout>) -> Table {
        let (buckets, placement, fragments) = bucket::plan(&layout.shapes, layout.fragments);
        let raw = buckets.iter().map(|_| bytemuck::Zeroable::zeroed()).collect();
        let bytes = layout.shapes.iter().map(|shape| shape.elements * shape.dtype.size() as u64);
        let bytes = bytes.fold(0, u64::saturating_add);
        let spans = Vec::with_capacity(layout.shapes.len());
        Table {
            layout,
            placement,
            buckets,
            fragments,
            raw,
            copies: vec![],
            spans,
            bytes,
            moved: true,
            unchecked: true,
            shared_pool: 0,
        }
    }

    /// Adds the buckets of copies of the tensors, each at its address. Called once, when all
    /// buckets are complete.
    pub(super) fn add_copies(&mut self, addresses: &[u64]) {
        for (index, (bucket, &snapshot)) in self.buckets.iter().zip(addresses).enumerate() {
            let copy = |segment: &PaSegment| {
                let address = snapshot + segment.first_pack * u64::from(PA_PACK_BYTES);
                PaSegment { address, ..*segment }
            };
            self.copies.push(bucket.segments.iter().map(copy).collect());
            self.raw.push(PaBucket { snapshot, ..self.raw[index] });
        }
    }

    /// Segments of each of the kernels' buckets.
    pub(super) fn segments(&self) -> impl Iterator<Item = &[PaSegment]> {
        let tensors = self.buckets.iter().map(|bucket| &bucket.segments[..]);
        tensors.chain(self.copies.iter().map(|segments| &segments[..]))
    }

    /// Number of segments of all the kernels' buckets.
    pub(super) fn segment_count(&self) -> usize {
        self.segments().map(<[PaSegment]>::len).sum()
    }

    /// Brings the addresses in the kernels' buckets up to date. Returns the address of the buckets
    /// of a call: those of a fragment, or all; of the copies, or of the tensors; and their number.
    pub(super) fn place(
        &mut self,
        engine: &Engine,
        fragment: Option<usize>,
        of_copies: bool,
    ) -> (u64, u32) {
        let count = self.buckets.len();
        let tensors = self.buckets.iter().map(|bucket| &bucket.segments[..]);
        let segments = tensors.chain(self.copies.iter().map(|segments| &segments[..]));
        let address = engine.place(&mut self.raw, segments);
        for index in count..self.raw.len() {
            self.raw[index].source = self.raw[index - count].segments;
        }
        let range = self.buckets_of(fragment);
        let first = range.start + if of_copies { count } else { 0 };
        (address + (first * size_of::<PaBucket>()) as u64, range.len() as u32)
    }

    /// Buckets of a fragment, or all.
    pub(super) fn buckets_of(&self, fragment: Option<usize>) -> Range<usize> {
        fragment.map_or(0..self.buckets.len(), |fragment| self.fragments[fragment].clone())
    }

    /// Bytes of the tensors of a fragment, or of all.
    pub(super) fn bytes_of(&self, fragment: Option<usize>) -> u64 {
        let bytes = |bucket: &Bucket| {
            let elements = bucket.segments.iter().map(|segment| segment.elements);
            elements.sum::<u64>() * bucket.dtype.size() as u64
        };
        self.buckets[self.buckets_of(fragment)].iter().map(bytes).sum()
    }

    /// Takes over the tensors' addresses, if they are the tensors that the table was made for. Does
    /// not allocate. The addresses are valid for as long as the caller's borrow of `params`.
    pub(super) fn refresh<'a>(
        &mut self,
        params: &'a mut (dyn Parameters + '_),
    ) -> Result<(), Problem> {
        let (mut index, mut problem) = (0, None);
        self.shared_pool = 0; // a pool may be destroyed, and its handle be another's later
        params.visit(&mut |tensor: TensorMut<'a>| {
            if let Err(found) = self.take(index, &tensor) {
                problem = problem.or(Some(Problem { tensor: index as u64, found }));
            }
            index += 1;
        });
        if index < self.layout.shapes.len() {
            problem = problem.or(Some(Problem { tensor: index as u64, found: MISSING << SHIFT }));
        }
        match problem {
            Some(problem) => Err(problem),
            None if self.unchecked => self.overlap().map(|()| self.unchecked = false),
            None => Ok(()),
        }
    }

    /// Takes over the tensor's address, or returns its problem.
    fn take(&mut self, index: usize, tensor: &TensorMut<'_>) -> Result<(), u64> {
        let found = u64::from(tensor.dtype().code()) << SHIFT | tensor.len() as u64;
        let Some(&shape) = self.layout.shapes.get(index) else { return Err(EXTRA << SHIFT) };
        if tensor.len() as u64 > most_elements(tensor.dtype()) {
            return Err(TOO_LONG << SHIFT);
        }
        if shape != (Shape { dtype: tensor.dtype(), elements: tensor.len() as u64 }) {
            return Err(found);
        }
        let identity = tensor.identity();
        if identity != self.layout.names[index].identity() {
            return Err(RENAMED << SHIFT | self.layout.place_of(identity));
        }
        if tensor.device() != self.layout.device {
            return Err(DEVICE << SHIFT);
        }
        match tensor.refusal() {
            None => {}
            Some(Unordered::OtherContext) => return Err(OTHER_CONTEXT << SHIFT),
            Some(Unordered::Untracked) => return Err(UNTRACKED << SHIFT),
            Some(Unordered::InAGraph) => return Err(IN_A_GRAPH << SHIFT),
        }
        let Some((bucket, segment)) = self.placement[index] else { return Ok(()) };
        let address = tensor.address();
        if address == 0 {
            return Err(NULL << SHIFT);
        }
        if !address.is_multiple_of(shape.dtype.size() as u64) {
            return Err(MISALIGNED << SHIFT);
        }
        let slot = &mut self.buckets[bucket].segments[segment].address;
        if *slot == address {
            return Ok(());
        }
        // Both ends: a tensor that is longer than its memory would end in another's, or in none.
        let last = address + shape.elements * shape.dtype.size() as u64 - 1;
        if let MemorySpace::Cuda(context) = &self.layout.space {
            let (ends, readers) = ([address, last], &self.layout.readers);
            if !ends.iter().all(|&end| context.owns(end)) {
                return Err(FOREIGN << SHIFT);
            }
            let mut lends = |&end: &u64| context.lends(end, readers, &mut self.shared_pool);
            if !readers.is_empty() && !ends.iter().all(&mut lends) {
                return Err(UNREACHED << SHIFT);
            }
        }
        *slot = address;
        (self.moved, self.unchecked) = (true, true);
        Ok(())
    }

    /// Finds two tensors that share memory, which would be averaged twice.
    fn overlap(&mut self) -> Result<(), Problem> {
        self.spans.clear();
        for bucket in &self.buckets {
            let size = bucket.dtype.size() as u64;
            for (PaSegment { address, elements, .. }, &tensor) in
                bucket.segments.iter().zip(&bucket.tensors)
            {
                self.spans.push((*address, address + elements * size, tensor as u32));
            }
        }
        self.spans.sort_unstable();
        match self.spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            None => Ok(()),
            Some(pair) => {
                let (one, other) = (u64::from(pair[0].2), u64::from(pair[1].2));
                Err(Problem { tensor: one.max(other), found: OVERLAP << SHIFT | one.min(other) })
            }
        }
    }

    /// Error of tensors that could be mistaken for one another.
    pub(super) fn ambiguity(&self, rank: usize, allow_unnamed: bool) -> Option<Error> {
        let (first, second) = self.layout.twins(allow_unnamed)?;
        let problem = match self.layout.names[second].name.as_str() {
            "" => format!(
                "has no name, as {}, so that nothing tells the two apart if their order differs \
                 between ranks: name every tensor (TensorMut::named, or a BTreeMap) and sort them \
                 by name where they come from a HashMap, whose order differs from process to \
                 process; or call Builder::allow_unnamed if their order is fixed, as in a Vec",
                self.describe(first)
            ),
            _ => format!(
                "has the name of {}: give every tensor a name of its own",
                self.describe(first)
            ),
        };
        Some(Error::InvalidTensor { rank, tensor: self.describe(second), problem })
    }

    /// Line about one tensor, such as "tensor 3 `ln.weight` (f32, 768 elements)".
    pub(super) fn describe(&self, index: usize) -> String {
        let Shape { dtype, elements } = self.layout.shapes[index];
        let name = match &self.layout.names[index] {
            name if name.name.is_empty() => String::new(),
            name => format!(" `{name}`"),
        };
        format!("tensor {index}{name} ({dtype}, {elements} elements)")
    }

    /// Names as errors show them. Empty where there is none.
    pub(super) fn names(&self) -> Vec<String> {
        let name = |name: &Name| match name.name.is_empty() {
            true => String::new(),
            false => name.to_string(),
        };
        self.layout.names.iter().map(name).collect()
    }

    pub(super) fn describe_all(&self) -> Vec<String> {
        (0..self.layout.shapes.len()).map(|index| self.describe(index)).collect()
    }
}
