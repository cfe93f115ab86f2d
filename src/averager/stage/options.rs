//! Options of a builder: the user's stage.

use crate::averager::{Algorithm, Builder};
use crate::backend::MemorySpace;
use crate::stage::{DeviceShard, Function, Shard, Stage, Veto};
#[cfg(doc)]
use crate::Error;

impl Builder {
    /// Stage of this rank: a function that has the rank's [`Shard`] of the mean, in f32 (f64 for
    /// f64), before the commit. What it leaves there is what all ranks get, rounded to the tensors'
    /// dtype: an optimizer of one's own, a filter, a check. It is called once in every average that
    /// has summed, also of a world of one rank, on the thread that averages, unless a mean is not
    /// finite where that is [rejected](Self::reject_non_finite); peers wait for it meanwhile, until
    /// the [`timeout`](Self::timeout). With an [`outer`](Self::outer) optimizer it comes first, and
    /// the outer step is made from what it leaves. Averagers of clones of one builder share it.
    ///
    /// If it returns a [`Veto`] or panics, no tensor of any rank changes, every rank gets
    /// [`Error::StageVetoed`], and the world lives. The same holds if it leaves a value that is not
    /// finite where such values are rejected. After a panic it is not called again, and every
    /// average is refused.
    ///
    /// All ranks have a stage or none. Averages use the ring with its commit; the algorithm
    /// `Direct` and `all_or_nothing(false)` are refused, and so are CUDA devices, which have
    /// [`device_stage`](Self::device_stage). Its state is its own: it is in no saved state, and
    /// [`Shard::layout`] tells when its parts have changed.
    /// [`guide::outer`](crate::guide::outer) has an example. Default: none.
    pub fn stage(
        mut self,
        stage: impl FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send + 'static,
    ) -> Self {
        self.stage = Some(Stage::new(Function::Host(Box::new(stage))));
        self
    }

    /// [Stage](Self::stage) of a rank on a CUDA device: a function that enqueues work on the rank's
    /// [`DeviceShard`] of the mean, and returns. The work runs on the shard's
    /// [stream](DeviceShard::stream), behind the sum and before the vote of the ranks; peers wait
    /// for it until the [`timeout`](Self::timeout), and no kernel of theirs does.
    ///
    /// It differs from a stage on CPUs in this: the function is called when the sum is enqueued,
    /// not when it is made. So it is also called in averages that fail before they have summed,
    /// that no rank needs, and where a mean is not finite, which the vote refuses after it. What it
    /// returns is known before its work has run: a check that needs the values waits for the
    /// stream, or leaves a NaN where such values are [rejected](Self::reject_non_finite), the
    /// default. An average that is [started](crate::ParamAverager::start) still returns before it
    /// has run, when the functions of all ranks of the process have returned.
    ///
    /// With a link to other [hosts](Self::hosts) it is called when their mean is made, as on CPUs.
    ///
    /// An average with a stage is not captured into a CUDA graph: that is refused.
    ///
    /// # Safety
    /// The work accesses no memory of the averager but the values of the shard's parts, and those
    /// only between the earlier and the later work of the shard's stream: on that stream, or on
    /// others that wait for it and that it waits for. What else the work accesses lives until it
    /// has run. The function leaves the stream as it was, not captured, and the current context,
    /// too.
    pub unsafe fn device_stage(
        mut self,
        stage: impl FnMut(&mut DeviceShard<'_>) -> Result<(), Veto> + Send + 'static,
    ) -> Self {
        self.stage = Some(Stage::new(Function::Device(Box::new(stage))));
        self
    }

    /// Option that contradicts a stage: its name, what was found, and what is expected.
    pub(in crate::averager) fn stage_refusal(
        &self,
    ) -> Option<(&'static str, &'static str, &'static str)> {
        const RING: &str = "Auto or Ring: only the ring commits after it has summed";
        let is_on_device = self.stage.as_ref()?.is_on_device;
        if self.algorithm == Algorithm::Direct {
            return Some(("algorithm", "Direct, with a stage", RING));
        }
        if !self.all_or_nothing {
            let expected = "true, the default: a stage comes between the sum and the commit";
            return Some(("all_or_nothing", "false, with a stage", expected));
        }
        match (self.communicator.space(), is_on_device) {
            (MemorySpace::Host, false) | (MemorySpace::Cuda(_), true) => None,
            (MemorySpace::Cuda(_), false) => Some((
                "stage",
                "set, for a rank on a CUDA device",
                "Builder::device_stage there, whose function has addresses and a stream",
            )),
            (MemorySpace::Host, true) => Some((
                "device_stage",
                "set, for a rank on CPUs",
                "Builder::stage there, whose function has the values",
            )),
        }
    }
}
