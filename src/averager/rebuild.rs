//! Building an averager again, without its tensors.
//!
//! After a rank is lost, every averager of a process needs a successor in the new view of the
//! world. Which of them a process recovers first is its own affair, but building is collective. So
//! the first `recover` of a process builds successors for all its averagers, in an order that all
//! ranks agree on, and each averager takes its successor when its own `recover` is called.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use super::memory::check_room;
use super::table::{Layout, Table};
use super::{Builder, ParamAverager};
use crate::error::Phase;
use crate::schedule::Course;
use crate::sync::lock;
use crate::world::{Admission, Bootstrap, Communicator, Rebuild};
use crate::{Error, Result};

/// Recipe of an averager: everything that it is built from.
pub(super) struct Blueprint {
    options: Builder,
    layout: Arc<Layout>,
    /// Identity of the averager in its world, the same on every rank and for all successors.
    ordinal: String,
    /// Course of this rank, kept up to date by `LocalSgd`.
    course: Mutex<Course>,
    successor: Mutex<Option<Successor>>,
}

/// Averager in a later view. It has no `Blueprint` until it is taken, since a cycle of owners would
/// never be dropped.
struct Successor {
    view: u32,
    built: Result<Box<ParamAverager>>,
}

impl Blueprint {
    /// Blueprint of an averager that was built just now, registered with its world.
    pub(super) fn of(averager: &ParamAverager) -> Arc<Blueprint> {
        let blueprint = Arc::new(Blueprint {
            options: averager.options.clone().within_host(), // no recovery has other hosts
            layout: averager.table.layout.clone(),
            ordinal: averager.agreement.ordinal.clone().unwrap_or_default(),
            course: Mutex::new(averager.farthest_course()),
            successor: Mutex::new(None),
        });
        let weak = Arc::downgrade(&blueprint);
        averager.communicator.register(weak);
        blueprint
    }

    pub(super) fn course(&self) -> Course {
        *lock(&self.course)
    }

    pub(super) fn set_course(&self, course: Course) {
        *lock(&self.course) = course;
    }

    /// Reason why there is no successor in this view, if building one has failed.
    pub(super) fn refusal(&self, view: u32) -> Option<Error> {
        let successor = self.lock();
        let of_view = successor.as_ref().filter(|successor| successor.view == view)?;
        of_view.built.as_ref().err().cloned()
    }

    /// Successor in this view, if this process has built one. An error stays.
    pub(super) fn take(self: &Arc<Self>, view: u32) -> Option<Result<ParamAverager>> {
        if let Some(error) = self.refusal(view) {
            return Some(Err(error));
        }
        let successor = self.lock().take_if(|successor| successor.view == view)?;
        Some(successor.built.map(|mut averager| {
            self.set_course(averager.farthest_course());
            averager.blueprint = Some(self.clone());
            *averager
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Successor>> {
        lock(&self.successor)
    }

    fn put(&self, communicator: &Communicator, built: Result<ParamAverager>) {
        let built = built.map(Box::new);
        let before = self.lock().replace(Successor { view: communicator.view(), built });
        drop(before); // After the lock: it ends the threads of a successor that was not taken.
    }
}

impl Rebuild for Blueprint {
    fn ordinal(&self) -> &str {
        &self.ordinal
    }

    fn rebuild(&self, bootstrap: &Arc<dyn Bootstrap>, number: u32) -> Result<()> {
        let communicator = Communicator::of(bootstrap.clone());
        let options = Builder {
            communicator: communicator.clone(),
            course: self.course(),
            admission: Admission::None,
            ordinal: Some(self.ordinal.clone()),
            inherited: None,
            ..self.options.clone()
        };
        let (tensors, names) = self.layout.size();
        let (table, refusal) =
            match check_room(tensors, names, communicator.rank(), communicator.world_size()) {
                Ok(()) => (Table::of(self.layout.clone()), None),
                Err(error) => (Table::of(self.layout.without_tensors().into()), Some(error)),
            };
        let built = ParamAverager::assemble_for(options, table, refusal, None, Some(number));
        match built {
            // The view has lost a rank again, or was aborted: none of its averagers can be built.
            Err(error) if is_of_the_view(&error) || matches!(error, Error::Aborted { .. }) => {
                Err(error)
            }
            built => {
                self.put(&communicator, built);
                Ok(())
            }
        }
    }

    fn refuse(&self, bootstrap: &Arc<dyn Bootstrap>, rank: usize) {
        let communicator = Communicator::of(bootstrap.clone());
        let reason =
            "it has dropped this averager, or has joined without it: drop it on every rank".into();
        self.put(&communicator, Err(Error::PeerBuildFailed { rank, reason }));
    }
}

impl fmt::Debug for Blueprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blueprint({})", self.ordinal)
    }
}

/// True if an error of building means that the view has lost a rank, so that the next view leaves
/// it out.
pub(super) fn is_of_the_view(error: &Error) -> bool {
    match error {
        Error::PeerLost { phase, .. } | Error::Timeout { phase, .. } => *phase == Phase::Build,
        Error::Poisoned { cause } => is_of_the_view(cause), // Another thread got the error first.
        _ => false,
    }
}
