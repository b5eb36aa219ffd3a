//! Records of a file that others append to, each once.

use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Most bytes that one call reads.
const AT_ONCE: u64 = 256 << 10;
/// Bytes before the place of reading by which a file is known again: times of records are among them.
const KNOWN_BY: usize = 4096;

/// A file of JSON lines, read piece by piece.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    at: u64,
    /// A line whose end was not there yet.
    part: Vec<u8>,
    /// The last bytes before `at`, as far as they were read.
    before: Vec<u8>,
}

/// Result of [`Tail::next`].
#[derive(Debug, Default, PartialEq)]
pub struct Piece<T> {
    pub records: Vec<T>,
    /// The file was cut back, and may have grown since: these records begin at its first line.
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
        Self { path: path.to_owned(), at, part: Vec::new(), before: Vec::new() }
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
        let again = file.metadata()?.len() < self.at || !self.is_known(&file);
        if again {
            *self = Self::new(&self.path);
        }
        file.seek(SeekFrom::Start(self.at))?;
        let had = self.part.len();
        let got = file.take(AT_ONCE).read_to_end(&mut self.part)? as u64;
        self.at += got;
        self.before.extend_from_slice(&self.part[had..]);
        self.before.drain(..self.before.len().saturating_sub(KNOWN_BY));
        let end = self.part.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = self.part.drain(..end).collect();
        let lines = whole.split(|byte| *byte == b'\n');
        let records = lines.filter_map(|line| serde_json::from_slice(line).ok()).collect();
        Ok(Piece { records, again, more: got == AT_ONCE })
    }

    /// True if what was read last stands where it stood.
    fn is_known(&self, file: &File) -> bool {
        let mut now = vec![0; self.before.len()];
        let read = file.read_exact_at(&mut now, self.at - self.before.len() as u64);
        read.is_ok() && now == self.before
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
        // Cut back, and grown beyond the place of reading before the next look.
        std::fs::write(&path, "8\n9\n").unwrap();
        assert_eq!(tail.next::<u32>().unwrap(), Piece { records: vec![8, 9], again: true, more: false });
        assert_eq!(Tail::behind(&path, 2).next::<u32>().unwrap().records, [9]);
        assert!(Tail::behind(&path, 4).next::<u32>().unwrap().records.is_empty());
    }
}
