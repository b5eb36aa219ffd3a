//! Ranges of a pass: where samples are cut, which parts are there already, and whose turn the others are.

use crate::task::pass::{PassOutput, PassRange};
use std::path::{Path, PathBuf};

/// Work that is left, and where its parts lie.
pub(super) struct Ranges {
    /// All, in order.
    all: Vec<PassRange>,
    /// For each output, its first range.
    first: Vec<usize>,
    /// Ranges without a part, of outputs that are not there.
    pub pending: Vec<usize>,
    /// Ranges that each output waits for. `None`: it is there.
    waits: Vec<Option<usize>>,
    parts: PathBuf,
}

impl Ranges {
    /// Cuts `outputs` into ranges of at most `most` samples and looks for what is done: outputs in `out`, parts in `parts`.
    pub fn find(outputs: &[PassOutput], most: u64, out: &Path, parts: &Path) -> Self {
        let (mut all, mut first) = (Vec::new(), Vec::with_capacity(outputs.len()));
        for (output, of) in outputs.iter().enumerate() {
            first.push(all.len());
            all.extend(cut(of, most).map(|samples| PassRange { output, samples }));
        }
        let mut ranges = Self { all, first, pending: Vec::new(), waits: Vec::new(), parts: parts.to_owned() };
        for (output, of) in outputs.iter().enumerate() {
            let lacks = |n: &usize| !ranges.part(*n).exists();
            let lacking: Vec<usize> = ranges.of_output(output).filter(lacks).collect();
            let is_there = out.join(&of.name).exists();
            ranges.waits.push((!is_there).then_some(lacking.len()));
            if !is_there {
                ranges.pending.extend(lacking);
            }
        }
        ranges
    }

    pub fn get(&self, range: usize) -> &PassRange {
        &self.all[range]
    }

    pub fn of_output(&self, output: usize) -> std::ops::Range<usize> {
        self.first[output]..self.first.get(output + 1).copied().unwrap_or(self.all.len())
    }

    /// The part of a range, once it is whole.
    pub fn part(&self, range: usize) -> PathBuf {
        self.parts.join(format!("{range:08}"))
    }

    /// The name under which something is written before it is renamed.
    pub fn unfinished(&self, what: &str) -> PathBuf {
        self.parts.join(format!(".{what}.unfinished"))
    }

    /// Samples of ranges that are done, and of all.
    pub fn samples(&self) -> [u64; 2] {
        let sum = |ranges: &mut dyn Iterator<Item = &PassRange>| ranges.map(count).sum::<u64>();
        let all = sum(&mut self.all.iter());
        [all - sum(&mut self.pending.iter().map(|n| &self.all[*n])), all]
    }

    /// Outputs whose parts are all there.
    pub fn ready(&self) -> Vec<usize> {
        (0..self.waits.len()).filter(|output| self.waits[*output] == Some(0)).collect()
    }

    /// A range is done.
    pub fn done(&mut self, range: usize) {
        if let Some(left) = &mut self.waits[self.all[range].output] {
            *left = left.saturating_sub(1);
        }
    }

    /// An output is there.
    pub fn joined(&mut self, output: usize) {
        self.waits[output] = None;
    }

    /// Outputs that are there.
    pub fn outputs_done(&self) -> usize {
        self.waits.iter().filter(|waits| waits.is_none()).count()
    }
}

pub(super) fn count(range: &PassRange) -> u64 {
    range.samples.end - range.samples.start
}

/// Runs of at most `most` samples, of nearly equal length.
fn cut(output: &PassOutput, most: u64) -> impl Iterator<Item = std::ops::Range<u64>> + use<> {
    let (start, len) = (output.samples.start, output.samples.end.saturating_sub(output.samples.start));
    let pieces = len.div_ceil(most.max(1)).max(1);
    let at = move |piece: u64| start + (u128::from(len) * u128::from(piece) / u128::from(pieces)) as u64;
    (0..pieces).map(move |piece| at(piece)..at(piece + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outputs(lengths: &[u64]) -> Vec<PassOutput> {
        let mut at = 0;
        let one = |(n, len): (usize, &u64)| {
            at += len;
            PassOutput { name: format!("o{n}").into(), samples: at - len..at }
        };
        lengths.iter().enumerate().map(one).collect()
    }

    proptest! {
        #[test]
        fn ranges_cover_every_output_without_a_gap(
            lengths in proptest::collection::vec(0u64..40, 1..6), most in 1u64..12,
        ) {
            let (dir, outputs) = (tempfile::tempdir().unwrap(), outputs(&lengths));
            let ranges = Ranges::find(&outputs, most, dir.path(), dir.path());
            for (n, output) in outputs.iter().enumerate() {
                let of: Vec<_> = ranges.of_output(n).map(|n| ranges.get(n).clone()).collect();
                prop_assert_eq!((of[0].samples.start, of[of.len() - 1].samples.end), (output.samples.start, output.samples.end));
                prop_assert!(of.windows(2).all(|pair| pair[0].samples.end == pair[1].samples.start));
                prop_assert!(of.iter().all(|range| range.output == n && count(range) <= most));
            }
            prop_assert_eq!(ranges.samples(), [0, lengths.iter().sum()]);
        }
    }

    #[test]
    fn what_is_there_is_not_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let (out, parts) = (dir.path().join("out"), dir.path().join("parts"));
        std::fs::create_dir_all(&out).unwrap();
        std::fs::create_dir_all(&parts).unwrap();
        let outputs = outputs(&[10, 4, 7]);
        let find = || Ranges::find(&outputs, 4, &out, &parts);
        assert_eq!(find().pending, [0, 1, 2, 3, 4, 5]);
        std::fs::write(out.join("o0"), "").unwrap();
        std::fs::write(find().part(4), "").unwrap();
        // Never taken for a part.
        std::fs::write(find().unfinished("5"), "").unwrap();
        let mut ranges = find();
        assert_eq!((ranges.pending.as_slice(), ranges.ready()), (&[3, 5][..], vec![]));
        assert_eq!((ranges.samples(), ranges.outputs_done()), ([13, 21], 1));
        ranges.done(5);
        assert_eq!(ranges.ready(), [2]);
        ranges.joined(2);
        ranges.done(3);
        assert_eq!((ranges.ready(), ranges.outputs_done()), (vec![1], 2));
    }
}
