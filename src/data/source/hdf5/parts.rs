//! Rows that lie in other files: the parts of a virtual dataset, and external raw data.
//!
//! libhdf5 reads zeros where a part of a virtual dataset cannot be opened, for whatever reason, and behind the end of an
//! external file. So the parts are opened one by one here, and external files are measured before they are read. What cannot be
//! read is an error that names the part.
//!
//! ```text
//! mapping (selection of rows here ─► selection of rows there) ─► Runs that cover every row once ─► read part by part
//! ```

use super::ffi::mapping::mappings;
use super::ffi::types::{self, Selected};
use super::library::{self, Fault, missing, unreadable};
use super::runs::{COPY, MAX_RUNS, Span, covered, holes, merged, runs_of, through, within};
use super::storage::{refuse_unknown_filters, unwritten_rows};
use super::{Layout, OtherFile, Run, Table};
use crate::data::DataError;
use crate::data::source::{Identity, file_error};
use ::hdf5::Dataset;
use ::hdf5::dataset::Layout as H5Layout;
use ::hdf5::plist::DatasetCreate;
use spec::contract::shown;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Most virtual datasets that lead to each other.
const MAX_DEPTH: usize = 8;

/// State of a part when it was opened.
struct Seen {
    shape: Vec<u64>,
    /// Runs of rows that were never written.
    unwritten: Vec<[u64; 2]>,
    /// Parts of a part that is a virtual dataset as well, and where its rows lie in them.
    inner: Option<(Vec<Run>, Vec<OtherFile>)>,
}

/// Completes the table of a virtual dataset: opens each part once, checks that it holds the rows that are mapped, and notes the
/// rows that were never written there, or lie in no part. Does nothing for other datasets.
///
/// # Errors
/// A mapping of a kind that is not read; a part that is missing or cannot be opened, by name.
pub fn resolve(dataset: &Dataset, table: &mut Table) -> Result<(), DataError> {
    if dataset.layout() != H5Layout::Virtual {
        return Ok(());
    }
    let columns = if table.plain { table.columns() as u64 } else { 0 };
    let found = follow(dataset, table, &table.path, (table.rows, columns), 0)?;
    (table.others, table.unwritten) = (found.parts, found.unwritten);
    if let Layout::Library { runs, .. } = &mut table.layout {
        *runs = found.runs;
    }
    Ok(())
}

/// Where the rows of a virtual dataset lie.
#[derive(Default)]
struct Followed {
    runs: Vec<Run>,
    parts: Vec<OtherFile>,
    unwritten: Vec<[u64; 2]>,
}

/// Follows a virtual dataset in file `path`. `table` says which fields are read.
fn follow(
    dataset: &Dataset,
    table: &Table,
    path: &Path,
    (rows, columns): (u64, u64),
    depth: usize,
) -> Result<Followed, DataError> {
    let fail = |problem: String| file_error(&table.path, problem);
    if depth > MAX_DEPTH {
        return Err(fail("virtual datasets that lead to each other without end".into()));
    }
    let mappings = dataset.dcpl().and_then(|plist| mappings(&plist));
    let mappings = mappings.map_err(|error| fail(format!("its virtual mapping: {error}")))?;
    let mut seen: Vec<(OtherFile, Seen)> = Vec::new();
    let mut mapped = Vec::new();
    let mut unwritten = Vec::new();
    for mapping in &mappings {
        let file = locate(path, &mapping.file).map_err(fail)?;
        let known = seen.iter().rposition(|(other, _)| other.path == file && other.dataset == mapping.dataset);
        let part = match known {
            Some(part) => part,
            None => {
                let identity = identity(&file).map_err(|fault| lacking(&table.path, &file, fault))?;
                let other = OtherFile { path: file, dataset: mapping.dataset.clone(), identity };
                let facts = look_at(table, &other, depth)?;
                seen.push((other, facts));
                seen.len() - 1
            }
        };
        let (other, facts) = &seen[part];
        let runs = runs_of(mapping, part, &facts.shape, table.plain).map_err(fail)?;
        within(&runs, &facts.shape, &other.path).map_err(fail)?;
        unwritten.extend(runs.iter().flat_map(|run| holes(run, &facts.unwritten)));
        mapped.extend(runs);
        if mapped.len() > MAX_RUNS {
            return Err(fail(format!("virtual dataset of more than {MAX_RUNS} pieces: {COPY}")));
        }
    }
    unwritten.extend(covered(&mut mapped, rows, columns).map_err(fail)?);
    let unwritten = merged(unwritten);
    Ok(Followed { unwritten, ..spread(mapped, seen) })
}

/// Puts the parts of virtual parts in the place of these.
fn spread(mapped: Vec<Run>, seen: Vec<(OtherFile, Seen)>) -> Followed {
    let mut all = Followed::default();
    for (n, (other, facts)) in seen.into_iter().enumerate() {
        let own: Vec<Run> = mapped.iter().filter(|run| run.part == n).cloned().collect();
        let first = all.parts.len();
        match facts.inner {
            Some((inner, parts)) => {
                all.runs.extend(through(&own, &inner, first));
                all.parts.extend(parts);
                // No run leads to it, but its mapping may change.
                all.parts.push(other);
            }
            None => {
                all.runs.extend(own.into_iter().map(|run| Run { part: first, ..run }));
                all.parts.push(other);
            }
        }
    }
    all
}

/// Looks for the parts of a virtual dataset without rows.
///
/// # Errors
/// Names the first part that is missing: libhdf5 counts only rows of parts that it finds.
pub fn refuse_missing_parts(dataset: &Dataset, path: &Path) -> Result<(), String> {
    if dataset.layout() != H5Layout::Virtual {
        return Ok(());
    }
    let mappings = dataset.dcpl().and_then(|plist| mappings(&plist)).map_err(|error| error.to_string())?;
    mappings.iter().try_for_each(|mapping| locate(path, &mapping.file).map(drop))
}

/// Words for a part that cannot be opened.
fn lost(part: &Path, fault: Fault) -> String {
    let of_process = fault.is_of_process();
    let words = fault.into_words(part);
    if of_process { unreadable(part, &words) } else { missing(part, &words) }
}

/// File that a virtual dataset names, where libhdf5 looks for it (`H5F_prefix_open_file`): below HDF5_VDS_PREFIX, beside the file,
/// in the working directory, beside the file that a link leads to.
fn locate(path: &Path, name: &OsStr) -> Result<PathBuf, String> {
    if name == "." {
        return Ok(path.to_owned());
    }
    let named = Path::new(name);
    if name.as_encoded_bytes().contains(&b'%') {
        return Err(format!("virtual dataset over files that a pattern names ({}): {COPY}", shown(named)));
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut candidates = Vec::new();
    let mut name = named;
    if named.is_absolute() {
        candidates.push(named.to_owned());
        name = named.file_name().map_or(named, Path::new);
    }
    let prefixes = std::env::var("HDF5_VDS_PREFIX").unwrap_or_default();
    let prefixes = prefixes.split(':').filter(|prefix| !prefix.is_empty() && *prefix != ".");
    candidates.extend(prefixes.map(|prefix| at_origin(prefix, folder).join(name)));
    candidates.extend([folder.join(name), name.to_owned()]);
    if let Some(folder) = path.canonicalize().ok().as_deref().and_then(Path::parent) {
        candidates.push(folder.join(name));
    }
    for candidate in &candidates {
        match std::fs::metadata(candidate) {
            Ok(facts) if facts.is_file() => return Ok(candidate.clone()),
            Ok(_) => return Err(missing(candidate, "it is no regular file")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(missing(candidate, &error.to_string())),
        }
    }
    let first = if named.is_absolute() { named.to_owned() } else { folder.join(named) };
    Err(missing(&first, "No such file or directory"))
}

/// `prefix` with the file's folder for a leading `${ORIGIN}`.
fn at_origin(prefix: &str, folder: &Path) -> PathBuf {
    match prefix.strip_prefix("${ORIGIN}") {
        Some(rest) => folder.join(rest.trim_start_matches('/')),
        None => PathBuf::from(prefix),
    }
}

/// The external raw files of a dataset of so many bytes, as libhdf5 finds them (`H5D__efl_read`), each with its stored bytes.
///
/// # Errors
/// A file is missing, or ends before the rows that it is to hold: libhdf5 would read zeros there.
pub fn raw_files(plist: &DatasetCreate, path: &Path, bytes: u64) -> Result<Vec<OtherFile>, String> {
    let files = plist.get_external().map_err(|error| format!("its list of external files: {error}"))?;
    let prefix = std::env::var("HDF5_EXTFILE_PREFIX").unwrap_or_default();
    let folder = match prefix.as_str() {
        "" | "." => PathBuf::new(),
        prefix => at_origin(prefix, path.parent().unwrap_or(Path::new(""))),
    };
    let (mut left, mut found) = (bytes, Vec::new());
    for external in files {
        if left == 0 {
            break;
        }
        let file = folder.join(&external.name);
        // 0: all that is there.
        let take = if external.size == 0 { left } else { left.min(external.size as u64) };
        let identity = identity(&file).map_err(|fault| missing(&file, &fault.into_words(&file)))?;
        let file_bytes = identity.bytes;
        let needed = (external.offset as u64).saturating_add(take);
        if file_bytes < needed {
            return Err(missing(&file, &format!("it ends at byte {file_bytes}, its rows at byte {needed}")));
        }
        found.push(OtherFile { path: file, dataset: String::new(), identity });
        left -= take;
    }
    if left > 0 {
        return Err(format!("{left} of its {bytes} bytes of rows lie in no external file: it is damaged"));
    }
    Ok(found)
}

fn without_path(error: &DataError) -> String {
    match error {
        DataError::File { problem, .. } => problem.clone(),
        other => other.to_string(),
    }
}

/// Checks that the other files of `table` are as they were when it was opened.
///
/// # Errors
/// Names the first that is gone or changed.
pub fn check_others(table: &Table) -> Result<(), String> {
    table.others.iter().try_for_each(check_other)
}

fn check_other(other: &OtherFile) -> Result<(), String> {
    let found = library::patiently(|| File::open(&other.path).map_err(|error| Fault::of_io(&error)));
    let file = found.map_err(|fault| lost(&other.path, fault))?;
    let same = other.identity.check(&other.path, &file);
    same.map_err(|error| format!("its part {} {}", shown(&other.path), without_path(&error)))
}

/// Identity of a part, a regular file.
fn identity(part: &Path) -> Result<Identity, Fault> {
    let file = library::patiently(|| library::regular(part))?;
    Identity::of(part, &file).map_err(|error| Fault::content(without_path(&error)))
}

/// Opens the dataset of a part. The part's file must be as it was when the virtual dataset was opened.
///
/// # Errors
/// Names the part.
pub fn open_part(part: &OtherFile) -> Result<Dataset, String> {
    check_other(part)?;
    let file = library::open(&part.path).map_err(|fault| lost(&part.path, fault))?;
    file.dataset(&part.dataset).map_err(|error| {
        let fault = Fault::of(&error);
        let words = if fault.is_lack() { fault.words } else { format!("it holds no dataset {}", part.dataset) };
        missing(&part.path, &words)
    })
}

/// Reads those rows of `run` that are among `rows` into their places in `packed`, rows of the fields in use.
///
/// # Errors
/// libhdf5's.
pub fn read_run(dataset: &Dataset, table: &Table, run: &Run, rows: Span, packed: &mut [u8]) -> ::hdf5::Result<()> {
    let (from, to) = (run.rows[0].max(rows.start), run.rows[1].min(rows.end));
    let source = run.source_row + (from - run.rows[0])..run.source_row + (to - run.rows[0]);
    let first = (from - rows.start) as usize;
    let row_bytes = table.used_row_bytes();
    let place = first * row_bytes..first * row_bytes + (to - from) as usize * row_bytes;
    if !table.plain {
        let selected = Selected { members: &table.members, columns: None };
        return types::read_rows(dataset, &selected, source, &mut packed[place]);
    }
    let used = run.columns[0] as usize..(run.columns[1] as usize).min(table.columns());
    if used.is_empty() {
        return Ok(());
    }
    let columns = run.source_column as usize..run.source_column as usize + used.len();
    let cell = row_bytes / table.columns();
    let mut block = vec![0; (to - from) as usize * used.len() * cell];
    let selected = Selected { members: &table.members, columns: Some(columns) };
    types::read_rows(dataset, &selected, source, &mut block)?;
    let rows = block.chunks_exact(used.len() * cell).zip(packed[place].chunks_exact_mut(row_bytes));
    rows.for_each(|(from, to)| to[used.start * cell..used.end * cell].copy_from_slice(from));
    Ok(())
}

/// The error about the whole file when a part cannot be opened.
fn lacking(path: &Path, part: &Path, fault: Fault) -> DataError {
    match fault.into_error(part, |words| format!("cannot be read as HDF5 ({words})")) {
        DataError::Lack { problem, .. } => {
            let problem = format!("its part {} {problem}", shown(part));
            DataError::Lack { path: path.to_owned(), problem }
        }
        error => file_error(path, missing(part, &without_path(&error))),
    }
}

/// Opens a part and checks that its fields can be read as those of `table`.
fn look_at(table: &Table, part: &OtherFile, depth: usize) -> Result<Seen, DataError> {
    let fail = |problem: String| file_error(&table.path, missing(&part.path, &problem));
    drop(library::open(&part.path).map_err(|fault| lacking(&table.path, &part.path, fault))?);
    let dataset = open_part(part).map_err(|problem| file_error(&table.path, problem))?;
    types::check_convertible(&dataset, &table.members, table.plain).map_err(fail)?;
    let shape: Vec<u64> = dataset.shape().into_iter().map(|dim| dim as u64).collect();
    if shape.len() != 1 + usize::from(table.plain) {
        return Err(fail(format!("it has shape {shape:?}")));
    }
    if dataset.layout() == H5Layout::Virtual {
        let size = (shape[0], shape.get(1).copied().unwrap_or(0));
        let found = follow(&dataset, table, &part.path, size, depth + 1)?;
        return Ok(Seen { shape, unwritten: found.unwritten, inner: Some((found.runs, found.parts)) });
    }
    let plist = dataset.dcpl().map_err(|error| fail(error.to_string()))?;
    if !plist.external().is_empty() {
        raw_files(&plist, &part.path, dataset.storage_size()).map_err(fail)?;
    }
    refuse_unknown_filters(&dataset).map_err(fail)?;
    Ok(Seen { shape, unwritten: unwritten_rows(&dataset).map_err(fail)?, inner: None })
}
