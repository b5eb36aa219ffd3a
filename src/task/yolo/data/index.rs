//! Findings about unchanged images and labels, kept from run to run.
//!
//! `yolo-<key>.bin`: for each image that can be used a key made of what the system says of both files (size, times, inode), then what was found;
//! at the end the CRC-32 of all before. Anything unexpected in it means that the images are looked at again, never an error.

use super::form::Item;
use super::labels::Row;
use crate::data::DataError;
use crate::data::source::file_error;
use crate::data::source::picture::Header;
use crate::data::source::video::image::ImageSize;
use std::collections::HashMap;
use std::hash::Hasher;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Raised when a scan finds out something else.
const VERSION: u32 = 1;

/// Findings about an image and its labels.
#[derive(Clone, Debug, PartialEq)]
pub enum Finding {
    Good(Good),
    /// It is not used; the line says why.
    Bad(String),
}

/// An image that can be used.
#[derive(Clone, Debug, PartialEq)]
pub struct Good {
    pub header: Header,
    /// Bytes of the file, and the time of its last write.
    pub bytes: u64,
    pub modified: (i64, i64),
    pub rows: Vec<Row>,
}

/// Key of an image under which findings are kept. `settings`: what else they depend on.
pub fn key(item: &Item, settings: u64) -> u64 {
    let mut hash = fnv::FnvHasher::default();
    hash.write_u32(VERSION);
    hash.write_u64(settings);
    for path in [Some(item.image.as_path()), item.label.file()].into_iter().flatten() {
        hash.write(path.as_os_str().as_encoded_bytes());
        if let Ok(facts) = std::fs::metadata(path) {
            let times = [facts.mtime(), facts.mtime_nsec(), facts.ctime(), facts.ctime_nsec()];
            times.into_iter().for_each(|time| hash.write_i64(time));
            [facts.len(), facts.dev(), facts.ino()].into_iter().for_each(|fact| hash.write_u64(fact));
        }
    }
    hash.finish()
}

/// Where the findings of the data set at `root` are kept.
pub fn path(index_dir: &Path, root: &Path) -> PathBuf {
    let mut hash = fnv::FnvHasher::default();
    let whole = root.canonicalize().unwrap_or_else(|_| root.to_owned());
    hash.write(whole.as_os_str().as_encoded_bytes());
    index_dir.join(format!("yolo-{:016x}.bin", hash.finish()))
}

/// Findings by key; empty where the file is missing or damaged.
pub fn load(path: &Path) -> HashMap<u64, Finding> {
    let bytes = std::fs::read(path).unwrap_or_default();
    decode(&bytes).map(|found| found.into_iter().collect()).unwrap_or_default()
}

/// Writes findings beside their place and renames them.
///
/// # Errors
/// No room or permission.
pub fn save(path: &Path, found: &[(u64, &Finding)]) -> Result<(), DataError> {
    let beside = path.with_extension(format!("partial-{}", std::process::id()));
    let write = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&beside, encode(found))?;
        std::fs::rename(&beside, path)
    };
    write().map_err(|error: std::io::Error| file_error(path, error.to_string()))
}

/// Findings as bytes, for a file and for other ranks.
pub fn encode(found: &[(u64, &Finding)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (key, finding) in found {
        out.extend(key.to_le_bytes());
        match finding {
            Finding::Good(Good { header, bytes, modified, rows }) => {
                out.push(header.orientation);
                for number in [header.size.height as u64, header.size.width as u64, *bytes, rows.len() as u64] {
                    out.extend(number.to_le_bytes());
                }
                out.extend([modified.0, modified.1].into_iter().flat_map(i64::to_le_bytes));
                out.extend(rows.iter().flatten().flat_map(|number| number.to_le_bytes()));
            }
            Finding::Bad(why) => {
                out.push(0);
                out.extend((why.len() as u64).to_le_bytes());
                out.extend(why.as_bytes());
            }
        }
    }
    out.extend(libdeflater::crc32(&out).to_le_bytes());
    out
}

/// The inverse of [`encode`]; `None` where the bytes are not whole.
pub fn decode(bytes: &[u8]) -> Option<Vec<(u64, Finding)>> {
    let (mut rest, sum) = bytes.split_last_chunk::<4>()?;
    if libdeflater::crc32(rest).to_le_bytes() != *sum {
        return None;
    }
    fn number(rest: &mut &[u8]) -> Option<u64> {
        let (first, behind) = rest.split_first_chunk::<8>()?;
        *rest = behind;
        Some(u64::from_le_bytes(*first))
    }
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = number(&mut rest)?;
        let (orientation, behind) = rest.split_first()?;
        rest = behind;
        if *orientation == 0 {
            let length = number(&mut rest)? as usize;
            let (why, behind) = rest.split_at_checked(length)?;
            rest = behind;
            found.push((key, Finding::Bad(String::from_utf8_lossy(why).into_owned())));
            continue;
        }
        let (height, width) = (number(&mut rest)? as usize, number(&mut rest)? as usize);
        let (bytes, count) = (number(&mut rest)?, number(&mut rest)? as usize);
        let modified = (number(&mut rest)? as i64, number(&mut rest)? as i64);
        let (part, behind) = rest.split_at_checked(count.checked_mul(20)?)?;
        rest = behind;
        let numbers: Vec<f32> = part.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        let rows = numbers.as_chunks::<5>().0.to_vec();
        let header = Header { size: ImageSize { height, width }, orientation: *orientation };
        found.push((key, Finding::Good(Good { header, bytes, modified, rows })));
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::super::form::Label;
    use super::*;

    fn some() -> Vec<(u64, Finding)> {
        let header = Header { size: ImageSize { height: 3, width: 70_000 }, orientation: 6 };
        let rows = vec![[1.0, 0.25, 0.5, 0.125, 1e-7], [0.0; 5]];
        let good = Good { header, bytes: 1 << 40, modified: (-3, 5), rows };
        vec![(7, Finding::Bad("line 2: „x“".into())), (9, Finding::Good(good))]
    }

    #[test]
    fn findings_survive_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let place = path(&dir.path().join("index"), Path::new("data.yaml"));
        assert!(load(&place).is_empty());
        let found = some();
        let lent: Vec<(u64, &Finding)> = found.iter().map(|(key, finding)| (*key, finding)).collect();
        save(&place, &lent).unwrap();
        assert_eq!(load(&place), found.iter().cloned().collect());
        let bytes = encode(&lent);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(decode(&damaged).is_none() && decode(&bytes[..at]).is_none());
        }
    }

    #[test]
    fn a_key_changes_with_the_files_and_settings() {
        let dir = tempfile::tempdir().unwrap();
        let (image, text) = (dir.path().join("a.png"), dir.path().join("a.txt"));
        let item = Item { image: image.clone(), label: Label::Text(text.clone()) };
        let mut keys = vec![key(&item, 1), key(&item, 2)];
        for (path, content) in [(&image, "x"), (&text, ""), (&text, "y")] {
            std::fs::write(path, content).unwrap();
            keys.push(key(&item, 1));
        }
        assert_eq!(key(&item, 1), keys[4]);
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 5);
    }
}
