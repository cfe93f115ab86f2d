//! Bucket and segment tables of a rank on a device, and their copies in CUDA graphs.

use std::sync::Arc;

use super::driver::Failed;
use super::memory::Pinned;
use super::{Context, DeviceMemory};
use crate::abi::{PaBucket, PaSegment};

/// The tables of a rank: all buckets, then all segments.
#[derive(Debug)]
pub(super) struct Tables {
    context: Arc<Context>,
    device: DeviceMemory,
    /// Capacity for buckets.
    buckets: usize,
    /// Tables of the next average, and the source of the copy to `device`.
    next: Pinned,
    /// True if `next` has not been copied.
    is_stale: bool,
    /// Tables of captured averages, as they were at the capture. A graph may be replayed at any
    /// time, so they are kept.
    captured: Vec<DeviceMemory>,
    /// Memory for the first captured tables, allocated in advance: a driver may forbid allocation
    /// during a capture.
    reserve: Option<DeviceMemory>,
}

impl Tables {
    /// Tables with room for `buckets` and `segments`.
    pub(super) fn new(
        context: &Arc<Context>,
        buckets: usize,
        segments: usize,
    ) -> Result<Tables, Failed> {
        let bytes = buckets * size_of::<PaBucket>() + segments * size_of::<PaSegment>();
        Ok(Tables {
            context: context.clone(),
            device: DeviceMemory::new(context, bytes)?,
            buckets,
            next: Pinned::new(context, bytes)?,
            is_stale: true,
            captured: vec![],
            reserve: Some(DeviceMemory::new(context, bytes)?),
        })
    }

    /// Device memory in bytes, captured tables included.
    pub(super) fn bytes(&self) -> usize {
        let captured: usize =
            self.captured.iter().chain(&self.reserve).map(DeviceMemory::bytes).sum();
        self.device.bytes() + captured
    }

    /// Address of the buckets.
    pub(super) fn buckets(&self) -> u64 {
        self.device.address()
    }

    /// Address of the segments of a bucket, after `before` segments of other buckets.
    pub(super) fn segments(&self, buckets: usize, before: usize) -> u64 {
        let at = buckets * size_of::<PaBucket>() + before * size_of::<PaSegment>();
        self.device.address() + at as u64
    }

    /// Sets the tables of the next average. No average may be running.
    pub(super) fn set<'a>(
        &mut self,
        buckets: &'a [PaBucket],
        segments: impl Iterator<Item = &'a [PaSegment]>,
    ) {
        let parts = std::iter::once(bytemuck::cast_slice(buckets))
            .chain(segments.map(bytemuck::cast_slice));
        let mut rest = self.next.bytes_mut();
        for part in parts {
            let (to, others) = rest.split_at_mut(part.len());
            to.copy_from_slice(part);
            rest = others;
        }
        self.is_stale = true;
    }

    /// Tables that have changed, for the caller to copy before the next average: address on the
    /// device, address here, bytes. They are not set again until the copy has ended.
    pub(super) fn take_stale(&mut self) -> Option<(u64, usize, usize)> {
        let (to, from) = (self.device.address(), self.next.bytes());
        std::mem::take(&mut self.is_stale).then_some((to, from.as_ptr() as usize, from.len()))
    }

    /// Records that the tables which were taken have not been copied.
    pub(super) fn set_stale(&mut self) {
        self.is_stale = true;
    }

    /// A copy of the current tables, for a graph.
    pub(super) fn copy(&mut self) -> Result<DeviceMemory, Failed> {
        let copy = match self.reserve.take() {
            Some(memory) => memory,
            None => DeviceMemory::new(&self.context, self.device.bytes())?,
        };
        let mut bytes = self.next.bytes().to_vec();
        let (buckets, _) = bytes.split_at_mut(self.buckets * size_of::<PaBucket>());
        for bucket in buckets.chunks_exact_mut(size_of::<PaBucket>()) {
            let mut own: PaBucket = bytemuck::pod_read_unaligned(bucket);
            own.segments = own.segments - self.device.address() + copy.address();
            bucket.copy_from_slice(bytemuck::bytes_of(&own));
        }
        copy.write(0, &bytes)?;
        Ok(copy)
    }

    /// Keeps the copy that a graph uses.
    pub(super) fn keep(&mut self, copy: DeviceMemory) {
        self.captured.push(copy);
    }

    /// Takes back a copy that no graph uses.
    pub(super) fn take_back(&mut self, copy: DeviceMemory) {
        self.reserve = Some(copy);
    }

    /// True if a graph uses tables of this rank.
    pub(super) fn is_captured(&self) -> bool {
        !self.captured.is_empty()
    }
}
