//! Windows as indices: nothing is kept per window, only per failure-free block of a file.

use crate::data::Pages;

/// A failure-free run of windows in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    file: u32,
    /// Row of its first window.
    first: u64,
    /// Windows before it, over all segments.
    before: u64,
}

/// Index → (file, start row), by binary search over segments.
#[derive(Clone, Debug)]
pub struct Windows {
    segments: Vec<Segment>,
    stride: u64,
    total: u64,
    /// Windows in use: all, or an evenly spread part.
    used: u64,
}

impl Windows {
    /// None yet; `stride` is at least 1.
    pub fn new(stride: u64) -> Self {
        Self { segments: Vec::new(), stride, total: 0, used: 0 }
    }

    /// Adds the windows of `rows` rows that start at multiples of the stride in `file` and lie wholly inside `block`.
    pub fn add(&mut self, file: u32, block: [u64; 2], window: u64) {
        let (first, count) = windows_in(block, window, self.stride);
        if count > 0 {
            self.segments.push(Segment { file, first, before: self.total });
            self.total += count;
            self.used = self.total;
        }
    }

    /// Keeps at most `limit` windows, evenly spread; 0 keeps all.
    pub fn limit(&mut self, limit: usize) {
        self.used = if limit == 0 { self.total } else { self.total.min(limit as u64) };
    }

    pub fn len(&self) -> usize {
        self.used as usize
    }

    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Files with windows, each once, in rising order.
    pub fn files(&self) -> impl Iterator<Item = u32> {
        let new = |n: &usize| *n == 0 || self.segments[n - 1].file != self.segments[*n].file;
        (0..self.segments.len()).filter(new).map(|n| self.segments[n].file)
    }

    /// Windows before [`Windows::limit`].
    pub fn total(&self) -> u64 {
        self.total
    }

    /// File and first row of window `index`; `None` from [`Windows::len`] on.
    pub fn get(&self, index: usize) -> Option<(u32, u64)> {
        let index = index as u64;
        if index >= self.used {
            return None;
        }
        let spread = (u128::from(index) * u128::from(self.total) / u128::from(self.used)) as u64;
        let after = self.segments.partition_point(|segment| segment.before <= spread);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        Some((segment.file, segment.first + (spread - segment.before) * self.stride))
    }
}

impl Windows {
    /// Pages: windows in use that start in the same `page_rows(file)` rows of a file. Sequences: those of one file.
    pub fn pages(&self, page_rows: impl Fn(u32) -> u64) -> Pages {
        let mut found = Pages::default();
        let mut last = None;
        for (n, segment) in self.segments.iter().enumerate() {
            let end = self.segments.get(n + 1).map_or(self.total, |next| next.before);
            let rows = page_rows(segment.file).max(1);
            let mut window = segment.before;
            while window < end {
                let row = segment.first + (window - segment.before) * self.stride;
                let place = (segment.file, row / rows);
                if last.is_none_or(|(file, _)| file != segment.file) {
                    found.sequences.push(self.used_from(window));
                }
                if last.replace(place) != Some(place) {
                    found.pages.push(self.used_from(window));
                }
                // On to the first window that starts in the next page.
                window += ((row / rows + 1) * rows - row).div_ceil(self.stride);
            }
        }
        // A limit may leave pages without a window in use.
        for starts in [&mut found.pages, &mut found.sequences] {
            starts.dedup();
            starts.retain(|start| *start < self.used);
        }
        found
    }

    /// Indices of the windows of `window` rows in `file` that touch `rows`, as ranges in rising order.
    pub fn touching(
        &self,
        file: u32,
        rows: std::ops::Range<u64>,
        window: u64,
    ) -> impl Iterator<Item = std::ops::Range<u64>> {
        let first = self.segments.partition_point(|segment| segment.file < file);
        let of_file = self.segments[first..].iter().enumerate().take_while(move |(_, segment)| segment.file == file);
        of_file.filter_map(move |(n, segment)| {
            let end = self.segments.get(first + n + 1).map_or(self.total, |next| next.before);
            // Window k of the segment starts at row first + k × stride.
            let k_from = (rows.start + 1).saturating_sub(segment.first + window).div_ceil(self.stride);
            let k_to = rows.end.saturating_sub(segment.first).div_ceil(self.stride).min(end - segment.before);
            (k_from < k_to).then(|| self.used_from(segment.before + k_from)..self.used_from(segment.before + k_to))
        })
    }

    /// The first index whose window is `spread` or a later one, of all windows.
    fn used_from(&self, spread: u64) -> u64 {
        (u128::from(spread) * u128::from(self.used)).div_ceil(u128::from(self.total.max(1))) as u64
    }
}

/// Row of the first window in `block`, and how many there are.
pub fn windows_in(block: [u64; 2], window: u64, stride: u64) -> (u64, u64) {
    let first = block[0].div_ceil(stride) * stride;
    match block[1].checked_sub(window) {
        Some(last) if window > 0 && first <= last => (first, (last - first) / stride + 1),
        _ => (first, 0),
    }
}

/// Finaliser of SplitMix64: a bijection that mixes all bits.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// A permutation of `0..len` as a pure function of the seed: a Feistel network over the next even number of bits, walked
/// until it lands inside.
pub fn permuted(index: u64, len: u64, seed: u64) -> u64 {
    let half = (u64::BITS - len.saturating_sub(1).leading_zeros()).div_ceil(2).max(1);
    let mask = (1 << half) - 1;
    let mut x = index;
    loop {
        let (mut left, mut right) = (x >> half, x & mask);
        for round in 0..4u64 {
            (left, right) = (right, left ^ (mix(mix(seed ^ round) ^ right) & mask));
        }
        x = (left << half) | right;
        if x < len {
            return x;
        }
    }
}

/// Places of files in the three splits, from 0.7/0.15/0.15-like shares: deterministic by seed, none empty from three files
/// on. With two files validation and test share one, with one all three do. Each list is sorted.
pub fn split_files(files: usize, ratio: [f64; 3], seed: u64) -> [Vec<usize>; 3] {
    let mut order: Vec<usize> = (0..files).collect();
    for i in (1..files).rev() {
        let bound = i as u64 + 1;
        let draw = (u128::from(mix(seed ^ mix(i as u64))) * u128::from(bound)) >> 64;
        order.swap(i, draw as usize);
    }
    let mut splits = match files {
        0 => [vec![], vec![], vec![]],
        1 => [vec![0], vec![0], vec![0]],
        2 => [vec![order[0]], vec![order[1]], vec![order[1]]],
        _ => {
            let share = |ratio: f64| ((files as f64 * ratio).round() as usize).clamp(1, files - 2);
            let val = share(ratio[1]);
            let test = share(ratio[2]).min(files - 1 - val);
            let train = files - val - test;
            [order[..train].to_vec(), order[train..train + val].to_vec(), order[train + val..].to_vec()]
        }
    };
    splits.iter_mut().for_each(|split| split.sort_unstable());
    splits
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn windows_per_file_follow_the_formula() {
        for (rows, window, stride) in [(1000, 500, 1), (1000, 500, 2), (999, 500, 250), (500, 500, 7), (499, 500, 1)] {
            let expected = if rows < window { 0 } else { (rows - window) / stride + 1 };
            assert_eq!(windows_in([0, rows], window, stride).1, expected);
        }
    }

    #[test]
    fn pages_hold_the_windows_that_start_in_a_chunk() {
        let mut windows = Windows::new(30);
        windows.add(0, [0, 1000], 50);
        windows.add(2, [70, 450], 50);
        windows.add(2, [500, 1000], 50);
        for limit in [0, 1, 3, 7, 20] {
            windows.limit(limit);
            let pages = windows.pages(|file| if file == 0 { 100 } else { 1000 });
            let starts = |key: &dyn Fn(u32, u64) -> (u32, u64)| -> Vec<u64> {
                let places = (0..windows.len()).map(|n| windows.get(n).map(|(file, row)| key(file, row)));
                let places: Vec<_> = places.collect();
                (0..places.len()).filter(|n| *n == 0 || places[*n] != places[n - 1]).map(|n| n as u64).collect()
            };
            assert_eq!(pages.pages, starts(&|file, row| (file, if file == 0 { row / 100 } else { 0 })), "{limit}");
            assert_eq!(pages.sequences, starts(&|file, _| (file, 0)), "{limit}");
        }
    }

    proptest! {
        #[test]
        fn indices_equal_a_plain_list(
            files in proptest::collection::vec(proptest::collection::vec((0u64..40, 0u64..90), 0..4), 1..5),
            window in 1u64..30, stride in 1u64..12, limit in 0usize..80,
        ) {
            let mut windows = Windows::new(stride);
            let mut plain = Vec::new();
            for (file, blocks) in files.iter().enumerate() {
                let mut at = 0;
                for (gap, length) in blocks {
                    let block = [at + gap, at + gap + length];
                    windows.add(file as u32, block, window);
                    plain.extend((0..1000).map(|k| k * stride)
                        .filter(|start| *start >= block[0] && start + window <= block[1])
                        .map(|start| (file as u32, start)));
                    at = block[1] + 1;
                }
            }
            for (i, want) in plain.iter().enumerate() {
                prop_assert_eq!(windows.get(i), Some(*want));
            }
            prop_assert_eq!(windows.len(), plain.len());
            windows.limit(limit);
            let some: Vec<_> = (0..windows.len()).map(|i| windows.get(i).unwrap()).collect();
            prop_assert_eq!(some.len(), if limit == 0 { plain.len() } else { limit.min(plain.len()) });
            prop_assert!(some.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert_eq!(windows.get(windows.len()), None);
            for file in 0..files.len() as u32 {
                for (from, to) in [(0, 1), (7, 30), (29, 31), (40, 400), (0, 1000)] {
                    let found: Vec<u64> = windows.touching(file, from..to, window).flatten().collect();
                    let touches = |i: &u64| {
                        let (f, row) = windows.get(*i as usize).unwrap();
                        f == file && row < to && row + window > from
                    };
                    prop_assert_eq!(found, (0..windows.len() as u64).filter(touches).collect::<Vec<_>>());
                }
            }
        }

        #[test]
        fn the_permutation_is_one(len in 1u64..700, seed in any::<u64>()) {
            let mut seen: Vec<u64> = (0..len).map(|i| permuted(i, len, seed)).collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..len).collect::<Vec<_>>());
        }

        #[test]
        fn every_file_is_in_one_split_and_no_split_is_empty(files in 3usize..200, seed in any::<u64>(), val in 0.0f64..0.9) {
            let splits = split_files(files, [1.0 - val, val / 2.0, val / 2.0], seed);
            prop_assert!(splits.iter().all(|split| !split.is_empty()));
            let mut all = splits.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..files).collect::<Vec<_>>());
        }
    }

    #[test]
    fn splits_depend_on_the_seed_alone() {
        let ratio = [0.7, 0.15, 0.15];
        assert_eq!(split_files(12, ratio, 42), split_files(12, ratio, 42));
        assert_ne!(split_files(12, ratio, 42), split_files(12, ratio, 43));
        assert_eq!(split_files(12, ratio, 42).map(|split| split.len()), [8, 2, 2]);
        assert_eq!(split_files(2, ratio, 1).map(|split| split.len()), [1, 1, 1]);
    }
}
