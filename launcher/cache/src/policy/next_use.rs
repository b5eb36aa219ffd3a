use super::{Entries, Policy};
use spec::contract::cache::Item;
use std::collections::BinaryHeap;

/// Belady's rule with bypass: the optimum for entries of one size when next uses are true.
#[derive(Default)]
pub struct NextUse {
    /// (next use, key) of entries when they came to rest; what has changed since is found out when it reaches the top.
    farthest: BinaryHeap<(u64, u64)>,
}

impl NextUse {
    /// The heap holds one record per rest. Drops those that no longer hold, so that it stays within twice the entries:
    /// amortised, a rest costs O(log n).
    fn compact(&mut self, entries: &dyn Entries) {
        if self.farthest.len() > 2 * entries.count() + 64 {
            let mut records = std::mem::take(&mut self.farthest).into_vec();
            records.retain(|(next_use, key)| entries.evictable(*key) == Some(*next_use));
            records.sort_unstable();
            records.dedup();
            self.farthest = records.into();
        }
    }
}

impl Policy for NextUse {
    fn rested(&mut self, key: u64, next_use: u64, entries: &dyn Entries) {
        self.compact(entries);
        self.farthest.push((next_use, key));
    }

    fn victim(&mut self, item: &Item, entries: &dyn Entries) -> Option<u64> {
        while let Some((next_use, key)) = self.farthest.peek().copied() {
            if entries.evictable(key) != Some(next_use) {
                self.farthest.pop();
                continue;
            }
            // Two unknown futures are alike: the newer entry has at least its present use.
            let unknown = next_use == u64::MAX && !item.offer;
            return (next_use > item.next_use || unknown).then_some(key);
        }
        None
    }
}
