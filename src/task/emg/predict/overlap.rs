//! Windows that overlap become one trajectory: each row is the mean of the windows over it, weighted by the distance to the
//! window's nearer end. So the trajectory has no steps where a window ends.
//!
//! A part of a range holds sums and weights, little-endian: first row and number of rows (u64), then f32 `[rows, angles]`, then
//! f32 `[rows]`. Parts of neighbouring ranges overlap; their sums add up.

use crate::data::DataError;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const HEAD_BYTES: u64 = 16;

/// Sums over the windows of a range.
pub(super) struct Sums {
    first: u64,
    angles: usize,
    sums: Vec<f32>,
    weights: Vec<f32>,
}

impl Sums {
    /// For rows `rows` of a session.
    pub fn new(rows: Range<u64>, angles: usize) -> Self {
        let count = (rows.end - rows.start) as usize;
        Self { first: rows.start, angles, sums: vec![0.0; count * angles], weights: vec![0.0; count] }
    }

    /// Adds the prediction for the window at `row`, `[T, angles]`.
    pub fn add(&mut self, row: u64, window: &[f32]) {
        let rows = window.len() / self.angles.max(1);
        let at = (row - self.first) as usize;
        for (n, pose) in window.chunks_exact(self.angles.max(1)).enumerate() {
            let weight = (n.min(rows - 1 - n) + 1) as f32;
            let into = &mut self.sums[(at + n) * self.angles..][..self.angles];
            into.iter_mut().zip(pose).for_each(|(sum, angle)| *sum += weight * angle);
            self.weights[at + n] += weight;
        }
    }

    pub fn write(&self, path: &Path) -> Result<(), DataError> {
        let write = || -> std::io::Result<()> {
            let mut file = BufWriter::new(File::create_new(path)?);
            file.write_all(&self.first.to_le_bytes())?;
            file.write_all(&(self.weights.len() as u64).to_le_bytes())?;
            for value in self.sums.iter().chain(&self.weights) {
                file.write_all(&value.to_le_bytes())?;
            }
            file.into_inner()?.sync_all()
        };
        write().map_err(|e| DataError::output(path, e))
    }
}

/// The parts of a session.
pub(super) struct Parts {
    parts: Vec<Part>,
    angles: usize,
}

struct Part {
    path: PathBuf,
    file: File,
    rows: Range<u64>,
}

impl Parts {
    pub fn open(paths: &[PathBuf], angles: usize) -> Result<Self, DataError> {
        let open = |path: &PathBuf| -> Result<Part, DataError> {
            let damaged = |problem: String| DataError::File { path: path.clone(), problem };
            let file = File::open(path).map_err(|e| damaged(e.to_string()))?;
            let mut head = [0; HEAD_BYTES as usize];
            file.read_exact_at(&mut head, 0).map_err(|e| damaged(e.to_string()))?;
            let number = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let (first, count) = (number(0), number(8));
            let bytes =
                count.checked_mul(angles as u64 + 1).and_then(|cells| cells.checked_mul(4)?.checked_add(HEAD_BYTES));
            let length = file.metadata().map_err(|e| damaged(e.to_string()))?.len();
            match bytes {
                Some(bytes) if bytes == length => Ok(Part { path: path.clone(), file, rows: first..first + count }),
                _ => Err(damaged("is damaged: remove it, and the same command makes it anew".into())),
            }
        };
        Ok(Self { parts: paths.iter().map(open).collect::<Result<_, _>>()?, angles })
    }

    /// Angles of these rows, `[rows, angles]`; NaN where no window lies.
    pub fn angles(&self, rows: Range<u64>) -> Result<Vec<f32>, DataError> {
        let count = (rows.end - rows.start) as usize;
        let (mut sums, mut weights) = (vec![0.0f32; count * self.angles], vec![0.0f32; count]);
        for part in &self.parts {
            let both = rows.start.max(part.rows.start)..rows.end.min(part.rows.end);
            if both.start >= both.end {
                continue;
            }
            let (inside, len) = (both.start - part.rows.start, (both.end - both.start) as usize);
            let behind = (part.rows.end - part.rows.start) * self.angles as u64;
            let into = (both.start - rows.start) as usize;
            let cells = part.read(inside * self.angles as u64, len * self.angles)?;
            sums[into * self.angles..].iter_mut().zip(cells).for_each(|(sum, more)| *sum += more);
            let cells = part.read(behind + inside, len)?;
            weights[into..].iter_mut().zip(cells).for_each(|(sum, more)| *sum += more);
        }
        for (pose, weight) in sums.chunks_exact_mut(self.angles.max(1)).zip(&weights) {
            // Without a window 0 / 0 is NaN.
            pose.iter_mut().for_each(|angle| *angle /= weight);
        }
        Ok(sums)
    }
}

impl Part {
    /// Numbers from the `first` on.
    fn read(&self, first: u64, count: usize) -> Result<Vec<f32>, DataError> {
        let mut bytes = vec![0; count * 4];
        let read = self.file.read_exact_at(&mut bytes, HEAD_BYTES + 4 * first);
        read.map_err(|e| DataError::File { path: self.path.clone(), problem: e.to_string() })?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|cell| f32::from_le_bytes(*cell)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_weighted_means_of_their_windows_however_ranges_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        // Windows of 4 rows at 0, 2, 4 of one angle: values 1, 2, 3.
        let whole = |cuts: &[&[(u64, f32)]]| {
            let write = |(n, windows): (usize, &&[(u64, f32)])| {
                let mut sums = Sums::new(windows[0].0..windows[windows.len() - 1].0 + 4, 1);
                windows.iter().for_each(|(row, value)| sums.add(*row, &[*value; 4]));
                let path = dir.path().join(format!("{}-{n}", cuts.len()));
                sums.write(&path).unwrap();
                path
            };
            let paths: Vec<PathBuf> = cuts.iter().enumerate().map(write).collect();
            Parts::open(&paths, 1).unwrap()
        };
        let one = whole(&[&[(0, 1.0), (2, 2.0), (4, 3.0)]]).angles(0..9).unwrap();
        let mean = |pairs: &[(f32, f32)]| {
            pairs.iter().map(|(w, v)| w * v).sum::<f32>() / pairs.iter().map(|(w, _)| w).sum::<f32>()
        };
        let expected = [1.0, 1.0, mean(&[(2.0, 1.0), (1.0, 2.0)]), mean(&[(1.0, 1.0), (2.0, 2.0)])];
        assert_eq!(&one[..4], &expected);
        assert_eq!((one[6], one[7], one[8].is_nan()), (3.0, 3.0, true));
        let cut = whole(&[&[(0, 1.0)], &[(2, 2.0), (4, 3.0)]]);
        for (a, b) in [(0, 9), (0, 3), (1, 2), (5, 7)] {
            let angles = cut.angles(a..b).unwrap();
            let same = |n: usize| angles[n].to_bits() == one[a as usize + n].to_bits();
            assert!((0..angles.len()).all(same), "{a}..{b}");
        }
    }

    #[test]
    fn a_part_that_was_cut_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0");
        Sums::new(0..8, 2).write(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(60).unwrap();
        let error = Parts::open(&[path], 2).err().unwrap().to_string();
        assert!(error.contains("is damaged: remove it"), "{error}");
    }
}
