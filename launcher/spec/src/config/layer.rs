//! One layer of a config: canonical keys with checked values, each with the place it was written at.

use super::error::{Place, Problem};
use super::schema::{self, Alias};
use super::tree::{Body, Entry, Node};
use serde_json::Value;
use std::collections::BTreeMap;

/// Where a layer's text comes from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    File(&'a str),
    Set(&'a str),
}

impl Source<'_> {
    pub fn place(&self, line: usize) -> Place {
        match self {
            Source::File(file) => Place::Line { file: file.to_string(), line },
            Source::Set(text) => Place::Set(text.to_string()),
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Layer {
    values: BTreeMap<&'static str, Found>,
    notes: Vec<Problem>,
}

#[derive(Clone, Debug)]
struct Found {
    value: Value,
    written: String,
    place: Place,
}

impl Layer {
    /// Reads a mapping. Every fault is added to `problems`; `inside` precedes keys in messages.
    pub fn read(entries: &[Entry], inside: &str, source: &Source, problems: &mut Vec<Problem>) -> Self {
        let mut reader = Reader { layer: Layer::default(), inside, source, problems };
        reader.section("", entries);
        reader.layer
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).map(|found| &found.value)
    }

    /// Each key with the place it was written at.
    pub fn places(&self) -> impl Iterator<Item = (&'static str, &Place)> {
        self.values.iter().map(|(key, found)| (*key, &found.place))
    }

    /// Whether a key was written that only `deblur` has.
    pub fn speaks_of_clips(&self) -> bool {
        self.values.keys().any(|key| key.starts_with("data.deblur.") || key.starts_with("model.vrt."))
    }

    /// Keys that were accepted and have no effect.
    pub fn notes(&self) -> &[Problem] {
        &self.notes
    }

    /// Writes this layer's values over those of a serialised `Config`.
    pub fn write_over(&self, config: &mut Value) {
        for (key, found) in &self.values {
            if let Some(slot) = config.pointer_mut(&format!("/{}", key.replace('.', "/"))) {
                *slot = found.value.clone();
            }
        }
    }
}

struct Reader<'a> {
    layer: Layer,
    inside: &'a str,
    source: &'a Source<'a>,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    fn section(&mut self, prefix: &str, entries: &[Entry]) {
        for entry in entries {
            self.entry(&format!("{prefix}{}", entry.key), entry);
        }
    }

    /// `written`: the key with its sections, as typed.
    fn entry(&mut self, written: &str, entry: &Entry) {
        let key = schema::canonical(written);
        if schema::is_section(&key) {
            match &entry.value.body {
                Body::Map(inner) => self.section(&format!("{written}."), inner),
                _ if entry.value.is_null() => {}
                _ => {
                    let found = super::kind::describe(&entry.value);
                    self.problem(
                        entry.value.line,
                        format!("{}{written}: expected a section, found {found}", self.inside),
                    );
                }
            }
        } else if let Some((key, _)) = schema::kind(&key) {
            self.value(key, written, entry);
        } else {
            match schema::alias(&key) {
                Some(Alias::To(target)) => self.value(target, written, entry),
                Some(Alias::Inert(why)) => {
                    let note = format!("{}{written} {why}", self.inside);
                    self.layer.notes.push(Problem::new(self.source.place(entry.line), note));
                }
                None => self.unknown(&key, written, entry.line),
            }
        }
    }

    fn unknown(&mut self, key: &str, written: &str, line: usize) {
        let near = schema::nearest(key, !self.inside.is_empty());
        self.problem(line, format!("unknown key {}{written}; did you mean {}{near}?", self.inside, self.inside));
    }

    fn value(&mut self, key: &'static str, written: &str, entry: &Entry) {
        let Some(value) = self.typed(key, written, &entry.value) else {
            return;
        };
        let place = self.source.place(entry.line);
        match self.layer.values.get(key) {
            // The guides' files name the watched metric twice; the same value twice is no contradiction.
            Some(earlier) if earlier.value == value && earlier.written != written => {}
            Some(earlier) => {
                let text = format!(
                    "{}{written} says again what {} says at {}; keep one of them",
                    self.inside, earlier.written, earlier.place
                );
                self.problem(entry.line, text);
            }
            None => {
                let written = written.to_string();
                self.layer.values.insert(key, Found { value, written, place });
            }
        }
    }

    fn typed(&mut self, key: &str, written: &str, node: &Node) -> Option<Value> {
        let (_, kind) = schema::kind(key)?;
        match kind.read(&format!("{}{written}", self.inside), node) {
            Ok(value) => Some(value),
            Err(faults) => {
                faults.into_iter().for_each(|(line, text)| self.problem(line, text));
                None
            }
        }
    }

    fn problem(&mut self, line: usize, text: String) {
        self.problems.push(Problem::new(self.source.place(line), text));
    }
}
