//! What a folder of recordings weighs, from file names and sizes alone: no file is opened.

use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Facts on a data set of HDF5 files. Bytes are those on disk, compressed where files are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetFacts {
    /// Something is at the path, be it without recordings.
    pub exists: bool,
    /// Files `.h5` and `.hdf5`.
    pub files: usize,
    pub bytes: u64,
    pub largest_file_bytes: u64,
}

/// Weighs the `.h5` and `.hdf5` files below `path`, or `path` itself when it is a file. Folders that cannot be read
/// count as empty; the rank that opens the data names them.
pub fn dataset_facts(path: &Path) -> DatasetFacts {
    let mut facts = DatasetFacts { exists: path.exists(), ..DatasetFacts::default() };
    let mut seen = HashSet::new();
    let mut waiting = vec![path.to_owned()];
    while let Some(path) = waiting.pop() {
        // Follows links: data sets are often linked together from several disks.
        let Ok(metadata) = std::fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            waiting.extend(entries_once(&path, &mut seen));
        } else if metadata.is_file() && is_recording(&path) {
            facts.files += 1;
            facts.bytes = facts.bytes.saturating_add(metadata.len());
            facts.largest_file_bytes = facts.largest_file_bytes.max(metadata.len());
        }
    }
    facts
}

/// Entries of a folder, the first time it is met: links may lead in circles.
fn entries_once(folder: &Path, seen: &mut HashSet<PathBuf>) -> Vec<PathBuf> {
    let fresh = std::fs::canonicalize(folder).is_ok_and(|real| seen.insert(real));
    let entries = fresh.then(|| std::fs::read_dir(folder).ok()).flatten();
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn is_recording(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    ["h5", "hdf5"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weighs_recordings_below_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("one.hdf5"), [0; 10]).unwrap();
        std::fs::write(root.join("a/b/two.h5"), [0; 300]).unwrap();
        std::fs::write(root.join("a/metadata.csv"), [0; 7000]).unwrap();
        std::os::unix::fs::symlink(root, root.join("a/circle")).unwrap();
        let facts = dataset_facts(root);
        assert_eq!(facts, DatasetFacts { exists: true, files: 2, bytes: 310, largest_file_bytes: 300 });
        let single = dataset_facts(&root.join("one.hdf5"));
        assert_eq!((single.files, single.bytes), (1, 10));
    }

    #[test]
    fn a_missing_folder_does_not_exist() {
        assert_eq!(dataset_facts(Path::new("no/such/folder")), DatasetFacts::default());
    }
}
