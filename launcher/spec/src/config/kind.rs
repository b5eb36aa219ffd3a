//! Types of keys: how a written value becomes a JSON value, and what to say when it does not.

use super::schema;
use super::tree::{Body, Fault, Node};
use serde_json::{Map, Value};

#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Text,
    OptionalText,
    Flag,
    /// A whole number, 0 or more.
    Whole,
    OptionalWhole,
    Number,
    OptionalNumber,
    Choice(&'static [&'static str]),
    /// A list of exactly so many numbers.
    Numbers(usize),
    Wholes,
    Texts,
    /// `model.tds_stages`.
    Stages,
    /// `memory.budget`.
    Size,
    /// A metric's name; `val_loss` is read as `val.loss`.
    Metric,
}

/// Keys of one entry of `model.tds_stages`; all are needed.
const STAGE: &[&str] = &["in_conv_kernel", "in_conv_stride", "num_blocks", "channels", "feature_width", "kernel_width"];

impl Kind {
    /// Reads `node` as the value of `key`.
    ///
    /// # Errors
    /// Every fault with its line: value found, what was expected.
    pub fn read(self, key: &str, node: &Node) -> Result<Value, Vec<Fault>> {
        if let (Kind::Stages, Body::List(stages)) = (self, &node.body) {
            return read_stages(key, stages);
        }
        self.read_plain(node).ok_or_else(|| {
            let found = describe(node);
            vec![(node.line, format!("{key}: expected {}, found {found}", self.expected()))]
        })
    }

    fn expected(self) -> String {
        match self {
            Kind::Text => "text on one line".into(),
            Kind::OptionalText => "text on one line, or null".into(),
            Kind::Flag => "true or false".into(),
            Kind::Whole => "a whole number of 0 or more".into(),
            Kind::OptionalWhole => "a whole number of 0 or more, or null".into(),
            Kind::Number => "a number".into(),
            Kind::OptionalNumber => "a number or null".into(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Numbers(count) => format!("a list of {count} numbers"),
            Kind::Wholes => "a list of whole numbers".into(),
            Kind::Texts => "a list of texts".into(),
            Kind::Stages => format!("a list of stages, each with {}", STAGE.join(", ")),
            Kind::Size => "a share such as 80% or a size such as 20GiB".into(),
            Kind::Metric => "the name of a metric such as val.loss".into(),
        }
    }

    fn read_plain(self, node: &Node) -> Option<Value> {
        let null = node.is_null();
        match (self, &node.body) {
            (Kind::OptionalText | Kind::OptionalWhole | Kind::OptionalNumber, _) if null => Some(Value::Null),
            // `num_workers: auto` says what leaving it out does.
            (Kind::OptionalWhole, Body::Scalar { text, .. }) if text == "auto" => Some(Value::Null),
            (Kind::Choice(words), Body::Scalar { text, plain }) => choose(words, text, *plain, null),
            (_, Body::Scalar { .. }) if null => None,
            (Kind::Text | Kind::OptionalText, Body::Scalar { text, .. }) => {
                one_line(text).then(|| text.as_str().into())
            }
            (Kind::Metric, Body::Scalar { text, .. }) => Some(metric(text).into()),
            (Kind::Flag, Body::Scalar { text, plain: true }) => flag(text).map(Value::Bool),
            (Kind::Whole | Kind::OptionalWhole, Body::Scalar { text, plain: true }) => whole(text).map(Value::from),
            (Kind::Number | Kind::OptionalNumber, Body::Scalar { text, plain: true }) => number(text).map(Value::from),
            (Kind::Size, Body::Scalar { text, .. }) => text.parse::<super::Budget>().ok().map(Value::from),
            (Kind::Numbers(count), Body::List(nodes)) if nodes.len() == count => list(nodes, Kind::Number),
            (Kind::Wholes, Body::List(nodes)) => list(nodes, Kind::Whole),
            (Kind::Texts, Body::List(nodes)) => list(nodes, Kind::Text),
            _ => None,
        }
    }
}

/// Names and paths hold no control characters and no line breaks, Unicode's own included.
fn one_line(text: &str) -> bool {
    !text.contains(|c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'))
}

fn list(nodes: &[Node], kind: Kind) -> Option<Value> {
    nodes.iter().map(|node| kind.read_plain(node)).collect::<Option<Vec<_>>>().map(Value::Array)
}

/// One of `words`, in any case. A flag or nothing means what it must: `amp: false` is `off`, `scheduler: null` is
/// `none`, `cache: true` is `auto`.
fn choose(words: &[&str], text: &str, plain: bool, null: bool) -> Option<Value> {
    let lower = text.to_lowercase();
    let word = match lower.as_str() {
        _ if null => "none",
        "true" if plain => "auto",
        "false" if plain => "off",
        other => other,
    };
    words.contains(&word).then(|| word.into())
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" => Some(true),
        "false" | "False" | "FALSE" => Some(false),
        _ => None,
    }
}

/// `1e4` and `10.0` are whole too.
fn whole(text: &str) -> Option<u64> {
    let exact = |value: f64| (value.fract() == 0.0 && (0.0..2f64.powi(53)).contains(&value)).then_some(value as u64);
    text.parse::<u64>().ok().or_else(|| number(text).and_then(exact))
}

fn number(text: &str) -> Option<f64> {
    // Rust would also read `inf` and `nan`, which YAML holds for text.
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c));
    text.parse::<f64>().ok().filter(|value| numeric && value.is_finite())
}

/// `val_loss` and `train_loss` are the guides' way of writing `val.loss` and `train.loss`.
fn metric(text: &str) -> String {
    let split = |side: &str| text.strip_prefix(&format!("{side}_")).map(|rest| format!("{side}.{rest}"));
    split("val").or_else(|| split("train")).unwrap_or_else(|| text.to_string())
}

fn read_stages(key: &str, stages: &[Node]) -> Result<Value, Vec<Fault>> {
    let mut faults = Vec::new();
    let mut values = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        values.push(Value::Object(read_stage(&format!("{key}[{i}]"), stage, &mut faults)));
    }
    if faults.is_empty() { Ok(Value::Array(values)) } else { Err(faults) }
}

fn read_stage(key: &str, stage: &Node, faults: &mut Vec<Fault>) -> Map<String, Value> {
    let mut values = Map::new();
    let Body::Map(entries) = &stage.body else {
        faults.push((
            stage.line,
            format!("{key}: expected a section with {}, found {}", STAGE.join(", "), describe(stage)),
        ));
        return values;
    };
    for entry in entries {
        let name = schema::canonical(&entry.key);
        if !STAGE.contains(&name.as_str()) {
            let near = STAGE.iter().min_by_key(|known| strsim::damerau_levenshtein(known, &name)).unwrap_or(&"");
            faults.push((entry.line, format!("unknown key {key}.{}; did you mean {key}.{near}?", entry.key)));
            continue;
        }
        match Kind::Whole.read(&format!("{key}.{name}"), &entry.value) {
            Ok(value) => drop(values.insert(name, value)),
            Err(more) => faults.extend(more),
        }
    }
    let written: Vec<String> = entries.iter().map(|entry| schema::canonical(&entry.key)).collect();
    for name in STAGE.iter().filter(|name| !written.iter().any(|w| w == *name)) {
        faults.push((stage.line, format!("{key}: {name} is missing")));
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
