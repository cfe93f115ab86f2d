//! Helpers that the tests on CPUs and on CUDA devices share.

use std::path::{Path, PathBuf};

/// The fields of a record, as the first line of a CSV file has them.
pub const FIELDS: &str =
    "method,backend,algorithm,layout,tensors,dtype,ranks,bytes,time_us,min_us,\
    max_us,algbw_gbs,busbw_gbs,wrong,ratio_to_limit";

/// Cells of a table's rows: size, count, type, redop, the method, whose label may have blanks, and
/// so many figures after it.
pub fn rows(table: &str, figures: usize) -> Vec<Vec<String>> {
    let lines = table.lines().filter(|line| !line.starts_with('#'));
    let cells = lines.map(|line| {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let label = 4..words.len() - figures;
        [&words[..4], &[words[label.clone()].join(" ")], &words[label.end..]].concat()
    });
    cells.collect()
}

/// A file in the folder for this build's temporary files.
pub fn file(name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{name}"));
    std::fs::write(&path, content).expect("can write there");
    path
}
