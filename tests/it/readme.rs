//! The READMEs point at files that exist.

use std::path::{Path, PathBuf};

fn readmes(folder: &Path, into: &mut Vec<PathBuf>) {
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && name != "target" && name != "runs" {
            readmes(&path, into);
        } else if name == "README.md" {
            into.push(path);
        }
    }
}

/// Targets of `[text](target)` that are files of this repository.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .map(|target| target.split('#').next().unwrap_or_default())
        .filter(|t| !t.is_empty() && !t.contains(':'))
        .collect()
}

#[test]
fn every_file_that_a_readme_links_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for part in ["src", "launcher", "configs", "tests"] {
        readmes(&root.join(part), &mut files);
    }
    files.push(root.join("README.md"));
    assert!(files.len() > 5, "{files:?}");
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        for target in links(&text) {
            assert!(file.parent().unwrap().join(target).exists(), "{}: {target} does not exist", file.display());
        }
    }
}

#[test]
fn the_front_page_stays_short() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(text.lines().count() <= 150, "README.md has {} lines", text.lines().count());
}
