//! Which cells each split has. A byte per cell of the files says so, and a count per 64 finds the n-th.
//!
//! A cell's split is drawn from the seed, its file and its row alone: it stays when files are added, when filters change, and
//! on any number of ranks.

use crate::data::loader::mix;
use crate::data::split::RowSplit;
use std::sync::Arc;

/// Cells that share a count.
const STEP: usize = 64;

/// Part that a cell is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    Train = 0,
    Val = 1,
    Test = 2,
    /// Left out by a filter, or without a label.
    Out = 3,
}

/// The part of row `row`, were it not left out.
pub fn part_of(split: &RowSplit, row: u64) -> Part {
    let draw = mix(split.key ^ mix(split.seed ^ mix(row.wrapping_add(1))));
    match draw {
        _ if draw < split.train_below => Part::Train,
        _ if draw < split.val_below => Part::Val,
        _ => Part::Test,
    }
}

/// Bounds of a split by shares: of all 64-bit draws.
pub fn bounds(ratio: [f64; 3]) -> (u64, u64) {
    let below = |share: f64| if share >= 1.0 - 1e-9 { u64::MAX } else { (share.max(0.0) * 2f64.powi(64)) as u64 };
    (below(ratio[0]), below(ratio[0] + ratio[1]))
}

/// Rows of all files, one after the other, by [`Part`].
pub type Parts = Arc<[u8]>;

/// Cells of some parts, numbered in the order of their rows.
#[derive(Clone, Debug)]
pub struct Members {
    parts: Parts,
    /// By part: its cells count.
    wanted: [bool; 4],
    /// Cells before every 64th row.
    before: Arc<[u32]>,
    len: u32,
}

impl Members {
    pub fn new(parts: Parts, wanted: &[Part]) -> Self {
        let mut of = [false; 4];
        wanted.iter().for_each(|part| of[*part as usize] = true);
        let mut len = 0;
        let before = parts.chunks(STEP).map(|block| {
            let first = len;
            len += block.iter().filter(|part| of[usize::from(**part)]).count() as u32;
            first
        });
        let before = before.collect();
        Self { parts, wanted: of, before, len }
    }

    pub fn len(&self) -> u64 {
        u64::from(self.len)
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Row of cell `n`.
    pub fn row(&self, n: u64) -> Option<u64> {
        if n >= self.len() {
            return None;
        }
        let block = self.before.partition_point(|before| u64::from(*before) <= n) - 1;
        let mut left = n - u64::from(self.before[block]);
        let first = block * STEP;
        for (at, part) in self.parts[first..].iter().enumerate() {
            if self.wanted[usize::from(*part)] {
                if left == 0 {
                    return Some((first + at) as u64);
                }
                left -= 1;
            }
        }
        None
    }

    /// Cells before `row`: the number of the cell at `row`, where it is one.
    pub fn rank(&self, row: u64) -> u64 {
        let row = (row as usize).min(self.parts.len());
        let Some(before) = self.before.get(row / STEP) else { return self.len() };
        let block = &self.parts[row / STEP * STEP..row];
        u64::from(*before) + block.iter().filter(|part| self.wanted[usize::from(**part)]).count() as u64
    }

    /// A limit on how many there are, spread evenly: cells beyond it are none of these.
    pub fn limited(self, most: usize) -> Self {
        if most == 0 || self.len() <= most as u64 {
            return self;
        }
        let (len, most) = (self.len(), most as u64);
        let mut parts = self.parts.to_vec();
        let mut n = 0;
        for part in &mut parts {
            if self.wanted[usize::from(*part)] {
                // Of `len` cells those at which the share passes the next whole number.
                if (n + 1) * most / len == n * most / len {
                    *part = Part::Out as u8;
                }
                n += 1;
            }
        }
        let wanted = [Part::Train, Part::Val, Part::Test].into_iter().filter(|part| self.wanted[*part as usize]);
        Self::new(parts.into(), &wanted.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(ratio: [f64; 3], key: u64) -> RowSplit {
        let (train_below, val_below) = bounds(ratio);
        RowSplit { key, seed: 42, train_below, val_below }
    }

    #[test]
    fn members_are_found_by_number_and_by_row() {
        let parts: Parts = (0..5000u64).map(|row| (mix(row) % 4) as u8).collect();
        for wanted in [&[Part::Train][..], &[Part::Val, Part::Test], &[Part::Train, Part::Val, Part::Test], &[]] {
            let members = Members::new(Arc::clone(&parts), wanted);
            let rows: Vec<u64> =
                (0..5000).filter(|row| wanted.iter().any(|part| *part as u8 == parts[*row as usize])).collect();
            assert_eq!(members.len(), rows.len() as u64);
            for (n, row) in rows.iter().enumerate() {
                assert_eq!((members.row(n as u64), members.rank(*row)), (Some(*row), n as u64));
            }
            assert_eq!((members.row(rows.len() as u64), members.rank(9999)), (None, rows.len() as u64));
            let few = members.limited(100);
            assert_eq!(few.len(), rows.len().min(100) as u64);
            assert!((0..few.len()).all(|n| rows.contains(&few.row(n).unwrap())));
        }
    }

    #[test]
    fn shares_are_kept_and_files_and_seeds_differ() {
        let parts = |split: &RowSplit| (0..20_000).map(|row| part_of(split, row)).collect::<Vec<_>>();
        let of = split([0.8, 0.15, 0.05], 7);
        let found = parts(&of);
        for (part, share) in [(Part::Train, 0.8), (Part::Val, 0.15), (Part::Test, 0.05)] {
            let count = found.iter().filter(|found| **found == part).count() as f64;
            assert!((count / 20_000.0 - share).abs() < 0.01, "{part:?} {count}");
        }
        assert_ne!(found, parts(&RowSplit { key: 8, ..of.clone() }));
        assert_ne!(found, parts(&RowSplit { seed: 43, ..of.clone() }));
        assert!(parts(&split([1.0, 0.0, 0.0], 7)).iter().all(|part| *part == Part::Train));
        assert!(parts(&split([0.5, 0.5, 0.0], 7)).iter().all(|part| *part != Part::Test));
    }
}
