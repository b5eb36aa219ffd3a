//! Identity of a file: what recognises it in another run, and shows that it was replaced or changed.

use super::file_error;
use crate::data::DataError;
use fnv::FnvHasher;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hash::Hasher;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes of each of the three places that a fingerprint looks at.
const PLACE_BYTES: u64 = 4096;

/// Facts that change when a file is written, replaced or restored from an archive with its old time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub bytes: u64,
    /// Time of the last write, seconds and nanoseconds.
    modified: (i64, i64),
    /// Time of the last change of content, owner, links or times, which no program can set.
    changed: (i64, i64),
    device: u64,
    inode: u64,
    /// Hash of the size and of the bytes at the beginning, in the middle and at the end. Equal files have the same one
    /// wherever they lie.
    pub print: u64,
}

impl Identity {
    /// Identity of the open file at `path`; does not move its position.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of(path: &Path, file: &File) -> Result<Self, DataError> {
        let failed = |e: std::io::Error| file_error(path, e.to_string());
        let facts = file.metadata().map_err(failed)?;
        Ok(Self {
            bytes: facts.len(),
            modified: (facts.mtime(), facts.mtime_nsec()),
            changed: (facts.ctime(), facts.ctime_nsec()),
            device: facts.dev(),
            inode: facts.ino(),
            print: fingerprint(file, facts.len()).map_err(failed)?,
        })
    }

    /// Identity of the file at `path` now.
    ///
    /// # Errors
    /// The file cannot be opened or read.
    pub fn now(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|e| file_error(path, e.to_string()))?;
        Self::of(path, &file)
    }

    /// Checks that the open file is still the one that was looked at when the run began. Where only its inode or its time
    /// of change differs (a file server that numbers files anew, a new link, other permissions), its bytes decide.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, path: &Path, file: &File) -> Result<(), DataError> {
        let failed = |e: std::io::Error| file_error(path, e.to_string());
        let facts = file.metadata().map_err(failed)?;
        let same_times = (facts.mtime(), facts.mtime_nsec()) == self.modified;
        let same_file = (facts.dev(), facts.ino()) == (self.device, self.inode)
            && (facts.ctime(), facts.ctime_nsec()) == self.changed;
        if facts.len() == self.bytes && same_times {
            if same_file || fingerprint(file, facts.len()).map_err(failed)? == self.print {
                return Ok(());
            }
            let problem = "replaced since the run began by a file of the same size and time: start again";
            return Err(file_error(path, problem));
        }
        let what = if facts.len() == self.bytes { "written anew".into() } else { format!("{} bytes", facts.len()) };
        let problem = format!("changed since the run began: it had {} bytes, now {what}: start again", self.bytes);
        Err(file_error(path, problem))
    }
}

/// Hash of the size and of 256 places, for files whose beginnings, middles and ends are alike though their content differs.
/// Equal files have the same one wherever they lie.
///
/// # Errors
/// The file cannot be opened or read.
pub fn wide_print(path: &Path) -> Result<u64, DataError> {
    /// Places, and bytes of each.
    const PLACES: u64 = 256;
    const BYTES: u64 = 512;
    let failed = |e: std::io::Error| file_error(path, e.to_string());
    let file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let mut hash = FnvHasher::default();
    hash.write(&bytes.to_le_bytes());
    let mut buffer = vec![0; BYTES as usize];
    let step = (bytes / PLACES).max(BYTES);
    for from in (0..bytes).step_by(step as usize) {
        let room = &mut buffer[..BYTES.min(bytes - from) as usize];
        file.read_exact_at(room, from).map_err(failed)?;
        hash.write(room);
    }
    Ok(hash.finish())
}

/// FNV-1a of the file's size and of three of its places; of all its bytes where the places meet.
fn fingerprint(file: &File, bytes: u64) -> std::io::Result<u64> {
    let mut hash = FnvHasher::default();
    hash.write(&bytes.to_le_bytes());
    let mut buffer = Vec::new();
    for (from, to) in places(bytes) {
        buffer.resize((to - from) as usize, 0);
        file.read_exact_at(&mut buffer, from)?;
        hash.write(&buffer);
    }
    Ok(hash.finish())
}

fn places(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= 3 * PLACE_BYTES {
        return vec![(0, bytes)];
    }
    let middle = (bytes - PLACE_BYTES) / 2;
    [0, middle, bytes - PLACE_BYTES].map(|from| (from, from + PLACE_BYTES)).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn new_bytes_of_the_same_size_and_time_are_another_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let write = |content: &[u8]| {
            std::fs::write(&path, content).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
            Identity::now(&path).unwrap()
        };
        let content = |at: usize| {
            let mut content: Vec<u8> = (0..50_000).map(|n| (n % 251) as u8).collect();
            content[at] ^= 1;
            content
        };
        let first = write(&content(7));
        first.check(&path, &File::open(&path).unwrap()).unwrap();
        for at in [8, 25_000, 49_999] {
            let now = write(&content(at));
            assert_eq!((now.bytes, now.modified, now.inode), (first.bytes, first.modified, first.inode));
            assert_ne!(now.print, first.print, "byte {at}");
            let error = first.check(&path, &File::open(&path).unwrap()).unwrap_err().to_string();
            assert!(error.contains("replaced since the run began by a file of the same size and time"), "{error}");
        }
        // Not in a place that is looked at: the time of change, which cannot be set, tells.
        let (a, b) = (write(&content(10_000)), write(&content(10_001)));
        assert!(a.print == b.print && a != b);
    }

    #[test]
    fn a_wide_fingerprint_sees_what_lies_between() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let print = |at: usize, bytes: usize| {
            let mut content = vec![0u8; bytes];
            content[at] = 1;
            std::fs::write(&path, content).unwrap();
            wide_print(&path).unwrap()
        };
        let all: std::collections::BTreeSet<u64> =
            (0..20).map(|n| print(n * 2000, 2000 * 256)).chain([print(0, 1), print(5, 700), print(600, 700)]).collect();
        assert_eq!(all.len(), 23);
        std::fs::write(&path, []).unwrap();
        wide_print(&path).unwrap();
    }

    #[test]
    fn links_and_permissions_change_the_identity_but_not_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&path, [3; 20_000]).unwrap();
        let first = Identity::now(&path).unwrap();
        std::fs::hard_link(&path, &copy).unwrap();
        first.check(&path, &File::open(&path).unwrap()).unwrap();
        std::fs::remove_file(&copy).unwrap();
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(Identity::now(&copy).unwrap().print, first.print, "a copy has the same fingerprint");
        for size in [0, 1, 12_288, 12_289] {
            std::fs::write(&copy, vec![1; size]).unwrap();
            Identity::now(&copy).unwrap();
        }
    }
}
