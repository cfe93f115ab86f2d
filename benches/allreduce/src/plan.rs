//! What the command line asks for, table by table.

use param_averager as lib;
use param_averager::Dtype;

use crate::cli::{Algorithm, Args, Backend, Baseline, Datatype, Link};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::methods::{Method, Options};

/// Rows that share a layout and a world, and are measured turn by turn.
#[derive(Clone, Debug)]
pub struct Group {
    pub layout: Layout,
    pub ranks: usize,
    pub methods: Vec<Method>,
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
    let (elsewhere, name, other) = match args.backend {
        Backend::Cpu => (Baseline::Nccl, "nccl", "cuda"),
        Backend::Cuda => (Baseline::TwoPass, "two-pass", "cpu"),
    };
    if args.baseline.contains(&elsewhere) {
        return Err(Failure::Usage(format!(
            "--baseline={name} is a row of --backend {other}: leave it out"
        )));
    }
    if let Some(spec) = &args.layout {
        return models(args, spec);
    }
    if args.min.or(args.max).or(args.step).or(args.factor).is_some() {
        return sweeps(args);
    }
    tour(args)
}

pub fn options(args: &Args) -> Options {
    Options {
        link: match args.link {
            None | Some(Link::Auto) => lib::Link::Auto,
            Some(Link::Peer) => lib::Link::Peer,
            Some(Link::Host) => lib::Link::Host,
        },
        channels: args.channels,
        chunk: args.chunk,
        slots: args.slots,
        narrow_wire: args.narrow_wire,
        reject_non_finite: args.reject_non_finite,
        timeout: args.timeout,
        weighted: args.weighted,
    }
}

/// Without sizes and without a model: GPT-2, then a sweep, as far as the other flags do not say
/// otherwise.
fn tour(args: &Args) -> Result<Vec<Section>, Failure> {
    let gpt2 = Layout::load("gpt2")?.scaled(args.scale.unwrap_or(1.0));
    let all = [Method::DIRECT, Method::RING, Method::RING_WITHOUT_COMMIT];
    let averages =
        if args.algorithm.is_empty() && !args.no_commit { all.to_vec() } else { averages(args) };
    let baselines = if args.baseline.is_empty() { &[Baseline::All][..] } else { &args.baseline };
    let group = |layout: Layout, ranks, averages: &[Method], baselines: &[Baseline]| Group {
        methods: methods(args.backend, averages, baselines, layout.tensors.len()),
        layout,
        ranks,
        iterations: args.iterations.unwrap_or(9),
        warmup: args.warmup.unwrap_or(1),
    };
    let ranks = ranks(args, &[2, 4]);
    let mut sections = vec![];
    for dtype in dtypes(args).unwrap_or(vec![Dtype::F32]) {
        for &ranks in &ranks {
            sections.push(Section::of(group(
                gpt2.clone().with_dtype(dtype),
                ranks,
                &averages,
                baselines,
            )));
        }
    }
    if args.datatype.is_empty() {
        let few = if args.baseline.is_empty() { &[Baseline::Limit][..] } else { &args.baseline };
        let two = &averages[..averages.len().min(2)];
        sections.push(Section::of(group(gpt2.with_dtype(Dtype::Bf16), ranks[0], two, few)));
    }
    let sizes = std::iter::successors(Some(1024), |size| Some(size * 4)).take(9);
    let dtype = dtypes(args).map_or(Dtype::F32, |dtypes| dtypes[0]);
    let few = if args.baseline.is_empty() { &[Baseline::Limit][..] } else { &args.baseline };
    let sweep = sizes.map(|size| Group {
        iterations: args.iterations.unwrap_or(20),
        warmup: args.warmup.unwrap_or(5),
        ..group(Layout::flat(size, dtype), ranks[0], &averages[..1], few)
    });
    let sweep = sweep.collect();
    sections.extend(Section::sweep(sweep));
    Ok(sections)
}

fn models(args: &Args, spec: &str) -> Result<Vec<Section>, Failure> {
    let layout = Layout::load(spec)?.scaled(args.scale.unwrap_or(1.0));
    let layouts = match dtypes(args) {
        Some(dtypes) => dtypes.into_iter().map(|dtype| layout.clone().with_dtype(dtype)).collect(),
        None => vec![layout],
    };
    let pairs = layouts
        .iter()
        .flat_map(|layout| ranks(args, &[2]).into_iter().map(move |ranks| (layout, ranks)));
    Ok(pairs.map(|(layout, ranks)| Section::of(group(args, layout.clone(), ranks))).collect())
}

fn sweeps(args: &Args) -> Result<Vec<Section>, Failure> {
    let sizes = sizes(args)?;
    let mut sections = vec![];
    for dtype in dtypes(args).unwrap_or(vec![Dtype::F32]) {
        for ranks in ranks(args, &[2]) {
            let groups = sizes.iter().map(|&size| group(args, Layout::flat(size, dtype), ranks));
            sections.extend(Section::sweep(groups.collect()));
        }
    }
    Ok(sections)
}

fn group(args: &Args, layout: Layout, ranks: usize) -> Group {
    Group {
        methods: methods(args.backend, &averages(args), &args.baseline, layout.tensors.len()),
        layout,
        ranks,
        iterations: args.iterations.unwrap_or(20),
        warmup: args.warmup.unwrap_or(5),
    }
}

/// As in nccl-tests, except that sizes double where neither -i nor -f is given.
fn sizes(args: &Args) -> Result<Vec<u64>, Failure> {
    const DEFAULT: u64 = 32 << 20;
    let min = args.min.unwrap_or(args.max.map_or(DEFAULT, |max| max.min(DEFAULT)));
    let max = args.max.unwrap_or(min.max(DEFAULT));
    if min > max {
        return Err(Failure::Usage(format!("-b {min} is larger than -e {max}: swap them")));
    }
    let next = |size: &u64| match (args.step, args.factor) {
        (Some(step), _) => size.checked_add(step),
        (None, factor) => size.checked_mul(factor.unwrap_or(2)),
    };
    let sizes: Vec<u64> = std::iter::successors(Some(min), next)
        .take_while(|&size| size <= max)
        .take(MOST_SIZES + 1)
        .collect();
    if sizes.len() > MOST_SIZES {
        return Err(Failure::Usage(format!(
            "-b {min} to -e {max} are more than {MOST_SIZES} sizes: use a larger step with -i, or \
             a factor with -f"
        )));
    }
    Ok(sizes)
}

const MOST_SIZES: usize = 10_000;

fn ranks(args: &Args, default: &[usize]) -> Vec<usize> {
    if args.ranks.is_empty() {
        default.to_vec()
    } else {
        args.ranks.iter().map(|&ranks| ranks.into()).collect()
    }
}

fn dtypes(args: &Args) -> Option<Vec<Dtype>> {
    let each = args.datatype.iter().flat_map(|datatype| match *datatype {
        Datatype::All => Dtype::ALL.to_vec(),
        Datatype::One(dtype) => vec![dtype],
    });
    Some(each.collect::<Vec<_>>()).filter(|dtypes| !dtypes.is_empty())
}

fn averages(args: &Args) -> Vec<Method> {
    let algorithms =
        if args.algorithm.is_empty() { &[Algorithm::Auto][..] } else { &args.algorithm };
    let commit = !args.no_commit;
    let method = |algorithm: &Algorithm| match algorithm {
        Algorithm::Auto => Method::Average { algorithm: lib::Algorithm::Auto, commit },
        Algorithm::Ring => Method::Average { algorithm: lib::Algorithm::Ring, commit },
        Algorithm::Direct => Method::Average { algorithm: lib::Algorithm::Direct, commit },
    };
    algorithms.iter().map(method).collect()
}

/// The limit last, so that it closes the table it is the yardstick of. One tensor needs no ring for
/// each.
fn methods(
    backend: Backend,
    averages: &[Method],
    baselines: &[Baseline],
    tensors: usize,
) -> Vec<Method> {
    let asked = |name| baselines.contains(&name) || baselines.contains(&Baseline::All);
    let mut methods = averages.to_vec();
    if asked(Baseline::PerTensor) && tensors > 1 {
        methods.push(Method::PerTensorRing);
    }
    if asked(Baseline::Flatten) {
        methods.push(Method::FlattenRing);
    }
    if backend == Backend::Cuda {
        if asked(Baseline::Flatten) {
            methods.push(Method::CopiesRing);
        }
        if asked(Baseline::Nccl) {
            let flats = if tensors > 1 { &[false, true][..] } else { &[false] };
            let each = |&flat: &bool| [false, true].map(|sum| Method::Nccl { flat, sum });
            methods.extend(flats.iter().flat_map(each));
        }
        if asked(Baseline::Limit) {
            methods.extend([Method::HostCopies, Method::DeviceCopy]);
        }
        return methods;
    }
    if asked(Baseline::TwoPass) {
        methods.push(Method::TwoPassLimit);
    }
    if asked(Baseline::Limit) {
        methods.push(Method::OnePassLimit);
    }
    methods
}

impl Section {
    fn of(group: Group) -> Section {
        Section { heading: model_heading(&group), groups: vec![group] }
    }

    fn sweep(groups: Vec<Group>) -> Option<Section> {
        let first = groups.first()?;
        let heading = format!("flat buffers, {}, {}", first.layout.dtype_name(), counts(first));
        Some(Section { heading, groups })
    }
}

fn model_heading(group: &Group) -> String {
    let layout = &group.layout;
    let scale = layout.scale.map_or(String::new(), |scale| format!(" at scale {scale}"));
    let note = layout.note.as_ref().map_or(String::new(), |note| format!(" ({note})"));
    format!(
        "{}{scale}: {} tensors, {} parameters in {}{note}, {}",
        layout.name,
        layout.tensors.len(),
        thousands(layout.elements()),
        layout.dtype_name(),
        counts(group)
    )
}

fn counts(group: &Group) -> String {
    format!("{} ranks, median of {} after {}", group.ranks, group.iterations, group.warmup)
}

/// 124,439,808
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let commas = digits.bytes().enumerate().flat_map(|(index, digit)| {
        let comma = index > 0 && (digits.len() - index).is_multiple_of(3);
        comma.then_some(',').into_iter().chain([char::from(digit)])
    });
    commas.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn plan(line: &str) -> Result<Vec<Section>, Failure> {
        super::plan(&Args::try_parse_from(format!("bench {line}").split_whitespace()).unwrap())
    }

    fn sizes(line: &str) -> Vec<u64> {
        let sections = plan(line).unwrap();
        sections[0].groups.iter().map(|group| group.layout.bytes()).collect()
    }

    #[test]
    fn sizes_are_those_of_nccl_tests() {
        assert_eq!(sizes("-b 1K -e 8K"), [1024, 2048, 4096, 8192]);
        assert_eq!(sizes("-b 1K -e 20K -f 4"), [1024, 4096, 16384]);
        assert_eq!(sizes("-b 1K -e 4K -i 1K"), [1024, 2048, 3072, 4096]);
        assert_eq!(sizes("-b 10 -e 10"), [8], "whole elements");
        assert_eq!(sizes("-b 64M"), [64 << 20]);
        assert_eq!(sizes("-b 8M"), [8 << 20, 16 << 20, 32 << 20]);
        assert_eq!(sizes("-e 32M"), [32 << 20]);
        assert_eq!(sizes("-e 1K"), [1024]);
        assert_eq!(plan("-b 2K -e 1K").unwrap_err().exit_code(), 2);
        assert_eq!(plan("-b 1 -e 1G -i 1").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn the_tour_is_gpt2_and_a_sweep() {
        let sections = plan("").unwrap();
        let shape: Vec<_> = sections
            .iter()
            .map(|s| (s.groups[0].layout.name.as_str(), s.groups[0].ranks))
            .collect();
        assert_eq!(shape, [("gpt2", 2), ("gpt2", 4), ("gpt2", 2), ("flat", 2)]);
        assert_eq!(sections[0].groups[0].methods.len(), 7);
        assert_eq!(sections[2].groups[0].layout.dtype(), Some(Dtype::Bf16));
        let sweep: Vec<_> = sections[3].groups.iter().map(|group| group.layout.bytes()).collect();
        assert_eq!((sweep[0], sweep[8], sweep.len()), (1 << 10, 64 << 20, 9));
        let one = plan("-g 3 -d half --algorithm ring --no-commit").unwrap();
        assert_eq!((one.len(), one[0].groups[0].ranks), (2, 3));
        assert_eq!(one[0].groups[0].methods[0], Method::RING_WITHOUT_COMMIT);
    }

    #[test]
    fn baselines_are_added_once_asked_for() {
        let methods = |line: &str| plan(line).unwrap()[0].groups[0].methods.clone();
        assert_eq!(methods("--layout resnet50").len(), 1);
        assert_eq!(methods("--layout resnet50 --baseline").len(), 5);
        assert_eq!(
            methods("-b 1K --baseline"),
            [
                averages(&args("")),
                vec![Method::FlattenRing, Method::TwoPassLimit, Method::OnePassLimit]
            ]
            .concat()
        );
        assert_eq!(methods("-b 1K --baseline=none").len(), 1);
        assert_eq!(methods("--layout resnet50 --baseline --backend cuda").len(), 10);
        assert_eq!(methods("-b 1K --baseline --backend cuda").len(), 7, "one tensor is flat");
        for (line, says) in [
            ("-b 1K --baseline=nccl", "a row of --backend cuda"),
            ("-b 1K --baseline=two-pass --backend cuda", "a row of --backend cpu"),
        ] {
            let error = plan(line).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains(says), "{error}");
        }
    }

    fn args(line: &str) -> Args {
        Args::try_parse_from(format!("bench {line}").split_whitespace()).unwrap()
    }

    #[test]
    fn numbers_have_commas() {
        assert_eq!(
            [0, 999, 1000, 124_439_808].map(thousands),
            ["0", "999", "1,000", "124,439,808"]
        );
    }
}
