//! Plan of a run: the tables that the command line asks for.

use indicatif::HumanCount;
use param_averager::{Algorithm, Dtype};

use crate::cli::{Args, Backend, Baseline, Datatype};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::load::load;
use crate::rows::{self, Kind, Row, PROCESSES, THREADS};

/// Rows that share a layout and a world, and are measured turn by turn.
#[derive(Clone, Debug)]
pub struct Group {
    pub layout: Layout,
    pub ranks: usize,
    pub rows: Vec<Row>,
    pub iterations: u32,
    pub warmup: u32,
}

/// Groups under one heading.
#[derive(Clone, Debug)]
pub struct Section {
    pub heading: String,
    pub groups: Vec<Group>,
}

/// All of a run.
pub fn plan(args: &Args) -> Result<Vec<Section>, Failure> {
    refuse(args)?;
    let flags = &args.sizes;
    let model = flags.layout.as_deref().map(load).transpose()?;
    let model = model.map(|model| model.scaled(flags.scale.unwrap_or(1.0)));
    let sizes = match model {
        Some(_) => vec![],
        None if flags.min.or(flags.max).or(flags.step).or(flags.factor).is_none() => {
            return tour(args)
        }
        None => sizes(args)?,
    };
    let mut sections = vec![];
    for dtype in dtypes(args).map_or(vec![None], |dtypes| dtypes.into_iter().map(Some).collect()) {
        let layouts: Vec<Layout> = match (&model, dtype) {
            (Some(model), None) => vec![model.clone()],
            (Some(model), Some(dtype)) => vec![model.clone().with_dtype(dtype)],
            (None, _) => {
                sizes.iter().map(|&size| Layout::flat(size, dtype.unwrap_or(Dtype::F32))).collect()
            }
        };
        for ranks in ranks(args, &[2]) {
            let group = |layout: &Layout| {
                let baselines = &args.what.baseline;
                group(args, layout.clone(), ranks, &averages(args), baselines, (20, 5))
            };
            sections.push(Section::new(layouts.iter().map(group).collect()));
        }
    }
    Ok(sections)
}

/// Refuses flags that exclude each other.
fn refuse(args: &Args) -> Result<(), Failure> {
    let what = &args.what;
    let (processes, cuda) = (what.processes, what.backend == Backend::Cuda);
    let baseline = |name| what.baseline.contains(&name);
    let wrong = if processes && cuda {
        "--processes has ranks on CPUs only: leave --backend cuda or --processes out"
    } else if processes && what.algorithm.contains(&Algorithm::Direct) {
        "--algorithm direct is for ranks that share an address space, which processes don't: use \
         ring with --processes"
    } else if processes && what.baseline.iter().any(|&baseline| baseline != Baseline::None) {
        "--baseline has rows for ranks that are threads: leave it out with --processes, whose \
         yardstick is the same ring between threads"
    } else if processes && what.ranks.len() > 1 {
        "--processes measures one world in a run: give one number with -g"
    } else if !cuda && baseline(Baseline::Nccl) {
        "--baseline=nccl is a row of --backend cuda: leave it out"
    } else if cuda && baseline(Baseline::TwoPass) {
        "--baseline=two-pass is a row of --backend cpu: leave it out"
    } else if (processes || cuda) && !what.outer.is_empty() {
        "--outer has rows for ranks that are threads on CPUs: leave it out with --processes and \
         --backend cuda"
    } else {
        return Ok(());
    };
    Err(Failure::Usage(wrong.into()))
}

/// Without sizes and without a model: GPT-2, then a sweep, as far as the other flags do not say
/// otherwise.
fn tour(args: &Args) -> Result<Vec<Section>, Failure> {
    let gpt2 = load("gpt2")?.scaled(args.sizes.scale.unwrap_or(1.0));
    let mut averages = averages(args);
    if args.what.algorithm.is_empty() && !args.options.no_commit {
        use Algorithm::{Direct, Ring};
        averages =
            vec![Row::average(Direct, true), Row::average(Ring, true), Row::average(Ring, false)];
    }
    let asked = &args.what.baseline[..];
    let or = |default| if asked.is_empty() { default } else { asked };
    let (all, few) = (or(&[Baseline::All]), or(&[Baseline::Limit]));
    let of = |layout, ranks, averages: &[Row], baselines: &[Baseline]| {
        Section::new(vec![group(args, layout, ranks, averages, baselines, (9, 1))])
    };
    let ranks = ranks(args, if args.what.processes { &[2] } else { &[2, 4] });
    let dtypes = dtypes(args);
    let mut sections = vec![];
    for &dtype in dtypes.as_deref().unwrap_or(&[Dtype::F32]) {
        for &ranks in &ranks {
            let layout = gpt2.clone().with_dtype(dtype);
            sections.push(of(layout, ranks, &averages, all));
        }
    }
    if dtypes.is_none() {
        let two = &averages[..averages.len().min(2)];
        sections.push(of(gpt2.with_dtype(Dtype::Bf16), ranks[0], two, few));
    }
    let sizes = std::iter::successors(Some(1024), |size| Some(size * 4)).take(9);
    let dtype = dtypes.map_or(Dtype::F32, |dtypes| dtypes[0]);
    let sweep = sizes
        .map(|size| group(args, Layout::flat(size, dtype), ranks[0], &averages[..1], few, (20, 5)));
    sections.push(Section::new(sweep.collect()));
    Ok(sections)
}

/// `times`: iterations and warm-up where the command line has none.
fn group(
    args: &Args,
    layout: Layout,
    ranks: usize,
    averages: &[Row],
    baselines: &[Baseline],
    times: (u32, u32),
) -> Group {
    Group {
        rows: with_baselines(args, averages, baselines, layout.tensors.len()),
        layout,
        ranks,
        iterations: args.measuring.iterations.unwrap_or(times.0),
        warmup: args.measuring.warmup.unwrap_or(times.1),
    }
}

/// As in nccl-tests, except that sizes double where neither -i nor -f is given.
fn sizes(args: &Args) -> Result<Vec<u64>, Failure> {
    const DEFAULT: u64 = 32 << 20;
    let sizes = &args.sizes;
    let min = sizes.min.unwrap_or(sizes.max.map_or(DEFAULT, |max| max.min(DEFAULT)));
    let max = sizes.max.unwrap_or(min.max(DEFAULT));
    if min > max {
        return Err(Failure::Usage(format!("-b {min} is larger than -e {max}: swap them")));
    }
    let next = |size: &u64| match (sizes.step, sizes.factor) {
        (Some(step), _) => size.checked_add(step),
        (None, factor) => size.checked_mul(factor.unwrap_or(2)),
    };
    let all = std::iter::successors(Some(min), next).take_while(|&size| size <= max);
    let all: Vec<u64> = all.take(MOST_SIZES + 1).collect();
    if all.len() > MOST_SIZES {
        return Err(Failure::Usage(format!(
            "-b {min} to -e {max} are more than {MOST_SIZES} sizes: use a larger step with -i, or \
             a factor with -f"
        )));
    }
    Ok(all)
}

const MOST_SIZES: usize = 10_000;

fn ranks(args: &Args, default: &[usize]) -> Vec<usize> {
    match &args.what.ranks[..] {
        [] => default.to_vec(),
        ranks => ranks.iter().map(|&ranks| ranks.into()).collect(),
    }
}

fn dtypes(args: &Args) -> Option<Vec<Dtype>> {
    let all: Vec<_> = args.what.datatype.iter().flat_map(|Datatype(each)| each.clone()).collect();
    (!all.is_empty()).then_some(all)
}

/// The library's rows.
fn averages(args: &Args) -> Vec<Row> {
    let commit = !args.options.no_commit;
    match &args.what.algorithm[..] {
        [] => vec![Row::average(Algorithm::Auto, commit)],
        algorithms => algorithms.iter().map(|&algorithm| Row::average(algorithm, commit)).collect(),
    }
}

/// The limit last, so that it closes the table it is the yardstick of. One tensor needs no ring for
/// each.
fn with_baselines(
    args: &Args,
    averages: &[Row],
    baselines: &[Baseline],
    tensors: usize,
) -> Vec<Row> {
    if args.what.processes {
        let kind = Row::average(Algorithm::Ring, !args.options.no_commit).kind;
        return [PROCESSES, THREADS].map(|are| Row { kind, ranks_are: Some(are) }).to_vec();
    }
    let asked = |name| baselines.contains(&name) || baselines.contains(&Baseline::All);
    let (flatten, limit) = (asked(Baseline::Flatten), asked(Baseline::Limit));
    let mut all = vec![];
    for average in averages {
        all.push(*average);
        for row in args.what.outer.iter().map(|&step| average.with_step(step)) {
            if !all.contains(&row) {
                all.push(row); // a ring with and one without a commit have the same one
            }
        }
    }
    let mut add = |wanted: bool, kind: Kind| all.extend(wanted.then_some(Row::from(kind)));
    add(asked(Baseline::PerTensor) && tensors > 1, Kind::PerTensor);
    add(flatten, Kind::Flatten { copies: false });
    if args.what.backend == Backend::Cuda {
        add(flatten, Kind::Flatten { copies: true });
        for kind in &rows::NCCL[..if tensors > 1 { 4 } else { 2 }] {
            add(asked(Baseline::Nccl), *kind);
        }
        add(limit, Kind::HostCopies);
        add(limit, Kind::DeviceCopy);
    } else {
        add(asked(Baseline::TwoPass), Kind::TwoPass);
        add(limit, Kind::OnePass);
    }
    all
}

impl Section {
    /// Section of one model, or of sizes of flat buffers.
    fn new(groups: Vec<Group>) -> Section {
        let Group { layout, ranks, iterations, warmup, .. } = &groups[0];
        let scale = layout.scale.map_or(String::new(), |scale| format!(" at scale {scale}"));
        let note = layout.note.as_ref().map_or(String::new(), |note| format!(" ({note})"));
        let (name, tensors) = (&layout.name, layout.tensors.len());
        let (elements, dtype) = (HumanCount(layout.elements()), layout.dtype_name());
        let what = match name.as_str() {
            "flat" => format!("flat buffers, {dtype}"),
            _ => {
                format!("{name}{scale}: {tensors} tensors, {elements} parameters in {dtype}{note}")
            }
        };
        let heading = format!("{what}, {ranks} ranks, median of {iterations} after {warmup}");
        Section { heading, groups }
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
