//! Windows over the rows of HDF5 files: read by `pread` and decoded in the calling thread, without libhdf5 or Python.
//!
//! ```text
//! index ─► windows ─► file, first row ─► rows of a table: its chunks as entries of the node's cache, else decoded here
//!                                      └► datasets beside each other: chunks decoded here, some kept
//! ```

use crate::entry::INDEX_BITS;
use crate::failure::Failure;
use crate::native::{Memory, Native, Template, words};
use cache::client::{CacheClient, CacheError, Filling, Item};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use source::columns::{Columns, find};
use source::data::source::Identity;
use source::data::source::chunks::LruChunks;
use source::data::source::hdf5::array::{Array, ArrayReader, Number};
use source::data::source::hdf5::gather::Transform;
use source::data::source::hdf5::{Reader, Target};
use source::data::windows::Windows as Index;
use source::data::{DataError, Scratch};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Part of a key that is an entry's number.
const ENTRY_MASK: u64 = (1 << INDEX_BITS) - 1;

/// A column as numpy has it: name, type, shape of a window without its rows.
type Field = (String, &'static str, Vec<usize>);

enum Kind {
    Rows(Rows),
    /// Arrays of file `f` are numbers `f × columns ..`.
    Arrays(ArrayReader),
}

/// Tables with the entries that lie before each of them.
struct Rows {
    reader: Reader,
    bases: Vec<u64>,
    cache: Option<(Arc<CacheClient>, u64)>,
    /// The cache is gone.
    lost: AtomicBool,
}

/// Windows of all files.
pub struct Windows {
    kind: Kind,
    index: Index,
    rows: usize,
    fields: Vec<Field>,
    paths: Vec<PathBuf>,
    template: OnceLock<Template>,
}

fn typestr(number: Number) -> &'static str {
    match number {
        Number::U8 => "|u1",
        Number::I8 => "|i1",
        Number::U16 => "<u2",
        Number::I16 => "<i2",
        Number::U32 => "<u4",
        Number::I32 => "<i4",
        Number::U64 => "<u8",
        Number::I64 => "<i8",
        Number::F32 => "<f4",
        Number::F64 => "<f8",
    }
}

fn array_field(name: &str, array: &Array) -> Field {
    let shape = if array.is_flat { Vec::new() } else { vec![array.columns as usize] };
    (name.to_owned(), typestr(array.number), shape)
}

/// All files must have the same columns.
fn same(path: &Path, fields: &[Field], first: &mut Option<Vec<Field>>) -> Result<(), DataError> {
    let Some(known) = first else {
        *first = Some(fields.to_vec());
        return Ok(());
    };
    let differs = known.iter().zip(fields).find(|(known, found)| known != found);
    let Some(((name, typestr, shape), (_, found, found_shape))) = differs else { return Ok(()) };
    let problem = format!("column {name} is {found} {found_shape:?}, in the first file it is {typestr} {shape:?}");
    Err(DataError::File { path: path.to_owned(), problem: format!("{problem}: give files of one kind") })
}

impl Windows {
    /// # Errors
    /// A file cannot be read, or does not hold the columns.
    pub fn open(
        paths: Vec<PathBuf>,
        (columns, dataset): (&[String], Option<&str>),
        (rows, stride): (u64, u64),
        kept_bytes: u64,
        cache: Option<(Arc<CacheClient>, u64)>,
    ) -> Result<Self, DataError> {
        let (mut tables, mut arrays, mut index, mut fields) = (Vec::new(), Vec::new(), Index::new(stride), None);
        for (file, path) in paths.iter().enumerate() {
            let found = match find(path, columns, dataset)? {
                Columns::Rows(table, widths) => {
                    table.written().into_iter().for_each(|block| index.add(file as u32, block, rows));
                    tables.push(*table);
                    let field = |(name, width): (&String, Option<usize>)| {
                        (name.clone(), "<f4", width.map(|width| vec![width]).unwrap_or_default())
                    };
                    columns.iter().zip(widths).map(field).collect::<Vec<_>>()
                }
                Columns::Arrays(found) => {
                    index.add(file as u32, [0, found.first().map_or(0, |array| array.rows)], rows);
                    let fields = columns.iter().zip(&found).map(|(name, array)| array_field(name, array)).collect();
                    arrays.extend(found);
                    fields
                }
            };
            same(path, &found, &mut fields)?;
        }
        if let (false, Some(path)) = (tables.is_empty() || arrays.is_empty(), paths.last()) {
            let problem =
                "some files hold the columns as fields of a table, others as datasets: give files of one kind";
            return Err(DataError::File { path: path.clone(), problem: problem.into() });
        }
        let store = Arc::new(LruChunks::new(kept_bytes));
        let identities = paths.iter().map(|path| Identity::now(path)).collect::<Result<Vec<_>, _>>()?;
        let kind = match arrays.is_empty() {
            true => Kind::Rows(Rows::new(Reader::new(tables, store).recognising(identities), cache)),
            false => Kind::Arrays(ArrayReader::new(arrays, paths.iter().cloned().zip(identities).collect(), store)),
        };
        let (fields, rows) = (fields.unwrap_or_default(), rows as usize);
        Ok(Self { kind, index, rows, fields, paths, template: OnceLock::new() })
    }

    pub fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// Takes the entry of a window of zeros.
    ///
    /// # Errors
    /// The bytes are not such an entry.
    pub fn set_template(&self, bytes: Vec<u8>) -> PyResult<()> {
        let bytes_of = |(_, typestr, shape): &Field| {
            let item = typestr.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(1);
            self.rows * shape.iter().product::<usize>() * item
        };
        let sizes: Vec<usize> = self.fields.iter().map(bytes_of).collect();
        let template = Template::new(bytes, &sizes);
        let template = template.ok_or_else(|| PyValueError::new_err("this is no entry of a window"))?;
        // The second one is the same.
        let _ = self.template.set(template);
        Ok(())
    }

    fn read(&self, file: usize, row: u64, leaves: &mut [&mut [u8]], memory: &mut Memory) -> Result<(), DataError> {
        match &self.kind {
            Kind::Rows(rows) => {
                let targets = leaves.iter_mut().enumerate();
                let mut targets: Vec<Target> =
                    targets.map(|(member, out)| Target { member, transform: &Transform::IDENTITY, out }).collect();
                rows.read(file, row, self.rows, &mut targets, &mut memory.scratch)
            }
            Kind::Arrays(reader) => {
                for (column, out) in leaves.iter_mut().enumerate() {
                    let mut bytes = std::mem::take(&mut memory.scratch.raw);
                    bytes.clear();
                    let array = file * self.fields.len() + column;
                    let read = reader.read(array, row..row + self.rows as u64, &mut bytes, &mut memory.buffers);
                    if read.is_ok() {
                        out.copy_from_slice(&bytes);
                    }
                    memory.scratch.raw = bytes;
                    read?;
                }
                Ok(())
            }
        }
    }
}

impl Native for Windows {
    fn len(&self) -> usize {
        self.index.len()
    }

    fn describe(&self, index: usize) -> String {
        match self.index.get(index) {
            Some((file, row)) => {
                let path = self.paths.get(file as usize).map(|path| path.display().to_string()).unwrap_or_default();
                format!("{path} rows {row}..{}", row + self.rows as u64)
            }
            None => format!("window {index} of {}", self.len()),
        }
    }

    fn counts(&self) -> (u64, u64) {
        match &self.kind {
            Kind::Rows(rows) => (rows.reader.stats().bytes, rows.reader.stats().decoded_chunks),
            Kind::Arrays(reader) => reader.stats(),
        }
    }

    fn sample(&self, index: u64, memory: &mut Memory) -> Result<Vec<u8>, Failure> {
        let found = usize::try_from(index).ok().and_then(|index| self.index.get(index)).zip(self.template.get());
        let ((file, row), template) =
            found.ok_or_else(|| Failure::File(format!("window {index} of {}", self.len())))?;
        let filled = template.filled(|leaves| self.read(file as usize, row, leaves, memory));
        filled.map_err(|error| Failure::File(words(&error)))
    }
}

/// A failure on the way through the cache.
enum Trouble {
    Data(DataError),
    /// It is gone, or silent.
    Cache,
}

impl From<CacheError> for Trouble {
    fn from(_: CacheError) -> Self {
        Trouble::Cache
    }
}

impl Rows {
    fn new(reader: Reader, cache: Option<(Arc<CacheClient>, u64)>) -> Self {
        let mut total = 0;
        let before = |file| {
            let before = total;
            total += reader.entries(file);
            before
        };
        let bases = (0..reader.tables().len()).map(before).collect();
        Self { reader, bases, cache, lost: AtomicBool::new(false) }
    }

    /// Rows through the node's cache, entry by entry; past it where it has no room, or is gone.
    fn read(
        &self,
        file: usize,
        start: u64,
        rows: usize,
        targets: &mut [Target],
        scratch: &mut Scratch,
    ) -> Result<(), DataError> {
        let Some((cache, base)) = self.cache.as_ref().filter(|_| !self.lost.load(Ordering::Relaxed)) else {
            return self.reader.read(file, start, rows, targets, scratch);
        };
        self.reader.check(file, start, rows, targets)?;
        let entry_rows = self.reader.entry_rows(file) as u64;
        let mut done = 0;
        while done < rows {
            let row = start + done as u64;
            let (index, first) = (row / entry_rows, (row % entry_rows) as usize);
            let take = (entry_rows as usize - first).min(rows - done);
            let bytes = self.reader.entry_bytes(file, index);
            let key = base | (self.bases[file] + index);
            let want = Item { key, bytes: bytes as u64, next_use: u64::MAX, offer: false };
            // One entry at a time: others of these keys may be granted to this thread while it waits.
            let mut fill = |filling: &mut Filling| self.fill(filling, scratch);
            let found = match cache.open::<Trouble>(want, false, *base..=*base | ENTRY_MASK, &mut fill) {
                Ok(found) => found,
                Err(Trouble::Data(error)) => return Err(error),
                Err(Trouble::Cache) => {
                    self.lost.store(true, Ordering::Relaxed);
                    return self.reader.read(file, start, rows, targets, scratch);
                }
            };
            match found {
                Some(entry) => {
                    self.reader.gather_entry((file, index), &entry, first, done..done + take, targets)?;
                }
                None => return self.reader.read(file, start, rows, targets, scratch),
            }
            done += take;
        }
        Ok(())
    }

    fn fill(&self, filling: &mut Filling, scratch: &mut Scratch) -> Result<(), Trouble> {
        let number = filling.key() & ENTRY_MASK;
        let file = self.bases.partition_point(|base| *base <= number).saturating_sub(1);
        let index = number - self.bases.get(file).copied().unwrap_or(0);
        let bytes = self.reader.entry_bytes(file, index);
        if bytes > filling.room() {
            filling.set_length(0);
            return Ok(());
        }
        filling.set_length(bytes);
        let room = &mut filling.bytes_mut()[..bytes];
        self.reader.fill_entry(file, index, room, scratch).map_err(Trouble::Data)
    }
}
