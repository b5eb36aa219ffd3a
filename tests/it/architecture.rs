//! The rooms and the one direction of flow (src/lib.rs), held by a test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Room → rooms it may use. A room may always use itself. Rooms of other packages are named with their package.
type Rooms = &'static [(&'static str, &'static [&'static str])];
const SPEC: Rooms = &[
    ("contract", &[]),
    ("config", &["contract"]),
    ("task", &["contract", "config"]),
    ("plan", &["contract", "config", "task"]),
    ("job", &["contract", "config", "plan"]),
];
const RANK: Rooms = &[
    ("torch", &[]),
    ("comm", &["torch", "ledger", "spec::contract", "cache", "host::machine", "host::nodes"]),
    ("ledger", &["spec::contract"]),
    ("data", &["ledger", "spec::contract", "spec::config", "cache", "host::machine"]),
    (
        "train",
        &[
            "torch",
            "comm",
            "data",
            "task",
            "ledger",
            "spec::contract",
            "spec::config",
            "spec::plan",
            "host::disk",
            "host::journal",
            "host::machine",
        ],
    ),
    ("task", &["torch", "data", "cache", "host::disk", "spec::config", "spec::contract", "spec::plan", "spec::task"]),
    ("report", &["spec::contract", "spec::config", "host::journal"]),
    ("own_loop", &["torch", "report", "spec::contract", "spec::config", "host::machine"]),
    (
        "rank",
        &[
            "torch",
            "comm",
            "data",
            "train",
            "task",
            "report",
            "own_loop",
            "ledger",
            "spec::contract",
            "spec::config",
            "spec::plan",
            "spec::job",
            "spec::task",
            "cache",
            "host::inherited",
            "host::journal",
            "host::limits",
            "host::lock",
            "host::logging",
            "host::machine",
            "host::nodes",
        ],
    ),
];
const HOST: Rooms = &[
    ("stamp", &[]),
    ("disk", &[]),
    ("scratch", &[]),
    ("machine", &["disk", "spec::contract"]),
    ("journal", &["spec::contract"]),
    ("logging", &["spec::contract"]),
    ("inherited", &["machine"]),
    ("limits", &["machine", "spec::contract", "spec::plan"]),
    ("lock", &["stamp", "spec::contract"]),
    ("nodes", &["machine", "spec::contract"]),
];
const LAUNCHER: Rooms = &[
    ("watch", &["host::journal", "host::machine", "spec::contract", "spec::config", "spec::plan"]),
    (
        "supervise",
        &["cache", "host::journal", "host::machine", "host::nodes", "host::scratch", "watch", "spec::contract"],
    ),
    ("console", &["host::machine", "supervise", "spec::contract", "spec::plan", "spec::config"]),
    (
        "run_dir",
        &["host::journal", "host::lock", "host::stamp", "spec::contract", "spec::config", "spec::plan", "spec::job"],
    ),
    (
        "cli",
        &[
            "host::logging",
            "host::machine",
            "monitor",
            "run_dir",
            "track",
            "spec::config",
            "spec::contract",
            "spec::plan",
            "spec::task",
        ],
    ),
    (
        "advise",
        &[
            "host::machine",
            "host::stamp",
            "run_dir",
            "watch",
            "spec::contract",
            "spec::config",
            "spec::plan",
            "spec::job",
        ],
    ),
    ("page", &["advise", "spec::contract", "spec::plan"]),
    ("plots", &["advise", "spec::contract", "spec::plan", "spec::job"]),
    ("smart", &["spec::contract", "spec::config"]),
    ("track", &["advise", "host::journal", "host::stamp", "run_dir", "spec::contract", "spec::plan"]),
    (
        "monitor",
        &[
            "advise",
            "host::journal",
            "host::machine",
            "host::stamp",
            "run_dir",
            "supervise",
            "watch",
            "spec::contract",
            "spec::plan",
            "spec::config",
        ],
    ),
    (
        "command",
        &[
            "advise",
            "cache",
            "cli",
            "console",
            "host::inherited",
            "host::journal",
            "host::limits",
            "host::lock",
            "host::logging",
            "host::machine",
            "host::nodes",
            "host::stamp",
            "monitor",
            "page",
            "plots",
            "run_dir",
            "smart",
            "supervise",
            "track",
            "watch",
            "spec::contract",
            "spec::config",
            "spec::plan",
            "spec::task",
            "spec::job",
        ],
    ),
];
const PYTHON: Rooms = &[
    ("entry", &[]),
    ("sizes", &[]),
    ("own", &[]),
    ("system", &["host::machine"]),
    ("buffer", &["cache"]),
    ("failure", &["entry", "cache"]),
    ("native", &["entry", "failure"]),
    ("disk", &["entry", "node", "cache", "host::disk", "host::scratch", "spec::plan"]),
    ("windows", &["entry", "failure", "native", "cache"]),
    ("cells", &["failure", "native"]),
    ("images", &["entry", "failure", "native"]),
    ("files", &["cells", "images", "memory", "native", "node", "own", "windows"]),
    ("batch", &["buffer", "entry", "failure"]),
    ("lane", &["cache", "launcher::supervise"]),
    ("work", &["batch", "failure", "cache"]),
    ("engine", &["batch", "buffer", "disk", "entry", "failure", "lane", "native", "sizes", "work", "cache"]),
    ("memory", &["buffer", "own", "cache"]),
    ("order", &["cache"]),
    ("sample", &["batch", "buffer", "entry", "failure", "memory", "own", "cache"]),
    ("node", &["memory", "own", "sample", "cache", "host::machine", "spec::contract"]),
    ("loader", &["disk", "engine", "failure", "files", "lane", "memory", "node", "own", "sample"]),
];
const IN_PYTHON: Rooms = &[("session", &["tensor"]), ("tensor", &[])];
/// Packages whose rooms are named one by one.
const PACKAGES: &[&str] = &["host", "launcher", "spec"];
/// A package that is one room.
const CACHE: &str = "cache";
/// Files and folders that may hold `unsafe`.
const UNSAFE: &[&str] = &[
    "src/torch/",
    "src/comm/nccl",
    "src/comm/shm",
    "src/data/source/hdf5/ffi/",
    "launcher/cache/src/mapping.rs",
    "launcher/host/src/inherited/unix.rs",
    "launcher/src/supervise/unix.rs",
    "src/python/session.rs",
    "src/python/tensor.rs",
];

/// Source folders of the packages.
pub const SOURCES: &[&str] =
    &["src", "launcher/src", "launcher/host/src", "launcher/spec/src", "launcher/cache/src", "launcher/python/src"];
/// Most lines of a file.
const MOST_LINES: usize = 600;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            into.push(path);
        }
    }
}

/// Every Rust file of the packages.
fn sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    SOURCES.iter().for_each(|folder| rust_files(&root().join(folder), &mut files));
    files
}

/// `file` below the repository's root.
fn inside(file: &Path) -> String {
    file.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

/// `file` without comments and without what follows its `mod tests`.
pub fn code(file: &Path) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let body = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    body.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Files that are compiled for tests alone.
pub fn is_test(file: &Path) -> bool {
    let name = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
    let stem = file.file_stem().map(name).unwrap_or_default();
    let inside_tests = file.parent().and_then(Path::file_name).map(name).is_some_and(|folder| folder == "tests");
    inside_tests || stem == "tests" || stem == "testing"
}

/// Room of a file below `src`: its folder, or its stem at the top.
fn room(src: &Path, file: &Path) -> String {
    let inside = file.strip_prefix(src).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_string_lossy().into_owned();
    first.trim_end_matches(".rs").to_string()
}

/// Rooms named after `prefix` (such as `crate::`) in `text`, also inside `crate::{a, b::c}`.
fn used_rooms(text: &str, prefix: &str) -> BTreeSet<String> {
    let ident = |s: &str| s.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut rooms = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        // `super::cache::` and `self::spec` name no package.
        let before = text[..at].chars().next_back().unwrap_or(' ');
        if before.is_alphanumeric() || matches!(before, '_' | ':') {
            continue;
        }
        let part = &text[at + prefix.len()..];
        let Some(list) = part.strip_prefix('{') else {
            rooms.insert(ident(part));
            continue;
        };
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
    }
    rooms.remove("");
    rooms
}

/// Rooms that `text` uses: those of its package by name, those of the other packages behind `package::`.
fn edges(text: &str) -> BTreeSet<String> {
    let mut rooms = used_rooms(text, "crate::");
    for package in PACKAGES {
        let prefix = format!("{package}::");
        rooms.extend(used_rooms(text, &prefix).into_iter().map(|room| format!("{prefix}{room}")));
    }
    if !used_rooms(text, &format!("{CACHE}::")).is_empty() {
        rooms.insert(CACHE.into());
    }
    rooms
}

fn check(src: &str, table: Rooms) -> Vec<String> {
    let src = root().join(src);
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    // The rank within Python is a package of its own.
    files.retain(|file| !src.join(room(&src, file)).join("Cargo.toml").exists());
    assert!(files.len() > table.len(), "only {} files under {}", files.len(), src.display());
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in files {
        let from = room(&src, &file);
        if matches!(from.as_str(), "lib" | "main" | "bin") || is_test(&file) {
            continue;
        }
        let Some((_, allowed)) = table.iter().find(|(name, _)| *name == from) else {
            wrong.push(format!("{}: room {from} is not in the table", file.display()));
            continue;
        };
        for to in edges(&code(&file)) {
            let known = to.contains("::") || to == CACHE || table.iter().any(|(name, _)| *name == to);
            if known && to != from && !allowed.contains(&to.as_str()) {
                wrong.push(format!("{}: {from} may not use {to}", file.display()));
            }
        }
        seen.insert(from);
    }
    let map = std::fs::read_to_string(src.join("lib.rs")).unwrap();
    let map: String = map.lines().filter(|line| line.starts_with("//!")).collect();
    for (name, allowed) in table {
        if !seen.contains(*name) {
            wrong.push(format!("{name} is in the table and not in {}", src.display()));
        }
        if !map.contains(&format!("[`{name}`]")) && !map.contains(&format!("[`{name}::")) {
            wrong.push(format!("{name} is not on the map in {}/lib.rs", src.display()));
        }
        for (other, back) in table {
            if allowed.contains(other) && back.contains(name) {
                wrong.push(format!("{name} and {other} use each other"));
            }
        }
    }
    wrong
}

#[test]
fn rooms_of_the_shared_vocabulary_use_only_what_they_may() {
    assert_eq!(check("launcher/spec/src", SPEC), Vec::<String>::new());
}

#[test]
fn rooms_of_what_both_programs_ask_of_the_machine_use_only_what_they_may() {
    assert_eq!(check("launcher/host/src", HOST), Vec::<String>::new());
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
fn rooms_of_the_python_package_use_only_what_they_may() {
    assert_eq!(check("launcher/python/src", PYTHON), Vec::<String>::new());
}

#[test]
fn rooms_of_the_rank_within_python_use_only_what_they_may() {
    assert_eq!(check("src/python", IN_PYTHON), Vec::<String>::new());
}

/// The page cache is for a Python module as well: it knows the contract and nothing else, and the directory knows no client.
#[test]
fn the_page_cache_uses_the_contract_alone() {
    let src = root().join("launcher/cache/src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 5, "only {} files under {}", files.len(), src.display());
    for file in files.iter().filter(|file| !is_test(file)) {
        let (from, text) = (room(&src, file), code(file));
        let foreign: Vec<_> =
            edges(&text).into_iter().filter(|to| to.contains("::") && to != "spec::contract").collect();
        assert!(foreign.is_empty(), "{}: cache may not use {foreign:?}", file.display());
        let client = ["crate::client", "super::client"].iter().any(|path| text.contains(path));
        assert!(matches!(from.as_str(), "client" | "lib") || !client, "{}: uses the client", file.display());
    }
}

#[test]
fn a_forbidden_edge_is_seen() {
    let rooms = used_rooms("use crate::{train::fit, data::{loader, source}};\nlet x = crate::comm::Solo;", "crate::");
    assert_eq!(rooms.into_iter().collect::<Vec<_>>(), ["comm", "data", "train"]);
    let rooms = edges("use spec::{contract::env, plan};\nuse super::cache::X;\nlet y = launcher::advise::z();");
    assert_eq!(rooms.into_iter().collect::<Vec<_>>(), ["launcher::advise", "spec::contract", "spec::plan"]);
    let rooms = edges("use cache::client::{Want, Offer};\nuse spec::contract::cache::Item;");
    assert_eq!(rooms.into_iter().collect::<Vec<_>>(), ["cache", "spec::contract"]);
}

#[test]
fn only_the_source_room_imports_hdf5_and_the_launcher_links_no_tensor_library() {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    for file in &files {
        let inside = inside(file);
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
    for package in ["launcher", "launcher/cache", "launcher/python", "launcher/spec"] {
        let manifest = std::fs::read_to_string(root().join(package).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("dependencies]").skip(1).collect::<String>();
        for name in ["tch", "hdf5", "cudarc", "headroom"] {
            assert!(!dependencies.lines().any(|line| line.starts_with(name)), "{package} depends on {name}");
        }
    }
}

#[test]
fn unsafe_stays_in_its_rooms_and_every_block_says_why() {
    for file in sources() {
        let inside = inside(&file);
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

/// An error without a variant of its own says nothing to code, and loses its cause.
#[test]
fn few_errors_are_nothing_but_a_text() {
    let uses: usize =
        sources().iter().filter(|file| !is_test(file)).map(|file| code(file).matches("Error::Other(").count()).sum();
    assert!(uses <= 10, "{uses} uses of Other");
}

/// A module with parts is `mod.rs` of its folder; one without is a file. Its tests are a part.
#[test]
fn a_module_with_a_folder_is_the_folders_mod_rs() {
    let beside: Vec<String> =
        sources().iter().filter(|file| file.with_extension("").is_dir()).map(|file| inside(file)).collect();
    assert_eq!(beside, Vec::<String>::new(), "move FOO.rs to FOO/mod.rs");
    for file in sources() {
        let stem = file.file_stem().unwrap().to_string_lossy().into_owned();
        assert!(!stem.ends_with("_tests"), "{}: tests of FOO are FOO/tests.rs", inside(&file));
    }
}

#[test]
fn files_stay_short() {
    let mut files = sources();
    rust_files(&root().join("tests"), &mut files);
    let lines = |file: &Path| std::fs::read_to_string(file).unwrap().lines().count();
    let long: Vec<String> = files.iter().filter(|file| lines(file) > MOST_LINES).map(|file| inside(file)).collect();
    assert_eq!(long, Vec::<String>::new(), "split files of more than {MOST_LINES} lines");
}
