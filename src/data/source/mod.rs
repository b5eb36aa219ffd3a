//! Formats on disk → entries of bytes. The only room that imports `hdf5` and image decoders ([`video`]).
//!
//! ```text
//! path ─► hdf5::open (libhdf5, metadata only) ─► Table ─► Reader ─► rows, widened to f32
//!                                                          │ contiguous: pread of the window's rows
//!                                                          └ chunked: ChunkStore ─► pread + decode once per chunk
//! ```
//!
//! Architecture invariant: libhdf5 and its global lock are entered once per file, at opening. Samples come by `pread` and
//! are decoded in the calling thread; the exceptions (filters that only libhdf5 knows, layouts without an address) are
//! announced with one warning each.

pub mod chunks;
pub mod hdf5;
pub mod video;

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::DataError;
use spec::contract::shown;

/// An error about a file.
pub(crate) fn file_error(path: &Path, problem: impl Into<String>) -> DataError {
    DataError::File { path: path.to_owned(), problem: problem.into() }
}

/// Files with one of the `extensions` (lower case, no dot) under `root`, recursively and sorted; `root` may be one file.
/// Links to folders are followed; a folder seen twice is entered once.
///
/// # Errors
/// `root` is missing or cannot be listed. Folders further down that cannot be listed go to `unreadable`.
pub fn find_files(root: &Path, extensions: &[&str], unreadable: &mut Vec<String>) -> Result<Vec<PathBuf>, DataError> {
    let facts = std::fs::metadata(root).map_err(|error| file_error(root, error.to_string()))?;
    if facts.is_file() {
        return Ok(vec![root.to_owned()]);
    }
    let mut found = Vec::new();
    let mut seen = std::collections::HashSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        if !folder.canonicalize().map(|real| seen.insert(real)).unwrap_or(false) {
            continue;
        }
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if folder == root => return Err(file_error(root, error.to_string())),
            Err(error) => {
                unreadable.push(format!("{}: {error}", shown(&folder)));
                continue;
            }
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if has_extension(&path, extensions) {
                match utf8(&path) {
                    Ok(_) => found.push(path),
                    Err(error) => unreadable.push(error.to_string()),
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

/// `work` on each item by so many threads; results in the order of items.
pub(crate) fn in_threads<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::with_capacity(items.len()));
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, items.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(n) else { return };
                    let result = work(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((n, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(n, _)| *n);
    results.into_iter().map(|(_, result)| result).collect()
}

/// The path as text. libhdf5's binding and the index take no other names.
///
/// # Errors
/// It is not UTF-8; the message shows its bytes.
pub(crate) fn utf8(path: &Path) -> Result<&str, DataError> {
    path.to_str().ok_or_else(|| file_error(path, "its name is not UTF-8: rename it"))
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    extension.is_some_and(|e| extensions.contains(&e.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_recursively_and_sorted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("b/c")).unwrap();
        for name in ["z.hdf5", "b/c/a.H5", "b/note.txt", "a.h5"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        std::os::unix::fs::symlink(dir.path(), dir.path().join("b/loop")).unwrap();
        let mut unreadable = Vec::new();
        let found = find_files(dir.path(), &["hdf5", "h5"], &mut unreadable).unwrap();
        let names: Vec<_> = found.iter().map(|p| p.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.h5", "b/c/a.H5", "z.hdf5"]);
        assert!(unreadable.is_empty());
        assert!(find_files(&dir.path().join("none"), &["h5"], &mut unreadable).is_err());
        use std::os::unix::ffi::OsStrExt;
        std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"s1\xff.h5")), b"").unwrap();
        assert_eq!(find_files(dir.path(), &["hdf5", "h5"], &mut unreadable).unwrap().len(), 3);
        assert!(unreadable[0].ends_with(r#"/s1\xFF.h5": its name is not UTF-8: rename it"#), "{unreadable:?}");
    }
}
