//! What the library tells through `tracing`, as text.

use std::fmt::Debug;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Calls `tell` with each event of the library in this process from now on, as "rank: text", and
/// makes waits be told of after `patience`.
pub fn listen(patience: Duration, tell: impl Fn(&str) + Send + Sync + 'static) {
    param_averager::__testing::set_patience(patience);
    let _ = tracing::subscriber::set_global_default(Listener(Box::new(tell)));
}

struct Listener(Box<dyn Fn(&str) + Send + Sync>);

#[derive(Default)]
struct Text {
    rank: String,
    message: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "rank" => self.rank = format!("{value:?}"),
            "message" => self.message = format!("{value:?}"),
            other => panic!("no field {other}"),
        }
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "param_averager" && *metadata.level() <= Level::INFO
    }
    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        (self.0)(&format!("{}: {}", text.rank, text.message));
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
