//! Columns of an HDF5 file by their names: fields of a table's rows, or datasets beside each other.

use crate::data::DataError;
use crate::data::source::file_error;
use crate::data::source::hdf5::array::{self, Array};
use crate::data::source::hdf5::open::{self, Wanted, checked, stamp};
use crate::data::source::hdf5::{Opened, Table};
use hdf5::types::TypeDescriptor;
use hdf5::{Dataset, File, Group};
use std::path::Path;

/// Folders below the root that are looked into.
const DEPTH: usize = 4;
/// Datasets that are looked at in one file.
const MOST: usize = 10_000;

/// Where the columns of one file lie.
pub enum Columns {
    /// Fields of the rows of one dataset. Numbers per row of each; `None`: a plain number.
    Rows(Box<Table>, Vec<Option<usize>>),
    /// One dataset each.
    Arrays(Vec<Array>),
}

/// Finds `names` in the file at `path`. `dataset` names the table whose fields they are; without it the file is searched for
/// datasets with these names, then for a table with these fields.
///
/// # Errors
/// The file cannot be read, or holds the columns nowhere, or at more than one place.
pub fn find(path: &Path, names: &[String], dataset: Option<&str>) -> Result<Columns, DataError> {
    let file = checked(path)?;
    let fail = |problem: String| file_error(path, problem);
    if let Some(name) = dataset {
        let table = file.dataset(name).map_err(|_| fail(format!("no dataset {name}: it holds {}", listed(&file))))?;
        return rows(path, &table, names);
    }
    if names.iter().all(|name| file.dataset(name).is_ok()) {
        return arrays(path, &file, names);
    }
    let mut places = Places::default();
    places.look(&file, names, DEPTH);
    match (&places.groups[..], &places.tables[..]) {
        ([group], []) => arrays(path, group, names),
        ([], [table]) => rows(path, table, names),
        ([], []) => Err(fail(format!("no columns {}: it holds {}", names.join(", "), listed(&file)))),
        (groups, tables) => {
            let found: Vec<String> = {
                let of_groups = groups.iter().map(|group| group.name());
                of_groups.chain(tables.iter().map(|table| table.name())).collect()
            };
            Err(fail(format!(
                "columns {} are at more than one place ({}): name them by their path, or give dataset=",
                names.join(", "),
                found.join(", ")
            )))
        }
    }
}

/// Places at which all columns are.
#[derive(Default)]
struct Places {
    groups: Vec<Group>,
    tables: Vec<Dataset>,
    seen: usize,
}

impl Places {
    fn look(&mut self, group: &Group, names: &[String], depth: usize) {
        if names.iter().all(|name| group.dataset(name).is_ok()) {
            self.groups.push(group.clone());
        }
        for dataset in group.datasets().unwrap_or_default() {
            self.seen += 1;
            let fields = fields(&dataset);
            if !fields.is_empty() && names.iter().all(|name| fields.iter().any(|(field, _)| field == name)) {
                self.tables.push(dataset);
            }
        }
        if depth > 0 && self.seen < MOST {
            group.groups().unwrap_or_default().iter().for_each(|inner| self.look(inner, names, depth - 1));
        }
    }
}

/// Fields of a dataset's rows with numbers per row; empty where rows have no fields.
fn fields(dataset: &Dataset) -> Vec<(String, Option<usize>)> {
    let Ok(TypeDescriptor::Compound(of)) = dataset.dtype().and_then(|dtype| dtype.to_descriptor()) else {
        return Vec::new();
    };
    let width = |of: TypeDescriptor| match of {
        TypeDescriptor::FixedArray(_, len) => Some(len),
        _ => None,
    };
    of.fields.into_iter().map(|field| (field.name, width(field.ty))).collect()
}

fn rows(path: &Path, dataset: &Dataset, names: &[String]) -> Result<Columns, DataError> {
    let (known, name) = (fields(dataset), dataset.name());
    let (group, table) = name.rsplit_once('/').unwrap_or(("", &name));
    let missing = |field: &String| {
        let known: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
        let known = if known.is_empty() { "no fields".into() } else { known.join(", ") };
        file_error(path, format!("no field {field}: rows of {name} hold {known}"))
    };
    let mut wanted = Wanted {
        group: if group.is_empty() { "/".into() } else { group.trim_start_matches('/').into() },
        dataset: table.into(),
        fields: Vec::with_capacity(names.len()),
    };
    let mut widths = Vec::with_capacity(names.len());
    for field in names {
        let (_, width) = known.iter().find(|(name, _)| name == field).ok_or_else(|| missing(field))?;
        wanted.fields.push((field.clone(), width.unwrap_or(1)));
        widths.push(*width);
    }
    let Opened { table, .. } = open::open(path, &wanted)?;
    Ok(Columns::Rows(Box::new(table), widths))
}

fn arrays(path: &Path, group: &Group, names: &[String]) -> Result<Columns, DataError> {
    let (stamp, fail) = (stamp(path)?, |problem: String| file_error(path, problem));
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let dataset = group.dataset(name).map_err(|error| fail(error.to_string()))?;
        found.push(array::open::open(&dataset, path, stamp).map_err(fail)?);
    }
    if let Some(other) = found.iter().find(|array| array.rows != found[0].rows) {
        let Array { dataset, rows, .. } = &found[0];
        return Err(fail(format!("{dataset} has {rows} rows, {} has {}: expected as many", other.dataset, other.rows)));
    }
    Ok(Columns::Arrays(found))
}

/// Datasets of a file, for messages.
fn listed(file: &File) -> String {
    /// Datasets that are named.
    const NAMED: usize = 12;
    fn into(group: &Group, depth: usize, names: &mut Vec<String>) {
        for dataset in group.datasets().unwrap_or_default() {
            let fields: Vec<String> = fields(&dataset).into_iter().map(|(name, _)| name).collect();
            let fields = if fields.is_empty() { String::new() } else { format!(" with fields {}", fields.join(", ")) };
            names.push(format!("{}{fields}", dataset.name()));
        }
        if depth > 0 && names.len() <= NAMED {
            group.groups().unwrap_or_default().iter().for_each(|inner| into(inner, depth - 1, names));
        }
    }
    let mut names = Vec::new();
    into(file, DEPTH, &mut names);
    match names.len() {
        0 => "no datasets".into(),
        1..=NAMED => names.join("; "),
        _ => format!("{}; and more", names[..NAMED].join("; ")),
    }
}
