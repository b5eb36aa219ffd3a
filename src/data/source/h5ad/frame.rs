//! Tables of cells and of genes (`obs`, `var`) of all three ages: a group of columns with categories beside their codes
//! (anndata 0.8), the same with all categories in one group (0.7), and a compound dataset (0.6 and before).

use super::text::{attribute, float_text, texts, wholes};
use crate::data::source::hdf5::fields::{Values, read_field};
use ::hdf5::{Dataset, File, Group};
use std::collections::HashMap;

/// Code of a cell without a label.
pub const MISSING: u32 = u32::MAX;

/// Labels of the cells of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// Per cell the place of its label in `names`, or [`MISSING`].
    pub codes: Vec<u32>,
    pub names: Vec<String>,
}

/// A table whose rows are cells, or genes.
pub enum Frame {
    Columns(Group),
    Rows(Dataset),
}

impl Frame {
    /// The table at `path`.
    ///
    /// # Errors
    /// Nothing is there, or what is there is no table.
    pub fn open(file: &File, path: &str) -> Result<Self, String> {
        if let Ok(group) = file.group(path) {
            return Ok(Frame::Columns(group));
        }
        match file.dataset(path) {
            Ok(dataset) => Ok(Frame::Rows(dataset)),
            Err(_) => Err(format!("no table {path}: it is no .h5ad, or not whole")),
        }
    }

    /// Names of the rows.
    ///
    /// # Errors
    /// There are none, or others than `len`.
    pub fn index(&self, len: usize) -> Result<Vec<String>, String> {
        let whole = |names: Vec<Option<String>>| names.into_iter().map(Option::unwrap_or_default).collect();
        match self {
            Frame::Columns(group) => {
                let name = self.index_name().ok_or_else(|| format!("{} has no index", group.name()))?;
                column(group, &name, len).map(whole)
            }
            Frame::Rows(dataset) => {
                let name = self.index_name().ok_or_else(|| format!("{} has no index", dataset.name()))?;
                field(dataset, &name, len).map(whole)
            }
        }
    }

    /// Rows of the table, without reading any.
    pub fn len(&self) -> Option<usize> {
        match self {
            Frame::Columns(group) => {
                let name = self.index_name()?;
                let dataset = group.dataset(&name).or_else(|_| group.dataset(&format!("{name}/values"))).ok()?;
                dataset.shape().first().copied()
            }
            Frame::Rows(dataset) => dataset.shape().first().copied(),
        }
    }

    fn index_name(&self) -> Option<String> {
        match self {
            Frame::Columns(group) => {
                let named = attribute(group, "_index");
                let usual = ["_index", "index"].map(String::from);
                named.into_iter().chain(usual).find(|name| group.link_exists(name))
            }
            Frame::Rows(dataset) => {
                let names = field_names(dataset);
                ["index", "_index"]
                    .map(String::from)
                    .into_iter()
                    .find(|name| names.contains(name))
                    .or(names.first().cloned())
            }
        }
    }

    /// Names of the columns, the index left out.
    pub fn columns(&self) -> Vec<String> {
        let index = self.index_name();
        let names = match self {
            Frame::Columns(group) => group.member_names().unwrap_or_default(),
            Frame::Rows(dataset) => field_names(dataset),
        };
        names.into_iter().filter(|name| Some(name) != index.as_ref() && name != "__categories").collect()
    }

    /// Column `name` as labels of `len` cells.
    ///
    /// # Errors
    /// No such column (the others are named), one of another length or of a kind that cannot be a label, or codes that no
    /// category has.
    pub fn labels(&self, file: &File, name: &str, len: usize) -> Result<Labels, String> {
        if !self.columns().iter().any(|column| column == name) {
            let columns = self.columns();
            let listed = if columns.is_empty() { "none".into() } else { columns.join(", ") };
            return Err(format!(
                "obs has no column {name} (its columns: {listed}): set cell.label to one of them, or to null to train without labels"
            ));
        }
        match self {
            Frame::Columns(group) => group_labels(group, name, len),
            Frame::Rows(dataset) => row_labels(file, dataset, name, len),
        }
    }
}

fn field_names(dataset: &Dataset) -> Vec<String> {
    match dataset.dtype().and_then(|dtype| dtype.to_descriptor()) {
        Ok(::hdf5::types::TypeDescriptor::Compound(of)) => of.fields.into_iter().map(|field| field.name).collect(),
        _ => Vec::new(),
    }
}

/// A column that is a dataset, or a nullable one.
fn column(group: &Group, name: &str, len: usize) -> Result<Vec<Option<String>>, String> {
    if let Ok(dataset) = group.dataset(name) {
        return texts(&dataset, Some(len));
    }
    let inner = group.group(name).map_err(|_| format!("{}/{name} leads nowhere", group.name()))?;
    let part = |part: &str| inner.dataset(part).map_err(|_| format!("{} has no {part}", inner.name()));
    let mut values = texts(&part("values")?, Some(len))?;
    let mask = wholes(&part("mask")?, Some(len))?;
    values.iter_mut().zip(mask).filter(|(_, hidden)| *hidden != 0).for_each(|(value, _)| *value = None);
    Ok(values)
}

fn group_labels(group: &Group, name: &str, len: usize) -> Result<Labels, String> {
    if let Ok(dataset) = group.dataset(name) {
        // Codes whose categories stand in one place for all columns.
        return match group.dataset(&format!("__categories/{name}")) {
            Ok(categories) => categorical(&dataset, texts(&categories, None)?, len),
            Err(_) => Ok(of_texts(texts(&dataset, Some(len))?)),
        };
    }
    let inner = group.group(name).map_err(|_| format!("{}/{name} leads nowhere", group.name()))?;
    match attribute(&inner, "encoding-type").as_deref() {
        Some("categorical") | None if inner.link_exists("codes") => {
            let part = |part: &str| inner.dataset(part).map_err(|_| format!("{} has no {part}", inner.name()));
            let categories = match inner.group("categories") {
                Ok(_) => column(&inner, "categories", nullable_len(&inner)?)?,
                Err(_) => texts(&part("categories")?, None)?,
            };
            categorical(&part("codes")?, categories, len)
        }
        Some(encoding) if !encoding.starts_with("nullable-") => Err(format!(
            "{} is of encoding {encoding}: expected categories, text, whole numbers or flags",
            inner.name()
        )),
        _ => Ok(of_texts(column(group, name, len)?)),
    }
}

/// Length of categories that are nullable text.
fn nullable_len(group: &Group) -> Result<usize, String> {
    let values =
        group.dataset("categories/values").map_err(|_| format!("{}/categories has no values", group.name()))?;
    Ok(values.shape().first().copied().unwrap_or(0))
}

/// Codes and categories; a category that is NaN counts as missing.
fn categorical(codes: &Dataset, categories: Vec<Option<String>>, len: usize) -> Result<Labels, String> {
    let found = wholes(codes, Some(len))?;
    let mut labels = Labels { codes: Vec::with_capacity(len), names: Vec::new() };
    for (cell, code) in found.into_iter().enumerate() {
        let known = usize::try_from(code).ok().and_then(|code| categories.get(code).map(|name| (code, name)));
        labels.codes.push(match known {
            Some((code, Some(_))) => code as u32,
            Some((_, None)) => MISSING,
            None if code == -1 => MISSING,
            None => {
                let (name, count) = (codes.name(), categories.len());
                return Err(format!(
                    "{name}: cell {cell} has code {code}, there are {count} categories: the column is damaged"
                ));
            }
        });
    }
    labels.names = categories.into_iter().map(Option::unwrap_or_default).collect();
    Ok(labels)
}

/// Labels that are written out; an empty text is no label.
fn of_texts(texts: Vec<Option<String>>) -> Labels {
    let mut labels = Labels::default();
    let mut known: HashMap<String, u32> = HashMap::new();
    for text in texts {
        labels.codes.push(match text.filter(|text| !text.is_empty() && text != "nan") {
            None => MISSING,
            Some(text) => match known.get(&text) {
                Some(code) => *code,
                None => {
                    let code = labels.names.len() as u32;
                    labels.names.push(text.clone());
                    known.insert(text, code);
                    code
                }
            },
        });
    }
    labels
}

/// A field of a compound as text.
fn field(dataset: &Dataset, name: &str, len: usize) -> Result<Vec<Option<String>>, String> {
    let rows = dataset.shape().first().copied().unwrap_or(0);
    if rows != len {
        return Err(format!("{} has {rows} rows, there are {len}", dataset.name()));
    }
    let values =
        read_field(dataset, name).map_err(|error| format!("{}.{name} cannot be read: {error}", dataset.name()))?;
    Ok(match values {
        Values::Text(texts) => texts.into_iter().map(Some).collect(),
        Values::Whole(numbers) => numbers.into_iter().map(|number| Some(number.to_string())).collect(),
        Values::Float(numbers) => numbers.into_iter().map(float_text).collect(),
    })
}

/// A field of a compound: codes where `uns` has categories for it, else labels.
fn row_labels(file: &File, dataset: &Dataset, name: &str, len: usize) -> Result<Labels, String> {
    let Ok(categories) = file.dataset(&format!("uns/{name}_categories")) else {
        return Ok(of_texts(field(dataset, name, len)?));
    };
    let names = if categories.shape().is_empty() {
        // One category was written as a scalar.
        vec![attribute_of_scalar(&categories)]
    } else {
        texts(&categories, None)?
    };
    let codes = match read_field(dataset, name) {
        Ok(Values::Whole(codes)) if codes.len() == len => codes,
        _ => return Ok(of_texts(field(dataset, name, len)?)),
    };
    let mut labels =
        Labels { codes: Vec::with_capacity(len), names: names.into_iter().map(Option::unwrap_or_default).collect() };
    for (cell, code) in codes.into_iter().enumerate() {
        let known = u32::try_from(code).ok().filter(|code| (*code as usize) < labels.names.len());
        match known {
            Some(code) => labels.codes.push(code),
            None if code == -1 => labels.codes.push(MISSING),
            None => {
                let count = labels.names.len();
                return Err(format!(
                    "obs.{name}: cell {cell} has code {code}, there are {count} categories: the column is damaged"
                ));
            }
        }
    }
    Ok(labels)
}

fn attribute_of_scalar(dataset: &Dataset) -> Option<String> {
    use ::hdf5::types::{VarLenAscii, VarLenUnicode};
    let unicode = dataset.read_scalar::<VarLenUnicode>().ok().map(|text| text.to_string());
    unicode.or_else(|| dataset.read_scalar::<VarLenAscii>().ok().map(|text| text.to_string()))
}
