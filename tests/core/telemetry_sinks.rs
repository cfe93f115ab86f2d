//! Reports of averages as lines of CSV, as events of `tracing`, and with a recorder of `metrics`.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use param_averager::{LocalSgd, ParamAverager, Report, Schedule, Start};
use test_support::ranks;

fn one_report(telemetry: bool) -> Report {
    let reports = ranks(2, |communicator| {
        let mut model = vec![communicator.rank() as f32; 16];
        let builder = ParamAverager::builder(communicator).start_from(Start::Own);
        let mut averager = builder.telemetry(telemetry).build(&mut model).unwrap();
        averager.average(&mut model).unwrap()
    });
    reports.into_iter().next().unwrap()
}

#[test]
fn a_line_of_csv_has_a_value_for_each_column() {
    let columns: Vec<&str> = Report::CSV_COLUMNS.split(',').collect();
    for telemetry in [false, true] {
        let report = one_report(telemetry);
        let line = report.csv();
        let values: Vec<&str> = line.split(',').collect();
        let of: BTreeMap<_, _> = columns.iter().copied().zip(values.iter().copied()).collect();
        assert_eq!((of.len(), values.len()), (columns.len(), columns.len()), "{line}");
        assert_eq!((of["world_size"], of["algorithm"], of["bytes"]), ("2", "Direct", "64"));
        assert_eq!(of["elapsed_s"].parse::<f64>().unwrap(), report.elapsed.as_secs_f64());
        let change = if telemetry { "2" } else { "" }; // √(16 · 0.5²)
        assert_eq!((of["change"], of["norm"]), (change, change));
        let [largest, bad] = if telemetry { ["0.5", "0"] } else { [""; 2] };
        assert_eq!((of["largest_change"], of["non_finite"]), (largest, bad));
        assert_eq!(of["waits_s"], if telemetry { "0;0" } else { "" });
    }
}

/// Events of this crate, as their fields.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<BTreeMap<&'static str, String>>>>);

struct Fields<'a>(&'a mut BTreeMap<&'static str, String>);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl tracing::Subscriber for Events {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "param_averager"
    }
    fn event(&self, event: &tracing::Event<'_>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        self.0.lock().unwrap().push(fields);
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
        tracing::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}
    fn enter(&self, _: &tracing::Id) {}
    fn exit(&self, _: &tracing::Id) {}
}

#[test]
fn each_average_is_an_event_of_tracing() {
    let all = ranks(2, |communicator| {
        let events = Events::default();
        tracing::subscriber::with_default(events.clone(), || {
            let mut model = vec![communicator.rank() as f32; 16];
            let builder = ParamAverager::builder(communicator).start_from(Start::Mean);
            let averager = builder.telemetry(true).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            for _ in 0..4 {
                sgd.step(&mut model).unwrap();
            }
        });
        let events = events.0.lock().unwrap().clone();
        events
    });
    for (rank, events) in all.into_iter().enumerate() {
        let calls: Vec<&str> = events.iter().map(|event| &event["call"][..]).collect();
        let starts = "build, which starts from the mean";
        assert_eq!(calls, [starts, "LocalSgd::step, its step 2", "LocalSgd::step, its step 4"]);
        assert!(events.iter().all(|event| event["rank"] == rank.to_string()));
        assert_eq!((&events[0]["change"][..], &events[0]["local_steps"][..]), ("2.0", "0"));
        assert_eq!((&events[1]["change"][..], &events[1]["local_steps"][..]), ("0.0", "2"));
        // Waits of all ranks, in the average before.
        let of = |event: &BTreeMap<_, String>, name: &str| -> f64 { event[name].parse().unwrap() };
        for (before, event) in events.iter().zip(&events[1..]) {
            let list = event["waits_s"].trim_matches(['[', ']']);
            let waits: Vec<f64> = list.split(", ").map(|wait| wait.parse().unwrap()).collect();
            assert_eq!((waits.len(), waits[rank]), (2, of(before, "waited_s")));
        }
        assert_eq!(events[0]["message"], "an average was made");
    }
}

/// A recorder of `metrics` that keeps each instrument's last value, and counts.
#[derive(Default)]
struct Recorder(Arc<Mutex<BTreeMap<String, f64>>>);

struct Instrument(String, Arc<Mutex<BTreeMap<String, f64>>>);

impl Instrument {
    fn put(&self, value: impl FnOnce(f64) -> f64) {
        let mut all = self.1.lock().unwrap();
        let old = all.get(&self.0).copied().unwrap_or(0.0);
        all.insert(self.0.clone(), value(old));
    }
}

impl metrics::CounterFn for Instrument {
    fn increment(&self, value: u64) {
        self.put(|old| old + value as f64);
    }
    fn absolute(&self, value: u64) {
        self.put(|_| value as f64);
    }
}
impl metrics::GaugeFn for Instrument {
    fn increment(&self, value: f64) {
        self.put(|old| old + value);
    }
    fn decrement(&self, value: f64) {
        self.put(|old| old - value);
    }
    fn set(&self, value: f64) {
        self.put(|_| value);
    }
}
impl metrics::HistogramFn for Instrument {
    fn record(&self, value: f64) {
        self.put(|_| value);
    }
}

impl Recorder {
    fn instrument(&self, key: &metrics::Key) -> Arc<Instrument> {
        let labels: Vec<String> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        Arc::new(Instrument(format!("{} {}", key.name(), labels.join(" ")), self.0.clone()))
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }
    fn describe_gauge(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }
    fn describe_histogram(
        &self,
        _: metrics::KeyName,
        _: Option<metrics::Unit>,
        _: metrics::SharedString,
    ) {
    }
    fn register_counter(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        self.instrument(key).into()
    }
    fn register_gauge(&self, key: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        self.instrument(key).into()
    }
    fn register_histogram(
        &self,
        key: &metrics::Key,
        _: &metrics::Metadata<'_>,
    ) -> metrics::Histogram {
        self.instrument(key).into()
    }
}

#[test]
fn each_average_is_recorded_with_metrics() {
    let all = ranks(2, |communicator| {
        let (rank, recorder) = (communicator.rank(), Recorder::default());
        metrics::with_local_recorder(&recorder, || {
            let mut model = vec![rank as f32; 16];
            let builder = ParamAverager::builder(communicator).start_from(Start::Own);
            let averager = builder.telemetry(true).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            for _ in 0..4 {
                sgd.step(&mut model).unwrap();
            }
        });
        let all = recorder.0.lock().unwrap().clone();
        all
    });
    for (rank, all) in all.into_iter().enumerate() {
        let of = |name: &str| all[&format!("param_averager_{name} rank={rank}")];
        assert_eq!([of("averages_total"), of("bytes_total")], [2.0, 128.0]);
        assert_eq!([of("world_size"), of("local_steps")], [2.0, 2.0]);
        assert_eq!([of("norm"), of("change"), of("relative_change")], [2.0, 0.0, 0.0]);
        assert_eq!([of("largest_change"), of("non_finite")], [0.0, 0.0]);
        assert!(of("elapsed_seconds") > 0.0 && of("waited_seconds") >= 0.0);
        let peers = [0, 1].map(|peer| {
            all[&format!("param_averager_peer_waited_seconds rank={rank} peer={peer}")]
        });
        assert!(peers.iter().all(|&wait| (0.0..100.0).contains(&wait)), "{peers:?}");
        assert_eq!(all.len(), 13, "{all:?}");
    }
}
