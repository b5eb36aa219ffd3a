//! Ranges of values: the check, the words for it, and the JSON Schema.

use super::verdict::Verdict;
use serde_json::{Map, Value, json};

/// Values that a key may have. A list's range is that of each item.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    Any,
    AtLeast(f64),
    Above(f64),
    /// At least 0 and below 1.
    Share,
    Within(f64, f64),
    /// Text that is not empty.
    Filled,
    /// Name of a folder, without a path.
    Folder,
}

impl Range {
    /// The range as it follows "it must".
    pub fn words(self) -> Option<String> {
        Some(match self {
            Range::Any => return None,
            Range::AtLeast(0.0) => "be 0 or more".into(),
            Range::AtLeast(least) => format!("be at least {least}"),
            Range::Above(low) => format!("be above {low}"),
            Range::Share => "be at least 0 and below 1".into(),
            Range::Within(least, most) => format!("be {least} to {most}"),
            Range::Filled => "not be empty".into(),
            Range::Folder => "name a folder, without a path".into(),
        })
    }

    fn holds(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Range::AtLeast(least) => number >= least,
                Range::Above(low) => number > low,
                Range::Share => (0.0..1.0).contains(&number),
                Range::Within(least, most) => (least..=most).contains(&number),
                Range::Any | Range::Filled | Range::Folder => true,
            }
    }

    /// Adds to `verdict` each number or text of `value` that is out of range.
    pub(super) fn check(self, key: &str, value: &Value, verdict: &mut Verdict) {
        let Some(words) = self.words() else { return };
        match value {
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, item)| self.check(&format!("{key}[{i}]"), item, verdict));
            }
            Value::Number(number) => {
                let (whole, float) = (number.as_u64(), number.as_f64().unwrap_or(f64::NAN));
                let shown = whole.map_or_else(|| float.to_string(), |whole| whole.to_string());
                verdict.need(self.holds(float), || format!("{key} is {shown}; it must {words}"));
            }
            Value::String(text) => {
                let fits = match self {
                    Range::Folder => !text.is_empty() && !text.contains('/') && text != "." && text != "..",
                    _ => !text.is_empty(),
                };
                verdict.need(fits, || format!("{key} is {text:?}; it must {words}"));
            }
            _ => {}
        }
    }

    /// Adds the range to the JSON Schema of a number or text.
    pub(super) fn restrict(self, schema: &mut Map<String, Value>) {
        let mut set = |word: &str, value: Value| drop(schema.insert(word.into(), value));
        match self {
            Range::Any => {}
            Range::AtLeast(least) => set("minimum", json!(least)),
            Range::Above(low) => set("exclusiveMinimum", json!(low)),
            Range::Share => {
                set("minimum", json!(0));
                set("exclusiveMaximum", json!(1));
            }
            Range::Within(least, most) => {
                set("minimum", json!(least));
                set("maximum", json!(most));
            }
            Range::Filled => set("minLength", json!(1)),
            Range::Folder => set("pattern", json!("^[^/]+$")),
        }
    }
}
