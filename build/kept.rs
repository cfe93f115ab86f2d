//! Compiled kernels, kept in `target/param-averager-kernels` from one build to the next.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::children;

/// Hash of all that a kernel is made from.
pub struct Key(DefaultHasher);

impl Key {
    /// Names and contents of all files in `kernels/`.
    pub fn of_sources() -> Result<Key, String> {
        let mut key = Key(DefaultHasher::new());
        let mut folders = vec![PathBuf::from("kernels")];
        while let Some(folder) = folders.pop() {
            let mut found = children(&folder, "");
            found.sort();
            for path in found {
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text =
                    fs::read(&path).map_err(|e| format!("reading {}: {e}", path.display()))?;
                (&path, text).hash(&mut key.0);
            }
        }
        Ok(key)
    }

    pub fn add(&mut self, what: &str, value: &str) {
        (what, value).hash(&mut self.0);
    }

    /// A program and its arguments.
    pub fn add_command(&mut self, command: &Command) {
        command.get_program().hash(&mut self.0);
        command.get_args().for_each(|argument| argument.hash(&mut self.0));
    }

    /// Adds the version that a compiler reports: its path may be another compiler's later.
    pub fn add_version(&mut self, compiler: &Path) {
        let output = Command::new(compiler).arg("--version").output();
        let said = output.map(|output| output.stdout).unwrap_or_default();
        (compiler, said).hash(&mut self.0);
    }

    pub fn finish(self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// The file of this name that an earlier run of this script has kept, as `copy`; or else what
/// `make` makes, which is kept. Nothing is kept where `OUT_DIR` is not in a folder of cargo's.
pub fn kept(
    name: &str,
    out: &Path,
    copy: &Path,
    make: impl FnOnce() -> Result<PathBuf, String>,
) -> Result<PathBuf, String> {
    // The folder of all that cargo builds: it has one of these, in which nothing is looked for.
    let is_target = |folder: &&Path| {
        ["CACHEDIR.TAG", ".rustc_info.json"].iter().any(|name| folder.join(name).is_file())
    };
    let target = out.ancestors().find(is_target);
    let Some(folder) = target.map(|target| target.join("param-averager-kernels")) else {
        return make();
    };
    let file = folder.join(name);
    let parent = copy.parent().expect("a folder in OUT_DIR");
    if fs::create_dir_all(parent).is_ok() && fs::copy(&file, copy).is_ok() {
        return Ok(copy.to_owned());
    }
    let made = make()?;
    // Whole, or not at all: another run may be looking. It is no error if nothing can be kept.
    let part = folder.join(format!("{name}.{}", std::process::id()));
    let _ = fs::create_dir_all(&folder)
        .and_then(|()| fs::copy(&made, &part))
        .and_then(|_| fs::rename(&part, &file));
    Ok(made)
}
