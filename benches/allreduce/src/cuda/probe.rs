//! Tries NCCL in a process of its own first. Where it can't be used it may not only say so: on some
//! machines it waits for ever, or ends the process. Then only its rows know.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use param_averager::Dtype;

use super::device::{Clock, DeviceMemory, Gpu, Machine};
use super::nccl::{Nccl, Op, SHARING};
use super::nccl_rows::{join, part, wait};
use super::{devices, placement};
use crate::failure::Failure;
use crate::plan::Section;

/// Elements that are averaged.
const ELEMENTS: usize = 1 << 16;

/// What NCCL is to know before it is loaded, and before any thread of ours could look at the
/// environment.
pub fn prepare(sections: &[Section], machine: &Machine) {
    let groups = sections.iter().flat_map(|section| &section.groups);
    let mut with_nccl = groups.filter(|group| group.methods.iter().any(|method| method.is_nccl()));
    if with_nccl.any(|group| group.ranks > machine.visible()) {
        for (name, value) in settings() {
            std::env::set_var(name, value);
        }
    }
}

/// Those that several ranks on one GPU need and that are not set.
fn settings() -> impl Iterator<Item = (&'static str, &'static str)> {
    // The default level is PXB, which would leave the fast way out on machines with PCIe alone.
    [(SHARING, "1"), ("NCCL_P2P_LEVEL", "SYS")]
        .into_iter()
        .filter(|(name, _)| std::env::var_os(name).is_none())
}

/// Whether so many ranks can average with NCCL here: what it is, or why not.
pub fn ask(machine: &Machine, ranks: usize, limit: Duration) -> Result<String, String> {
    let failed =
        |error: std::io::Error| format!("this program can't start itself to try NCCL: {error}");
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg(format!("--nccl-probe={ranks}")).arg(format!("--timeout={}", limit.as_secs_f64()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    let mut out = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut text = vec![];
        // what came before an error may do
        let _ = out.as_mut().map(|out| out.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    });
    // A start, a meeting, an average, and the end.
    let (begin, limit) = (Instant::now(), 4 * limit);
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if begin.elapsed() > limit => break None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    if status.is_none() {
        let _ = child.kill(); // it may be over by now
        let _ = child.wait();
    }
    let said = reader.join().unwrap_or_default();
    let answer = said.lines().rev().find_map(|line| line.strip_prefix(ANSWER));
    match (answer.map(|answer| answer.split_once(' ').unwrap_or((answer, ""))), status) {
        (Some(("ok", version)), _) => Ok(described(version, ranks, machine)),
        (Some((_, reason)), _) => Err(format!("{}: {reason}", placement(ranks, machine.visible()))),
        (None, Some(status)) => Err(format!(
            "NCCL ended the process that tried it ({status}); NCCL_DEBUG=INFO says more"
        )),
        (None, None) => Err(format!("NCCL did not come back within {limit:?} when it was tried")),
    }
}

fn described(version: &str, ranks: usize, machine: &Machine) -> String {
    let sharing = ranks > machine.visible();
    let how = if sharing { format!(", in process, with {SHARING}=1") } else { String::new() };
    format!("NCCL {version}, {}{how}", placement(ranks, machine.visible()))
}

const ANSWER: &str = "nccl-probe: ";

/// The process of its own: averages once, and says how that went.
pub fn answer(ranks: usize, limit: Duration) {
    match try_once(ranks, limit) {
        Ok(version) => println!("{ANSWER}ok {version}"),
        Err(reason) => println!("{ANSWER}no {}", reason.replace('\n', " ")),
    }
}

fn try_once(ranks: usize, limit: Duration) -> Result<String, String> {
    let text = |failure: Failure| failure.to_string();
    let machine = Machine::open().map_err(text)?;
    let nccl = Nccl::load(ranks > machine.visible())?;
    let gpus = devices(ranks, machine.visible()).into_iter().enumerate();
    let gpus = gpus.map(|(rank, ordinal)| Gpu::open(&machine, rank, ordinal));
    let gpus = gpus.collect::<Result<Vec<_>, _>>().map_err(text)?;
    let members = join(&nccl, &gpus, limit)?;
    let rank = |gpu: &Gpu| -> Result<(), Failure> {
        gpu.bind()?;
        let (clock, memory) = (Clock::new(gpu)?, DeviceMemory::new(gpu, 4 * ELEMENTS)?);
        memory.upload(bytemuck::cast_slice(&[gpu.rank as f32; ELEMENTS]))?;
        let buffer = (memory.address(), ELEMENTS, Dtype::F32);
        // SAFETY: own memory, and the stream is waited for.
        unsafe { members[gpu.rank].all_reduce(&[buffer], Op::Avg, &clock.stream) }?;
        clock.stop()?;
        wait(&clock, limit)?;
        let mut mean = vec![0f32; ELEMENTS];
        memory.download(bytemuck::cast_slice_mut(&mut mean))?;
        let right = (ranks - 1) as f32 / 2.0;
        match mean.iter().find(|&&x| (x - right).abs() > 1e-4) {
            Some(x) => Err(Failure::Failed(format!("ncclAvg of 0 to {} gives {x}", ranks - 1))),
            None => Ok(()),
        }
    };
    let rank = &rank;
    std::thread::scope(|scope| {
        let threads: Vec<_> = gpus.iter().map(|gpu| scope.spawn(move || rank(gpu))).collect();
        let mut ended = threads.into_iter().map(|thread| thread.join());
        ended.try_for_each(|result| {
            result.unwrap_or_else(|_| Err(Failure::Failed("a rank panicked, see above".into())))
        })
    })
    .map_err(text)?;
    part(members, &gpus, false, limit);
    Ok(nccl.version())
}
