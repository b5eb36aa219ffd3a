//! Latents on disk and in the page cache: what the stage `latents` writes and later stages train on.
//!
//! ```text
//! runs/NAME/latents/{train,val,test}.bin     a row per cell: latent (bf16 or f32), class (i16, −1: none), little endian
//!                   latents.json             sizes, element type, classes
//! ```
//! With bf16 and 128 numbers an atlas of 100 million cells is 25.8 GB.

use crate::data::entries::{CachedEntries, EntrySource};
use crate::data::{BatchAhead, DataError, Dataset, Dtype, FieldSpec, Pages, ReadRequest, Scratch, Wake};
use cache::client::{CacheClient, Reading};
use serde::{Deserialize, Serialize};
use spec::task::cell::LatentType;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use tch::{Kind, Tensor};

/// Splits, in the order of the files.
pub const SPLITS: [&str; 3] = ["train", "val", "test"];
/// The file with the sizes.
const FACTS: &str = "latents.json";
/// Rows of an entry of the page cache.
const ENTRY_ROWS: u64 = 4096;
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
    /// Cells of training, validation and test.
    pub cells: [u64; 3],
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
        let again = "run the stage again with --from latents";
        let text = std::fs::read_to_string(&path)
            .map_err(|e| DataError::File { path: path.clone(), problem: format!("{e}: {again}") })?;
        serde_json::from_str(&text).map_err(|e| DataError::Content { path, problem: format!("{e}: {again}") })
    }

    /// Writes the facts into the folder of the stage.
    ///
    /// # Errors
    /// No room or permission.
    pub fn write(&self, folder: &Path) -> Result<(), DataError> {
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

/// The files of the stage, as entries of the page cache.
pub struct LatentFiles {
    facts: LatentFacts,
    files: Vec<(PathBuf, File)>,
}

impl LatentFiles {
    /// Opens the files in `folder`.
    ///
    /// # Errors
    /// A file is missing or has another length than the facts say.
    pub fn open(folder: &Path) -> Result<Self, DataError> {
        let facts = LatentFacts::read(folder)?;
        let files = SPLITS.iter().zip(facts.cells).map(|(split, cells)| {
            let path = folder.join(format!("{split}.bin"));
            let failed = |e: std::io::Error| DataError::File { path: path.clone(), problem: e.to_string() };
            let file = File::open(&path).map_err(failed)?;
            let (bytes, expected) = (file.metadata().map_err(failed)?.len(), cells * facts.row_bytes() as u64);
            if bytes != expected {
                let problem =
                    format!("has {bytes} bytes, expected {expected}: run the stage again with --from latents");
                return Err(DataError::Content { path, problem });
            }
            Ok((path, file))
        });
        let files = files.collect::<Result<_, _>>()?;
        Ok(Self { files, facts })
    }

    pub fn facts(&self) -> &LatentFacts {
        &self.facts
    }

    /// Entries of the splits before `split`.
    fn base(&self, split: usize) -> u64 {
        self.facts.cells[..split].iter().map(|cells| cells.div_ceil(ENTRY_ROWS)).sum()
    }

    /// Split and first row of an entry.
    fn locate(&self, key: u64) -> (usize, u64) {
        let split = (0..SPLITS.len()).rev().find(|&split| self.base(split) <= key).unwrap_or(0);
        (split, (key - self.base(split)) * ENTRY_ROWS)
    }

    fn read_rows(&self, split: usize, row: u64, out: &mut [u8]) -> Result<(), DataError> {
        let (path, file) = &self.files[split];
        let at = row * self.facts.row_bytes() as u64;
        file.read_exact_at(out, at).map_err(|e| DataError::File { path: path.clone(), problem: e.to_string() })
    }

    /// Classes of a split's cells.
    fn classes(&self, split: usize) -> Result<Vec<i16>, DataError> {
        let row_bytes = self.facts.row_bytes();
        let mut classes = Vec::with_capacity(self.facts.cells[split] as usize);
        let mut rows = Vec::new();
        for start in (0..self.facts.cells[split]).step_by(ENTRY_ROWS as usize) {
            let count = ENTRY_ROWS.min(self.facts.cells[split] - start) as usize;
            rows.resize(count * row_bytes, 0);
            self.read_rows(split, start, &mut rows)?;
            classes.extend(rows.chunks_exact(row_bytes).map(class_of));
        }
        Ok(classes)
    }
}

/// The class at the end of a row.
fn class_of(row: &[u8]) -> i16 {
    match row {
        [.., low, high] => i16::from_le_bytes([*low, *high]),
        _ => -1,
    }
}

impl EntrySource for LatentFiles {
    fn entry_bytes(&self, key: u64) -> u64 {
        let (split, row) = self.locate(key);
        self.facts.cells[split].saturating_sub(row).min(ENTRY_ROWS) * self.facts.row_bytes() as u64
    }

    fn fill_entry(&self, key: u64, out: &mut [u8], _: &mut Scratch) -> Result<(), DataError> {
        let (split, row) = self.locate(key);
        self.read_rows(split, row, out)
    }
}

/// Latents of one split.
pub struct LatentDataset {
    files: Arc<LatentFiles>,
    cached: Option<Arc<CachedEntries<LatentFiles>>>,
    split: usize,
    /// Rows in use; `None` means all.
    chosen: Option<Vec<u32>>,
    fields: Vec<FieldSpec>,
}

impl LatentDataset {
    /// The three splits. `labelled`: only cells that have a class.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn splits(
        files: &Arc<LatentFiles>,
        cache: Option<Arc<CacheClient>>,
        labelled: bool,
    ) -> Result<[Arc<dyn Dataset>; 3], DataError> {
        let cached = cache.map(|cache| Arc::new(CachedEntries::new(Arc::clone(files), cache)));
        let split = |split| -> Result<Arc<dyn Dataset>, DataError> {
            let chosen = if labelled { labelled_rows(&files.classes(split)?) } else { None };
            let (files, cached) = (Arc::clone(files), cached.clone());
            Ok(Arc::new(Self { fields: files.facts.fields(), files, cached, split, chosen }))
        };
        Ok([split(0)?, split(1)?, split(2)?])
    }

    fn row(&self, index: usize) -> Result<u64, DataError> {
        let count = self.len() as u64;
        let row = match &self.chosen {
            Some(rows) => rows.get(index).map(|&row| u64::from(row)),
            None => Some(index as u64).filter(|&row| row < count),
        };
        row.ok_or(DataError::OutOfRange { what: "cell", index: index as u64, place: "the latents", count })
    }

    /// Entries that the samples lie in, each once.
    fn keys(&self, ids: &[u64]) -> Vec<u64> {
        let rows = ids.iter().filter_map(|&id| self.row(id as usize).ok());
        let mut keys: Vec<u64> = rows.map(|row| self.files.base(self.split) + row / ENTRY_ROWS).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }
}

/// Rows with a class; `None`: all have one.
fn labelled_rows(classes: &[i16]) -> Option<Vec<u32>> {
    if classes.iter().all(|class| *class >= 0) {
        return None;
    }
    Some((0u32..).zip(classes).filter(|(_, class)| **class >= 0).map(|(row, _)| row).collect())
}

impl Dataset for LatentDataset {
    fn len(&self) -> usize {
        self.chosen.as_ref().map_or(self.files.facts.cells[self.split] as usize, Vec::len)
    }

    fn fields(&self) -> &[FieldSpec] {
        &self.fields
    }

    fn read(&self, request: ReadRequest, out: &mut [&mut [u8]], scratch: &mut Scratch) -> Result<(), DataError> {
        let row = self.row(request.index)?;
        let [latent, label] = out else {
            return Err(DataError::Fields { asked: out.len(), count: self.fields.len() });
        };
        let mut put = |bytes: &[u8]| {
            let (values, _) = bytes.split_at(bytes.len().saturating_sub(CLASS));
            latent.copy_from_slice(values);
            label.copy_from_slice(&i64::from(class_of(bytes)).to_ne_bytes());
        };
        let row_bytes = self.files.facts.row_bytes();
        if let Some(cached) = &self.cached {
            let key = self.files.base(self.split) + row / ENTRY_ROWS;
            if let Reading::Held(entry) = cached.read_or_lend(key, (0..0, u64::MAX), scratch)? {
                let at = (row % ENTRY_ROWS) as usize * row_bytes;
                put(&entry[at..at + row_bytes]);
                return Ok(());
            }
        }
        let mut bytes = std::mem::take(&mut scratch.raw);
        bytes.resize(row_bytes, 0);
        let read = self.files.read_rows(self.split, row, &mut bytes);
        if read.is_ok() {
            put(&bytes);
        }
        scratch.raw = bytes;
        scratch.count();
        read
    }

    fn describe(&self, index: usize) -> String {
        let row = self.row(index).map_or_else(|_| index.to_string(), |row| row.to_string());
        format!("latents/{}.bin row {row}", SPLITS[self.split])
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
        let pages = (0..self.len() as u64).step_by(ENTRY_ROWS as usize).collect();
        Some(Pages { pages, sequences: vec![0] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kind: LatentType) -> LatentFacts {
        LatentFacts { latent: 3, kind, cells: [5, 2, 0], genes: 7, classes: vec!["a".into(), "b".into()] }
    }

    fn written(kind: LatentType) -> (tempfile::TempDir, Tensor) {
        let dir = tempfile::tempdir().unwrap();
        let facts = facts(kind);
        let latents = Tensor::arange(21, (Kind::Float, tch::Device::Cpu)).view([7, 3]) / 8.0;
        let classes = Tensor::from_slice(&[0i64, 1, -1, 1, 0, 1, 0]);
        let mut at = 0;
        for (split, cells) in SPLITS.iter().zip(facts.cells) {
            let part = |tensor: &Tensor| tensor.narrow(0, at, cells as i64);
            std::fs::write(
                dir.path().join(format!("{split}.bin")),
                facts.rows(&part(&latents), &part(&classes)).unwrap(),
            )
            .unwrap();
            at += cells as i64;
        }
        facts.write(dir.path()).unwrap();
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
            let files = Arc::new(LatentFiles::open(dir.path()).unwrap());
            let [train, val, test] = LatentDataset::splits(&files, None, false).unwrap();
            assert_eq!([train.len(), val.len(), test.len()], [5, 2, 0]);
            for (dataset, index, row, class) in [(&train, 0, 0, 0), (&train, 2, 2, -1), (&val, 1, 6, 0)] {
                let (latent, label) = read(dataset.as_ref(), index).unwrap();
                assert_eq!((latent, label), (latents.narrow(0, row, 1), class));
            }
            assert!(read(val.as_ref(), 2).unwrap_err().to_string().contains("cell 2"));
        }
    }

    #[test]
    fn the_classifier_sees_labelled_cells_alone() {
        let (dir, latents) = written(LatentType::F32);
        let files = Arc::new(LatentFiles::open(dir.path()).unwrap());
        let [train, ..] = LatentDataset::splits(&files, None, true).unwrap();
        assert_eq!(train.len(), 4);
        assert_eq!(read(train.as_ref(), 2).unwrap(), (latents.narrow(0, 3, 1), 1));
        assert_eq!(train.describe(2), "latents/train.bin row 3");
    }

    #[test]
    fn files_of_another_length_are_refused_with_a_way_out() {
        let (dir, _) = written(LatentType::Bf16);
        std::fs::write(dir.path().join("val.bin"), [0; 5]).unwrap();
        let error = LatentFiles::open(dir.path()).err().unwrap().to_string();
        assert!(error.contains("has 5 bytes, expected 16") && error.contains("--from latents"), "{error}");
        std::fs::write(dir.path().join(FACTS), "{}").unwrap();
        assert!(LatentFacts::read(dir.path()).unwrap_err().to_string().contains("latents.json"));
    }

    #[test]
    fn entries_are_blocks_of_rows_of_one_split() {
        let (dir, _) = written(LatentType::Bf16);
        let files = LatentFiles::open(dir.path()).unwrap();
        assert_eq!([files.entry_bytes(0), files.entry_bytes(1)], [5 * 8, 2 * 8]);
        assert_eq!(files.locate(1), (1, 0));
        let mut bytes = vec![0; 16];
        files.fill_entry(1, &mut bytes, &mut Scratch::default()).unwrap();
        assert_eq!(bytes, std::fs::read(dir.path().join("val.bin")).unwrap());
    }
}
