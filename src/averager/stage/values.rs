//! Values of a rank's shard, in memory of the host or of a device, and copies between both.

use super::RankStage;
use crate::backend::cuda::{Failed, StageStream};
use crate::hash::Digest;
use crate::stage::{Span, Veto};

impl RankStage {
    /// Looks at the means, in memory of the host. Where they are on a device alone, the vote looks
    /// at them, after the stage.
    ///
    /// # Safety
    /// The spans' values are initialised, and nothing else uses them.
    pub(super) unsafe fn check(
        &self,
        spans: &[Span],
        describe: &dyn Fn(usize) -> String,
    ) -> Result<(), Veto> {
        // SAFETY: guaranteed by the caller.
        if let Some((tensor, element)) = unsafe { self.first_non_finite(spans) } {
            // The rank that holds such a value votes against the average, too, and its error is the
            // one that all ranks get. Otherwise the sum has overflowed.
            let tensor = describe(tensor);
            return Err(Veto::new(format!("the mean is not finite: {tensor}, element {element}")));
        }
        Ok(())
    }

    /// Tensor and element of a mean that is rejected, if there is one.
    ///
    /// # Safety
    /// As `check`.
    unsafe fn first_non_finite(&self, spans: &[Span]) -> Option<(usize, usize)> {
        if !self.rejects_non_finite {
            return None;
        }
        spans.iter().find_map(|span| {
            // SAFETY: guaranteed by the caller.
            let found = unsafe { span.values() }.first_beyond(span.dtype)?;
            Some((span.tensor, span.first + found))
        })
    }

    /// Digest of all values. On a device this waits for the stream.
    ///
    /// # Safety
    /// As `refuses`.
    pub(super) unsafe fn digest(&self, on: Option<&StageStream>) -> Result<u64, Veto> {
        let (mut digest, mut copy) = (Digest::default(), vec![]);
        for span in &self.spans {
            // SAFETY: guaranteed by the caller.
            match on {
                None => digest.add(unsafe { span.values() }.bytes()),
                Some(on) => {
                    copy.resize(span.bytes(), 0);
                    // SAFETY: as above.
                    unsafe { on.read(span.address, &mut copy) }.map_err(unmoved)?;
                    digest.add(&copy);
                }
            }
        }
        Ok(digest.value())
    }
}

/// The spans in the copy of the shard on the host.
pub(super) fn on_host(spans: &[Span], on: &StageStream) -> Vec<Span> {
    spans.iter().map(|span| Span { address: on.on_host(span.address), ..*span }).collect()
}

/// Brings the copies on the host up to date, for a rank on a device.
pub(super) fn fetch(on: &mut Option<&mut StageStream>, with_anchors: bool) -> Result<(), Veto> {
    on.as_mut().map_or(Ok(()), |on| on.fetch(with_anchors)).map_err(unmoved)
}

pub(super) fn unmoved(failed: Failed) -> Veto {
    Veto::new(format!("its shard can't be copied to the host and back: {}", String::from(failed)))
}
