//! What was measured, for people and for programs: one record a row.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::failure::Failure;
use crate::methods::Method;

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub method: Method,
    pub layout: String,
    pub tensors: usize,
    pub dtype: String,
    pub ranks: usize,
    pub elements: u64,
    /// Of one rank.
    pub bytes: u64,
    /// Ascending. Empty: not measured.
    pub times: Vec<Duration>,
    /// `None`: not checked.
    pub wrong: Option<u64>,
    /// Median time of the limit's row in the same table.
    pub limit: Option<Duration>,
    /// `None`: CPUs.
    pub device: Option<OnDevice>,
    /// Of `--processes`.
    pub apart: Option<Apart>,
}

/// What a row has besides that is about ranks that are processes, or that such a row is held
/// against.
#[derive(Clone, Debug, PartialEq)]
pub struct Apart {
    /// Each rank is a process, else a thread.
    pub processes: bool,
    /// Median time of the same method between threads.
    pub threads: Option<Duration>,
    /// From the start of the processes to the end of their first average.
    pub start: Duration,
    /// What the first average adds to the memory of a process, bytes of the rank that took most: an
    /// averager's mailboxes, its own and those it writes into, and its shard. `None`: threads, or
    /// not known.
    pub extra: Option<u64>,
}

/// What a row on CUDA devices has besides.
#[derive(Clone, Debug, PartialEq)]
pub struct OnDevice {
    /// As the driver calls it; the first rank's.
    pub name: String,
    /// One rank a GPU, or several on one.
    pub placement: &'static str,
    /// There is no GPU, and so there are no times.
    pub simulated: bool,
    /// The largest error in ulp, see `Found`. `None`: not checked.
    pub ulps: Option<f64>,
    /// What NCCL it was measured with, or why it was not.
    pub note: Option<String>,
}

impl Record {
    /// Median.
    pub fn time(&self) -> Option<Duration> {
        let last = self.times.len().checked_sub(1)?;
        Some((self.times[last / 2] + self.times[self.times.len() / 2]) / 2)
    }

    /// GB/s, 10⁹ bytes: bytes / time.
    pub fn algbw(&self) -> Option<f64> {
        Some(self.bytes as f64 / self.time()?.as_secs_f64().max(1e-9) / 1e9)
    }

    /// algbw · 2(n − 1)/n. Of a copy there is none.
    pub fn busbw(&self) -> Option<f64> {
        let algbw = self.algbw().filter(|_| !self.method.is_copy())?;
        Some(algbw * 2.0 * (self.ranks as f64 - 1.0) / self.ranks as f64)
    }

    /// Time as a multiple of the limit's.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.time()?.as_secs_f64() / self.limit?.as_secs_f64().max(1e-9))
    }

    /// Time of processes as a multiple of that of threads.
    pub fn times_threads(&self) -> Option<f64> {
        Some(self.time()?.as_secs_f64() / self.apart.as_ref()?.threads?.as_secs_f64().max(1e-9))
    }

    /// Its name in the table.
    pub fn label(&self) -> String {
        let ranks = match &self.apart {
            None => return self.method.label().into(),
            Some(apart) if apart.processes => "processes",
            Some(_) => "threads",
        };
        format!("{}, {ranks}", if self.method == Method::RING { "ring" } else { "no commit" })
    }

    /// All fields, in the order in which they are written.
    fn fields(&self) -> Vec<(&'static str, Value)> {
        let us =
            |time: Option<Duration>| Value::from(time.map(|time| time.as_nanos() as f64 / 1e3));
        // Four digits are more than a measurement has.
        let short = |x: Option<f64>| Value::from(x.map(|x| (x * 1e4).round() / 1e4));
        let backend = if self.device.is_some() { "cuda" } else { "cpu" };
        let mut fields = vec![
            ("method", self.method.name().into()),
            ("backend", backend.into()),
            ("algorithm", self.method.algorithm().into()),
            ("layout", self.layout.as_str().into()),
            ("tensors", self.tensors.into()),
            ("dtype", self.dtype.as_str().into()),
            ("ranks", self.ranks.into()),
            ("bytes", self.bytes.into()),
            ("time_us", us(self.time())),
            ("min_us", us(self.times.first().copied())),
            ("max_us", us(self.times.last().copied())),
            ("algbw_gbs", short(self.algbw())),
            ("busbw_gbs", short(self.busbw())),
            ("wrong", self.wrong.into()),
            ("ratio_to_limit", short(self.ratio())),
        ];
        if let Some(device) = &self.device {
            fields.extend([
                // null if it is infinite, too: then there are wrong ones
                ("max_ulp", short(device.ulps)),
                ("device", device.name.as_str().into()),
                ("placement", device.placement.into()),
                ("simulated", device.simulated.into()),
                ("note", device.note.as_deref().into()),
            ]);
        }
        if let Some(apart) = &self.apart {
            fields.extend([
                ("ranks_are", if apart.processes { "processes" } else { "threads" }.into()),
                ("ratio_to_threads", short(self.times_threads())),
                ("start_ms", short(Some(apart.start.as_secs_f64() * 1e3))),
                ("extra_rss_bytes", apart.extra.into()),
            ]);
        }
        fields
    }
}

/// A list of objects, one a line.
pub fn json(records: &[Record]) -> String {
    let object = |record: &Record| {
        let fields =
            record.fields().into_iter().map(|(name, value)| format!("\"{name}\": {value}"));
        format!("  {{{}}}", fields.collect::<Vec<_>>().join(", "))
    };
    format!("[\n{}\n]\n", records.iter().map(object).collect::<Vec<_>>().join(",\n"))
}

/// A line of names, then a line a record; nothing where there is no value.
pub fn csv(records: &[Record]) -> String {
    let cell = |value: Value| match value {
        Value::Null => String::new(),
        Value::String(text) if text.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text,
        other => other.to_string(),
    };
    let mut text = String::new();
    for record in records {
        if text.is_empty() {
            text =
                record.fields().iter().map(|(name, _)| *name).collect::<Vec<_>>().join(",") + "\n";
        }
        let cells = record.fields().into_iter().map(|(_, value)| cell(value));
        text += &(cells.collect::<Vec<_>>().join(",") + "\n");
    }
    text
}

/// A file opened before anything is measured, so that a wrong path costs nobody a run.
pub struct Sink {
    path: PathBuf,
    file: File,
    form: fn(&[Record]) -> String,
}

impl Sink {
    pub fn create(path: &Path, form: fn(&[Record]) -> String) -> Result<Self, Failure> {
        let file = File::create(path)
            .map_err(|e| Failure::Failed(format!("cannot write {}: {e}", path.display())))?;
        Ok(Sink { path: path.into(), file, form })
    }

    pub fn write(self, records: &[Record]) -> Result<(), Failure> {
        let mut file = BufWriter::new(self.file);
        let result = file.write_all((self.form)(records).as_bytes()).and_then(|()| file.flush());
        result.map_err(|e| Failure::Failed(format!("cannot write {}: {e}", self.path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            method: Method::OnePassLimit,
            layout: "a \"model\", mine.json".into(),
            tensors: 2,
            dtype: "f32".into(),
            ranks: 4,
            elements: 250_000,
            bytes: 1_000_000,
            times: [100, 200, 400, 500].map(Duration::from_micros).to_vec(),
            wrong: Some(0),
            limit: Some(Duration::from_micros(200)),
            device: None,
            apart: None,
        }
    }

    #[test]
    fn figures_are_those_of_nccl_tests() {
        let record = record();
        assert_eq!(record.time(), Some(Duration::from_micros(300)), "the median of an even number");
        assert!((record.algbw().unwrap() - 3.3333).abs() < 1e-3);
        assert!((record.busbw().unwrap() - 5.0).abs() < 1e-3);
        assert!((record.ratio().unwrap() - 1.5).abs() < 1e-9);
    }

    #[test]
    fn what_was_not_measured_is_null() {
        let device = OnDevice {
            name: "a GPU".into(),
            placement: "one rank a GPU",
            simulated: true,
            ulps: Some(0.5),
            note: None,
        };
        let record = Record { times: vec![], device: Some(device), ..record() };
        let value: Value = serde_json::from_str(&json(std::slice::from_ref(&record))).unwrap();
        for field in
            ["time_us", "min_us", "max_us", "algbw_gbs", "busbw_gbs", "ratio_to_limit", "note"]
        {
            assert_eq!(value[0][field], Value::Null, "{field}");
        }
        assert_eq!((&value[0]["simulated"], &value[0]["max_ulp"]), (&true.into(), &0.5.into()));
        assert!(csv(&[record]).ends_with(",0,,0.5,a GPU,one rank a GPU,true,\n"));
    }

    #[test]
    fn csv_and_json_say_the_same() {
        let unchecked = Record { wrong: None, limit: None, ..record() };
        let text = csv(&[record(), unchecked.clone()]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[0],
            "method,backend,algorithm,layout,tensors,dtype,ranks,bytes,time_us,min_us,max_us,algbw_gbs,busbw_gbs,wrong,ratio_to_limit"
        );
        assert_eq!(
            lines[1],
            "one_pass_limit,cpu,one_pass,\"a \"\"model\"\", \
             mine.json\",2,f32,4,1000000,300.0,100.0,500.0,3.3333,5.0,0,1.5"
        );
        assert!(lines[2].ends_with("3.3333,5.0,,"));
        let value: Value = serde_json::from_str(&json(&[record(), unchecked])).unwrap();
        assert_eq!(value[0]["layout"], "a \"model\", mine.json");
        assert_eq!((&value[0]["time_us"], &value[1]["wrong"]), (&Value::from(300.0), &Value::Null));
        assert_eq!(json(&[]).trim(), "[\n\n]");
    }
}
