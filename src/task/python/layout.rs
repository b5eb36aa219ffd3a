//! How samples of the user are laid out as bytes.

use super::lane::{Lanes, Request, Work};
use crate::data::{DataError, Dtype, FieldSpec};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Layout of the samples of one data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Fields as `dataset[i]` gives them: an entry of the page cache holds them one behind the other.
    pub stored: Vec<FieldSpec>,
    /// Fields as the model gets them.
    pub given: Vec<FieldSpec>,
    /// Two readings of the same sample differ.
    pub is_random: bool,
    /// Nesting of what the model gets, as JSON.
    pub structure: String,
    /// Most bytes of a sample as `dataset[i]` gives it, where samples differ in size: entries begin with its length then.
    pub most: Option<usize>,
}

/// Bytes of the length before an entry of a sample whose size differs.
pub const LENGTH_BYTES: usize = 8;

/// Messages of a decode worker.
#[derive(Deserialize)]
struct Told {
    stored: Part,
    given: Part,
    random: bool,
    /// Samples differ in size, and have at most so many bytes, stored and given.
    most: Option<[usize; 2]>,
}

#[derive(Deserialize)]
struct Part {
    structure: Value,
    /// Name, kind of object, element type, shape.
    fields: Vec<(String, String, String, Vec<usize>)>,
}

impl Layout {
    /// Asks a decode worker to look at sample 0.
    ///
    /// # Errors
    /// The user's code failed, or samples cannot be kept as bytes.
    pub fn of_split(lanes: &Lanes, split: u64) -> Result<Self, DataError> {
        let request = Request { work: Work::Describe, split, index: 0, epoch: 0 };
        let text = lanes.ask(&request, &[], |bytes, read| {
            let mut text = vec![0; bytes];
            read(&mut text).map_err(lost)?;
            Ok(text)
        })?;
        Self::read(&text)
    }

    fn read(text: &[u8]) -> Result<Self, DataError> {
        let refused = |problem: String| DataError::User(format!("the layout of samples: {problem}"));
        let told: Told = serde_json::from_slice(text).map_err(|e| refused(e.to_string()))?;
        let structure = told.given.structure.to_string();
        if let Some([stored, given]) = told.most {
            let one = |most| vec![FieldSpec::ragged("sample", &[], Dtype::U8, most)];
            let (stored, given, most) = (one(stored), one(given), Some(stored));
            return Ok(Self { stored, given, is_random: told.random, structure, most });
        }
        let fields = |part: Part| part.fields.into_iter().map(field).collect::<Result<Vec<_>, _>>().map_err(refused);
        Ok(Self {
            stored: fields(told.stored)?,
            given: fields(told.given)?,
            is_random: told.random,
            structure,
            most: None,
        })
    }

    /// Bytes of an entry of the page cache.
    pub fn stored_bytes(&self) -> usize {
        let length = if self.most.is_some() { LENGTH_BYTES } else { 0 };
        self.stored.iter().map(FieldSpec::sample_bytes).sum::<usize>() + length
    }

    pub fn given_bytes(&self) -> usize {
        self.given.iter().map(FieldSpec::sample_bytes).sum()
    }

    /// Most bytes that a loader thread holds of a sample.
    pub fn scratch_bytes(&self) -> usize {
        self.stored_bytes().max(self.given_bytes())
    }
}

/// The scratch memory of a worker cannot be read.
pub fn lost(error: std::io::Error) -> DataError {
    DataError::User(format!("the scratch memory of a decode worker: {error}"))
}

fn field((name, _, dtype, shape): (String, String, String, Vec<usize>)) -> Result<FieldSpec, String> {
    let dtype = match dtype.as_str() {
        "bool" => Dtype::Bool,
        "uint8" => Dtype::U8,
        "int8" => Dtype::I8,
        "int16" => Dtype::I16,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::Bf16,
        "int32" => Dtype::I32,
        "float32" => Dtype::F32,
        "int64" => Dtype::I64,
        "float64" => Dtype::F64,
        other => return Err(format!("{name} has the element type {other}, which is unknown here")),
    };
    Ok(FieldSpec::new(lasting(&name), &shape, dtype))
}

/// The name for as long as this process lives. Each is kept once.
fn lasting(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = names.get(name) {
        return known;
    }
    let kept: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(kept);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_as_workers_write_them() {
        let text = br#"{"stored": {"structure": ["l", 0], "fields": [["x", "a", "uint8", [3, 4]]]}, "random": true,
            "given": {"structure": ["t", [["l", 0], ["l", 1]]],
                      "fields": [["x", "t", "bfloat16", [2]], ["y", "i", "int64", []]]}}"#;
        let layout = Layout::read(text).unwrap();
        assert_eq!((layout.stored_bytes(), layout.given_bytes(), layout.is_random), (12, 12, true));
        assert_eq!(layout.given, [FieldSpec::new("x", &[2], Dtype::Bf16), FieldSpec::new("y", &[], Dtype::I64)]);
        assert_eq!(layout.structure, r#"["t",[["l",0],["l",1]]]"#);
        assert!(std::ptr::eq(lasting("x"), lasting("x")));
        let ragged =
            String::from_utf8_lossy(text).replace("\"random\": true", "\"random\": false, \"most\": [100, 50]");
        let layout = Layout::read(ragged.as_bytes()).unwrap();
        assert_eq!((layout.stored_bytes(), layout.given_bytes(), layout.most), (108, 50, Some(100)));
        assert_eq!(layout.given, [FieldSpec::ragged("sample", &[], Dtype::U8, 50)]);
        let bad = String::from_utf8_lossy(text).replace("bfloat16", "complex64");
        assert!(Layout::read(bad.as_bytes()).unwrap_err().to_string().contains("complex64"));
    }
}
