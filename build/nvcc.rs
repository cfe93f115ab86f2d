//! The search for nvcc.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::{children, read};

/// Reason to build without nvcc.
pub struct Absent {
    pub reason: &'static str,
    /// True if it was asked for, so that no warning is needed.
    pub is_meant: bool,
}

/// The nvcc to use, or the reason there is none. An error if one was named that can't be used.
pub fn find() -> Result<Result<PathBuf, Absent>, String> {
    let meant = |reason| Ok(Err(Absent { reason, is_meant: true }));
    if env::var_os("CARGO_FEATURE_CUDA").is_none_or(|set| set.is_empty()) {
        return meant("without the feature `cuda`");
    }
    if read("DOCS_RS").is_some() {
        return meant("since DOCS_RS is set");
    }
    if let Some(named) = read("NVCC") {
        if named.is_empty() {
            return meant("since NVCC is set to nothing");
        }
        let path = if Path::new(&named).components().count() > 1 {
            Some(PathBuf::from(&named)).filter(|path| path.is_file())
        } else {
            on_path(&named)
        };
        return match path {
            Some(path) => Ok(Ok(path)),
            None => Err(format!(
                "NVCC names {}, which does not exist: correct NVCC, unset it to search for nvcc, \
                 or set it to nothing \
                 to build without GPU kernels",
                Path::new(&named).display()
            )),
        };
    }
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        let Some(home) = read(variable).filter(|home| !home.is_empty()) else { continue };
        let home = PathBuf::from(home);
        if !home.is_dir() {
            return Err(format!(
                "{variable} names {}, which is not a directory: correct it or unset it",
                home.display()
            ));
        }
        if home.join("bin/nvcc").is_file() {
            return Ok(Ok(home.join("bin/nvcc")));
        }
    }
    let found = on_path(&OsString::from("nvcc"))
        .or_else(|| Some(PathBuf::from("/usr/local/cuda/bin/nvcc")).filter(|path| path.is_file()))
        .or_else(in_virtual_environment);
    Ok(found.ok_or(Absent { reason: "since no nvcc was found", is_meant: false }))
}

fn on_path(name: &OsString) -> Option<PathBuf> {
    env::split_paths(&read("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// PyPI's toolkit of the newest CUDA in the active virtual environment.
fn in_virtual_environment() -> Option<PathBuf> {
    let root = PathBuf::from(read("VIRTUAL_ENV")?);
    let mut found: Vec<PathBuf> = children(&root.join("lib"), "python")
        .iter()
        .flat_map(|python| children(&python.join("site-packages/nvidia"), "cu"))
        .map(|toolkit| toolkit.join("bin/nvcc"))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop()
}
