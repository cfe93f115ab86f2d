//! Runs scenarios in child processes: a library must be on LD_LIBRARY_PATH when a process starts,
//! and the simulator's settings are environment variables.
//!
//! On which driver: `../shared/cudasim`, which is built, or the one in the folder that
//! `CUDASIM_LIB` names. With `PARAM_AVERAGER_GPU=1` it is this machine's own: settings of the
//! simulator mean nothing then, so a scenario runs once, and one about a machine that has to be
//! simulated prints SKIPPED. `tests/gpu/suite` runs the tests so.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::common::skipped;

/// The scenario that a child is to run.
pub const SCENARIO: &str = "PA_PTX_SCENARIO";
/// A fatbin to use instead of the crate's.
#[allow(dead_code)] // of ptx.rs
pub const FATBIN: &str = "PA_PTX_FATBIN";

/// An environment variable and its value.
pub type Setting<'a> = (&'a str, &'a str);

/// What makes a machine that a GPU's owner has not got, or a detector that a GPU has not got.
const SIMULATED: [&str; 5] =
    ["CUDASIM_NO_DEVICE", "CUDASIM_OLD_DRIVER", "CUDASIM_MEM_MB", "CUDASIM_RACE", "CUDASIM_P2P"];
const ABOUT_SIMULATED: &str = "about a simulated machine";

/// Where scenarios run.
#[derive(Clone)]
pub enum Driver {
    /// The folder of the simulator's libcuda.so.1.
    Simulated(PathBuf),
    /// This machine's own.
    Own,
}

/// Whether scenarios run on this machine's own driver.
pub fn on_own_driver() -> bool {
    std::env::var_os("PARAM_AVERAGER_GPU").is_some_and(|value| value == "1")
}

/// The driver, or a SKIPPED line of this test's.
pub fn driver_for(test: &str) -> Option<Driver> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let found = || match on_own_driver() {
        true => Ok(Driver::Own),
        false => find_or_build().map(Driver::Simulated),
    };
    let fatbin = param_averager::__testing::fatbin().map_err(str::to_owned);
    match fatbin.and_then(|_| DRIVER.get_or_init(found).clone()) {
        Ok(driver) => Some(driver),
        Err(reason) => {
            skipped(test, &reason);
            None
        }
    }
}

fn find_or_build() -> Result<PathBuf, String> {
    if let Some(folder) = std::env::var_os("CUDASIM_LIB").map(PathBuf::from) {
        let there = folder.join("libcuda.so.1").is_file();
        return there
            .then(|| folder.clone())
            .ok_or(format!("CUDASIM_LIB={} holds no libcuda.so.1", folder.display()));
    }
    // Beside the checkout. Packages of this workspace at different depths use this file.
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().skip(1);
    let Some(source) =
        folders.map(|folder| folder.join("shared/cudasim")).find(|source| source.is_dir())
    else {
        return Err("no ../shared/cudasim, and CUDASIM_LIB is not set".into());
    };
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cudasim");
    let make = Command::new("make")
        .args(["-j2", "-C"])
        .arg(source)
        .arg(format!("BUILD={}", build.display()))
        .output();
    match make {
        Err(error) => Err(format!("make did not run: {error}")),
        Ok(output) if !output.status.success() => {
            Err(format!("cudasim did not build: {}", String::from_utf8_lossy(&output.stderr)))
        }
        Ok(_) => Ok(build),
    }
}

/// Runs the scenario with each of some settings, to success; or prints a SKIPPED line of this
/// test's.
pub fn scenario(test: &str, name: &str, settings: &[&[Setting<'_>]]) {
    let Some(driver) = driver_for(test) else { return };
    let settings = match driver {
        Driver::Simulated(_) => settings.iter().map(|settings| settings.to_vec()).collect(),
        Driver::Own => match on_a_machine(settings) {
            Ok(settings) => settings,
            Err(reason) => return skipped(test, &reason),
        },
    };
    for settings in settings {
        let ended = child(name, Some(&driver), &settings);
        assert_eq!(ended.code, Some(0), "{name}, {settings:?}: {}", ended.said);
    }
}

/// What is left of the settings on a machine that is what it is, or why it can't be used.
fn on_a_machine<'a>(settings: &[&[Setting<'a>]]) -> Result<Vec<Vec<Setting<'a>>>, String> {
    let mut left: Vec<Vec<Setting<'a>>> = vec![];
    let mut too_few = None;
    for settings in settings {
        if settings.iter().any(|(name, _)| SIMULATED.contains(name)) {
            continue;
        }
        let needed = settings.iter().find(|(name, _)| *name == "CUDASIM_DEVICES");
        let needed: i32 = needed.map_or(1, |(_, devices)| devices.parse().expect("a number"));
        if needed > devices() {
            too_few = Some(format!("needs {needed} devices, this machine has {}", devices()));
            continue;
        }
        let others: Vec<_> =
            settings.iter().copied().filter(|(name, _)| !name.starts_with("CUDASIM_")).collect();
        if !left.contains(&others) {
            left.push(others);
        }
    }
    match left.is_empty() {
        true => Err(too_few.unwrap_or(ABOUT_SIMULATED.into())),
        false => Ok(left),
    }
}

/// What a process of a test's own needs in its environment to run with these settings, or a SKIPPED
/// line of the test's.
#[allow(dead_code)] // of cuda_processes.rs
pub fn environment(
    test: &str,
    settings: &[Setting<'static>],
) -> Option<Vec<(&'static str, String)>> {
    let own = |settings: Vec<Setting<'static>>| -> Vec<(&'static str, String)> {
        settings.into_iter().map(|(name, value)| (name, value.to_owned())).collect()
    };
    match driver_for(test)? {
        Driver::Simulated(folder) => {
            let library = ("LD_LIBRARY_PATH", folder.to_str().expect("a name in UTF-8").to_owned());
            Some(
                [own(settings.to_vec()), vec![library, ("CUDASIM_KILL_S", "60".to_owned())]]
                    .concat(),
            )
        }
        Driver::Own => match on_a_machine(&[settings]) {
            Ok(mut left) => {
                let line = format!("RAN {test} {settings:?}\n");
                let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
                Some(own(left.remove(0)))
            }
            Err(reason) => {
                skipped(test, &reason);
                None
            }
        },
    }
}

/// Of this machine's own driver.
fn devices() -> i32 {
    // SAFETY: it opens a library and looks no further.
    let there = unsafe { cudarc::driver::sys::is_culib_present() };
    assert!(
        there,
        "PARAM_AVERAGER_GPU=1, but there is no libcuda: install the driver, or set LD_LIBRARY_PATH"
    );
    cudarc::driver::CudaContext::device_count().expect("a driver that can be initialised")
}

/// How a child ended, and what it said.
pub struct Ended {
    pub code: Option<i32>,
    pub said: String,
}

/// Runs a scenario in a child, for so long at most. `driver`: none, a process that finds no libcuda
/// but one that is installed.
pub fn child(scenario: &str, driver: Option<&Driver>, settings: &[Setting<'_>]) -> Ended {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["child_process", "--exact", "--nocapture", "--test-threads=1"])
        .env(SCENARIO, scenario);
    match driver {
        Some(Driver::Own) => {
            // For tests/gpu/suite: a test that says neither this nor SKIPPED has shown nothing.
            let line = format!("RAN {scenario} {settings:?}\n");
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
        }
        _ => {
            let simulator =
                |name: &std::ffi::OsString| name.to_string_lossy().starts_with("CUDASIM_");
            for (name, _) in std::env::vars_os().filter(|(name, _)| simulator(name)) {
                command.env_remove(name);
            }
            command.env_remove("CUDA_VISIBLE_DEVICES").env_remove("LD_LIBRARY_PATH");
        }
    }
    if let Some(Driver::Simulated(folder)) = driver {
        command.env("LD_LIBRARY_PATH", folder);
        // Kernels that make no progress end in an error, not in a test that hangs.
        command.env("CUDASIM_KILL_S", "60");
    }
    command.envs(settings.iter().copied()).stdout(Stdio::piped()).stderr(Stdio::piped());
    ended(command, limit())
}

/// For one child.
fn limit() -> Duration {
    let seconds = std::env::var("PARAM_AVERAGER_CHILD_LIMIT_S");
    Duration::from_secs(seconds.map_or(600, |seconds| seconds.parse().expect("whole seconds")))
}

/// Waits for the end of the process, or ends it.
fn ended(mut command: Command, limit: Duration) -> Ended {
    fn read(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = from.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        })
    }
    let (start, mut child) = (Instant::now(), command.spawn().unwrap());
    let said = [read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap())];
    let (mut code, mut killed) = (None, String::new());
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            if killed.is_empty() {
                code = status.code();
            }
            break;
        }
        if start.elapsed() >= limit && killed.is_empty() {
            killed = format!("\nkilled: it took longer than {limit:?}");
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = said.map(|thread| thread.join().unwrap()).concat();
    Ended { code, said: said + &killed }
}

/// A process without a driver says so. A driver that is found without LD_LIBRARY_PATH is one of the
/// machine's own.
pub fn no_driver(test: &str) {
    if on_own_driver() {
        return skipped(test, "this machine has a driver");
    }
    let ended = child("no-driver", None, &[]);
    if ended.code != Some(0) && ended.said.contains("a libcuda is installed here") {
        return skipped(test, "this machine has a driver");
    }
    assert_eq!(ended.code, Some(0), "{}", ended.said);
}

#[test]
fn a_child_that_hangs_is_ended() {
    let mut command = Command::new("sleep");
    command.arg("600").stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let ended = ended(command, Duration::from_millis(300));
    assert!(ended.code.is_none() && ended.said.contains("killed"), "{}", ended.said);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn settings_on_a_machine_that_is_what_it_is() {
    let (one, seed) = (("CUDASIM_DELAY", "30"), ("CUDASIM_SEED", "1"));
    let visible = ("CUDA_VISIBLE_DEVICES", "");
    assert_eq!(on_a_machine(&[&[("CUDASIM_RACE", "1")]]).unwrap_err(), ABOUT_SIMULATED);
    // Without a driver no devices are counted; this is decided before.
    assert_eq!(on_a_machine(&[&[one, ("CUDASIM_MEM_MB", "64")]]).unwrap_err(), ABOUT_SIMULATED);
    if on_own_driver() {
        assert_eq!(on_a_machine(&[&[one], &[seed], &[visible]]).unwrap(), [vec![], vec![visible]]);
        let many = on_a_machine(&[&[("CUDASIM_DEVICES", "1000")]]).unwrap_err();
        assert!(many.contains("needs 1000 devices"), "{many}");
    }
}
