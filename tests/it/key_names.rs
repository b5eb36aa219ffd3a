//! Every `section.key` that a message, a document or a shipped script names is a key of today's schema, not a name that a
//! config may still use.

use spec::config::Schema;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Files whose literals declare other names of keys.
const DECLARE: &[&str] = &["/keys.rs", "/config/sections.rs", "/config/model.rs", "/config/schema.rs"];
/// Names with a section's first word that are no keys: files of the kernel's memory controller and of a run, columns of
/// nvidia-smi, metrics.
const NO_KEYS: &[&str] = &[
    "memory.current",
    "memory.events",
    "memory.failcnt",
    "memory.high",
    "memory.limit_in_bytes",
    "memory.max",
    "memory.oom.group",
    "memory.oom_control",
    "memory.pressure",
    "memory.rank",
    "memory.soft_limit_in_bytes",
    "memory.stat",
    "memory.total",
    "memory.usage_in_bytes",
    "memory.used",
    "train.box_loss",
    "train.cls_loss",
    "train.dfl_loss",
    "train.loss",
];
/// Endings of file names.
const FILES: &[&str] = &["h5", "hdf5", "json", "jsonl", "png", "py", "rs", "safetensors", "txt", "yaml", "yml"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` that users read or whose strings they read; tests, fixtures and generated files are left out.
fn files(folder: &Path, into: &mut Vec<PathBuf>) {
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "tests" {
                files(&path, into);
            }
        } else if name != "tests.rs" && !name.ends_with("_tests.rs") && name != "schema.json" {
            into.push(path);
        }
    }
}

/// String literals and comments of Rust code, each with the number of its first line.
fn texts(code: &str) -> Vec<(usize, &str)> {
    let (mut found, mut at) = (Vec::new(), 0);
    let line = |at: usize| code[..at].matches('\n').count() + 1;
    while let Some(step) = code[at..].find(['"', '/', '\'']) {
        let start = at + step;
        let rest = &code[start..];
        let end = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with('"') && code[..start].ends_with("r#") {
            rest[1..].find("\"#").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with('"') {
            closing(rest)
        } else if let Some(character) = ["'\"'", "'\\\"'", "'/'", "'\\''"].iter().find(|c| rest.starts_with(**c)) {
            at = start + character.len();
            continue;
        } else {
            at = start + 1;
            continue;
        };
        found.push((line(start), &rest[..end]));
        at = start + end;
    }
    found
}

/// Length of the literal that `text` begins with.
fn closing(text: &str) -> usize {
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == '"' && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |(at, _)| at + 1)
}

/// Words such as `train.batch_size` in `text`, where the first part is one of `roots`.
fn dotted<'a>(text: &'a str, roots: &BTreeSet<&str>) -> Vec<&'a str> {
    let part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.');
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(step) = text[at..].find(part) {
        let start = at + step;
        let end = text[start..].find(|c| !part(c)).map_or(text.len(), |end| start + end);
        at = end;
        // A path, a call, a type or the rest of a longer word names no key.
        let (before, after) = (text[..start].chars().next_back(), text[end..].chars().next());
        let apart = |c: Option<char>, others: &str| c.is_none_or(|c| !c.is_alphanumeric() && !others.contains(c));
        let word = text[start..end].trim_end_matches('.');
        let (root, rest) = word.split_once('.').unwrap_or((word, ""));
        if apart(before, "/$<-") && apart(after, "/(<") && roots.contains(root) && !rest.is_empty() {
            found.push(word);
        }
    }
    found
}

/// First parts of all names that a config may hold.
fn roots(schema: &Schema) -> BTreeSet<&str> {
    let names = schema.keys().flat_map(|key| schema.other_names(key).into_iter().chain([key.path]));
    names.filter_map(|name| Some(name.split_once('.')?.0)).collect()
}

/// `word` is a key, a section, the beginning of keys (`train.warmup_`), a field of a key's list or table, or no key at all.
fn stands(schema: &Schema, word: &str) -> bool {
    let section = schema.sections().iter().any(|section| section.name() == word);
    let begins = word.ends_with('_') && schema.keys().any(|key| key.path.starts_with(word));
    let file = word.rsplit('.').next().is_some_and(|ending| FILES.contains(&ending));
    // A tensor of a model, by the number of its layer.
    let weight = word.strip_prefix("model.").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    schema.key(word).is_some() || section || begins || file || weight || NO_KEYS.contains(&word)
}

#[test]
fn every_key_that_a_message_or_document_names_exists() {
    let (schema, mut paths, mut wrong) = (spec::task::schema(), vec![root().join("README.md")], Vec::new());
    let roots = roots(&schema);
    for folder in ["src", "launcher", "configs", "scripts"] {
        files(&root().join(folder), &mut paths);
    }
    assert!(paths.len() > 300, "only {} files", paths.len());
    let mut named = BTreeSet::new();
    for path in paths {
        let shown = path.strip_prefix(root()).unwrap().display().to_string();
        // The Python package has names of its own, such as `data.seed`, and speaks of people's `train.py`.
        // So do the scripts of pages and of a rank within Python: their words are a language's, not a config's.
        let python = shown.starts_with("launcher/python/")
            || shown.starts_with("src/python/headroom_rank/")
            || shown.ends_with(".js");
        let generated = shown == "configs/README.md";
        let declares = DECLARE.iter().any(|file| shown.ends_with(file));
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let whole = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let parts = if shown.ends_with(".rs") {
            texts(whole)
        } else {
            whole.lines().enumerate().map(|(number, line)| (number + 1, line)).collect()
        };
        for (line, part) in parts {
            // Other names are shown as such, also where a document shows a declaration.
            let declaration = part.contains("aliases = ") || part.contains("inert { ");
            if generated
                || python
                || declaration
                || (declares && part.starts_with('"'))
                || shown.ends_with("CHANGELOG.md")
            {
                continue;
            }
            for word in dotted(part, &roots) {
                named.insert(word.to_owned());
                if !stands(&schema, word) {
                    wrong.push(format!("{shown}:{line}: {word} is no key"));
                }
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
    let keys = named.iter().filter(|word| schema.key(word).is_some()).count();
    assert!(keys > 60, "only {keys} keys are named anywhere: are texts still read?");
}

#[test]
fn an_old_or_mistyped_name_is_seen() {
    let schema = spec::task::schema();
    let roots = roots(&schema);
    let code = r##"
        // see data.table_name
        let c = '"'; let s = "set \"train.batch_size\" or data.deblur.clip_len."; let t = r#"model.dropout"#;
        data.read(train.step); // not data/emg.h5, log.rs
    "##;
    let words: Vec<(usize, &str)> = texts(code)
        .into_iter()
        .flat_map(|(line, text)| dotted(text, &roots).into_iter().map(move |word| (line, word)))
        .collect();
    let expected = [
        (2, "data.table_name"),
        (3, "train.batch_size"),
        (3, "data.deblur.clip_len"),
        (3, "model.dropout"),
        (4, "log.rs"),
    ];
    assert_eq!(words, expected);
    let stand: Vec<bool> = words.iter().map(|(_, word)| stands(&schema, word)).collect();
    assert_eq!(stand, [false, true, false, false, true]);
}
