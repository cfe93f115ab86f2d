//! Output of cuobjdump for a fatbin: per architecture and kernel, the resources and the machine
//! code.

use std::path::{Path, PathBuf};
use std::process::Command;

/// nvcc and its cuobjdump.
pub struct Tools {
    pub nvcc: PathBuf,
    cuobjdump: PathBuf,
}

impl Tools {
    /// The tools that the kernels were built with, or why there are none.
    pub fn find() -> Result<Tools, String> {
        let nvcc = match option_env!("PARAM_AVERAGER_NVCC") {
            None | Some("") => return Err("the crate was built without nvcc".into()),
            Some(path) => PathBuf::from(path),
        };
        if !nvcc.is_file() {
            return Err(format!("the nvcc that built the kernels, {}, is gone", nvcc.display()));
        }
        let beside = std::fs::canonicalize(&nvcc).unwrap_or_else(|_| nvcc.clone());
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders =
            [&nvcc, &beside].into_iter().filter_map(|tool| tool.parent().map(Path::to_path_buf));
        let cuobjdump = folders
            .chain(std::env::split_paths(&path))
            .map(|folder| folder.join("cuobjdump"))
            .find(|tool| tool.is_file())
            .ok_or_else(|| {
                format!(
                    "no cuobjdump beside {} and none on PATH (pip install \
                     cuda-toolkit[cuobjdump,nvdisasm])",
                    nvcc.display()
                )
            })?;
        Ok(Tools { nvcc, cuobjdump })
    }

    /// Output of cuobjdump for one of its options.
    pub fn dump(&self, option: &str, file: &Path) -> String {
        let mut command = Command::new(&self.cuobjdump);
        // cuobjdump runs the nvdisasm of its own folder.
        let mut path =
            self.cuobjdump.parent().map(|folder| vec![folder.to_path_buf()]).unwrap_or_default();
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        command.env("PATH", std::env::join_paths(path).unwrap());
        let output = command.arg(option).arg(file).output().expect("cuobjdump runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cuobjdump {option} {}: {said}", file.display());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// An instruction, without its predicate and encoding.
#[derive(Clone, Debug)]
pub struct Instruction {
    pub address: u64,
    pub predicated: bool,
    /// Opcode with its suffixes, such as `LDG.E.128`.
    pub opcode: String,
    pub operands: String,
}

impl Instruction {
    pub fn is_load(&self) -> bool {
        matches!(self.space(), "LDG" | "LD" | "LDL")
    }
    pub fn is_store(&self) -> bool {
        matches!(self.space(), "STG" | "ST" | "STL")
    }
    /// True for accesses to memory of tensors, mailboxes or the stack; false for constants.
    pub fn is_memory(&self) -> bool {
        self.is_load() || self.is_store()
    }
    /// The opcode up to its first dot.
    pub fn space(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }
    pub fn has(&self, modifier: &str) -> bool {
        self.opcode.split('.').skip(1).any(|word| word == modifier)
    }
}

/// A kernel for one architecture.
pub struct Kernel {
    pub architecture: String,
    pub name: String,
    pub registers: u32,
    pub stack: u32,
    pub local: u32,
    pub code: Vec<Instruction>,
}

/// All kernels of a fatbin or cubin.
pub fn kernels(tools: &Tools, file: &Path) -> Vec<Kernel> {
    let mut kernels = resources(&tools.dump("-res-usage", file));
    let (mut architecture, mut current) = (String::new(), None);
    for line in tools.dump("-sass", file).lines() {
        if let Some(value) = architecture_of(line) {
            (architecture, current) = (value, None);
        } else if let Some(name) = line.trim().strip_prefix("Function : ") {
            current = kernels.iter().position(|k| k.name == name && k.architecture == architecture);
            assert!(
                current.is_some(),
                "cuobjdump -res-usage did not mention {name} for {architecture}"
            );
        } else if let (Some(instruction), Some(kernel)) = (instruction(line), current) {
            kernels[kernel].code.push(instruction);
        }
    }
    assert!(kernels.iter().all(|kernel| !kernel.code.is_empty()), "a kernel without code");
    kernels
}

/// A line such as `arch = sm_90`, of machine code and of PTX.
fn architecture_of(line: &str) -> Option<String> {
    line.trim().strip_prefix("arch = ").map(str::to_owned)
}

fn resources(text: &str) -> Vec<Kernel> {
    let (mut kernels, mut architecture, mut name) = (vec![], String::new(), None);
    for line in text.lines() {
        if let Some(value) = architecture_of(line) {
            architecture = value;
        } else if let Some(function) = line.trim().strip_prefix("Function ") {
            name = Some(function.trim_end_matches(':').to_owned());
        } else if let (true, Some(name)) = (line.trim().starts_with("REG:"), name.take()) {
            let number = |key: &str| {
                let value = line.split_whitespace().find_map(|word| word.strip_prefix(key));
                value
                    .and_then(|value| value.parse().ok())
                    .unwrap_or_else(|| panic!("no {key} in `{line}`"))
            };
            kernels.push(Kernel {
                architecture: architecture.clone(),
                name,
                registers: number("REG:"),
                stack: number("STACK:"),
                local: number("LOCAL:"),
                code: vec![],
            });
        }
    }
    kernels
}

/// `/*02f0*/  @!P1 STG.E.128 desc[UR8][R6.64], R4 ;  /* encoding */`, braces of dual issue aside.
fn instruction(line: &str) -> Option<Instruction> {
    let (address, rest) = line.trim_start().strip_prefix("/*")?.split_once("*/")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    let (text, _) = rest.split_once(';')?;
    let mut text = text.trim_start_matches(|c: char| c == '{' || c.is_whitespace());
    let predicated = text.starts_with('@') && !text.starts_with("@PT ");
    if text.starts_with('@') {
        text = text.split_once(char::is_whitespace)?.1.trim_start();
    }
    let (opcode, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    Some(Instruction {
        address,
        predicated,
        opcode: opcode.into(),
        operands: operands.trim().into(),
    })
}

/// The PTX of a fatbin, by architecture.
pub fn ptx(tools: &Tools, file: &Path) -> Vec<(String, String)> {
    let mut all: Vec<(String, String)> = vec![];
    for line in tools.dump("-ptx", file).lines() {
        if let Some(architecture) = architecture_of(line) {
            all.push((architecture, String::new()));
        } else if let Some((_, text)) = all.last_mut() {
            text.push_str(line);
            text.push('\n');
        }
    }
    // Headers of machine code come without.
    all.retain(|(_, text)| text.contains(".version"));
    all
}
