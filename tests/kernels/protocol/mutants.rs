//! The mutants of mutants.txt, and copies of `kernels/` that hold one of them or
//! all.

#![allow(dead_code)] // each test uses its own part

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The files of `kernels/`, by name.
pub type Sources = BTreeMap<String, String>;

/// A copy of the kernels without one synchronisation, credit or bound, and the check that notices.
#[derive(Clone, Default, Debug)]
pub struct Mutant {
    pub number: u32,
    pub flavour: String,
    pub scenario: String,
    /// Ends of the run that count as noticed.
    pub expected: Vec<String>,
    /// Description of the synchronisation that is taken out.
    pub what: String,
    edits: Vec<Edit>,
}

/// A substitution in one file.
#[derive(Clone, Default, Debug)]
struct Edit {
    file: String,
    /// Text that occurs once in the file, white space aside.
    find: String,
    /// `find` without white space, and the part of it that is replaced.
    squeezed: String,
    replaced: Range<usize>,
    with: String,
}

/// Position of an edit: the file and the bytes that are replaced.
type Position = (String, Range<usize>);
/// A position that can be ordered.
type Span = (String, usize, usize);
/// Mutants that replace the same text, with their replacements.
type Choices<'a> = Vec<(u32, &'a str)>;

/// The table.
pub fn table() -> Vec<Mutant> {
    let text = fs::read_to_string(Path::new(ROOT).join("tests/kernels/protocol/mutants.txt"))
        .expect("mutants.txt");
    parse(&text)
}

/// The sources of `kernels/`.
pub fn kernels() -> Sources {
    let root = Path::new(ROOT).join("kernels");
    let name = |path: &Path| {
        path.strip_prefix(&root).expect("a path in kernels/").to_string_lossy().into_owned()
    };
    files(&root)
        .into_iter()
        .map(|path| (name(&path), fs::read_to_string(path).expect("a kernel source")))
        .collect()
}

/// The files of a folder and of the folders in it.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder of sources");
    let paths = entries.map(|entry| entry.expect("an entry of a folder").path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Writes sources into a folder, only those that differ from what is there, since builds compare
/// modification times.
pub fn write(sources: &Sources, folder: &Path) {
    for (name, text) in sources {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder for sources");
        if !fs::read_to_string(&path).is_ok_and(|old| old == *text) {
            fs::write(path, text).expect("writing a source");
        }
    }
}

pub fn parse(text: &str) -> Vec<Mutant> {
    let mut mutants: Vec<Mutant> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let Some(edit) = line.strip_prefix("    ") else {
            mutants.push(Mutant::parse(line));
            continue;
        };
        let mutant =
            mutants.last_mut().unwrap_or_else(|| panic!("mutants.txt: no mutant before {line:?}"));
        let wrong = || -> ! { panic!("mutants.txt, mutant {}: what is {edit:?}?", mutant.number) };
        if let Some(what) = edit.strip_prefix("what ") {
            mutant.what = what.into();
            continue;
        }
        if let Some(file) = edit.strip_prefix("in ") {
            mutant.edits.push(Edit { file: file.into(), ..Edit::default() });
            continue;
        }
        let Some((mark @ ("-" | "+"), rest)) = edit.split_at_checked(1) else { wrong() };
        let Some(last) = mutant.edits.last_mut() else { wrong() };
        let side = if mark == "-" { &mut last.find } else { &mut last.with };
        if !side.is_empty() {
            side.push('\n');
        }
        side.push_str(rest.strip_prefix(' ').unwrap_or(rest));
    }
    for mutant in &mut mutants {
        assert!(!mutant.what.is_empty(), "mutants.txt, mutant {}: no `what`", mutant.number);
        assert!(!mutant.edits.is_empty(), "mutants.txt, mutant {}: no edits", mutant.number);
        mutant.edits.iter_mut().for_each(Edit::take_marks);
    }
    mutants
}

impl Mutant {
    fn parse(line: &str) -> Mutant {
        let mut words = line.split_whitespace();
        let mut word = || words.next().expect("a column of mutants.txt").to_owned();
        let number =
            word().parse().unwrap_or_else(|_| panic!("mutants.txt: no number before {line:?}"));
        let (flavour, scenario, expected) = (word(), word(), word());
        let expected = expected.split('/').map(str::to_owned).collect();
        Mutant { number, flavour, scenario, expected, ..Mutant::default() }
    }

    /// Position of each edit's text, or an error that names an edit whose text does not occur
    /// exactly once.
    fn places(&self, sources: &Sources) -> Result<Vec<Position>, String> {
        let place = |edit: &Edit| {
            let text = sources.get(&edit.file).map(String::as_str).unwrap_or_default();
            let (text, offsets) = squeeze(text);
            let found: Vec<usize> = text.match_indices(&edit.squeezed).map(|(at, _)| at).collect();
            match found[..] {
                [at] => {
                    let first = offsets[at + edit.replaced.start];
                    let last = offsets[at + edit.replaced.end - 1];
                    Ok((edit.file.clone(), first..last + 1))
                }
                _ => Err(format!(
                    "mutant {}, {}: in {} there is {} times, not once:\n{}",
                    self.number,
                    self.what,
                    edit.file,
                    found.len(),
                    edit.find
                )),
            }
        };
        self.edits.iter().map(place).collect()
    }

    /// Sources that are wrong in this one way.
    pub fn apply(&self, sources: &Sources) -> Sources {
        let places = self.places(sources).unwrap_or_else(|problem| panic!("{problem}"));
        substitute(
            sources,
            places.into_iter().zip(self.edits.iter().map(|edit| edit.with.clone())).collect(),
        )
    }
}

impl Edit {
    fn take_marks(&mut self) {
        let marked = squeeze(&self.find).0;
        let (begin, end) = match (marked.find('«'), marked.find('»')) {
            (Some(begin), Some(end)) => (begin, end - '«'.len_utf8()),
            _ => (0, marked.len()),
        };
        assert!(begin < end, "mutants.txt: nothing is replaced in {}", self.find);
        self.find = self.find.replace(['«', '»'], "");
        self.squeezed = marked.replace(['«', '»'], "");
        self.replaced = begin..end;
    }
}

/// A text without its white space, and the offset in the text of each byte that is left.
fn squeeze(text: &str) -> (String, Vec<usize>) {
    let mut squeezed = String::new();
    let mut offsets = Vec::new();
    for (at, letter) in text.char_indices().filter(|(_, letter)| !letter.is_whitespace()) {
        squeezed.push(letter);
        offsets.extend(at..at + letter.len_utf8());
    }
    (squeezed, offsets)
}

/// Reasons why these sources can't hold all mutants in one copy.
pub fn problems(mutants: &[Mutant], sources: &Sources) -> Vec<String> {
    let mut problems = Vec::new();
    let mut taken: Vec<(u32, Position)> = Vec::new();
    for mutant in mutants {
        let places = mutant.places(sources).unwrap_or_else(|problem| {
            problems.push(problem);
            Vec::new()
        });
        for (file, range) in places {
            if sources[&file][range.clone()].contains("//") {
                problems.push(format!(
                    "mutant {}, {}: replaces a comment in {file}, which would hide what is woven \
                     in after it: mark the code before it with « and »",
                    mutant.number, mutant.what
                ));
            }
            for (other, (other_file, other_range)) in &taken {
                let apart = range.end <= other_range.start || other_range.end <= range.start;
                let same = *other_range == range && *other != mutant.number;
                if *other_file == file && !apart && !same {
                    problems.push(format!(
                        "mutants {other} and {}, {}: they replace parts of one another's text in \
                         {file}",
                        mutant.number, mutant.what
                    ));
                }
            }
            taken.push((mutant.number, (file, range)));
        }
    }
    problems
}

/// Sources that hold all mutants: `chosen_mutant` says at run time which one counts.
pub fn weave(mutants: &[Mutant], sources: &Sources) -> Sources {
    let mut woven: BTreeMap<Span, Choices> = BTreeMap::new();
    for mutant in mutants {
        let places = mutant.places(sources).unwrap_or_else(|problem| panic!("{problem}"));
        for ((file, range), edit) in places.into_iter().zip(&mutant.edits) {
            woven
                .entry((file, range.start, range.end))
                .or_default()
                .push((mutant.number, &edit.with));
        }
    }
    let choose = |((file, start, end), choices): (Span, Choices)| {
        let right = &sources[&file][start..end];
        let text = if right.ends_with([';', '}']) {
            let wrong = choices
                .iter()
                .map(|(number, with)| format!("if (chosen_mutant == {number}) {{ {with} }} else "));
            format!("{{ {}{{ {right} }} }}", wrong.collect::<String>())
        } else {
            let wrong = choices
                .iter()
                .map(|(number, with)| format!("chosen_mutant == {number} ? ({with}) : "));
            format!("({}({right}))", wrong.collect::<String>())
        };
        ((file, start..end), text)
    };
    substitute(sources, woven.into_iter().map(choose).collect())
}

fn substitute(sources: &Sources, mut replacements: Vec<(Position, String)>) -> Sources {
    let mut sources = sources.clone();
    // From the end, so that places before it stay where they are.
    replacements.sort_by_key(|((_, range), _)| std::cmp::Reverse(range.start));
    for ((file, range), text) in replacements {
        sources.get_mut(&file).expect("a file that was found").replace_range(range, &text);
    }
    sources
}
