//! Size of a data set, from file names, sizes and times. Nothing is opened, and no format is known.

use spec::contract::DatasetFacts;
use spec::contract::files::is_no_data;
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Counts the files below `path`, or `path` itself when it is a file. Folders that cannot be read count as empty; the rank
/// that opens the data names them. Names that are no data ([`is_no_data`]) are left out.
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
        } else if metadata.is_file() {
            facts.files += 1;
            facts.bytes = facts.bytes.saturating_add(metadata.len());
            // A sum, since folders list their files in any order.
            facts.digest = facts.digest.wrapping_add(digest(&path, &metadata));
        }
    }
    facts
}

fn digest(path: &Path, metadata: &std::fs::Metadata) -> u64 {
    let mut hasher = DefaultHasher::new();
    (path, metadata.len(), metadata.dev(), metadata.ino()).hash(&mut hasher);
    (metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()).hash(&mut hasher);
    hasher.finish()
}

/// Entries of a folder that may be data, the first time it is met: links may lead in circles.
fn entries_once(folder: &Path, seen: &mut HashSet<PathBuf>) -> Vec<PathBuf> {
    let fresh = std::fs::canonicalize(folder).is_ok_and(|real| seen.insert(real));
    let entries = fresh.then(|| std::fs::read_dir(folder).ok()).flatten();
    let entries = entries.into_iter().flatten().flatten();
    entries.filter(|entry| !is_no_data(&entry.file_name())).map(|entry| entry.path()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weighs_files_below_a_folder_and_notices_every_change() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(root.join("one.hdf5"), [0; 10]).unwrap();
        std::fs::write(root.join("a/b/two.h5"), [0; 300]).unwrap();
        std::os::unix::fs::symlink(root, root.join("a/circle")).unwrap();
        for no_data in
            [".ipynb_checkpoints/one-checkpoint.hdf5", ".Trash-1000/files/one.hdf5", "@eaDir/x.h5", "a/._b.h5"]
        {
            std::fs::create_dir_all(root.join(no_data).parent().unwrap()).unwrap();
            std::fs::write(root.join(no_data), [0; 5000]).unwrap();
        }
        let facts = dataset_facts(root);
        assert_eq!((facts.exists, facts.files, facts.bytes), (true, 2, 310));
        assert_eq!(dataset_facts(root), facts);
        std::fs::write(root.join("one.hdf5"), [0; 11]).unwrap();
        let changed = dataset_facts(root);
        assert_ne!(changed.digest, facts.digest);
        std::fs::write(root.join("three.h5"), []).unwrap();
        assert_ne!(dataset_facts(root).digest, changed.digest);
        let single = dataset_facts(&root.join("one.hdf5"));
        assert_eq!((single.files, single.bytes), (1, 11));
        assert_eq!(dataset_facts(Path::new("no/such/folder")), DatasetFacts::default());
    }
}
