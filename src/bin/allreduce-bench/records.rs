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
    /// Ascending, not empty.
    pub times: Vec<Duration>,
    /// `None`: not checked.
    pub wrong: Option<u64>,
    /// Median time of the limit's row in the same table.
    pub limit: Option<Duration>,
}

impl Record {
    /// Median.
    pub fn time(&self) -> Duration {
        let (low, high) = (self.times[(self.times.len() - 1) / 2], self.times[self.times.len() / 2]);
        (low + high) / 2
    }

    /// GB/s, 10⁹ bytes: bytes / time.
    pub fn algbw(&self) -> f64 {
        self.bytes as f64 / self.time().as_secs_f64().max(1e-9) / 1e9
    }

    /// algbw · 2(n − 1)/n.
    pub fn busbw(&self) -> f64 {
        self.algbw() * 2.0 * (self.ranks as f64 - 1.0) / self.ranks as f64
    }

    /// Time as a multiple of the limit's.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.time().as_secs_f64() / self.limit?.as_secs_f64().max(1e-9))
    }

    /// All fields, in the order in which they are written.
    fn fields(&self) -> [(&'static str, Value); 15] {
        let us = |time: Duration| Value::from(time.as_nanos() as f64 / 1e3);
        // Four digits are more than a measurement has.
        let short = |x: f64| Value::from((x * 1e4).round() / 1e4);
        [
            ("method", self.method.name().into()),
            ("backend", "cpu".into()),
            ("algorithm", self.method.algorithm().into()),
            ("layout", self.layout.as_str().into()),
            ("tensors", self.tensors.into()),
            ("dtype", self.dtype.as_str().into()),
            ("ranks", self.ranks.into()),
            ("bytes", self.bytes.into()),
            ("time_us", us(self.time())),
            ("min_us", us(self.times[0])),
            ("max_us", us(self.times[self.times.len() - 1])),
            ("algbw_gbs", short(self.algbw())),
            ("busbw_gbs", short(self.busbw())),
            ("wrong", self.wrong.into()),
            ("ratio_to_limit", self.ratio().map(short).into()),
        ]
    }
}

/// A list of objects, one a line.
pub fn json(records: &[Record]) -> String {
    let object = |record: &Record| {
        let fields = record.fields().map(|(name, value)| format!("\"{name}\": {value}"));
        format!("  {{{}}}", fields.join(", "))
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
            text = record.fields().map(|(name, _)| name).join(",") + "\n";
        }
        text += &(record.fields().map(|(_, value)| cell(value)).join(",") + "\n");
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
        }
    }

    #[test]
    fn figures_are_those_of_nccl_tests() {
        let record = record();
        assert_eq!(record.time(), Duration::from_micros(300), "the median of an even number");
        assert!((record.algbw() - 3.3333).abs() < 1e-3 && (record.busbw() - 5.0).abs() < 1e-3);
        assert!((record.ratio().unwrap() - 1.5).abs() < 1e-9);
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
            "one_pass_limit,cpu,one_pass,\"a \"\"model\"\", mine.json\",2,f32,4,1000000,300.0,100.0,500.0,3.3333,5.0,0,1.5"
        );
        assert!(lines[2].ends_with("3.3333,5.0,,"));
        let value: Value = serde_json::from_str(&json(&[record(), unchecked])).unwrap();
        assert_eq!(value[0]["layout"], "a \"model\", mine.json");
        assert_eq!((&value[0]["time_us"], &value[1]["wrong"]), (&Value::from(300.0), &Value::Null));
        assert_eq!(json(&[]).trim(), "[\n\n]");
    }
}
