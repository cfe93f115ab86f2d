//! Meetings of a rank with its peers, and the launches behind them.

use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::Arc;

use super::super::driver::{call, Failed};
use super::super::launch::{launch_all, leader_of, Launched, Part};
use super::super::streams::Event;
use super::Rank;
use crate::abi::{PaArgs, PA_DEPARTED};
#[cfg(processes)]
use crate::backend::ProcessWay;
use crate::backend::{Arrivals, Attendance, Failure, Gathering, Meeting, Unstarted};

impl Rank {
    /// Meets the ranks that are threads of this process, and launches for those on this device if
    /// this rank is the first of them. Returns the event behind the launches.
    pub(super) fn launch_together(
        &mut self,
        part: Part,
        calls: &Meeting<Part>,
        launches: &Meeting<Launched>,
        (peers, world): (&Gathering<'_>, &Arc<dyn Arrivals>),
    ) -> Result<Arc<Event>, Unstarted> {
        let parts = calls.all_gather(peers.position, part, peers.world, peers.timeout);
        let parts = parts.inspect_err(|_| self.tables.set_stale()).map_err(Unstarted::Ended)?;
        // From here on every rank takes part, whatever happens to the world: tensors must not be
        // returned to a caller while a launch uses them.
        let leader = leader_of(self.context.ordinal(), &parts);
        let leads = leader == peers.position;
        // A panic, too, comes after the peers have been told.
        let launch = || catch_unwind(AssertUnwindSafe(|| self.launch_all(&parts, None, peers)));
        let (launched, panic) = match leads.then(launch) {
            None => (None, None),
            Some(Ok(launched)) => (Some(launched), None),
            Some(Err(panic)) => {
                self.end_launches(None, peers);
                (Some(Err(Failed::panicked())), Some(panic))
            }
        };
        let all = launches.all_gather_of_all(peers.position, launched);
        self.beside.clear();
        if matches!(all[leader], Some(Ok(_))) {
            super::beside::set(&mut self.beside, leader, &parts, &all, world);
        }
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        match all[leader].clone().expect("the first rank of a device launches") {
            Ok(done) => Ok(done),
            Err(failed) if leads => Err(failed.into()),
            // The launches before the failure have ended.
            Err(_) => Err(Unstarted::Halted(Failure { kind: PA_DEPARTED, position: leader })),
        }
    }

    /// Launches for this rank, the only one of this process on its device. `goes_on`: see
    /// `meet_and_launch`.
    #[cfg(processes)]
    pub(super) fn launch_alone(
        &mut self,
        part: Part,
        way: ProcessWay,
        arrivals: &Arc<dyn Arrivals>,
        peers: &Gathering<'_>,
        goes_on: bool,
    ) -> Result<Arc<Event>, Unstarted> {
        if way == ProcessWay::InStreams {
            let meeting = self.next_meeting(arrivals, peers);
            super::super::arrivals::watch(meeting.clone());
            self.watched.push(meeting.clone());
            return Ok(self.launch_all(&[part], Some(&meeting), peers)?);
        }
        // The host comes when the work before the average has ended.
        let mut launches = part.launches.clone();
        let parts = match way {
            ProcessWay::Sequenced => launches.drain(..).map(|each| vec![each]).collect(),
            _ => vec![launches],
        };
        self.ready.synchronize()?;
        let args = part.args;
        let mut meets = true;
        for (index, launches) in parts.into_iter().enumerate() {
            if meets {
                match self.next_meeting(arrivals, peers).meet() {
                    Ok(()) => {}
                    Err(failure) if index == 0 && !goes_on => {
                        self.tables.set_stale();
                        return Err(Unstarted::Ended(failure));
                    }
                    // A peer may have met all ranks and commit, so the kernels decide how this ends
                    // (`given_up` in tests/kernels/protocol). The world has ended: none waits.
                    Err(_) => meets = false,
                }
            }
            let tables = part.tables.filter(|_| index == 0);
            let part = Part { launches, tables, ..part.clone() };
            let done = self.launch_all(&[part], None, peers)?;
            if way == ProcessWay::Sequenced {
                done.synchronize()?;
                if self.was_left(&args) {
                    break;
                }
            }
        }
        Ok(self.done.clone())
    }

    /// True if a test ends the rank in the launches so far, which have ended.
    pub(super) fn was_left(&self, args: &PaArgs) -> bool {
        let fault = args.fault_step;
        fault != 0 && self.ended().iter().any(|status| status.step == fault)
    }

    /// Launches for this rank as it was done formerly.
    #[cfg(feature = "__testing")]
    pub(super) fn launch_formerly(
        &mut self,
        part: &Part,
        peers: &Gathering<'_>,
    ) -> Result<Arc<Event>, Failed> {
        let stream = self.stream.as_ref().expect("every rank has one");
        // SAFETY: guaranteed by the caller of `start`.
        unsafe {
            super::super::former::launch_one(&self.context, stream, part, peers.timeout, &self.done)
        }?;
        Ok(self.done.clone())
    }

    /// The next meeting of processes.
    #[cfg(processes)]
    fn next_meeting(&mut self, arrivals: &Arc<dyn Arrivals>, peers: &Gathering<'_>) -> Attendance {
        self.meetings = self.meetings.wrapping_add(1);
        Attendance {
            arrivals: arrivals.clone(),
            ranks: peers.ranks,
            position: peers.position,
            number: self.meetings,
            timeout: peers.timeout,
            since: None,
        }
    }

    /// Launches for all ranks of this process on the device, behind a meeting in the stream if
    /// there is one.
    fn launch_all(
        &self,
        parts: &[Part],
        meeting: Option<&Attendance>,
        peers: &Gathering<'_>,
    ) -> Result<Arc<Event>, Failed> {
        let stream = self.stream.as_ref().expect("the first rank of a device has a stream");
        // SAFETY: every rank guarantees it for its part.
        let launched = unsafe { launch_all(&self.context, stream, meeting, parts, &self.done) };
        launched.map(|()| self.done.clone()).inspect_err(|_| self.end_launches(meeting, peers))
    }

    /// Ends what was launched of an average: half of it may wait for the other half.
    fn end_launches(&self, meeting: Option<&Attendance>, peers: &Gathering<'_>) {
        peers.world.poison(Failure { kind: PA_DEPARTED, position: peers.position });
        if let Some(meeting) = meeting {
            meeting.release();
        }
        if let Some(stream) = &self.stream {
            // SAFETY: this rank's stream; the context is bound.
            let _ = unsafe { call!(cuStreamSynchronize(stream.raw())) };
        }
    }
}
