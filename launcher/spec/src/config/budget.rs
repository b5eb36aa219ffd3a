//! `memory.budget`: `80%`, `20GiB`, `512 MB` or a number of bytes.

use super::Budget;
use serde_json::Value;

impl TryFrom<Value> for Budget {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        match &value {
            Value::Number(n) => n.as_u64().map(Budget::Bytes).ok_or_else(|| bad(&value.to_string())),
            Value::String(text) => text.parse(),
            other => Err(bad(&other.to_string())),
        }
    }
}

impl From<Budget> for Value {
    fn from(budget: Budget) -> Value {
        match budget {
            Budget::Bytes(bytes) => bytes.into(),
            Budget::Percent(percent) => format!("{percent}%").into(),
        }
    }
}

impl std::str::FromStr for Budget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let trimmed = text.trim();
        if let Some(number) = trimmed.strip_suffix('%') {
            let percent: f64 = number.trim().parse().map_err(|_| bad(text))?;
            let sensible = percent > 0.0 && percent <= 100.0;
            return sensible.then_some(Budget::Percent(percent)).ok_or_else(|| bad(text));
        }
        bytes(trimmed).filter(|bytes| *bytes > 0).map(Budget::Bytes).ok_or_else(|| bad(text))
    }
}

/// A number of bytes: plain, or with a unit.
pub(super) fn bytes(text: &str) -> Option<u64> {
    // A plain number stays exact beyond 2^53.
    if let Some(bytes) = super::literal::whole(text) {
        return Some(bytes);
    }
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.trim().parse().ok()?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        _ => return None,
    };
    let bytes = number * factor;
    (bytes >= 1.0 && bytes < 2f64.powi(63)).then_some(bytes as u64)
}

fn bad(text: &str) -> String {
    format!("{text} is not a memory budget: write a share such as 80% or a size such as 20GiB")
}
