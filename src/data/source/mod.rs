//! Formats on disk → entries of bytes. The only room that imports `hdf5` and image decoders ([`video`], [`picture`]).
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
pub mod h5ad;
pub mod hdf5;
mod identity;
pub mod picture;
pub mod video;

pub use identity::{Identity, wide_print};

use spec::contract::files::is_no_data;
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

/// Files that [`find_files`] found.
#[derive(Debug, Default)]
pub struct Listing {
    /// In the order of their paths.
    pub files: Vec<PathBuf>,
    /// Entries that could not be read, with the reason, one line each.
    pub unreadable: Vec<String>,
    /// Hidden or leftover folders and files, which are no data.
    pub no_data: Vec<PathBuf>,
}

/// Files with one of the `extensions` (lower case, no dot) under `root`, recursively and sorted; `root` may be one file.
/// Links to folders are followed; a folder seen twice is entered once. Names that are no data
/// ([`spec::contract::files::is_no_data`]) are left out.
///
/// # Errors
/// `root` is missing or cannot be listed. Folders further down that cannot be listed go to [`Listing::unreadable`].
pub fn find_files(root: &Path, extensions: &[&str]) -> Result<Listing, DataError> {
    let facts = std::fs::metadata(root).map_err(|error| file_error(root, error.to_string()))?;
    let mut found = Listing::default();
    if facts.is_file() {
        found.files.push(root.to_owned());
        return Ok(found);
    }
    let mut seen = std::collections::HashSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        if !folder.canonicalize().map(|real| seen.insert(real)).unwrap_or(false) {
            continue;
        }
        match list_folder(&folder, extensions, &mut found) {
            Ok(inner) => folders.extend(inner),
            Err(error) if folder == root => return Err(file_error(root, error.to_string())),
            Err(error) => found.unreadable.push(format!("{}: {error}", shown(&folder))),
        }
    }
    found.files.sort();
    found.no_data.sort();
    Ok(found)
}

/// Takes in the files of `folder` and returns its folders.
fn list_folder(folder: &Path, extensions: &[&str], found: &mut Listing) -> std::io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let facts = std::fs::metadata(&path);
        let is_folder = facts.as_ref().is_ok_and(std::fs::Metadata::is_dir);
        let wanted = has_extension(&path, extensions);
        if path.file_name().is_some_and(is_no_data) {
            // Only hidden files that would have been read are worth a line.
            found.no_data.extend((is_folder || wanted).then_some(path));
        } else if is_folder {
            folders.push(path);
        } else if wanted {
            match utf8(&path) {
                Ok(_) => found.files.push(path),
                Err(error) => found.unreadable.push(error.to_string()),
            }
        } else if let Err(error) = facts {
            // A link to a folder of recordings that is not mounted now.
            found.unreadable.push(format!("{}: {error}", shown(&path)));
        }
    }
    Ok(folders)
}

/// A line on entries below `root` that are no data; `None`: there are none.
pub fn no_data_line(root: &Path, entries: &[PathBuf]) -> Option<String> {
    /// Entries that are named.
    const NAMED: usize = 5;
    let name = |path: &PathBuf| path.strip_prefix(root).unwrap_or(path).display().to_string();
    let named: Vec<String> = entries.iter().take(NAMED).map(name).collect();
    let more = entries.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let plural = if entries.len() == 1 { "entry" } else { "entries" };
    (!named.is_empty()).then(|| {
        let (count, named) = (entries.len(), named.join(", "));
        format!("{count} hidden or leftover {plural} left out, no data: {named}{more}; rename what is data")
    })
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
        let found = find_files(dir.path(), &["hdf5", "h5"]).unwrap();
        let names: Vec<_> = found.files.iter().map(|p| p.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["a.h5", "b/c/a.H5", "z.hdf5"]);
        assert!(found.unreadable.is_empty() && found.no_data.is_empty());
        assert!(find_files(&dir.path().join("none"), &["h5"]).is_err());
        use std::os::unix::ffi::OsStrExt;
        std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"s1\xff.h5")), b"").unwrap();
        let Listing { files, unreadable, .. } = find_files(dir.path(), &["hdf5", "h5"]).unwrap();
        assert_eq!(files.len(), 3);
        assert!(unreadable[0].ends_with(r#"/s1\xFF.h5": its name is not UTF-8: rename it"#), "{unreadable:?}");
    }

    #[test]
    fn what_is_no_data_is_left_out_and_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "s0.hdf5",
            ".ipynb_checkpoints/s0-checkpoint.hdf5",
            ".Trash-1000/files/s1.hdf5",
            "a/.snapshot/hourly.0/s2.hdf5",
            "a/._s0.hdf5",
            "a/@eaDir/s0.hdf5",
            "lost+found/s3.hdf5",
            ".DS_Store",
        ] {
            std::fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let found = find_files(dir.path(), &["hdf5", "h5"]).unwrap();
        assert_eq!(found.files, [dir.path().join("s0.hdf5")]);
        let line = no_data_line(dir.path(), &found.no_data).unwrap();
        assert_eq!(
            line,
            "6 hidden or leftover entries left out, no data: .Trash-1000, .ipynb_checkpoints, a/._s0.hdf5, a/.snapshot, \
             a/@eaDir and 1 more; rename what is data"
        );
        assert_eq!(no_data_line(dir.path(), &[]), None);
        // Named in the config, a hidden folder or file is data.
        let inside = find_files(&dir.path().join(".Trash-1000"), &["hdf5"]).unwrap();
        assert_eq!((inside.files.len(), inside.no_data.len()), (1, 0));
        assert_eq!(find_files(&dir.path().join("a/._s0.hdf5"), &["hdf5"]).unwrap().files.len(), 1);
    }

    #[test]
    fn a_link_to_a_folder_that_is_gone_is_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("s0.h5"), b"").unwrap();
        std::os::unix::fs::symlink("/no/such/mount", dir.path().join("site2")).unwrap();
        let found = find_files(dir.path(), &["h5"]).unwrap();
        assert_eq!((found.files.len(), found.unreadable.len()), (1, 1));
        assert!(found.unreadable[0].contains("site2: No such file"), "{:?}", found.unreadable);
    }
}
