//! Files use each other in one direction: no two files lead to each other, unless one lies above the other in the tree.

use crate::architecture::{SOURCES, code, is_test, root, rust_files};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Types that hold each other, each in its own file.
const KNOWN: &[&[&str]] = &[
    // A key has a kind, and a kind may be a list of sections of keys.
    &["launcher/spec/src/config/keys", "launcher/spec/src/config/kind"],
    // A config is made for a task, and a task sets a config's defaults.
    &["launcher/spec/src/config/model", "launcher/spec/src/config/task"],
];

type Module = Vec<String>;

/// Path of the module in `file` below `src`.
fn module(src: &Path, file: &Path) -> Module {
    let inside = file.strip_prefix(src).unwrap().with_extension("");
    let mut parts: Module = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    parts.pop_if(|last| matches!(last.as_str(), "mod" | "lib" | "main"));
    parts
}

/// `a::{b, c::{d, e}}` as `a::b`, `a::c::d`, `a::c::e`.
fn expand(path: &str) -> Vec<String> {
    let Some((before, list)) = path.split_once('{') else { return vec![path.to_owned()] };
    let list = list.rsplit_once('}').map_or(list, |(list, _)| list);
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in list.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match c {
            ',' if depth == 0 => parts.push(String::new()),
            _ => parts.last_mut().unwrap().push(c),
        }
    }
    parts.iter().filter(|part| !part.is_empty()).flat_map(|part| expand(&format!("{before}{part}"))).collect()
}

/// Paths that `text` names: those of `use`, and those that begin with `crate`, `super` or `self`.
fn paths(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("use ") {
        let starts = before.chars().next_back().is_none_or(char::is_whitespace);
        let (path, next) = after.split_once(';').unwrap_or((after, ""));
        if starts {
            let path: String = path.split_whitespace().collect::<Vec<_>>().join(" ").replace(" as ", "@");
            let path: String = path.chars().filter(|c| !c.is_whitespace()).collect();
            found.extend(expand(&path).into_iter().map(|path| path.split('@').next().unwrap_or_default().to_owned()));
        }
        rest = if starts { next } else { after };
    }
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    let words = text.split(|c| !word(c)).filter(|path| path.contains("::"));
    let ours = words.filter(|path| ["crate::", "super::", "self::"].iter().any(|start| path.starts_with(start)));
    found.extend(ours.map(str::to_owned));
    found
}

/// The module that `path` leads to from `from`.
fn target(from: &Module, path: &str, modules: &BTreeSet<Module>) -> Option<Module> {
    let mut parts = path.split("::").filter(|part| !part.is_empty()).peekable();
    let mut at = match *parts.peek()? {
        "crate" => Module::new(),
        "self" | "super" => from.clone(),
        child => Some(from.iter().cloned().chain([child.to_owned()]).collect()).filter(|m| modules.contains(m))?,
    };
    for part in parts {
        match part {
            "crate" | "self" => {}
            "super" => drop(at.pop()),
            part => {
                at.push(part.to_owned());
                if !modules.contains(&at) {
                    at.pop();
                    break;
                }
            }
        }
    }
    Some(at)
}

/// Groups of modules below `src` that lead to each other.
fn circles(src: &str) -> Vec<Vec<String>> {
    let folder = root().join(src);
    let mut files = Vec::new();
    rust_files(&folder, &mut files);
    files.retain(|file| !is_test(file));
    let modules: BTreeSet<Module> = files.iter().map(|file| module(&folder, file)).collect();
    let mut uses: BTreeMap<Module, BTreeSet<Module>> = BTreeMap::new();
    for file in &files {
        let from = module(&folder, file);
        let found = paths(&code(file)).into_iter().filter_map(|path| target(&from, &path, &modules));
        let beside = found.filter(|to| !to.starts_with(&from) && !from.starts_with(to)).collect();
        uses.insert(from, beside);
    }
    let reached: BTreeMap<&Module, BTreeSet<&Module>> = uses.keys().map(|from| (from, all_from(from, &uses))).collect();
    let shown = |module: &Module| format!("{src}/{}", module.join("/"));
    let mut groups = BTreeSet::new();
    for (from, there) in reached.iter().filter(|(from, there)| there.contains(*from)) {
        let back = there.iter().filter(|to| reached[**to].contains(*from));
        groups.insert(back.map(|module| shown(module)).collect::<Vec<_>>());
    }
    groups.into_iter().collect()
}

/// Every module that `from` leads to, over others too.
fn all_from<'a>(from: &Module, uses: &'a BTreeMap<Module, BTreeSet<Module>>) -> BTreeSet<&'a Module> {
    let (mut found, mut open) = (BTreeSet::new(), Vec::from_iter(uses.get_key_value(from).map(|(from, _)| from)));
    while let Some(module) = open.pop() {
        open.extend(uses[module].iter().filter(|to| found.insert(*to)));
    }
    found
}

#[test]
fn files_use_each_other_in_one_direction() {
    let found: Vec<Vec<String>> = SOURCES.iter().flat_map(|src| circles(src)).collect();
    assert_eq!(found, KNOWN, "move what both need into a file of its own");
}

#[test]
fn a_circle_is_seen() {
    let text = "use super::{b::{self, X}, c as d};\nfn f() { crate::a::g(super::e::h) }";
    let modules: BTreeSet<Module> =
        ["a", "b", "c", "e", "a/x"].iter().map(|path| path.split('/').map(str::to_owned).collect()).collect();
    let from: Module = vec!["f".into()];
    let found: BTreeSet<String> =
        paths(text).iter().filter_map(|path| target(&from, path, &modules)).map(|module| module.join("/")).collect();
    // `super` alone is the root.
    assert_eq!(found.into_iter().collect::<Vec<_>>(), ["", "a", "b", "c", "e"]);
    let module = |name: &str| vec![name.to_owned()];
    let uses = BTreeMap::from([
        (module("a"), BTreeSet::from([module("b")])),
        (module("b"), BTreeSet::from([module("c")])),
        (module("c"), BTreeSet::from([module("b")])),
    ]);
    assert!(all_from(&module("b"), &uses).contains(&module("b")));
    assert!(!all_from(&module("a"), &uses).contains(&module("a")));
}
