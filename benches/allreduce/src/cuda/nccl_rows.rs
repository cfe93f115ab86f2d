//! NCCL's rows: in place on the tensors, all of them in one group, or on a flat buffer between
//! flatten and unflatten.

use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant};

use param_averager::Dtype;

use super::device::{Clock, Gpu};
use super::kernels::{Kernels, Way};
use super::nccl::{Member, Nccl, Op};
use crate::crew::Work;
use crate::failure::Failure;

/// How long NCCL may take for one thing, if `--timeout` says so.
pub fn nccl_limit(timeout: Option<Duration>) -> Duration {
    timeout.unwrap_or(Duration::from_secs(60))
}

/// What a row all-reduces, and how.
pub struct Row {
    pub member: Arc<Member>,
    /// Address, elements, dtype.
    pub buffers: Vec<(u64, usize, Dtype)>,
    /// The buffers are flat: the kernels fill them first and empty them afterwards.
    pub flat: bool,
    /// ncclSum, and the kernels multiply by this (on the way out of the flat buffers, if there are
    /// any); else ncclAvg.
    pub scale: Option<f64>,
    pub kernels: Arc<Kernels>,
    /// How long it may take.
    pub limit: Duration,
}

impl Row {
    pub fn work(self, gpu: Gpu) -> Result<Work, Failure> {
        let clock = Clock::new(&gpu)?;
        let Row { member, buffers, flat, scale, kernels, limit } = self;
        let op = if scale.is_some() { Op::Sum } else { Op::Avg };
        Ok(Box::new(move || {
            clock.start()?;
            if flat {
                kernels.enqueue(Way::Flatten, None, &clock.stream)?;
            }
            // SAFETY: own memory, which is this member's while it works, and the wait below is for
            // the stream.
            unsafe { member.all_reduce(&buffers, op, &clock.stream) }?;
            match (flat, scale) {
                (true, _) => kernels.enqueue(Way::Unflatten, scale, &clock.stream)?,
                (false, Some(_)) => kernels.enqueue(Way::InPlace, scale, &clock.stream)?,
                (false, None) => {}
            }
            clock.stop()?;
            wait(&clock, limit)?;
            clock.took()
        }))
    }
}

/// Waits for the end, but not for ever.
pub fn wait(clock: &Clock, limit: Duration) -> Result<(), Failure> {
    let begin = Instant::now();
    while !clock.stop.is_done()? {
        if begin.elapsed() > limit {
            return Err(Failure::Failed(format!(
                "NCCL: an all-reduce was not done after {limit:?}; NCCL_DEBUG=INFO says more"
            )));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Runs it on a thread of its own. If it does not come back in time, that thread is left behind.
pub fn within<T: Send + 'static>(
    limit: Duration,
    what: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, result) = mpsc::channel();
    let thread = std::thread::Builder::new().name("nccl".into());
    thread.spawn(move || done.send(what())).ok()?; // nobody listens any more: then it was too late
    result.recv_timeout(limit).ok()
}

/// All ranks' members, or why there are none. Collective, on a thread for each rank.
pub fn join(nccl: &Nccl, gpus: &[Gpu], limit: Duration) -> Result<Vec<Arc<Member>>, String> {
    let (nccl, gpus) = (nccl.clone(), gpus.to_vec());
    let all = move || -> Result<Vec<Arc<Member>>, String> {
        let id = nccl.unique_id()?;
        let ranks = gpus.len();
        let one = |gpu: &Gpu| {
            gpu.bind().map_err(|failure| failure.to_string())?;
            Member::new(&nccl, id, ranks, gpu.rank).map(Arc::new)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = gpus.iter().map(|gpu| scope.spawn(move || one(gpu))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|member| member.unwrap_or_else(|_| Err("a rank panicked, see above".into())))
                .collect()
        })
    };
    within(limit, all)
        .unwrap_or_else(|| Err(format!("ncclCommInitRank did not come back within {limit:?}")))
}

/// Gives all of them back: `aborted`, with whatever they wait for. Each on a thread, as they wait
/// for one another.
pub fn part(members: Vec<Arc<Member>>, gpus: &[Gpu], aborted: bool, limit: Duration) {
    let members: Vec<_> =
        members.into_iter().filter_map(Arc::into_inner).zip(gpus.to_vec()).collect();
    let all = move || {
        std::thread::scope(|scope| {
            for (member, gpu) in members {
                scope.spawn(move || {
                    let _ = gpu.bind(); // an error comes again from NCCL
                    if aborted {
                        member.abort()
                    } else {
                        member.destroy()
                    }
                });
            }
        })
    };
    let _ = within(limit, all); // what does not end now ends with the process
}
