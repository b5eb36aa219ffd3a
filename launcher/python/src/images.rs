//! PNG and JPEG files, one per sample: `[H, W, 3]` as bytes, and a number.

use crate::entry::with_room;
use crate::failure::Failure;
use crate::native::{Memory, Native, words};
use source::data::DataError;
use source::data::source::video::image::{decode, size_of};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// Image files with a label each.
pub struct Images {
    paths: Vec<PathBuf>,
    labels: Vec<i64>,
    /// A sample's spec: before its height, between height and width, after its width.
    spec: [String; 3],
    tag: u64,
    bytes: AtomicU64,
    decoded: AtomicU64,
}

impl Images {
    pub fn new(paths: Vec<PathBuf>, labels: Vec<i64>, spec: [String; 3], tag: u64) -> Self {
        Self { paths, labels, spec, tag, bytes: AtomicU64::new(0), decoded: AtomicU64::new(0) }
    }

    fn read(&self, index: usize) -> Result<Vec<u8>, DataError> {
        let count = self.paths.len() as u64;
        let missing = || DataError::OutOfRange { what: "image", index: index as u64, place: "the data set", count };
        let (path, label) = self.paths.get(index).zip(self.labels.get(index)).ok_or_else(missing)?;
        let failed = |error: std::io::Error| DataError::File { path: path.clone(), problem: error.to_string() };
        let mut file = File::open(path).map_err(failed)?;
        let size = size_of(path, &mut file)?;
        file.rewind().map_err(failed)?;
        let mut stored = Vec::with_capacity(file.metadata().map_or(0, |facts| facts.len() as usize));
        file.read_to_end(&mut stored).map_err(failed)?;
        let [before, between, after] = &self.spec;
        let spec = format!("{before}{}{between}{}{after}", size.height, size.width);
        let (mut made, starts) = with_room(spec.as_bytes(), self.tag, &[size.bytes(), 8]);
        if let [pixels, number] = starts[..] {
            decode(path, &stored, size, &mut made[pixels..pixels + size.bytes()])?;
            made[number..number + 8].copy_from_slice(&label.to_le_bytes());
        }
        self.bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
        self.decoded.fetch_add(1, Ordering::Relaxed);
        Ok(made)
    }
}

impl Native for Images {
    fn len(&self) -> usize {
        self.paths.len()
    }

    fn describe(&self, index: usize) -> String {
        self.paths.get(index).map_or_else(|| format!("image {index}"), |path| path.display().to_string())
    }

    fn counts(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.decoded.load(Ordering::Relaxed))
    }

    fn sample(&self, index: u64, _memory: &mut Memory) -> Result<Vec<u8>, Failure> {
        self.read(usize::try_from(index).unwrap_or(usize::MAX)).map_err(|error| Failure::File(words(&error)))
    }
}
