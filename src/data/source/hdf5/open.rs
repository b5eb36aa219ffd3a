//! Metadata of a recording, by libhdf5: type, shape, layout, filters, chunk addresses, attributes. No sample is read.

use super::layout::{by_library, layout, refuse_holes};
use super::library::Fault;
use super::types::{self, Element, Field, RowType};
use super::{Layout, Member, Order, SUPERBLOCK_BYTES, Scalar, Table, library, links, parts, superblock};
use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::types::{FixedAscii, FixedUnicode, TypeDescriptor, VarLenAscii, VarLenUnicode};
use ::hdf5::{Dataset, Group};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Required content of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    pub group: String,
    pub dataset: String,
    /// Name and numbers per row. In a plain 2-D dataset they are columns in this order, from the first on.
    pub fields: Vec<(String, usize)>,
}

/// An attribute of the group.
#[derive(Clone, Debug, PartialEq)]
pub enum Attribute {
    Text(String),
    Float(f64),
    Integer(i64),
}

/// Result of opening a file.
pub struct Opened {
    pub table: Table,
    /// Every field of the compound (or `column 0..n` of a 2-D dataset), in the file's order.
    pub field_names: Vec<String>,
    pub attributes: BTreeMap<String, Attribute>,
}

/// Size and modification time (ns) by which a file is recognised.
pub fn stamp(path: &Path) -> Result<(u64, i128), DataError> {
    let facts = std::fs::metadata(path).map_err(|error| file_error(path, error.to_string()))?;
    Ok((facts.len(), stamp_of(&facts)))
}

pub(super) fn stamp_of(facts: &std::fs::Metadata) -> i128 {
    i128::from(facts.mtime()) * 1_000_000_000 + i128::from(facts.mtime_nsec())
}

/// Opens a file by libhdf5 once its first bytes and its size are credible.
///
/// # Errors
/// It is no file of HDF5, not whole, or cannot be opened.
pub fn checked(path: &Path) -> Result<::hdf5::File, DataError> {
    behind_checks(path).map(|(file, ..)| file)
}

/// The file, its size and time, and the place of its superblock.
fn behind_checks(path: &Path) -> Result<(::hdf5::File, (u64, i128), u64), DataError> {
    let bytes = library::patiently(|| library::regular(path)).map_err(|fault| fault.into_error(path, str::to_owned))?;
    let (file_bytes, modified_ns) = stamp(path)?;
    let facts = bytes.metadata().map_err(|error| Fault::of_io(&error).into_error(path, str::to_owned))?;
    let superblock = superblock::check(&bytes, file_bytes).map_err(|fault| {
        fault.into_error(path, |problem| format!("{problem} ({file_bytes} bytes): replace it or leave it out"))
    })?;
    drop(bytes);
    refuse_holes(&facts).map_err(|problem| file_error(path, problem))?;
    let file = library::open(path).map_err(|fault| fault.into_error(path, |words| not_hdf5(file_bytes, words)))?;
    Ok((file, (file_bytes, modified_ns), superblock))
}

/// Opens `path` and describes the wanted fields. Reads metadata only.
///
/// # Errors
/// Names the file and what is missing, of another type, empty or not credible.
pub fn open(path: &Path, wanted: &Wanted) -> Result<Opened, DataError> {
    // A message that holds libhdf5's words for a failed system call is about that call, not about the file.
    let fail = |problem: String| match Fault::in_words(problem) {
        fault if fault.is_lack() => fault.into_error(path, str::to_owned),
        fault => file_error(path, fault.words),
    };
    let (file, (file_bytes, modified_ns), superblock) = behind_checks(path)?;
    let (group, dataset) = found(&file, wanted).map_err(&fail)?;
    let address_bytes = file.fcpl().map(|plist| plist.sizes().sizeof_addr as usize).unwrap_or(8);
    let (mut table, field_names, row) = describe(&dataset, wanted, address_bytes).map_err(&fail)?;
    if table.rows == 0 {
        parts::refuse_missing_parts(&dataset, path).map_err(&fail)?;
        return Err(fail(format!("dataset {} has no rows", wanted.dataset)));
    }
    table.path = path.to_owned();
    table.dataset = format!("{}/{}", wanted.group, wanted.dataset);
    (table.file_bytes, table.modified_ns) = (file_bytes, modified_ns);
    table.validate_extent().map_err(&fail)?;
    layout(&dataset, &row, &mut table).map_err(&fail)?;
    parts::resolve(&dataset, &mut table)?;
    table.validate().and_then(|()| behind_header(&table, superblock)).map_err(&fail)?;
    Ok(Opened { table, field_names, attributes: attributes(&group) })
}

/// The wanted group and dataset, in this file.
fn found(file: &::hdf5::File, wanted: &Wanted) -> Result<(Group, Dataset), String> {
    let linked = |problem| format!("{problem} (emg.hdf5_group, emg.table_name)");
    links::refuse_external(file, &wanted.group).map_err(linked)?;
    let group = file.group(&wanted.group).map_err(|error| {
        lack_or(&error, || {
            let (group, names) = (&wanted.group, listed(file.member_names()));
            format!("no group /{group}: it holds {names} (emg.hdf5_group names the group)")
        })
    })?;
    links::refuse_external(&group, &wanted.dataset).map_err(linked)?;
    let dataset = group.dataset(&wanted.dataset).map_err(|error| {
        lack_or(&error, || {
            let (dataset, group, names) = (&wanted.dataset, &wanted.group, group.member_names());
            if names.as_ref().is_ok_and(|names| names.contains(dataset)) {
                return format!(
                    "no dataset {dataset} in group /{group}: what has that name is no dataset, or a link to nothing"
                );
            }
            let names = listed(names);
            format!("no dataset {dataset} in group /{group}: it holds {names} (emg.table_name names the dataset)")
        })
    })?;
    links::refuse_other_file(file, &dataset).map_err(linked)?;
    Ok((group, dataset))
}

/// libhdf5's own words where a system call failed.
fn lack_or(error: &::hdf5::Error, words: impl FnOnce() -> String) -> String {
    let fault = Fault::of(error);
    if fault.is_lack() { fault.words } else { words() }
}

/// Rows lie behind the superblock, and so behind a user block.
fn behind_header(table: &Table, superblock: u64) -> Result<(), String> {
    let first = match &table.layout {
        Layout::Contiguous { addr } => *addr,
        Layout::Chunked { chunks, .. } => {
            chunks.iter().filter(|chunk| chunk.stored_bytes != 0).map(|chunk| chunk.addr).min().unwrap_or(u64::MAX)
        }
        Layout::Library { .. } => u64::MAX,
    };
    if first < superblock + SUPERBLOCK_BYTES {
        return Err(format!("rows at byte {first} overlap the file's header: it is damaged"));
    }
    Ok(())
}

fn not_hdf5(file_bytes: u64, error: &str) -> String {
    let whole = error.split("stored_eof = ").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    if let Some(whole) = whole {
        return format!("is truncated: {file_bytes} of {whole} bytes are there: replace it or leave it out");
    }
    if error.contains("already open for") {
        return "is marked as open for writing: close it in the program that writes it; if that program has crashed, clear \
                the mark (h5clear -s)"
            .into();
    }
    // libhdf5 reports call by call; the cause comes last.
    let reason = error.rsplit(": ").next().unwrap_or(error);
    format!("cannot be read as HDF5 ({file_bytes} bytes, {reason}): replace it or leave it out")
}

fn listed(names: ::hdf5::Result<Vec<String>>) -> String {
    match names {
        Ok(names) if names.is_empty() => "nothing".into(),
        Ok(names) => names.join(", "),
        Err(_) => "nothing that can be listed".into(),
    }
}

/// Rows and fields, without the layout. The type tells whether rows can be read without libhdf5.
fn describe(dataset: &Dataset, wanted: &Wanted, address_bytes: usize) -> Result<(Table, Vec<String>, RowType), String> {
    let shape = dataset.shape();
    let row = types::of(dataset, address_bytes).map_err(|error| format!("dataset {}: {error}", wanted.dataset))?;
    let bytes = row.bytes.unwrap_or(row.memory_bytes);
    let mut table = Table {
        path: Default::default(),
        dataset: String::new(),
        rows: shape.first().copied().unwrap_or(0) as u64,
        row_bytes: bytes,
        element_bytes: bytes,
        plain: false,
        members: Vec::new(),
        layout: Layout::Contiguous { addr: 0 },
        unwritten: Vec::new(),
        others: Vec::new(),
        file_bytes: 0,
        modified_ns: 0,
    };
    let names = match (&row.fields, &row.whole.element, shape.len()) {
        (Some(fields), _, 1) => compound(&mut table, fields, wanted)?,
        (None, Element::Ieee(..) | Element::OtherFloat(_), 2) if row.whole.dims.is_empty() => {
            plain(&mut table, &row.whole.element, shape[1], wanted)?
        }
        _ => {
            let found = dataset.dtype().map(|dtype| dtype.to_string()).unwrap_or_default();
            return Err(format!(
                "dataset {} has shape {shape:?} of {found}: expected rows of a compound type, or a 2-D dataset of floats",
                wanted.dataset
            ));
        }
    };
    if let (Layout::Contiguous { .. }, None) = (&table.layout, row.bytes) {
        table.layout = by_library("rows hold references whose size in the file is not certain");
    }
    if let Layout::Library { .. } = &table.layout {
        pack(&mut table);
    }
    Ok((table, names, row))
}

/// libhdf5 gives the members one after the other, whatever lies between them in the file.
fn pack(table: &mut Table) {
    let mut offset = 0;
    for member in &mut table.members {
        member.offset = offset;
        offset += member.width();
    }
    table.row_bytes = table.row_bytes.max(offset);
    table.element_bytes = table.row_bytes;
}

fn compound(table: &mut Table, fields: &[Field], wanted: &Wanted) -> Result<Vec<String>, String> {
    let names: Vec<String> = fields.iter().map(|field| field.name.clone()).collect();
    for (name, len) in &wanted.fields {
        let field = fields.iter().find(|field| field.name == *name);
        let field = field.ok_or_else(|| format!("no field {name}: rows hold {}", names.join(", ")))?;
        let (scalar, order) = number(name, &field.element, &field.dims)?;
        let found = field.dims.iter().try_fold(1usize, |cells, dim| cells.checked_mul(*dim));
        if found != Some(*len) {
            return Err(format!(
                "field {name} has {} channels, {len} expected (emg.emg_channels, emg.joint_angles_channels)",
                found.map_or("too many".into(), |found| found.to_string())
            ));
        }
        match (&field.element, field.offset) {
            (Element::OtherFloat(bytes), _) => {
                table.layout =
                    by_library(&format!("field {name} holds floats of {bytes} bytes in a format of their own"));
            }
            (_, None) => table.layout = by_library(&format!("the place of field {name} in a row is not certain")),
            _ => {}
        }
        let offset = field.offset.unwrap_or(0);
        table.members.push(Member { name: name.clone(), offset, scalar, order, len: *len });
    }
    Ok(names)
}

/// Type of a field's numbers as they are read.
fn number(name: &str, element: &Element, dims: &[usize]) -> Result<(Scalar, Order), String> {
    match element {
        Element::Ieee(scalar, order) => Ok((*scalar, *order)),
        Element::OtherFloat(bytes) => Ok((if *bytes <= 4 { Scalar::F32 } else { Scalar::F64 }, Order::NATIVE)),
        Element::NoFloat(words) => {
            let dims: Vec<String> = dims.iter().map(|dim| dim.to_string()).collect();
            let found = if dims.is_empty() { words.clone() } else { format!("[{words}; {}]", dims.join(", ")) };
            Err(format!("field {name} is {found}: expected f4 or f8"))
        }
    }
}

fn plain(table: &mut Table, element: &Element, columns: usize, wanted: &Wanted) -> Result<Vec<String>, String> {
    let needed: usize = wanted.fields.iter().map(|(_, len)| len).sum();
    if columns < needed {
        return Err(format!("dataset {} has {columns} columns, at least {needed} expected", wanted.dataset));
    }
    let (scalar, order) = number(&wanted.dataset, element, &[])?;
    if let Element::OtherFloat(bytes) = element {
        table.layout = by_library(&format!("floats of {bytes} bytes in a format of their own"));
    }
    let mut offset = 0;
    for (name, len) in &wanted.fields {
        table.members.push(Member { name: name.clone(), offset, scalar, order, len: *len });
        offset += len * scalar.bytes();
    }
    table.plain = true;
    let row_bytes = columns.checked_mul(scalar.bytes()).ok_or("rows of more bytes than can be counted")?;
    table.row_bytes = row_bytes;
    table.element_bytes = scalar.bytes();
    Ok((0..columns).map(|column| format!("column {column}")).collect())
}

/// The group's attributes; those of types that make no sense here are left out.
fn attributes(group: &Group) -> BTreeMap<String, Attribute> {
    let names = group.attr_names().unwrap_or_default();
    names.into_iter().filter_map(|name| attribute(group, &name).map(|value| (name, value))).collect()
}

fn attribute(group: &Group, name: &str) -> Option<Attribute> {
    /// Longest fixed-length string that is read.
    const LONGEST: usize = 512;
    let attr = group.attr(name).ok()?;
    match attr.dtype().ok()?.to_descriptor().ok()? {
        TypeDescriptor::Integer(_) | TypeDescriptor::Unsigned(_) => attr.read_scalar().ok().map(Attribute::Integer),
        TypeDescriptor::Float(_) => attr.read_scalar().ok().map(Attribute::Float),
        TypeDescriptor::VarLenUnicode => {
            attr.read_scalar::<VarLenUnicode>().ok().map(|s| Attribute::Text(s.to_string()))
        }
        TypeDescriptor::VarLenAscii => attr.read_scalar::<VarLenAscii>().ok().map(|s| Attribute::Text(s.to_string())),
        TypeDescriptor::FixedUnicode(n) if n <= LONGEST => {
            attr.read_scalar::<FixedUnicode<LONGEST>>().ok().map(|s| Attribute::Text(s.to_string()))
        }
        TypeDescriptor::FixedAscii(n) if n <= LONGEST => {
            attr.read_scalar::<FixedAscii<LONGEST>>().ok().map(|s| Attribute::Text(s.to_string()))
        }
        _ => None,
    }
}
