//! One record a row, and its files for programs.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::failure::Failure;
use crate::layout::Layout;
use crate::rows::Row;

/// The result of a row.
#[derive(Clone, Debug)]
pub struct Record {
    pub row: Row,
    /// The tensors of one rank.
    pub layout: Layout,
    pub ranks: usize,
    /// Ascending. Empty: not measured.
    pub times: Vec<Duration>,
    /// `None`: not checked.
    pub wrong: Option<u64>,
    /// Median time of the yardstick's row in the same group.
    pub yardstick: Option<Duration>,
    pub details: Details,
}

/// Further fields of a record, by the kind of its ranks.
#[derive(Clone, Debug)]
pub enum Details {
    Cpu,
    Cuda {
        /// Name by the driver, of the first rank's device.
        device: String,
        /// One rank a GPU, or several on one.
        placement: &'static str,
        /// There is no GPU, and so there are no times.
        simulated: bool,
        /// Largest error in ulp, see `Found`. `None`: not checked.
        ulps: Option<f64>,
        /// Version of NCCL, or the reason why the row was not measured.
        note: Option<String>,
    },
    /// A row of `--processes`: ranks that are processes, or the threads that they are compared
    /// with.
    Processes {
        /// From the start of the processes to the end of their first average.
        start: Duration,
        /// Bytes that the first average adds to the memory of a process, of the rank that took
        /// most: an averager's mailboxes, its own and those it writes into, and its shard.
        /// `None`: threads, or not known.
        extra: Option<u64>,
    },
}

impl Record {
    /// Median.
    pub fn time(&self) -> Option<Duration> {
        let last = self.times.len().checked_sub(1)?;
        Some((self.times[last / 2] + self.times[self.times.len() / 2]) / 2)
    }

    /// GB/s, 10⁹ bytes: bytes / time.
    pub fn algbw(&self) -> Option<f64> {
        Some(self.layout.bytes() as f64 / self.time()?.as_secs_f64().max(1e-9) / 1e9)
    }

    /// algbw · 2(n − 1)/n. Of a copy there is none.
    pub fn busbw(&self) -> Option<f64> {
        let algbw = self.algbw().filter(|_| !self.row.is_copy())?;
        Some(algbw * 2.0 * (self.ranks as f64 - 1.0) / self.ranks as f64)
    }

    /// Time as a multiple of the yardstick's.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.time()?.as_secs_f64() / self.yardstick?.as_secs_f64().max(1e-9))
    }

    /// All fields, in the order in which they are written.
    fn fields(&self) -> Vec<(&'static str, Value)> {
        let us =
            |time: Option<Duration>| Value::from(time.map(|time| time.as_nanos() as f64 / 1e3));
        // Four digits are more than a measurement has.
        let short = |x: Option<f64>| Value::from(x.map(|x| (x * 1e4).round() / 1e4));
        let processes = matches!(self.details, Details::Processes { .. });
        let backend = if matches!(self.details, Details::Cuda { .. }) { "cuda" } else { "cpu" };
        let mut fields = vec![
            ("method", self.row.name().into()),
            ("backend", backend.into()),
            ("algorithm", self.row.algorithm().into()),
            ("layout", self.layout.name.as_str().into()),
            ("tensors", self.layout.tensors.len().into()),
            ("dtype", self.layout.dtype_name().into()),
            ("ranks", self.ranks.into()),
            ("bytes", self.layout.bytes().into()),
            ("time_us", us(self.time())),
            ("min_us", us(self.times.first().copied())),
            ("max_us", us(self.times.last().copied())),
            ("algbw_gbs", short(self.algbw())),
            ("busbw_gbs", short(self.busbw())),
            ("wrong", self.wrong.into()),
            ("ratio_to_limit", short(self.ratio().filter(|_| !processes))),
        ];
        match &self.details {
            Details::Cpu => {}
            Details::Cuda { device, placement, simulated, ulps, note } => fields.extend([
                // null if it is infinite, too: then there are wrong elements
                ("max_ulp", short(*ulps)),
                ("device", device.as_str().into()),
                ("placement", (*placement).into()),
                ("simulated", (*simulated).into()),
                ("note", note.as_deref().into()),
            ]),
            Details::Processes { start, extra } => fields.extend([
                ("ranks_are", self.row.ranks_are.into()),
                ("ratio_to_threads", short(self.ratio())),
                ("start_ms", short(Some(start.as_secs_f64() * 1e3))),
                ("extra_rss_bytes", (*extra).into()),
            ]),
        }
        fields
    }
}

/// A list of objects, one a line.
pub fn json(records: &[Record], file: &mut dyn Write) -> io::Result<()> {
    let object = |record: &Record| {
        let fields = record.fields();
        let fields = fields.iter().map(|(name, value)| format!("\"{name}\": {value}"));
        format!("  {{{}}}", fields.collect::<Vec<_>>().join(", "))
    };
    writeln!(file, "[\n{}\n]", records.iter().map(object).collect::<Vec<_>>().join(",\n"))
}

/// A line of names, then a line a record; nothing where there is no value.
pub fn csv(records: &[Record], file: &mut dyn Write) -> io::Result<()> {
    let mut csv = csv::Writer::from_writer(file);
    for (index, record) in records.iter().enumerate() {
        let fields = record.fields();
        if index == 0 {
            csv.write_record(fields.iter().map(|(name, _)| name))?;
        }
        csv.write_record(fields.into_iter().map(|(_, value)| match value {
            Value::Null => String::new(),
            Value::String(text) => text,
            other => other.to_string(),
        }))?;
    }
    csv.flush()
}

/// Writes records in some format.
pub type Format = fn(&[Record], &mut dyn Write) -> io::Result<()>;

/// A file that is opened before anything is measured, so that a wrong path costs no run.
pub struct Sink {
    path: PathBuf,
    file: File,
    format: Format,
}

impl Sink {
    pub fn create(path: &Path, format: Format) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|error| unwritable(path, error))?;
        Ok(Sink { path: path.into(), file, format })
    }

    pub fn write(self, records: &[Record]) -> Result<(), Failure> {
        let mut file = BufWriter::new(self.file);
        let written = (self.format)(records, &mut file).and_then(|()| file.flush());
        written.map_err(|error| unwritable(&self.path, error))
    }
}

fn unwritable(path: &Path, error: io::Error) -> Failure {
    Failure::Failed(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
pub mod tests {
    use param_averager::Dtype;

    use super::*;
    use crate::layout::Tensor;
    use crate::rows::Kind;

    pub fn record() -> Record {
        let tensor =
            |elements| Tensor { name: "a".into(), shape: vec![elements], dtype: Dtype::F32 };
        Record {
            row: Kind::OnePass.into(),
            layout: Layout::new("a \"model\", mine.json", [50_000, 200_000].map(tensor).to_vec()),
            ranks: 4,
            times: [100, 200, 400, 500].map(Duration::from_micros).to_vec(),
            wrong: Some(0),
            yardstick: Some(Duration::from_micros(200)),
            details: Details::Cpu,
        }
    }

    fn text(format: Format, records: &[Record]) -> String {
        let mut text = vec![];
        format(records, &mut text).unwrap();
        String::from_utf8(text).unwrap()
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
        let (device, placement) = ("a GPU".into(), "one rank a GPU");
        let details =
            Details::Cuda { device, placement, simulated: true, ulps: Some(0.5), note: None };
        let record = Record { times: vec![], details, ..record() };
        let value = text(json, std::slice::from_ref(&record));
        let value: Value = serde_json::from_str(&value).unwrap();
        for field in
            ["time_us", "min_us", "max_us", "algbw_gbs", "busbw_gbs", "ratio_to_limit", "note"]
        {
            assert_eq!(value[0][field], Value::Null, "{field}");
        }
        assert_eq!((&value[0]["simulated"], &value[0]["max_ulp"]), (&true.into(), &0.5.into()));
        assert!(text(csv, &[record]).ends_with(",0,,0.5,a GPU,one rank a GPU,true,\n"));
    }

    #[test]
    fn texts_are_quoted_and_what_was_not_checked_is_empty() {
        let unchecked = Record { wrong: None, yardstick: None, ..record() };
        let lines = text(csv, &[record(), unchecked.clone()]);
        let lines: Vec<_> = lines.lines().collect();
        let quoted = "one_pass_limit,cpu,one_pass,\"a \"\"model\"\", mine.json\",2,f32,4,1000000,";
        assert_eq!(lines[1], format!("{quoted}300.0,100.0,500.0,3.3333,5.0,0,1.5"));
        assert_eq!(lines[2], format!("{quoted}300.0,100.0,500.0,3.3333,5.0,,"));
        let value: Value = serde_json::from_str(&text(json, &[record(), unchecked])).unwrap();
        assert_eq!(value[0]["layout"], "a \"model\", mine.json");
        assert_eq!((&value[0]["time_us"], &value[1]["wrong"]), (&300.0.into(), &Value::Null));
        assert_eq!(text(json, &[]).trim(), "[\n\n]");
    }
}
