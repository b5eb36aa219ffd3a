//! Records of a file that others append to, each once.

use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Most bytes that one call reads.
const AT_ONCE: u64 = 256 << 10;

/// A file of JSON lines, read piece by piece.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    at: u64,
    /// A line whose end was not there yet.
    part: Vec<u8>,
}

/// Result of [`Tail::next`].
#[derive(Debug, Default, PartialEq)]
pub struct Piece<T> {
    pub records: Vec<T>,
    /// The file became shorter: these records begin at its first line.
    pub again: bool,
    /// There may be more now.
    pub more: bool,
}

impl Tail {
    /// Begins at the file's first line.
    pub fn new(path: &Path) -> Self {
        Self::behind(path, 0)
    }

    /// Begins at byte `at`.
    pub fn behind(path: &Path, at: u64) -> Self {
        Self { path: path.to_owned(), at, part: Vec::new() }
    }

    /// The next whole lines, as far as they are records of this kind.
    ///
    /// # Errors
    /// The file cannot be read; a missing file has no records.
    pub fn next<T: DeserializeOwned>(&mut self) -> io::Result<Piece<T>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Piece { records: Vec::new(), again: false, more: false });
            }
            Err(error) => return Err(error),
        };
        let again = file.metadata()?.len() < self.at;
        if again {
            (self.at, self.part) = (0, Vec::new());
        }
        file.seek(SeekFrom::Start(self.at))?;
        let got = file.take(AT_ONCE).read_to_end(&mut self.part)? as u64;
        self.at += got;
        let end = self.part.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = self.part.drain(..end).collect();
        let lines = whole.split(|byte| *byte == b'\n');
        let records = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        Ok(Piece { records, again, more: got == AT_ONCE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn each_record_comes_once_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let mut tail = Tail::new(&path);
        assert!(tail.next::<u32>().unwrap().records.is_empty());
        let mut file = File::options().create(true).append(true).open(&path).unwrap();
        file.write_all(b"1\n2\n3").unwrap();
        assert_eq!(tail.next::<u32>().unwrap().records, [1, 2]);
        file.write_all(b"4\nx\n5\n").unwrap();
        assert_eq!(tail.next::<u32>().unwrap().records, [34, 5]);
        assert_eq!(tail.next::<u32>().unwrap(), Piece { records: vec![], again: false, more: false });
        std::fs::write(&path, "7\n").unwrap();
        assert_eq!(tail.next::<u32>().unwrap(), Piece { records: vec![7], again: true, more: false });
        let mut late = Tail::behind(&path, 2);
        assert!(late.next::<u32>().unwrap().records.is_empty());
    }
}
