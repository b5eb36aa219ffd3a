//! State that the data sets of a run share.

use super::store::{Pixels, Store};
use crate::data::entries::CachedEntries;
use crate::data::{DataError, Scratch};
use spec::contract::shown;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Images, the page cache, and which images turned out to be damaged.
pub struct Shared {
    pub store: Arc<Store>,
    pub cached: Option<CachedEntries<Store>>,
    /// Damaged images are left out rather than ending the run.
    pub skip_bad: bool,
    damaged: Mutex<Damaged>,
}

#[derive(Default)]
struct Damaged {
    /// By path: so a line is said once.
    known: BTreeMap<PathBuf, String>,
    news: Vec<String>,
}

impl Shared {
    pub fn new(store: Arc<Store>, cached: Option<CachedEntries<Store>>, skip_bad: bool) -> Self {
        Self { store, cached, skip_bad, damaged: Mutex::default() }
    }

    /// Pixels of an image of a training sample, which others are about to want.
    ///
    /// # Errors
    /// Its file cannot be read or decoded.
    pub fn pixels(&self, number: usize, scratch: &mut Scratch) -> Result<Pixels<'_>, DataError> {
        self.store.pixels(number, self.cached.as_ref(), true, scratch)
    }

    fn damaged(&self) -> MutexGuard<'_, Damaged> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a damaged image, where such images are left out.
    pub fn skips(&self, error: Option<&DataError>) -> bool {
        let Some(DataError::Content { path, problem }) = error.filter(|_| self.skip_bad) else { return false };
        let mut damaged = self.damaged();
        if damaged.known.insert(path.clone(), problem.clone()).is_none() {
            damaged.news.push(format!("{}: {problem}: left out", shown(path)));
        }
        true
    }

    pub fn is_damaged(&self, number: usize) -> bool {
        self.damaged().known.contains_key(&self.store.image(number).path)
    }

    /// Lines since the last call; `None`: damaged images end the run.
    pub fn take_news(&self) -> Option<Vec<String>> {
        self.skip_bad.then(|| std::mem::take(&mut self.damaged().news))
    }

    pub fn describe(&self, number: Option<u32>, index: usize) -> String {
        match number {
            Some(number) => shown(&self.store.image(number as usize).path).to_string(),
            None => format!("image {index}"),
        }
    }
}

/// Writes rows into a ragged field.
pub fn write_rows(rows: &[[f32; 5]], out: &mut &mut [u8]) {
    let bytes = size_of_val(rows);
    let (written, _) = std::mem::take(out).split_at_mut(bytes);
    for (number, out) in rows.iter().flatten().zip(written.chunks_exact_mut(4)) {
        out.copy_from_slice(&number.to_ne_bytes());
    }
    *out = written;
}
