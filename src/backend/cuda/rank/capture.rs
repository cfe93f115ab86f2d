//! Averages that become a part of a CUDA graph.

use cudarc::driver::sys;

use super::super::driver::{call, Failed};
use super::super::launch::launch;
use super::super::streams::is_capturing;
use super::Rank;
use crate::abi::PaArgs;
use crate::backend::{Gathering, Unstarted};
use crate::plan::Launch;

impl Rank {
    /// Makes an average a part of the graph that is captured on the stream.
    ///
    /// # Safety
    /// As `start`; the work does not run before the graph does.
    pub(super) unsafe fn capture(
        &mut self,
        args: &PaArgs,
        launches: &[Launch],
        stream: sys::CUstream,
        peers: &Gathering<'_>,
    ) -> Result<(), Unstarted> {
        if peers.shares_device {
            // Nothing promises that two graphs run at the same time on one device.
            self.capturing = false;
            return Err(Unstarted::Refused {
                found: "being captured, in a world where ranks share a device".into(),
                expected: "a stream that is not captured, or a device for each rank: the averages \
                    of graphs wait for one another on their devices",
            });
        }
        let tables = self.tables.copy()?;
        // Ranks meet in the kernels, since no host sees a replay.
        if !self.context.ends_long_kernels() {
            self.longest_wait = peers.timeout;
        }
        let timeout_ns = u64::try_from(self.longest_wait.as_nanos()).unwrap_or(u64::MAX);
        let args = PaArgs { buckets: tables.address(), timeout_ns, ..*args };
        let enqueue = |&each: &Launch| {
            // SAFETY: guaranteed by the caller.
            unsafe { launch(&self.context, each, &[args], stream) }
        };
        match launches.iter().try_for_each(enqueue) {
            // The capture failed, so there will be no graph.
            Err(failed) if failed.is_of_capture() => {
                self.tables.take_back(tables);
                self.capturing = false;
                Err(Unstarted::Refused {
                    found: format!("a stream whose capture has failed ({failed})"),
                    expected: "a stream whose capture can continue: end this capture, and capture \
                        again",
                })
            }
            captured => {
                self.tables.keep(tables);
                Ok(captured?)
            }
        }
    }

    /// True if the average that was started last was captured and so has not run.
    pub(crate) fn was_captured(&self) -> bool {
        self.capturing
    }

    /// Waits for a stream on which a graph was replayed.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn wait_for(&self, stream: sys::CUstream) -> Result<(), Unstarted> {
        // SAFETY: guaranteed by the caller.
        match unsafe { self.is_capturing(stream) } {
            // Waiting would invalidate the capture.
            Ok(true) => Err(Unstarted::Refused {
                found: "a stream that is being captured".into(),
                expected: "a stream on which a graph with this averager's average was launched",
            }),
            // SAFETY: as above.
            Ok(false) => Ok(unsafe { self.synchronize(stream) }?),
            Err(failed) if failed.is_of_capture() => {
                Err(Unstarted::beside_a_capture(&failed.to_string()))
            }
            Err(failed) => Err(failed.into()),
        }
    }

    /// # Safety
    /// `stream` belongs to this context.
    unsafe fn synchronize(&self, stream: sys::CUstream) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { call!(cuStreamSynchronize(stream)) }
    }

    /// True if the stream is being captured.
    ///
    /// # Safety
    /// `stream` belongs to this context.
    pub(crate) unsafe fn is_capturing(&self, stream: sys::CUstream) -> Result<bool, Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: guaranteed by the caller.
        unsafe { is_capturing(stream) }
    }
}
