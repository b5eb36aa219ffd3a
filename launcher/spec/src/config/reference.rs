//! The keys in words: `launch help` and configs/README.md.

use super::keys::{Key, Section, one_line};
use super::kind::Kind;
use super::model::Config;
use super::schema::{self, Alias, Schema};
use super::spelling::canonical;
use serde_json::Value;
use std::fmt::Write;

/// Command that writes configs/README.md anew.
pub const WRITE_MARKDOWN: &str = "target/release/launch help --markdown > configs/README.md";
/// Command that writes configs/schema.json anew.
pub const WRITE_SCHEMA: &str = "target/release/launch help --schema > configs/schema.json";

impl Schema {
    /// Sections with their docs, for `launch help`.
    pub fn overview(&self) -> String {
        let named = self.sections().iter().filter(|section| !section.name().is_empty());
        let width = named.clone().map(|section| section.name().len()).max().unwrap_or_default();
        let mut text = String::from("Sections of a config (launch help SECTION lists their keys):\n");
        let top: Vec<&str> = self.top().iter().map(|key| key.path).collect();
        let _ = writeln!(text, "  {:width$}  {}", "", top.join(", "));
        for section in named {
            let _ = writeln!(text, "  {:width$}  {}", section.name(), one_line(section.doc));
        }
        text + "\nlaunch help KEY         a key: type, default, range, other names\n\
                launch help exit-codes  the meaning of exit codes\n\
                launch help VERB        options of a verb\n"
    }

    /// The section, key or other name `topic`.
    ///
    /// # Errors
    /// There is no such name; the text suggests the nearest.
    pub fn help(&self, topic: &str) -> Result<String, String> {
        let name = canonical(topic.trim_end_matches('.'));
        if let Some(section) = self.sections().iter().find(|section| section.name() == name) {
            return Ok(self.section_help(section));
        }
        if let Some(key) = self.key(&name) {
            return Ok(self.key_help(key));
        }
        match self.alias(&name) {
            Some(Alias::To(key)) => {
                return Ok(format!("{topic} is another name of {}.\n\n{}", key.path, self.key_help(key)));
            }
            Some(Alias::Inert(why)) => return Ok(format!("{topic} is accepted and has no effect: {why}.\n")),
            None => {}
        }
        let found: Vec<&Key> = self.keys().filter(|key| key.leaf() == name).collect();
        match found[..] {
            [] => Err(format!("unknown key or topic {topic}; did you mean {}?", self.nearest(&name, false))),
            [key] => Ok(self.key_help(key)),
            _ => Ok(found.iter().map(|key| format!("{}\n", self.key_help(key))).collect()),
        }
    }

    fn top(&self) -> &'static [Key] {
        self.sections().first().map_or(&[], |section| section.keys)
    }

    fn section_help(&self, section: &Section) -> String {
        let mut text = format!("{}: {}\n\n", section.name(), one_line(section.doc));
        let width = section.keys.iter().map(|key| key.path.len()).max().unwrap_or_default();
        for key in section.keys {
            let _ = writeln!(text, "  {:width$}  {} [default: {}]", key.path, key.summary(), self.default_of(key));
        }
        for inner in section.nested {
            let _ = writeln!(text, "  {}: {}", inner.name(), one_line(inner.doc));
        }
        text
    }

    fn key_help(&self, key: &Key) -> String {
        let mut text = format!("{}\n  {}\n\n", key.path, key.summary());
        let mut line = |what: &str, is: String| text += &format!("  {what:12} {is}\n");
        line("type:", key.kind.expected());
        if !key.unit.is_empty() {
            line("unit:", key.unit.into());
        }
        if let Some(range) = key.range.words() {
            line("range:", format!("must {range}"));
        }
        line("default:", self.default_of(key));
        if let Kind::Choice(words) = key.kind {
            for (word, meaning) in words.iter().filter(|(_, meaning)| !meaning.is_empty()) {
                line(&format!("{word}:"), one_line(meaning));
            }
        }
        let others = self.other_names(key);
        if !others.is_empty() {
            line("other names:", others.join(", "));
        }
        line("example:", format!("--set {}={}", key.path, self.example(key)));
        text
    }

    /// The default as a shell takes it.
    fn example(&self, key: &Key) -> String {
        match self.default_value(key) {
            Value::String(text) => text,
            Value::Array(items) => format!("'{}'", Value::Array(items)),
            value => value.to_string(),
        }
    }

    /// The default of the first task, or of the task that has the key.
    fn default_value(&self, key: &Key) -> Value {
        let own = key.path.split('.').next().and_then(|name| self.task(name));
        let task = own.or(self.tasks().first().copied());
        task.map(|task| default_in(&Config::of(task), key)).unwrap_or_default()
    }

    /// The default, and those of tasks that have another.
    pub fn default_of(&self, key: &Key) -> String {
        if key.path == "name" {
            return "the file's name".into();
        }
        let usual = self.default_value(key);
        let mut text = shown(&usual);
        for task in self.tasks() {
            let theirs = default_in(&Config::of(*task), key);
            if !theirs.is_null() && theirs != usual && key.path != "task" {
                let _ = write!(text, " ({}: {})", task.name(), shown(&theirs));
            }
        }
        text
    }

    /// configs/README.md: every key.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "# Keys of a config\n\n\
             Generated from the declarations in launcher/spec/src; write it anew with `{WRITE_MARKDOWN}`.\n\
             `launch help KEY` shows one entry. `schema.json` beside this file lets editors complete and check keys: begin a \
             config with\n`# yaml-language-server: $schema=schema.json`.\n\n\
             A config is YAML 1.2. Keys that are left out keep their defaults; `--set key=value` overrides one; the section \
             `profiles` holds\nvalues for one kind of device (`cpu`, `cuda`), the section `stages` those for one stage of a task that has \
             stages\n(`--set stages.NAME.key=value`). Names in capitals, `training` for `train` and \
             `logging` for `log` work too. Merge keys\n(`<<: *base`) merge. In paths `~` is the home folder; `${{VAR}}` is \
             not expanded. Numbers may be written `1e-4`, `.5`, `10_000`.\n"
        );
        for section in self.sections() {
            let title = if section.name().is_empty() { "Top level" } else { section.name() };
            let _ = write!(text, "\n## {title}\n\n{}\n\n", one_line(section.doc));
            text += "| key | default | meaning |\n|---|---|---|\n";
            for key in section.keys {
                let _ = writeln!(
                    text,
                    "| `{}` | {} | {} |",
                    key.path,
                    cell(&self.default_of(key)),
                    cell(&self.meaning(key))
                );
            }
            for inert in section.inert {
                let _ = writeln!(text, "| `{}` |  | No effect: {}. |", inert.path, cell(inert.why));
            }
        }
        text
    }

    /// Doc, type, unit, range, words and other names of a key.
    fn meaning(&self, key: &Key) -> String {
        let mut text = key.summary();
        if let Kind::Choice(words) = key.kind {
            let word = |(word, meaning): &(&str, &str)| match one_line(meaning) {
                meaning if meaning.is_empty() => format!("`{word}`"),
                meaning => format!("`{word}`: {}", meaning.trim_end_matches('.')),
            };
            let _ = write!(text, " One of {}.", words.iter().map(word).collect::<Vec<_>>().join("; "));
        }
        if let Kind::List(Kind::Record(section)) = key.kind {
            let keys: Vec<String> = section.keys.iter().map(|key| format!("`{}`", key.path)).collect();
            let _ = write!(text, " Keys of each: {}.", keys.join(", "));
        }
        if !key.unit.is_empty() {
            let _ = write!(text, " Unit: {}.", key.unit);
        }
        if let Some(range) = key.range.words() {
            let _ = write!(text, " Must {range}.");
        }
        let others = self.other_names(key);
        if !others.is_empty() {
            let _ = write!(text, " Also `{}`.", others.join("`, `"));
        }
        text
    }
}

fn default_in(config: &Config, key: &Key) -> Value {
    let value = serde_json::to_value(config).unwrap_or_default();
    value.pointer(&schema::pointer(key.path)).cloned().unwrap_or_default()
}

/// A default in words.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().any(Value::is_object) => format!("{} sections", items.len()),
        value => value.to_string(),
    }
}

/// Text inside a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
