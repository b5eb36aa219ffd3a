//! Findings about unchanged files, kept from run to run, so that the next start reads no values.
//!
//! `cell-<key>.bin`: arrays with their lengths, and the CRC-32 of all before. Anything unexpected in it means that the file is
//! scanned again, never an error.

use super::scan::{Scan, Totals};
use crate::data::DataError;
use crate::data::source::Identity;
use crate::data::source::h5ad::Wanted;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Raised when a scan finds out something else.
const VERSION: u32 = 1;

/// Everything that findings depend on.
#[derive(Serialize)]
pub struct Key<'a> {
    pub matrix: &'a str,
    pub min_cells: usize,
    /// Files that hold the values, with their identities.
    pub files: &'a [(PathBuf, Identity)],
    /// Places of the file's genes in the data set.
    pub map: Option<&'a [u32]>,
    pub genes: usize,
}

/// Where the findings of a key are kept.
pub fn path(index_dir: &Path, key: &Key) -> PathBuf {
    let text = serde_json::to_vec(&(VERSION, key)).unwrap_or_default();
    let mut hash = fnv::FnvHasher::default();
    std::hash::Hasher::write(&mut hash, &text);
    index_dir.join(format!("cell-{:016x}.bin", std::hash::Hasher::finish(&hash)))
}

/// A file whose presence says that `file`, as it is now, was opened without harm.
pub fn mark(index_dir: &Path, file: &Path, wanted: &Wanted) -> PathBuf {
    let facts = Identity::now(file).ok();
    let text = serde_json::to_vec(&(VERSION, file, facts, wanted)).unwrap_or_default();
    let mut hash = fnv::FnvHasher::default();
    std::hash::Hasher::write(&mut hash, &text);
    index_dir.join(format!("cell-{:016x}.opened", std::hash::Hasher::finish(&hash)))
}

/// The findings at `path`, where they are there and whole.
pub fn load(path: &Path) -> Option<Scan> {
    decode(&std::fs::read(path).ok()?)
}

/// Writes the findings beside their place and renames them.
///
/// # Errors
/// No room or permission.
pub fn save(path: &Path, scan: &Scan) -> Result<(), DataError> {
    let beside = path.with_extension(format!("partial-{}", std::process::id()));
    let write = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&beside, encode(scan))?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|error: std::io::Error| DataError::File { path: path.to_owned(), problem: error.to_string() })
}

/// Findings as bytes, for a file and for other ranks.
pub fn encode(scan: &Scan) -> Vec<u8> {
    let mut out = Vec::new();
    let mut part = |bytes: Vec<u8>| {
        out.extend((bytes.len() as u64).to_le_bytes());
        out.extend(bytes);
    };
    part(serde_json::to_vec(&(scan.entry_cells, scan.totals)).unwrap_or_default());
    part(scan.expressed.iter().flat_map(|n| n.to_le_bytes()).collect());
    scan.entries.iter().for_each(|list| part(list.iter().flat_map(|n| n.to_le_bytes()).collect()));
    part(scan.counts.iter().flat_map(|n| n.to_le_bytes()).collect());
    part(scan.rare.iter().flat_map(|(gene, cell)| [gene.to_le_bytes(), cell.to_le_bytes()].concat()).collect());
    out.extend(libdeflater::crc32(&out).to_le_bytes());
    out
}

/// The inverse of [`encode`]; `None` where the bytes are not whole.
pub fn decode(bytes: &[u8]) -> Option<Scan> {
    let (whole, sum) = bytes.split_last_chunk::<4>()?;
    if libdeflater::crc32(whole).to_le_bytes() != *sum {
        return None;
    }
    let mut rest = whole;
    let mut part = || {
        let (length, behind) = rest.split_first_chunk::<8>()?;
        let (part, behind) = behind.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        rest = behind;
        Some(part)
    };
    let (entry_cells, totals): (u64, Totals) = serde_json::from_slice(part()?).ok()?;
    let numbers =
        |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|cell| u32::from_le_bytes(*cell)).collect::<Vec<_>>();
    let expressed = part()?.as_chunks::<2>().0.iter().map(|cell| u16::from_le_bytes(*cell)).collect();
    let entries = [numbers(part()?), numbers(part()?)];
    let counts = numbers(part()?);
    let rare = numbers(part()?).as_chunks::<2>().0.iter().map(|[gene, cell]| (*gene, *cell)).collect();
    Some(Scan { entry_cells, expressed, entries, counts, rare, totals })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Scan {
        let totals = Totals { values: 7, most: 3, max: 1e300, fraction: Some((1, 2, 0.1)), negative: None };
        let entries = [vec![100, 90], vec![70, 60]];
        Scan {
            entry_cells: 2,
            expressed: vec![1, 65_535, 3],
            entries,
            counts: vec![2, 0, 5],
            rare: vec![(1, 2), (2, 0)],
            totals,
        }
    }

    #[test]
    fn findings_survive_and_damage_is_seen() {
        let (scan, dir) = (some(), tempfile::tempdir().unwrap());
        let path = dir.path().join("a/cell-1.bin");
        assert!(load(&path).is_none());
        save(&path, &scan).unwrap();
        assert_eq!(load(&path), Some(scan.clone()));
        let bytes = encode(&scan);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(decode(&damaged).is_none() && decode(&bytes[..at]).is_none());
        }
        assert!(scan.fits(3, 3, 2) && !scan.fits(4, 3, 2) && !scan.fits(3, 2, 2) && !scan.fits(3, 3, 1));
    }

    #[test]
    fn other_settings_have_another_place() {
        let key = Key { matrix: "X", min_cells: 3, files: &[], map: None, genes: 4 };
        let here = Path::new("i");
        assert_ne!(path(here, &key), path(here, &Key { min_cells: 2, ..key }));
        assert_ne!(path(here, &key), path(here, &Key { map: Some(&[0]), ..key }));
        assert_eq!(path(here, &key), path(here, &Key { ..key }));
    }
}
