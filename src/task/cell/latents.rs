//! Latents on disk and in the page cache: what the stage `latents` writes and later stages train on.
//!
//! ```text
//! runs/NAME/latents/latents.bin     a row per cell, in the order of files and rows: latent (bf16 or f32), class (i16, −1: none)
//!                   parts.bin       a byte per cell: training, validation, test, or none
//!                   latents.json    sizes, element type, classes
//! ```
//! With bf16 and 128 numbers an atlas of 100 million cells is 25.8 GB.

use super::data::members::{Members, Part};
use crate::data::entries::{CachedEntries, EntrySource};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, Pages, ReadRequest, Scratch, Wake};
use crate::task::outline::SCRATCH_BYTES;
use cache::client::{CacheClient, Reading};
use serde::{Deserialize, Serialize};
use spec::contract::{CacheMode, DataSizes};
use spec::task::cell::LatentType;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use tch::{Kind, Tensor};

/// Rows of latents.
pub const ROWS: &str = "latents.bin";
/// Part of each cell.
const PARTS: &str = "parts.bin";
/// The file with the sizes.
const FACTS: &str = "latents.json";
/// A way out of damaged files.
const AGAIN: &str = "run the stage again with --from latents";
/// Rows of an entry of the page cache, at the least and at most; and entries of a small data set.
const ENTRY_ROWS: [u64; 2] = [64, 4096];
const FEW_ENTRIES: u64 = 64;
/// Bytes of a class.
const CLASS: usize = 2;
/// Most classes: their numbers are i16.
pub const MOST_CLASSES: usize = i16::MAX as usize;

/// Sizes of kept latents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LatentFacts {
    /// Numbers of a latent.
    pub latent: usize,
    pub kind: LatentType,
    /// Cells of all parts.
    pub cells: u64,
    /// Genes that the autoencoder sees.
    pub genes: usize,
    /// Names of the classes, sorted.
    pub classes: Vec<String>,
}

impl LatentFacts {
    /// Reads the facts of a finished stage.
    ///
    /// # Errors
    /// The file is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(FACTS);
        let text = std::fs::read_to_string(&path)
            .map_err(|e| DataError::File { path: path.clone(), problem: format!("{e}: {AGAIN}") })?;
        serde_json::from_str(&text).map_err(|e| DataError::Content { path, problem: format!("{e}: {AGAIN}") })
    }

    /// Writes the facts, and the part of each cell, into the folder of the stage.
    ///
    /// # Errors
    /// No room or permission.
    pub fn write(&self, folder: &Path, parts: &[u8]) -> Result<(), DataError> {
        let path = folder.join(PARTS);
        std::fs::write(&path, parts).map_err(|e| DataError::output(&path, e))?;
        let path = folder.join(FACTS);
        let text = serde_json::to_string_pretty(self).unwrap_or_default();
        std::fs::write(&path, text + "\n").map_err(|e| DataError::output(&path, e))
    }

    /// Bytes of a latent.
    fn latent_bytes(&self) -> usize {
        self.latent * if self.kind == LatentType::Bf16 { 2 } else { 4 }
    }

    fn row_bytes(&self) -> usize {
        self.latent_bytes() + CLASS
    }

    /// Rows of an entry of the page cache.
    fn entry_rows(&self) -> u64 {
        self.cells.div_ceil(FEW_ENTRIES).clamp(ENTRY_ROWS[0], ENTRY_ROWS[1])
    }

    /// Bytes of all rows.
    pub fn bytes(&self) -> u64 {
        self.cells * self.row_bytes() as u64
    }

    /// Fields of a sample: `latent` u8 `[2 L]` (bits of bf16) or f32 `[L]`; `label` i64.
    pub fn fields(&self) -> Vec<FieldSpec> {
        let latent = match self.kind {
            LatentType::Bf16 => FieldSpec::new("latent", &[2 * self.latent], Dtype::U8),
            LatentType::F32 => FieldSpec::new("latent", &[self.latent], Dtype::F32),
        };
        vec![latent, FieldSpec::new("label", &[], Dtype::I64)]
    }

    /// Rows of latents f32 `[B, L]` and classes i64 `[B]`, as they lie in a file.
    ///
    /// # Errors
    /// libtorch refuses.
    pub fn rows(&self, latents: &Tensor, classes: &Tensor) -> Result<Vec<u8>, tch::TchError> {
        let latents = latents.to_device(tch::Device::Cpu);
        let bits: Vec<u8> = match self.kind {
            LatentType::Bf16 => {
                let bits = latents.to_kind(Kind::BFloat16).contiguous().f_view_dtype(Kind::Int16)?.flatten(0, -1);
                Vec::<i16>::try_from(bits)?.iter().flat_map(|bits| bits.to_le_bytes()).collect()
            }
            LatentType::F32 => {
                let values = latents.to_kind(Kind::Float).flatten(0, -1);
                Vec::<f32>::try_from(values)?.iter().flat_map(|value| value.to_le_bytes()).collect()
            }
        };
        let classes = Vec::<i64>::try_from(classes.to_device(tch::Device::Cpu))?;
        let mut rows = Vec::with_capacity(classes.len() * self.row_bytes());
        for (latent, class) in bits.chunks_exact(self.latent_bytes().max(1)).zip(classes) {
            rows.extend_from_slice(latent);
            rows.extend_from_slice(&(class as i16).to_le_bytes());
        }
        Ok(rows)
    }
}

/// Latents f32 `[B, L]` of a batch's first field.
pub fn widened(field: &Tensor) -> Tensor {
    if field.kind() == Kind::Uint8 {
        field.view_dtype(Kind::BFloat16).to_kind(Kind::Float)
    } else {
        field.shallow_clone()
    }
}

/// The rows of the stage, as entries of the page cache.
pub struct LatentFile {
    facts: LatentFacts,
    path: PathBuf,
    file: File,
}

impl LatentFile {
    /// Opens the latents in `folder`.
    ///
    /// # Errors
    /// A file is missing or has another length than the facts say.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let (facts, path) = (LatentFacts::read(folder)?, folder.join(ROWS));
        let file = File::open(&path).map_err(|e| failed(&path, &e))?;
        let bytes = file.metadata().map_err(|e| failed(&path, &e))?.len();
        check_length(&path, bytes, facts.bytes())?;
        Ok(Self { facts, path, file })
    }

    pub fn facts(&self) -> &LatentFacts {
        &self.facts
    }

    fn read_rows(&self, row: u64, out: &mut [u8]) -> Result<(), DataError> {
        self.file.read_exact_at(out, row * self.facts.row_bytes() as u64).map_err(|e| failed(&self.path, &e))
    }
}

fn failed(path: &Path, error: &std::io::Error) -> DataError {
    DataError::File { path: path.to_owned(), problem: format!("{error}: {AGAIN}") }
}

fn check_length(path: &Path, bytes: u64, expected: u64) -> Result<(), DataError> {
    if bytes == expected {
        return Ok(());
    }
    let problem = format!("has {bytes} bytes, expected {expected}: {AGAIN}");
    Err(DataError::Content { path: path.to_owned(), problem })
}

/// The class at the end of a row.
fn class_of(row: &[u8]) -> i16 {
    match row {
        [.., low, high] => i16::from_le_bytes([*low, *high]),
        _ => -1,
    }
}

impl EntrySource for LatentFile {
    fn entry_bytes(&self, key: u64) -> u64 {
        let rows = self.facts.entry_rows();
        self.facts.cells.saturating_sub(key * rows).min(rows) * self.facts.row_bytes() as u64
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], _: &mut Scratch) -> Result<(), DataError> {
        self.read_rows(key * self.facts.entry_rows(), out)
    }
}

/// Sizes of the latents for a plan.
pub fn sizes(facts: &LatentFacts) -> DataSizes {
    let row = facts.row_bytes() as u64;
    DataSizes {
        entry_bytes: [facts.entry_rows().min(facts.cells) * row; 2],
        scratch_bytes: SCRATCH_BYTES,
        useful_bytes: facts.cells * row,
        useful: format!("{} latents of {row} B", facts.cells),
        useful_is_exact: true,
        auto_policy: CacheMode::Pin,
        ..DataSizes::default()
    }
}

/// Latents of one part of the cells.
pub struct LatentDataset {
    file: Arc<LatentFile>,
    cached: Option<Arc<CachedEntries<LatentFile>>>,
    members: Members,
    fields: Vec<FieldSpec>,
}

impl LatentDataset {
    /// Training, validation and test of the latents in `folder`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn open(folder: &Path, cache: Option<Arc<CacheClient>>) -> Result<[Arc<dyn Dataset>; 3], DataError> {
        let file = Arc::new(LatentFile::open(folder)?);
        let path = folder.join(PARTS);
        let parts: Arc<[u8]> = std::fs::read(&path).map_err(|e| failed(&path, &e))?.into();
        check_length(&path, parts.len() as u64, file.facts.cells)?;
        if let Some(cell) = parts.iter().position(|part| *part > Part::Out as u8) {
            let problem = format!("cell {cell} is in part {}, expected 0 to 3: {AGAIN}", parts[cell]);
            return Err(DataError::Content { path, problem });
        }
        let cached = cache.map(|cache| Arc::new(CachedEntries::new(Arc::clone(&file), cache)));
        let part = |part| -> Arc<dyn Dataset> {
            let members = Members::new(Arc::clone(&parts), &[part]);
            Arc::new(Self { fields: file.facts.fields(), file: Arc::clone(&file), cached: cached.clone(), members })
        };
        Ok([part(Part::Train), part(Part::Val), part(Part::Test)])
    }

    fn row(&self, index: u64) -> Result<u64, DataError> {
        let count = self.members.len();
        self.members.row(index).ok_or(DataError::OutOfRange { what: "cell", index, place: "the latents", count })
    }

    /// Entries that the samples lie in, each once.
    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let mut keys: Vec<u64> =
            ids.iter().filter_map(|&id| self.members.row(id)).map(|row| row / self.file.facts.entry_rows()).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

impl Dataset for LatentDataset {
    fn len(&self) -> usize {
        self.members.len() as usize
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let row = self.row(request.index as u64)?;
        let [latent, label] = out else {
            return Err(DataError::Fields { asked: out.len(), count: self.fields.len() });
        };
        let mut put = |bytes: &[u8]| {
            let (values, _) = bytes.split_at(bytes.len().saturating_sub(CLASS));
            latent.copy_from_slice(values);
            label.copy_from_slice(&i64::from(class_of(bytes)).to_ne_bytes());
        };
        let (row_bytes, rows) = (self.file.facts.row_bytes(), self.file.facts.entry_rows());
        if let Some(cached) = &self.cached
            && let Reading::Held(entry) = cached.read_or_lend(row / rows, (0..0, u64::MAX), scratch)?
        {
            let at = (row % rows) as usize * row_bytes;
            put(&entry[at..at + row_bytes]);
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut scratch.raw);
        bytes.resize(row_bytes, 0);
        let read = self.file.read_rows(row, &mut bytes);
        if read.is_ok() {
            put(&bytes);
        }
        scratch.raw = bytes;
        scratch.count();
        read
    }

    fn describe(&self, index: usize) -> String {
        let row = self.row(index as u64).map_or_else(|_| index.to_string(), |row| row.to_string());
        format!("{ROWS} row {row}")
    }

    fn announce(&self, batch: BatchAhead) {
        if let Some(cached) = &self.cached {
            cached.announce(&self.keys(batch.ids), |_| u64::MAX);
        }
    }

    fn retire(&self, batch: BatchAhead) {
        if let Some(cached) = &self.cached {
            cached.retire(&self.keys(batch.ids));
        }
    }

    fn work_ahead(&self, scratch: &mut Scratch) -> bool {
        self.cached.as_ref().is_some_and(|cached| cached.work_ahead(scratch))
    }

    fn wake_by(&self, waker: Weak<dyn Wake>) {
        if let Some(cached) = &self.cached {
            cached.wake_by(waker);
        }
    }

    fn pages(&self) -> Option<Pages> {
        let mut pages: Vec<u64> = (0..self.file.facts.cells)
            .step_by(self.file.facts.entry_rows() as usize)
            .map(|row| self.members.rank(row))
            .collect();
        pages.dedup();
        Some(Pages { pages, sequences: vec![0] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kind: LatentType) -> LatentFacts {
        LatentFacts { latent: 3, kind, cells: 7, genes: 7, classes: vec!["a".into(), "b".into()] }
    }

    fn written(kind: LatentType) -> (tempfile::TempDir, Tensor) {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts(kind);
        let latents = Tensor::arange(21, (Kind::Float, tch::Device::Cpu)).view([7, 3]) / 8.0;
        let classes = Tensor::from_slice(&[0i64, 1, -1, 1, 0, 1, 0]);
        std::fs::write(dir.path().join(ROWS), facts.rows(&latents, &classes).unwrap()).unwrap();
        facts.write(dir.path(), &[0, 0, 1, 0, 3, 1, 0]).unwrap();
        (dir, latents)
    }

    fn read(dataset: &dyn Dataset, index: usize) -> Result<(Tensor, i64), DataError> {
        let mut latent = vec![0u8; dataset.fields()[0].sample_bytes()];
        let mut label = [0u8; 8];
        let request = ReadRequest { epoch: 0, index };
        dataset.read(request, &mut [&mut latent, &mut label], &mut Scratch::default())?;
        let field = &dataset.fields()[0];
        let shape: Vec<i64> = std::iter::once(1).chain(field.shape.iter().map(|&n| n as i64)).collect();
        let kind = if field.dtype == Dtype::U8 { Kind::Uint8 } else { Kind::Float };
        Ok((widened(&Tensor::from_data_size(&latent, &shape, kind)), i64::from_ne_bytes(label)))
    }

    /// Eighths are exact in bf16.
    #[test]
    fn latents_are_read_as_they_were_written() {
        for kind in [LatentType::Bf16, LatentType::F32] {
            let (dir, latents) = written(kind);
            let [train, val, test] = LatentDataset::open(dir.path(), None).unwrap();
            assert_eq!([train.len(), val.len(), test.len()], [4, 2, 0]);
            for (dataset, index, row, class) in
                [(&train, 0, 0, 0), (&train, 3, 6, 0), (&val, 0, 2, -1), (&val, 1, 5, 1)]
            {
                let (latent, label) = read(dataset.as_ref(), index).unwrap();
                assert_eq!((latent, label), (latents.narrow(0, row, 1), class));
            }
            assert_eq!(train.describe(2), "latents.bin row 3");
            assert!(read(val.as_ref(), 2).unwrap_err().to_string().contains("cell 2"));
        }
    }

    #[test]
    fn damaged_files_are_refused_with_a_way_out() {
        let (dir, _) = written(LatentType::Bf16);
        let refused = |dir: &Path| LatentDataset::open(dir, None).err().unwrap().to_string();
        std::fs::write(dir.path().join(PARTS), [0, 0, 1, 0, 9, 1, 0]).unwrap();
        assert!(refused(dir.path()).contains("cell 4 is in part 9, expected 0 to 3"), "{}", refused(dir.path()));
        std::fs::write(dir.path().join(ROWS), [0; 5]).unwrap();
        let error = refused(dir.path());
        assert!(error.contains("has 5 bytes, expected 56") && error.contains("--from latents"), "{error}");
        std::fs::write(dir.path().join(FACTS), "{}").unwrap();
        assert!(refused(dir.path()).contains("latents.json"));
    }

    #[test]
    fn entries_are_blocks_of_rows() {
        let (dir, _) = written(LatentType::Bf16);
        let file = LatentFile::open(dir.path()).unwrap();
        assert_eq!([file.entry_bytes(0), file.entry_bytes(1)], [7 * 8, 0]);
        let mut bytes = vec![0; 56];
        file.fill_entry(0, &mut bytes, &mut Scratch::default()).unwrap();
        assert_eq!(bytes, std::fs::read(dir.path().join(ROWS)).unwrap());
    }
}
