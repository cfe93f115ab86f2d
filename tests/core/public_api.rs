//! Items that safe code of a user can call: none that only tests may use.

use std::path::Path;

fn sources(folder: &Path, found: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push((path.display().to_string(), std::fs::read_to_string(&path).unwrap()));
        }
    }
}

/// Every hidden item is behind a feature that no user sets: users could call it like any
/// other.
#[test]
fn hidden_items_are_behind_a_gate() {
    let mut found = vec![];
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    let mut hidden = 0;
    for (path, text) in &found {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (at, _) in lines.iter().enumerate().filter(|(_, line)| line.contains("doc(hidden)")) {
            hidden += 1;
            let beside = &lines[at.saturating_sub(1)..(at + 2).min(lines.len())];
            let gated = beside.iter().any(|line| line.contains("feature = \"__testing\""));
            assert!(gated, "{path}:{}: a hidden item that every user can call", at + 1);
        }
    }
    assert!(hidden >= 3, "{hidden}: this test has lost what it looks at");
}
