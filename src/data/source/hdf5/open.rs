//! Metadata of a recording, by libhdf5: type, shape, layout, filters, chunk addresses, attributes. No sample is read.

use super::compress::{LZ4_ID, LZF_ID};
use super::{
    ChunkAt, Filter, Layout, MAX_RATIO, MAX_UNSTORED_BYTES, Member, Order, SUPERBLOCK_BYTES, Scalar, Table, links,
    superblock,
};
use crate::data::DataError;
use crate::data::source::file_error;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::datatype::ByteOrder;
use ::hdf5::filters::Filter as H5Filter;
use ::hdf5::plist::dataset_create::ChunkOpts;
use ::hdf5::types::{FixedAscii, FixedUnicode, FloatSize, TypeDescriptor, VarLenAscii, VarLenUnicode};
use ::hdf5::{Dataset, Group};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// What a file must hold.
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

/// What opening a file tells.
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

/// Opens `path` and describes the wanted fields. Reads metadata only.
///
/// # Errors
/// Names the file and what is missing, of another type, empty or not credible.
pub fn open(path: &Path, wanted: &Wanted) -> Result<Opened, DataError> {
    let fail = |problem: String| file_error(path, problem);
    // Asked first: libhdf5's own words for a missing or forbidden file are long.
    // Opening a pipe would wait for its writer.
    let facts = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?;
    if !facts.is_file() {
        return Err(fail("is not a regular file: replace it or leave it out".into()));
    }
    let bytes = std::fs::File::open(path).map_err(|error| fail(error.to_string()))?;
    let (file_bytes, modified_ns) = stamp(path)?;
    let superblock = superblock::check(&bytes, file_bytes)
        .map_err(|error| fail(format!("{error} ({file_bytes} bytes): replace it or leave it out")))?;
    drop(bytes);
    refuse_holes(&facts).map_err(&fail)?;
    let file = ::hdf5::File::open(path).map_err(|error| fail(not_hdf5(file_bytes, &error)))?;
    let linked = |problem| fail(format!("{problem} (data.hdf5_group, data.table_name)"));
    links::refuse_external(&file, &wanted.group).map_err(linked)?;
    let group = file.group(&wanted.group).map_err(|_| {
        fail(format!(
            "no group /{}: it holds {} (data.hdf5_group names the group)",
            wanted.group,
            listed(file.member_names())
        ))
    })?;
    links::refuse_external(&group, &wanted.dataset).map_err(linked)?;
    let dataset = group.dataset(&wanted.dataset).map_err(|_| {
        fail(format!(
            "no dataset {} in group /{}: it holds {} (data.table_name names the dataset)",
            wanted.dataset,
            wanted.group,
            listed(group.member_names())
        ))
    })?;
    links::refuse_other_file(&file, &dataset).map_err(linked)?;
    let (mut table, field_names) = describe(&dataset, wanted).map_err(&fail)?;
    table.path = path.to_owned();
    table.dataset = format!("{}/{}", wanted.group, wanted.dataset);
    (table.file_bytes, table.modified_ns) = (file_bytes, modified_ns);
    table.validate_extent().map_err(&fail)?;
    table.layout = layout(&dataset, &table).map_err(&fail)?;
    table.validate().and_then(|()| behind_header(&table, superblock)).map_err(&fail)?;
    Ok(Opened { table, field_names, attributes: attributes(&group) })
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

/// A file that is mostly holes: its rows would be zeros without end.
fn refuse_holes(facts: &std::fs::Metadata) -> Result<(), String> {
    let (bytes, stored) = (facts.len(), facts.blocks().saturating_mul(512));
    // Some file systems count no blocks.
    if stored > 0 && bytes > stored.saturating_mul(MAX_RATIO).saturating_add(MAX_UNSTORED_BYTES) {
        return Err(format!("says {bytes} bytes, {stored} of them are stored: replace it or leave it out"));
    }
    Ok(())
}

fn not_hdf5(file_bytes: u64, error: &::hdf5::Error) -> String {
    let error = error.to_string();
    let whole = error.split("stored_eof = ").nth(1).and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next());
    if let Some(whole) = whole {
        return format!("is truncated: {file_bytes} of {whole} bytes are there: replace it or leave it out");
    }
    // libhdf5 tells call by call; what went wrong comes last.
    let reason = error.rsplit(": ").next().unwrap_or(&error);
    format!("cannot be read as HDF5 ({file_bytes} bytes, {reason}): replace it or leave it out")
}

fn listed(names: ::hdf5::Result<Vec<String>>) -> String {
    match names {
        Ok(names) if names.is_empty() => "nothing".into(),
        Ok(names) => names.join(", "),
        Err(_) => "nothing that can be listed".into(),
    }
}

/// Rows and fields, without the layout.
fn describe(dataset: &Dataset, wanted: &Wanted) -> Result<(Table, Vec<String>), String> {
    let shape = dataset.shape();
    let dtype = dataset.dtype().map_err(|error| error.to_string())?;
    let descriptor = dtype.to_descriptor().map_err(|error| format!("dataset {}: {error}", wanted.dataset))?;
    let order = match dtype.byte_order() {
        ByteOrder::LittleEndian => Some(Order::Little),
        ByteOrder::BigEndian => Some(Order::Big),
        _ => None,
    };
    let mut table = Table {
        path: Default::default(),
        dataset: String::new(),
        rows: shape.first().copied().unwrap_or(0) as u64,
        row_bytes: descriptor.size(),
        element_bytes: descriptor.size(),
        plain: false,
        members: Vec::new(),
        // Mixed byte order is left to libhdf5, which then yields native numbers.
        layout: match order {
            Some(_) => Layout::Contiguous { addr: 0 },
            None => Layout::Library { chunk_rows: 0, reason: "mixed byte order".into() },
        },
        file_bytes: 0,
        modified_ns: 0,
    };
    let native = order.unwrap_or(if cfg!(target_endian = "big") { Order::Big } else { Order::Little });
    let names = match (&descriptor, shape.len()) {
        (TypeDescriptor::Compound(compound), 1) => {
            let names: Vec<String> = compound.fields.iter().map(|field| field.name.clone()).collect();
            for (name, len) in &wanted.fields {
                let field = compound.fields.iter().find(|field| field.name == *name);
                let field = field.ok_or_else(|| format!("no field {name}: rows hold {}", names.join(", ")))?;
                table.members.push(member(name, &field.ty, field.offset, native, *len)?);
            }
            names
        }
        (TypeDescriptor::Float(size), 2) => plain(&mut table, *size, shape[1], native, wanted)?,
        _ => {
            return Err(format!(
                "dataset {} has shape {shape:?} of {descriptor}: expected rows of a compound type, or a 2-D dataset of floats",
                wanted.dataset
            ));
        }
    };
    if table.rows == 0 {
        return Err(format!("dataset {} has no rows", wanted.dataset));
    }
    Ok((table, names))
}

fn member(name: &str, ty: &TypeDescriptor, offset: usize, order: Order, len: usize) -> Result<Member, String> {
    let (element, found) = match ty {
        TypeDescriptor::FixedArray(element, found) => (&**element, *found),
        scalar => (scalar, 1),
    };
    let TypeDescriptor::Float(size) = element else {
        return Err(format!("field {name} is {ty}: expected f4 or f8"));
    };
    if found != len {
        return Err(format!(
            "field {name} has {found} channels, {len} expected (data.emg_channels, data.joint_angles_channels)"
        ));
    }
    Ok(Member { name: name.into(), offset, scalar: scalar(*size), order, len })
}

fn scalar(size: FloatSize) -> Scalar {
    match size {
        FloatSize::U4 => Scalar::F32,
        FloatSize::U8 => Scalar::F64,
    }
}

fn plain(
    table: &mut Table,
    size: FloatSize,
    columns: usize,
    order: Order,
    wanted: &Wanted,
) -> Result<Vec<String>, String> {
    let needed: usize = wanted.fields.iter().map(|(_, len)| len).sum();
    if columns < needed {
        return Err(format!("dataset {} has {columns} columns, at least {needed} expected", wanted.dataset));
    }
    let mut offset = 0;
    for (name, len) in &wanted.fields {
        table.members.push(Member { name: name.clone(), offset, scalar: scalar(size), order, len: *len });
        offset += len * scalar(size).bytes();
    }
    table.plain = true;
    table.row_bytes = columns * scalar(size).bytes();
    Ok((0..columns).map(|column| format!("column {column}")).collect())
}

/// Where the rows lie, and through which filters.
fn layout(dataset: &Dataset, table: &Table) -> Result<Layout, String> {
    let library = |reason: &str, chunk_rows| Ok(Layout::Library { chunk_rows, reason: reason.into() });
    let some_rows = (table.rows as usize).clamp(1, 2048);
    let stored = dataset.layout();
    let chunk = dataset.chunk();
    let chunk_rows = chunk.as_ref().and_then(|shape| shape.first().copied()).unwrap_or(some_rows);
    refuse_unknown_filters(dataset)?;
    if let Layout::Library { reason, .. } = &table.layout {
        return library(reason, chunk_rows);
    }
    match stored {
        // Rows in other files have no address here.
        H5Layout::Contiguous => match dataset.offset() {
            Some(addr) if !external(dataset) => Ok(Layout::Contiguous { addr }),
            _ => library("rows outside the file or not yet written", some_rows),
        },
        H5Layout::Chunked => {
            if table.plain && chunk.is_some_and(|shape| shape.get(1) != Some(&(table.row_bytes / table.element_bytes)))
            {
                return library("chunks that cut rows", chunk_rows);
            }
            match filters(dataset) {
                Ok(filters) => Ok(Layout::Chunked { chunk_rows, chunks: chunks(dataset, table, chunk_rows)?, filters }),
                Err(name) => library(&name, chunk_rows),
            }
        }
        H5Layout::Compact => library("compact layout", some_rows),
        H5Layout::Virtual => library("virtual dataset", some_rows),
    }
}

fn external(dataset: &Dataset) -> bool {
    dataset.dcpl().is_ok_and(|plist| !plist.external().is_empty())
}

/// The filters that are decoded here, or the name of the first that is not.
fn filters(dataset: &Dataset) -> Result<Vec<Filter>, String> {
    let mut found = Vec::new();
    for filter in dataset.filters() {
        let known = match filter {
            H5Filter::Deflate(_) => Filter::Deflate,
            H5Filter::Shuffle => Filter::Shuffle,
            H5Filter::Fletcher32 => Filter::Fletcher32,
            H5Filter::User(LZF_ID, _) => Filter::Lzf,
            H5Filter::User(LZ4_ID, _) => Filter::Lz4,
            other => return Err(filter_name(&other)),
        };
        if found.contains(&known) {
            return Err(format!("{known:?} applied twice"));
        }
        found.push(known);
    }
    Ok(found)
}

/// The filters that neither Headroom nor this libhdf5 can undo.
///
/// # Errors
/// Names them, and the way out.
fn refuse_unknown_filters(dataset: &Dataset) -> Result<(), String> {
    let here = |filter: &H5Filter| matches!(filter.id(), LZF_ID | LZ4_ID) || filter.is_available();
    let unknown: Vec<String> = dataset.filters().iter().filter(|filter| !here(filter)).map(filter_name).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    Err(format!(
        "compressed by {}, which neither Headroom nor its libhdf5 decodes: write it again with gzip, lzf or lz4 (h5repack -f GZIP=4)",
        unknown.join(" and ")
    ))
}

/// For people: HDF5's registered filters by their usual names.
fn filter_name(filter: &H5Filter) -> String {
    let id = filter.id();
    let name = match id {
        4 => "szip",
        5 => "nbit",
        6 => "scale-offset",
        307 => "bzip2",
        32001 => "blosc",
        32008 => "bitshuffle",
        32013 => "zfp",
        32015 => "zstd",
        32026 => "blosc2",
        _ => "an unknown filter",
    };
    format!("{name} (filter {id})")
}

/// Whether an incomplete last chunk is stored without its filters.
fn last_chunk_is_raw(dataset: &Dataset, rows: u64, chunk_rows: usize) -> bool {
    let raw = |opts: ChunkOpts| opts.contains(ChunkOpts::DONT_FILTER_PARTIAL_CHUNKS);
    !rows.is_multiple_of(chunk_rows as u64) && dataset.dcpl().ok().and_then(|plist| plist.chunk_opts()).is_some_and(raw)
}

fn chunks(dataset: &Dataset, table: &Table, chunk_rows: usize) -> Result<Box<[ChunkAt]>, String> {
    table.validate_chunk_rows(chunk_rows)?;
    let mut chunks = vec![ChunkAt::default(); table.rows.div_ceil(chunk_rows as u64) as usize];
    let mut problem = None;
    let visited = dataset.chunks_visit(|info| {
        let row = info.offset.first().copied().unwrap_or(u64::MAX);
        let slot = (row.is_multiple_of(chunk_rows as u64))
            .then(|| chunks.get_mut((row / chunk_rows as u64) as usize))
            .flatten();
        match (slot, u32::try_from(info.size)) {
            (Some(slot), Ok(stored_bytes)) if stored_bytes > 0 => {
                *slot = ChunkAt { addr: info.addr, stored_bytes, filter_mask: info.filter_mask };
            }
            _ => problem = Some(format!("a chunk of {} bytes at row {row} is not credible", info.size)),
        }
        0
    });
    visited.map_err(|error| format!("its list of chunks cannot be read ({error}): replace it or leave it out"))?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    if last_chunk_is_raw(dataset, table.rows, chunk_rows)
        && let Some(last) = chunks.last_mut()
    {
        last.filter_mask = u32::MAX;
    }
    Ok(chunks.into())
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
