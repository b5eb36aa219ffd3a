//! Orders that keep neighbours together: pages shuffled with a window of pages mixed, or whole sequences.
//!
//! A page is a run of samples that share stored bytes (a chunk of a file), a sequence a run that belongs together (a
//! file). Runs are permuted per epoch; `window` runs in that order make a group, and positions inside a group are
//! permuted again. With a cache that holds a window of pages, an epoch reads each page once.
//!
//! Memory: 8 bytes per run, 8 per group for each of the last two epochs, and 16 per run of the last few groups. All of it follows
//! from (seed, epoch) alone, so that an order remains a pure function of (seed, epoch, position).

use super::Permutation;
use std::sync::{Arc, Mutex, PoisonError};

/// Epochs whose group ends are kept: the one that runs and the next, which look-ahead reaches.
const EPOCHS_KEPT: usize = 2;

/// Groups whose runs are kept: those that a reader, the look-ahead and a search for next uses are in.
const GROUPS_KEPT: usize = 4;

/// Group ends of an epoch, with the keys they belong to.
type Kept = (u64, Arc<[u64]>);

/// The runs of a group, in the order of the epoch.
#[derive(Debug)]
struct Group {
    /// Key of (seed, epoch), and number of the group.
    of: (u64, usize),
    runs: Box<[u64]>,
    /// Samples of the group before the end of each run.
    ends: Box<[u64]>,
}

/// Runs of samples, drawn from `window` of them at a time.
#[derive(Debug)]
pub struct Paged {
    /// First sample of each run, ascending from 0, and the number of samples at the end.
    starts: Arc<[u64]>,
    window: u64,
    /// Samples of a group in their own order, not shuffled.
    in_order: bool,
    kept: Mutex<Vec<Kept>>,
    groups: Mutex<Vec<Arc<Group>>>,
}

impl Paged {
    /// Runs that begin at `starts`, over `len` samples. Starts that do not ascend, or lie past the end, are left out.
    pub fn new(starts: &[u64], len: u64, window: usize, in_order: bool) -> Self {
        let mut whole = vec![0];
        for start in starts.iter().copied().chain([len]) {
            if start <= len && whole.last().is_some_and(|last| start > *last) {
                whole.push(start);
            }
        }
        let (kept, groups) = Default::default();
        Self { starts: whole.into(), window: window.max(1) as u64, in_order, kept, groups }
    }

    fn runs(&self) -> u64 {
        self.starts.len() as u64 - 1
    }

    fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    fn run_len(&self, run: u64) -> u64 {
        self.starts[run as usize + 1] - self.starts[run as usize]
    }

    /// Samples before the end of each group: O(runs) once per epoch.
    fn group_ends(&self, start: u64, runs: &Permutation) -> Arc<[u64]> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, ends)) = kept.iter().find(|(of, _)| *of == start) {
            return ends.clone();
        }
        let mut total = 0;
        let groups = (0..self.runs()).step_by(self.window as usize).map(|first| {
            let last = (first + self.window).min(self.runs());
            total += (first..last).filter_map(|place| runs.at(place)).map(|run| self.run_len(run)).sum::<u64>();
            total
        });
        let ends: Arc<[u64]> = groups.collect();
        if kept.len() == EPOCHS_KEPT {
            kept.remove(0);
        }
        kept.push((start, ends.clone()));
        ends
    }
}

/// One epoch of a paged order.
#[derive(Clone, Debug)]
pub struct PagedEpoch {
    paged: Arc<Paged>,
    start: u64,
    runs: Permutation,
    ends: Arc<[u64]>,
}

impl PagedEpoch {
    /// `start` is the key of (seed, epoch).
    pub fn new(paged: &Arc<Paged>, start: u64) -> Self {
        let runs = Permutation::new(paged.runs(), start);
        Self { ends: paged.group_ends(start, &runs), paged: Arc::clone(paged), start, runs }
    }

    /// First position and length of `group`, and the permutation of what is inside.
    fn group(&self, group: usize) -> (u64, Permutation) {
        let first = group.checked_sub(1).map_or(0, |before| self.ends[before]);
        (first, Permutation::new(self.ends[group] - first, super::mix(self.start ^ super::mix(group as u64 + 1))))
    }

    /// Runs of `group`: O(window) where it is not one of the last few.
    fn runs_of(&self, group: usize) -> Arc<Group> {
        let of = (self.start, group);
        let mut groups = self.paged.groups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = groups.iter().rev().find(|known| known.of == of) {
            return Arc::clone(known);
        }
        let first = group as u64 * self.paged.window;
        let places = first..(first + self.paged.window).min(self.paged.runs());
        let runs: Box<[u64]> = places.filter_map(|place| self.runs.at(place)).collect();
        let ends = runs.iter().scan(0, |total, run| {
            *total += self.paged.run_len(*run);
            Some(*total)
        });
        let made = Arc::new(Group { of, ends: ends.collect(), runs });
        if groups.len() == GROUPS_KEPT {
            groups.remove(0);
        }
        groups.push(Arc::clone(&made));
        made
    }

    /// O(log groups + log window), and once per group O(window).
    pub fn at(&self, position: u64) -> Option<u64> {
        let group = self.ends.partition_point(|end| *end <= position);
        if group == self.ends.len() {
            return None;
        }
        let (first, inside) = self.group(group);
        let mut at = position - first;
        if !self.paged.in_order {
            at = inside.at(at)?;
        }
        let Group { runs, ends, .. } = &*self.runs_of(group);
        let place = ends.partition_point(|end| *end <= at);
        let before = place.checked_sub(1).map_or(0, |before| ends[before]);
        runs.get(place).map(|run| self.paged.starts[*run as usize] + at - before)
    }

    /// O(log runs + window).
    pub fn position_of(&self, sample: u64) -> Option<u64> {
        if sample >= self.paged.len() {
            return None;
        }
        let run = self.paged.starts.partition_point(|start| *start <= sample) as u64 - 1;
        let group = (self.runs.position_of(run)? / self.paged.window) as usize;
        let Group { runs, ends, .. } = &*self.runs_of(group);
        let place = runs.iter().position(|other| *other == run)?;
        let before = place.checked_sub(1).map_or(0, |before| ends[before]);
        let mut at = before + sample - self.paged.starts[run as usize];
        let (first, inside) = self.group(group);
        if !self.paged.in_order {
            at = inside.position_of(at)?;
        }
        Some(first + at)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Order, Shuffle};
    use super::*;

    /// Runs of 1 to 39 samples.
    fn starts(runs: u64) -> Vec<u64> {
        (0..runs).scan(0, |at, run| Some(std::mem::replace(at, *at + 1 + run * 7919 % 39))).collect()
    }

    fn order(runs: u64, window: usize, in_order: bool) -> Order {
        let starts = starts(runs);
        let len = starts.last().map_or(0, |last| last + 5);
        Order { len, seed: 3, shuffle: Shuffle::Paged(Arc::new(Paged::new(&starts, len, window, in_order))) }
    }

    #[test]
    fn every_sample_comes_once_and_is_found_again() {
        for (runs, window) in [(1, 1), (1, 8), (2, 1), (7, 3), (64, 8), (100, 16), (333, 1), (50, 500)] {
            for in_order in [false, true] {
                let order = order(runs, window, in_order);
                for epoch in 0..3 {
                    let keyed = order.epoch(epoch);
                    let mut seen = vec![false; order.len as usize];
                    for position in 0..order.len {
                        let sample = keyed.at(position).unwrap();
                        assert!(!std::mem::replace(&mut seen[sample as usize], true), "{sample} twice");
                        assert_eq!(keyed.position_of(sample), Some(position), "{runs} runs by {window}");
                        // Whatever epochs were asked for in between.
                        assert_eq!(order.at(epoch, position), Some(sample));
                    }
                    assert_eq!((keyed.at(order.len), keyed.position_of(order.len)), (None, None));
                }
            }
        }
        assert_eq!(order(0, 4, false).at(0, 0), None);
    }

    #[test]
    fn a_cache_of_one_window_reads_each_page_once() {
        let (runs, window) = (200, 16);
        let starts = starts(runs);
        let order = order(runs, window, false);
        let page_of = |sample: u64| starts.partition_point(|start| *start <= sample) - 1;
        let pages: Vec<usize> = (0..order.len).map(|position| page_of(order.at(1, position).unwrap())).collect();
        let mut changes = 0;
        for page in 0..runs as usize {
            let first = pages.iter().position(|at| *at == page).unwrap();
            let last = pages.iter().rposition(|at| *at == page).unwrap();
            let distinct: std::collections::BTreeSet<_> = pages[first..=last].iter().collect();
            assert!(distinct.len() <= window, "page {page} spans {} pages", distinct.len());
            changes += usize::from(last > first);
        }
        assert!(changes > 150, "samples of a page are apart");
        let other: Vec<usize> = (0..order.len).map(|position| page_of(order.at(2, position).unwrap())).collect();
        assert_ne!(pages, other);
    }

    #[test]
    fn grouped_samples_stay_in_order() {
        let order = order(60, 1, true);
        let starts = starts(60);
        let samples: Vec<u64> = (0..order.len).map(|position| order.at(4, position).unwrap()).collect();
        let breaks = samples.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        assert!((50..60).contains(&breaks), "{breaks}");
        assert!(samples.windows(2).all(|pair| pair[1] == pair[0] + 1 || starts.contains(&pair[1])));
    }

    #[test]
    fn starts_that_lie_are_left_out() {
        let order =
            Order { len: 10, seed: 1, shuffle: Shuffle::Paged(Arc::new(Paged::new(&[3, 3, 2, 40], 10, 2, false))) };
        let mut samples: Vec<u64> = (0..10).map(|position| order.at(0, position).unwrap()).collect();
        samples.sort_unstable();
        assert_eq!(samples, (0..10).collect::<Vec<_>>());
    }
}
