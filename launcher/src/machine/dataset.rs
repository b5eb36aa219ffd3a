//! What a data set weighs, from file names, sizes and a picture's header: nothing is decoded.

use spec::contract::DatasetFacts;
use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes of a spike file that are looked at to tell its encoding.
const PEEKED_BYTES: u64 = 64 << 10;

/// Weighs the recordings and frames below `path`, or `path` itself when it is a file. Folders that cannot be read
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
        } else if metadata.is_file() {
            add(&mut facts, &path, metadata.len());
        }
    }
    facts
}

/// Adds the file at `path` of `bytes` bytes.
fn add(facts: &mut DatasetFacts, path: &Path, bytes: u64) {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
    let frames = &mut facts.frames;
    match extension.as_str() {
        "h5" | "hdf5" => {
            facts.files += 1;
            facts.bytes = facts.bytes.saturating_add(bytes);
            facts.largest_file_bytes = facts.largest_file_bytes.max(bytes);
        }
        "png" | "jpg" | "jpeg" => {
            frames.images += 1;
            if frames.height == 0 && extension == "png" {
                (frames.height, frames.width) = png_size(path).unwrap_or_default();
            }
        }
        "dat" => {
            frames.spike_files += 1;
            if bytes > frames.spike_file_bytes {
                frames.spike_file_bytes = bytes;
                frames.spikes_are_bytes = zeros_and_ones(path).unwrap_or(false);
            }
        }
        "npy" => frames.voxel_bytes = frames.voxel_bytes.saturating_add(bytes),
        _ => {}
    }
}

/// Rows and columns by a PNG's first chunk (PNG specification, 11.2.2: width, then height, after 16 bytes).
fn png_size(path: &Path) -> Option<(usize, usize)> {
    let mut head = [0; 24];
    std::fs::File::open(path).ok()?.read_exact(&mut head).ok()?;
    let whole = head.starts_with(b"\x89PNG\r\n\x1a\n") && &head[12..16] == b"IHDR";
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
    whole.then(|| (number(20), number(16)))
}

fn zeros_and_ones(path: &Path) -> Option<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path).ok()?.take(PEEKED_BYTES).read_to_end(&mut head).ok()?;
    Some(head.iter().all(|byte| *byte <= 1) && head.contains(&1))
}

/// Entries of a folder, the first time it is met: links may lead in circles.
fn entries_once(folder: &Path, seen: &mut HashSet<PathBuf>) -> Vec<PathBuf> {
    let fresh = std::fs::canonicalize(folder).is_ok_and(|real| seen.insert(real));
    let entries = fresh.then(|| std::fs::read_dir(folder).ok()).flatten();
    entries.into_iter().flatten().flatten().map(|entry| entry.path()).collect()
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
        let expected =
            DatasetFacts { exists: true, files: 2, bytes: 310, largest_file_bytes: 300, ..Default::default() };
        assert_eq!(facts, expected);
        assert!(!facts.is_empty());
        let single = dataset_facts(&root.join("one.hdf5"));
        assert_eq!((single.files, single.bytes), (1, 10));
    }

    #[test]
    fn frames_are_counted_and_one_header_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        png.extend([1280u32.to_be_bytes(), 720u32.to_be_bytes()].concat());
        write("0.png", &png);
        write("1.PNG", &png);
        write("a.dat", &[0, 1, 1, 0]);
        write("b.dat", &[0, 200]);
        write("v.npy", &[0; 9]);
        let frames = dataset_facts(folder.path()).frames;
        assert_eq!((frames.images, frames.height, frames.width), (2, 720, 1280));
        assert_eq!((frames.spike_files, frames.spike_file_bytes, frames.spikes_are_bytes), (2, 4, true));
        assert_eq!(frames.voxel_bytes, 9);
        write("b.dat", &[0, 200, 1, 1, 1]);
        assert!(!dataset_facts(folder.path()).frames.spikes_are_bytes);
    }

    #[test]
    fn a_missing_folder_does_not_exist_and_a_broken_picture_has_no_size() {
        assert_eq!(dataset_facts(Path::new("no/such/folder")), DatasetFacts::default());
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("x.png"), b"\x89PNG").unwrap();
        let frames = dataset_facts(folder.path()).frames;
        assert_eq!((frames.images, frames.height, frames.width), (1, 0, 0));
    }
}
