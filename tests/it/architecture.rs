//! The rooms and the one direction of flow (src/lib.rs), held by a test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Room → rooms it may use. A room may always use itself.
const RANK: &[(&str, &[&str])] = &[
    ("torch", &[]),
    ("comm", &["torch", "ledger"]),
    ("ledger", &[]),
    ("data", &["ledger"]),
    ("train", &["torch", "comm", "data", "task", "ledger"]),
    ("task", &["torch", "data"]),
    ("report", &[]),
    ("monitor", &["torch", "report"]),
    ("rank", &["torch", "comm", "data", "train", "task", "report", "monitor", "ledger"]),
];
const LAUNCHER: &[(&str, &[&str])] = &[
    ("config", &["contract"]),
    ("machine", &[]),
    ("plan", &["config", "machine", "contract"]),
    ("contract", &["config", "plan"]),
    ("cache", &["contract", "machine"]),
    ("watch", &["config", "contract", "machine", "plan"]),
    ("supervise", &["contract", "cache", "machine", "watch"]),
    ("console", &["contract", "plan", "supervise"]),
    ("run_dir", &["config", "contract", "plan"]),
    ("cli", &["config", "run_dir"]),
    ("advise", &["config", "contract", "machine", "plan", "watch"]),
    ("smart", &["config", "contract"]),
    ("monitor", &["advise", "contract", "machine", "plan", "run_dir", "supervise", "watch"]),
    (
        "command",
        &[
            "advise",
            "cache",
            "cli",
            "config",
            "machine",
            "plan",
            "contract",
            "supervise",
            "console",
            "monitor",
            "run_dir",
            "smart",
            "watch",
        ],
    ),
];
/// Files and folders that may hold `unsafe`.
const UNSAFE: &[&str] = &[
    "src/torch/",
    "src/comm/nccl",
    "src/comm/shm",
    "src/data/cache/map.rs",
    "src/data/source/hdf5/ffi/",
    "launcher/src/supervise/unix.rs",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            into.push(path);
        }
    }
}

/// `file` without comments and without what follows its `mod tests`.
fn code(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let body = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    body.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Room of a file below `src`: its folder, or its stem at the top.
fn room(src: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(src).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_string()
}

/// Rooms named after `crate::` in `text`, also inside `crate::{a, b::c}`.
fn used_rooms(text: &str) -> BTreeSet<String> {
    let ident = |s: &str| s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut rooms = BTreeSet::new();
    for part in text.split("crate::").skip(1) {
        if let Some(list) = part.strip_prefix('{') {
            let (mut depth, mut start) = (0, 0);
            for (at, c) in list.char_indices() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => {
                        rooms.insert(ident(&list[start..at]));
                        break;
                    }
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        rooms.insert(ident(&list[start..at]));
                        start = at + 1;
                    }
                    _ => {}
                }
            }
        } else {
            rooms.insert(ident(part));
        }
    }
    rooms.remove("");
    rooms
}

fn check(src: &str, table: &[(&str, &[&str])]) -> Vec<String> {
    let src = root().join(src);
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 5, "only {} files under {}", files.len(), src.display());
    let mut wrong = Vec::new();
    for file in files {
        let from = room(&src, &file);
        if matches!(from.as_str(), "lib" | "main" | "bin") {
            continue;
        }
        let Some((_, allowed)) = table.iter().find(|(name, _)| *name == from) else {
            wrong.push(format!("{}: room {from} is not in the table", file.display()));
            continue;
        };
        for to in used_rooms(&code(&file)) {
            let known = table.iter().any(|(name, _)| *name == to);
            if known && to != from && !allowed.contains(&to.as_str()) {
                wrong.push(format!("{}: {from} may not use {to}", file.display()));
            }
        }
    }
    wrong
}

#[test]
fn rooms_of_the_rank_use_only_what_they_may() {
    assert_eq!(check("src", RANK), Vec::<String>::new());
}

#[test]
fn rooms_of_the_launcher_use_only_what_they_may() {
    assert_eq!(check("launcher/src", LAUNCHER), Vec::<String>::new());
}

#[test]
fn a_forbidden_edge_is_seen() {
    let rooms = used_rooms("use crate::{train::fit, data::{loader, source}};\nlet x = crate::comm::Solo;");
    assert_eq!(rooms.into_iter().collect::<Vec<_>>(), ["comm", "data", "train"]);
}

#[test]
fn only_the_source_room_imports_hdf5_and_the_launcher_links_no_tensor_library() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    for file in &files {
        let inside = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        if code(file).contains("hdf5::") && !code(file).contains("source::hdf5::") {
            let allowed = inside.starts_with("src/data/source") || inside.ends_with("/sample.rs");
            assert!(allowed, "{inside} imports hdf5");
        }
    }
    for file in files.iter().filter(|file| !file.starts_with(root().join("src/data/source"))) {
        let text = code(file);
        let imported = ["png", "zune_png", "zune_jpeg"]
            .iter()
            .find(|name| text.contains(&format!("{name}::")) && !text.contains(&format!("_{name}::")));
        assert!(imported.is_none(), "{} imports {imported:?}", file.display());
    }
    let manifest = std::fs::read_to_string(root().join("launcher/Cargo.toml")).unwrap();
    for name in ["tch", "hdf5", "cudarc", "headroom"] {
        assert!(!manifest.lines().any(|line| line.starts_with(name)), "launcher depends on {name}");
    }
}

#[test]
fn unsafe_stays_in_its_rooms_and_every_block_says_why() {
    let mut files = Vec::new();
    for folder in ["src", "launcher/src"] {
        rust_files(&root().join(folder), &mut files);
    }
    for file in files {
        let inside = file.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if !(code.contains("unsafe {") || code.contains("unsafe impl") || code.contains("unsafe fn")) {
                continue;
            }
            assert!(UNSAFE.iter().any(|room| inside.starts_with(room)), "{inside}:{}: unsafe here", number + 1);
            if code.contains("unsafe {") || code.contains("unsafe impl") {
                let before = &lines[number.saturating_sub(8)..number];
                assert!(
                    before.iter().any(|line| line.contains("SAFETY:")),
                    "{inside}:{}: no SAFETY: line names the fact relied on",
                    number + 1
                );
            }
        }
    }
}
