//! Types of keys: how a written value becomes a JSON value, and what to say when it does not.

use super::keys::{Keys, Section};
use super::literal::{flag, number, whole};
use super::spelling::canonical;
use super::tree::{Body, Fault, Node};
use serde_json::{Map, Value};
use std::path::PathBuf;

#[derive(Debug)]
pub enum Kind {
    Text,
    /// Text in any case, kept in lower case.
    Word,
    /// A path; `~` at its beginning is the home folder.
    Path,
    Flag,
    /// A whole number, 0 or more.
    Whole,
    /// A whole number of bytes, or a size such as `64MiB`.
    Bytes,
    Number,
    /// The kind, or null.
    Optional(&'static Kind),
    /// Words with their meaning, empty where the word says it.
    Choice(&'static [(&'static str, &'static str)]),
    /// Null, a number, or a list of numbers.
    Rates,
    /// A list of exactly so many numbers.
    Numbers(usize),
    List(&'static Kind),
    /// A section whose keys are all needed.
    Record(&'static Section),
    /// `memory.budget`.
    Size,
    /// A metric's name; `val_loss` is read as `val.loss`.
    Metric,
    /// A section with any keys: numbers, flags, texts, lists, sections.
    Values,
}

/// A Rust type that a key can have.
pub trait Typed {
    const KIND: Kind;
}

macro_rules! typed {
    ($($type:ty => $kind:expr),* $(,)?) => {
        $(impl Typed for $type {
            const KIND: Kind = $kind;
        })*
    };
}

typed! {
    bool => Kind::Flag,
    usize => Kind::Whole,
    u64 => Kind::Whole,
    f64 => Kind::Number,
    String => Kind::Text,
    PathBuf => Kind::Path,
    super::Budget => Kind::Size,
    super::Rates => Kind::Rates,
    super::Values => Kind::Values,
}

impl<T: Typed> Typed for Option<T> {
    const KIND: Kind = Kind::Optional(&T::KIND);
}

impl<T: Typed> Typed for Vec<T> {
    const KIND: Kind = Kind::List(&T::KIND);
}

impl<const N: usize> Typed for [f64; N] {
    const KIND: Kind = Kind::Numbers(N);
}

/// A struct of keys inside a list.
pub const fn record<T: Keys>() -> Kind {
    Kind::Record(T::SECTION)
}

impl Kind {
    /// Reads `node` as the value of `key`.
    ///
    /// # Errors
    /// Every fault with its place: value found, what was expected.
    pub(super) fn read(&self, key: &str, node: &Node) -> Result<Value, Vec<Fault>> {
        match (self, &node.body) {
            (Kind::List(Kind::Record(section)), Body::List(nodes)) => return read_records(section, key, nodes),
            (kind, Body::Scalar { text, .. }) if kind.is_path() => {
                if let Some(problem) = super::literal::unexpanded(text) {
                    return Err(vec![(node.at, format!("{key}: {problem}"))]);
                }
            }
            _ => {}
        }
        self.read_plain(node).ok_or_else(|| {
            let found = describe(node);
            vec![(node.at, format!("{key}: expected {}, found {found}", self.expected()))]
        })
    }

    /// A path, or a path or null.
    pub fn is_path(&self) -> bool {
        matches!(self, Kind::Path | Kind::Optional(Kind::Path))
    }

    /// The type in words.
    pub fn expected(&self) -> String {
        match self {
            Kind::Text | Kind::Word => "text on one line".into(),
            Kind::Path => "a path".into(),
            Kind::Flag => "true or false".into(),
            Kind::Whole => "a whole number of 0 or more".into(),
            Kind::Bytes => "a whole number of bytes, or a size such as 64MiB".into(),
            Kind::Number => "a number".into(),
            Kind::Optional(kind) => format!("{}, or null", kind.expected()),
            Kind::Choice(words) => {
                format!("one of {}", words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", "))
            }
            Kind::Rates => "a number, a list of numbers, or null".into(),
            Kind::Numbers(count) => format!("a list of {count} numbers"),
            Kind::List(Kind::Whole) => "a list of whole numbers".into(),
            Kind::List(Kind::Record(section)) => {
                format!("a list of sections, each with {}", leaves(section).join(", "))
            }
            Kind::List(_) => "a list of texts".into(),
            Kind::Record(section) => format!("a section with {}", leaves(section).join(", ")),
            Kind::Size => "a share such as 80% or a size such as 20GiB".into(),
            Kind::Metric => "the name of a metric such as val.loss".into(),
            Kind::Values => "a section with keys of any name".into(),
        }
    }

    fn read_plain(&self, node: &Node) -> Option<Value> {
        let null = node.is_null();
        match (self, &node.body) {
            (Kind::Optional(_) | Kind::Rates, _) if null => Some(Value::Null),
            // `num_workers: auto` says what leaving it out does.
            (Kind::Optional(Kind::Whole), Body::Scalar { text, .. }) if text == "auto" => Some(Value::Null),
            (Kind::Optional(kind), _) => kind.read_plain(node),
            (Kind::Choice(words), Body::Scalar { text, plain }) => choose(words, text, *plain, null),
            (_, Body::Scalar { .. }) if null => None,
            (Kind::Text | Kind::Path, Body::Scalar { text, .. }) => one_line(text).then(|| text.as_str().into()),
            (Kind::Word, Body::Scalar { text, .. }) => one_line(text).then(|| text.to_lowercase().into()),
            (Kind::Metric, Body::Scalar { text, .. }) => Some(metric(text).into()),
            (Kind::Flag, Body::Scalar { text, plain: true }) => flag(text).map(Value::Bool),
            (Kind::Whole, Body::Scalar { text, plain: true }) => whole(text).map(Value::from),
            (Kind::Bytes, Body::Scalar { text, .. }) => super::budget::bytes(text).map(Value::from),
            (Kind::Number, Body::Scalar { text, plain: true }) => number(text).map(Value::from),
            (Kind::Size, Body::Scalar { text, .. }) => text.parse::<super::Budget>().ok().map(Value::from),
            (Kind::Rates, Body::Scalar { text, plain: true }) => number(text).map(Value::from),
            (Kind::Rates, Body::List(nodes)) => list(nodes, &Kind::Number),
            (Kind::Numbers(count), Body::List(nodes)) if nodes.len() == *count => list(nodes, &Kind::Number),
            (Kind::List(kind), Body::List(nodes)) => list(nodes, kind),
            (Kind::Values, _) if null => Some(Value::Object(Map::new())),
            (Kind::Values, Body::Map(_)) => Some(any(node)),
            _ => None,
        }
    }
}

/// Names and paths hold no control characters and no line breaks, Unicode's own included.
fn one_line(text: &str) -> bool {
    !text.contains(|c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'))
}

fn list(nodes: &[Node], kind: &Kind) -> Option<Value> {
    nodes.iter().map(|node| kind.read_plain(node)).collect::<Option<Vec<_>>>().map(Value::Array)
}

/// The value of a node whose type nothing declares: plain scalars are flags and numbers where they read as such.
fn any(node: &Node) -> Value {
    match &node.body {
        Body::List(nodes) => nodes.iter().map(any).collect(),
        Body::Map(entries) => {
            let mut values = Map::new();
            for entry in entries {
                // Merged entries come last and give way.
                if !(entry.merged && values.contains_key(&entry.key)) {
                    values.insert(entry.key.clone(), any(&entry.value));
                }
            }
            Value::Object(values)
        }
        Body::Scalar { .. } if node.is_null() => Value::Null,
        Body::Scalar { text, plain: true } => {
            let exact = || text.parse::<i64>().ok().map(Value::from).or_else(|| whole(text).map(Value::from));
            let value = flag(text).map(Value::Bool).or_else(exact).or_else(|| number(text).map(Value::from));
            value.unwrap_or_else(|| text.as_str().into())
        }
        Body::Scalar { text, .. } => text.as_str().into(),
    }
}

/// One of `words`, in any case. A flag or nothing means what it must: `amp: false` is `off`, `scheduler: null` is
/// `none`, `cache: true` is `auto`.
fn choose(words: &[(&str, &str)], text: &str, plain: bool, null: bool) -> Option<Value> {
    let lower = text.to_lowercase();
    let word = match lower.as_str() {
        _ if null => "none",
        "true" if plain => "auto",
        "false" if plain => "off",
        other => other,
    };
    words.iter().any(|(known, _)| *known == word).then(|| word.into())
}

/// `val_loss` and `train_loss` are the guides' way of writing `val.loss` and `train.loss`.
fn metric(text: &str) -> String {
    let split = |side: &str| text.strip_prefix(&format!("{side}_")).map(|rest| format!("{side}.{rest}"));
    split("val").or_else(|| split("train")).unwrap_or_else(|| text.to_string())
}

fn leaves(section: &Section) -> Vec<&'static str> {
    section.keys.iter().map(super::keys::Key::leaf).collect()
}

fn read_records(section: &'static Section, key: &str, nodes: &[Node]) -> Result<Value, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut values = Vec::new();
    for (i, node) in nodes.iter().enumerate() {
        values.push(Value::Object(read_record(section, &format!("{key}[{i}]"), node, &mut faults)));
    }
    if faults.is_empty() { Ok(Value::Array(values)) } else { Err(faults) }
}

fn read_record(section: &'static Section, key: &str, node: &Node, faults: &mut Vec<Fault>) -> Map<String, Value> {
    let mut values = Map::new();
    let known = leaves(section);
    let Body::Map(entries) = &node.body else {
        let expected = Kind::Record(section).expected();
        faults.push((node.at, format!("{key}: expected {expected}, found {}", describe(node))));
        return values;
    };
    for entry in entries {
        let name = canonical(&entry.key);
        let Some(declared) = section.keys.iter().find(|known| known.leaf() == name) else {
            let near = known.iter().min_by_key(|known| strsim::damerau_levenshtein(known, &name)).unwrap_or(&"");
            faults.push((entry.at, format!("unknown key {key}.{}; did you mean {key}.{near}?", entry.key)));
            continue;
        };
        match declared.kind.read(&format!("{key}.{name}"), &entry.value) {
            // Merged values come last and give way.
            Ok(value) if entry.merged => drop(values.entry(name).or_insert(value)),
            Ok(value) => drop(values.insert(name, value)),
            Err(more) => faults.extend(more),
        }
    }
    let written: Vec<String> = entries.iter().map(|entry| canonical(&entry.key)).collect();
    for name in known.iter().filter(|name| !written.iter().any(|w| w == *name)) {
        faults.push((node.at, format!("{key}: {name} is missing")));
    }
    values
}

/// A value as found, with its type, for people.
pub(super) fn describe(node: &Node) -> String {
    match &node.body {
        Body::Map(_) => "a section".into(),
        Body::List(nodes) => format!("a list of {}", nodes.len()),
        Body::Scalar { .. } if node.is_null() => "nothing".into(),
        Body::Scalar { text, plain: true } if flag(text).is_some() || number(text).is_some() => text.clone(),
        Body::Scalar { text, .. } => format!("the text {text:?}"),
    }
}
