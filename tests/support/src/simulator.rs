//! Runs scenarios in child processes: a library must be on LD_LIBRARY_PATH when a process starts,
//! and the simulator's settings are environment variables.
//!
//! The driver is `../shared/cudasim`, which is built, or the one in the folder that `CUDASIM_LIB`
//! names. With `PARAM_AVERAGER_GPU=1` it is this machine's own: settings of the simulator mean
//! nothing then, so a scenario runs once. `tests/gpu/suite` runs tests so, and reads a line RAN for
//! each scenario, or SKIPPED for one about a machine that has to be simulated.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::{output_within, Ended, Skip};

/// Variable with the scenario that a child is to run. `main` of a test program looks at it before
/// anything else.
pub const SCENARIO: &str = "PA_PTX_SCENARIO";

/// An environment variable and its value.
pub type Setting<'a> = (&'a str, &'a str);

/// Settings that a real machine cannot follow: they simulate another machine, or a race detector.
const SIMULATED: [&str; 5] =
    ["CUDASIM_NO_DEVICE", "CUDASIM_OLD_DRIVER", "CUDASIM_MEM_MB", "CUDASIM_RACE", "CUDASIM_P2P"];
const ABOUT_SIMULATED: &str = "about a simulated machine";

/// Limits on the simulator. Kernels that make no progress end in an error, not in a test that
/// hangs. The clock of kernels is slow: their waits, of a second at most, are for skew, and on a
/// machine that has other work a kernel of the simulator may not run for longer than that. By the
/// same clock, a probe of peer access ends after 3 seconds, and its rates mean nothing.
const LIMITS: [Setting<'static>; 4] = [
    ("CUDASIM_KILL_S", "60"),
    ("CUDASIM_TIMESCALE", "30"),
    ("PARAM_AVERAGER_P2P_LIMIT_MS", "100"),
    ("PARAM_AVERAGER_P2P", "1"),
];

/// The driver that scenarios run on.
#[derive(Clone)]
pub enum Driver {
    /// The folder of the simulator's libcuda.so.1.
    Simulated(PathBuf),
    /// This machine's own driver.
    Own,
}

/// True if scenarios run on this machine's own driver.
pub fn on_own_driver() -> bool {
    std::env::var_os("PARAM_AVERAGER_GPU").is_some_and(|value| value == "1")
}

/// Skips where there is neither a driver to run on nor the sources of one.
pub fn missing() -> Skip {
    crate::gpu_kernels().or_else(|| match on_own_driver() || source().is_some() {
        false if std::env::var_os("CUDASIM_LIB").is_none() => {
            Some("no cudasim: neither ../shared/cudasim nor CUDASIM_LIB".to_owned())
        }
        _ => None,
    })
}

/// The driver; the simulator is built where it must be.
pub fn driver() -> Driver {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let found = || match on_own_driver() {
        true => Ok(Driver::Own),
        false => find_or_build().map(Driver::Simulated),
    };
    DRIVER.get_or_init(found).clone().unwrap_or_else(|reason| panic!("{reason}"))
}

/// Prints a line for `tests/gpu/suite`, past any capture of the output.
fn print_line(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Says on a machine's own driver that a test, or a part of one, is not for it.
pub fn not_here(reason: &str) {
    print_line(&format!("SKIPPED {reason}"));
}

/// The simulator's sources, beside the checkout.
fn source() -> Option<PathBuf> {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().skip(1);
    folders.map(|folder| folder.join("shared/cudasim")).find(|source| source.is_dir())
}

/// `target/tmp`, where cargo lets tests write: this program is in `target/PROFILE/deps`.
fn temporary() -> PathBuf {
    let program = std::env::current_exe().expect("this program has a path");
    program.ancestors().nth(3).expect("cargo's folders").join("tmp")
}

fn find_or_build() -> Result<PathBuf, String> {
    if let Some(folder) = std::env::var_os("CUDASIM_LIB").map(PathBuf::from) {
        let there = folder.join("libcuda.so.1").is_file();
        return there
            .then(|| folder.clone())
            .ok_or(format!("CUDASIM_LIB={} holds no libcuda.so.1", folder.display()));
    }
    let source = source().ok_or("no ../shared/cudasim, and CUDASIM_LIB is not set")?;
    let build = temporary().join("cudasim");
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

/// Runs the scenario with each of some settings, to success. On a machine's own driver with those
/// that mean something there.
pub fn scenario(name: &str, settings: &[&[Setting<'_>]]) {
    let driver = driver();
    let settings = match driver {
        Driver::Simulated(_) => settings.iter().map(|settings| settings.to_vec()).collect(),
        Driver::Own => match on_a_machine(settings) {
            Ok(settings) => settings,
            Err(reason) => return not_here(&format!("{name}: {reason}")),
        },
    };
    for settings in settings {
        let ended = child(name, Some(&driver), &settings);
        assert_eq!(ended.code, Some(0), "{name}, {settings:?}: {}", ended.said);
    }
}

/// The settings that a real machine can follow, or why it cannot be used.
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

/// Runs a scenario once with these settings, which come last, and returns how it ended within the
/// limit. `None` where a machine's own driver has no use for it.
pub fn outcome(name: &str, settings: &[Setting<'_>], limit: Duration) -> Option<Ended> {
    let driver = driver();
    let settings = match driver {
        Driver::Simulated(_) => settings.to_vec(),
        Driver::Own => match on_a_machine(&[settings]) {
            Ok(mut left) => left.remove(0),
            Err(reason) => {
                not_here(&format!("{name}: {reason}"));
                return None;
            }
        },
    };
    Some(child_within(name, Some(&driver), &settings, limit))
}

/// Environment of a process that is to run with these settings; none where a machine's own driver
/// has no use for them.
pub fn environment(settings: &[Setting<'static>]) -> Option<Vec<(&'static str, String)>> {
    let own = |settings: Vec<Setting<'static>>| -> Vec<(&'static str, String)> {
        settings.into_iter().map(|(name, value)| (name, value.to_owned())).collect()
    };
    match driver() {
        Driver::Simulated(folder) => {
            let library = ("LD_LIBRARY_PATH", folder.to_str().expect("a name in UTF-8").to_owned());
            let limits = LIMITS.map(|(name, value)| (name, value.to_owned())).to_vec();
            Some([limits, own(settings.to_vec()), vec![library]].concat())
        }
        Driver::Own => match on_a_machine(&[settings]) {
            Ok(mut left) => {
                print_line(&format!("RAN {settings:?}"));
                Some(own(left.remove(0)))
            }
            Err(reason) => {
                not_here(&reason);
                None
            }
        },
    }
}

/// Number of devices of this machine's own driver.
fn devices() -> i32 {
    // SAFETY: the call opens a library, and nothing else.
    let there = unsafe { cudarc::driver::sys::is_culib_present() };
    assert!(
        there,
        "PARAM_AVERAGER_GPU=1, but there is no libcuda: install the driver, or set LD_LIBRARY_PATH"
    );
    cudarc::driver::CudaContext::device_count().expect("a driver that can be initialised")
}

/// Runs a scenario in a child, within the limit. `driver`: `None` for a process that finds only an
/// installed libcuda.
pub fn child(scenario: &str, driver: Option<&Driver>, settings: &[Setting<'_>]) -> Ended {
    child_within(scenario, driver, settings, limit())
}

fn child_within(
    scenario: &str,
    driver: Option<&Driver>,
    settings: &[Setting<'_>],
    limit: Duration,
) -> Ended {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(SCENARIO, scenario);
    match driver {
        Some(Driver::Own) => {
            // A test that says neither this nor SKIPPED has shown nothing.
            print_line(&format!("RAN {scenario} {settings:?}"));
        }
        _ => {
            // A scenario may start processes of its own, which look for the simulator, too.
            let simulator = |name: &std::ffi::OsString| {
                name.to_string_lossy().starts_with("CUDASIM_") && name != "CUDASIM_LIB"
            };
            for (name, _) in std::env::vars_os().filter(|(name, _)| simulator(name)) {
                command.env_remove(name);
            }
            command.env_remove("CUDA_VISIBLE_DEVICES").env_remove("LD_LIBRARY_PATH");
        }
    }
    if let Some(Driver::Simulated(folder)) = driver {
        command.env("LD_LIBRARY_PATH", folder).envs(LIMITS);
    }
    command.envs(settings.iter().copied());
    output_within(command, limit)
}

/// Time limit of one child.
fn limit() -> Duration {
    let seconds = std::env::var("PARAM_AVERAGER_CHILD_LIMIT_S");
    Duration::from_secs(seconds.map_or(600, |seconds| seconds.parse().expect("whole seconds")))
}

/// Runs the scenario `no-driver` in a process without a driver. A driver that is found without
/// LD_LIBRARY_PATH belongs to the machine.
pub fn no_driver() {
    const THERE: &str = "no-driver: this machine has a driver";
    if on_own_driver() {
        return not_here(THERE);
    }
    let ended = child("no-driver", None, &[]);
    if ended.code != Some(0) && ended.said.contains("a libcuda is installed here") {
        return crate::partly(THERE);
    }
    assert_eq!(ended.code, Some(0), "{}", ended.said);
}

/// Runs a scenario's body in the child that is for it, where a rank that panics ends the process:
/// its peers might wait for it without end.
pub fn run_child(body: impl FnOnce()) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::exit(101);
    }));
    body();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_on_a_machine_that_is_what_it_is() {
        let (one, seed) = (("CUDASIM_DELAY", "30"), ("CUDASIM_SEED", "1"));
        let visible = ("CUDA_VISIBLE_DEVICES", "");
        assert_eq!(on_a_machine(&[&[("CUDASIM_RACE", "1")]]).unwrap_err(), ABOUT_SIMULATED);
        // Without a driver no devices are counted; this is decided before.
        assert_eq!(on_a_machine(&[&[one, ("CUDASIM_MEM_MB", "64")]]).unwrap_err(), ABOUT_SIMULATED);
        if on_own_driver() {
            let left = on_a_machine(&[&[one], &[seed], &[visible]]).unwrap();
            assert_eq!(left, [vec![], vec![visible]]);
            let many = on_a_machine(&[&[("CUDASIM_DEVICES", "1000")]]).unwrap_err();
            assert!(many.contains("needs 1000 devices"), "{many}");
        }
    }
}
