//! One layer of a config: canonical keys with checked values, each with the place it was written at.

use super::error::{Place, Problem};
use super::keys::Key;
use super::schema::{self, Alias, Schema};
use super::spelling::canonical;
use super::tree::{Body, Entry, Mark};
use serde_json::Value;
use std::collections::BTreeMap;

/// Where a layer's text comes from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    File(&'a str),
    Set(&'a str),
}

impl Source<'_> {
    pub fn place(&self, at: Mark) -> Place {
        match self {
            Source::File(file) => Place::Mark { file: file.to_string(), at },
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
    merged: bool,
}

impl Layer {
    /// Reads a mapping. Every fault is added to `problems`; `inside` precedes keys in messages.
    pub fn read(
        schema: &Schema,
        entries: &[Entry],
        inside: &str,
        source: &Source,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut reader = Reader { schema, layer: Layer::default(), inside, source, problems };
        reader.section("", entries, false);
        reader.layer
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).map(|found| &found.value)
    }

    /// Place at which a key was written.
    pub fn place(&self, key: &str) -> Option<&Place> {
        self.values.get(key).map(|found| &found.place)
    }

    /// Keys that were written.
    pub fn keys(&self) -> impl Iterator<Item = &'static str> {
        self.values.keys().copied()
    }

    /// Keys that were accepted and have no effect.
    pub fn notes(&self) -> &[Problem] {
        &self.notes
    }

    /// Writes this layer's values over those of a serialised `Config`. Sections that it lacks are other tasks'.
    pub fn write_over(&self, config: &mut Value) {
        for (key, found) in &self.values {
            if let Some(slot) = config.pointer_mut(&schema::pointer(key)) {
                *slot = found.value.clone();
            }
        }
    }
}

struct Reader<'a> {
    schema: &'a Schema,
    layer: Layer,
    inside: &'a str,
    source: &'a Source<'a>,
    problems: &'a mut Vec<Problem>,
}

impl Reader<'_> {
    /// `merged`: the entries were brought by a merge key.
    fn section(&mut self, prefix: &str, entries: &[Entry], merged: bool) {
        for entry in entries {
            self.entry(&format!("{prefix}{}", entry.key), entry, merged || entry.merged);
        }
    }

    /// `written`: the key with its sections, as typed.
    fn entry(&mut self, written: &str, entry: &Entry, merged: bool) {
        let key = canonical(written);
        // `data: coco.yaml`: a name with a value that with keys is a section.
        let is_value = matches!(&entry.value.body, Body::Scalar { .. }) && !entry.value.is_null();
        if self.schema.is_section(&key) && !(is_value && self.schema.alias(&key).is_some()) {
            match &entry.value.body {
                Body::Map(inner) => self.section(&format!("{written}."), inner, merged),
                _ if entry.value.is_null() => {}
                _ => {
                    let found = super::kind::describe(&entry.value);
                    let text = format!("{}{written}: expected a section, found {found}", self.inside);
                    self.problem(entry.value.at, text);
                }
            }
        } else if let Some(key) = self.schema.key(&key) {
            self.value(key, written, entry, merged);
        } else {
            match self.schema.alias(&key) {
                Some(Alias::To(target)) => self.value(target, written, entry, merged),
                Some(Alias::Inert(why)) => {
                    let note = format!("{}{written} has no effect: {why}", self.inside);
                    self.layer.notes.push(Problem::new(self.source.place(entry.at), note));
                }
                None => self.unknown(&key, written, entry.at),
            }
        }
    }

    fn unknown(&mut self, key: &str, written: &str, at: Mark) {
        let near = self.schema.nearest(key, !self.inside.is_empty());
        self.problem(at, format!("unknown key {}{written}; did you mean {}{near}?", self.inside, self.inside));
    }

    fn value(&mut self, key: &'static Key, written: &str, entry: &Entry, merged: bool) {
        let value = match key.kind.read(&format!("{}{written}", self.inside), &entry.value) {
            Ok(value) => value,
            Err(faults) => return faults.into_iter().for_each(|(at, text)| self.problem(at, text)),
        };
        let place = self.source.place(entry.at);
        match self.layer.values.get(key.path) {
            // A key written beside a merge wins, under whichever name.
            Some(_) if merged => {}
            Some(earlier) if earlier.merged => self.insert(key, value, written, place, merged),
            // The guides' files name the watched metric twice; the same value twice is no contradiction.
            Some(earlier) if earlier.value == value && earlier.written != written => {}
            Some(earlier) => {
                let text = format!(
                    "{}{written} says again what {} says at {}; keep one of them",
                    self.inside, earlier.written, earlier.place
                );
                self.problem(entry.at, text);
            }
            None => self.insert(key, value, written, place, merged),
        }
    }

    fn insert(&mut self, key: &'static Key, value: Value, written: &str, place: Place, merged: bool) {
        let written = written.to_string();
        self.layer.values.insert(key.path, Found { value, written, place, merged });
    }

    fn problem(&mut self, at: Mark, text: String) {
        self.problems.push(Problem::new(self.source.place(at), text));
    }
}
