use super::{Entries, Policy};
use spec::contract::cache::Item;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// Belady's rule with bypass: the optimum for entries of one size when next uses are true. Entries whose next use is not
/// known count as the farthest; among them the one used longest ago goes first.
#[derive(Default)]
pub struct NextUse {
    /// (next use, when it came to rest, key) of entries when they came to rest; what has changed since is found out when it
    /// reaches the top. Known next uses have no time: 0.
    farthest: BinaryHeap<(u64, Reverse<u64>, u64)>,
    /// Last rest of entries whose next use is not known. Empty where the order is known.
    rests: HashMap<u64, u64>,
    clock: u64,
}

impl NextUse {
    /// The heap holds one record per rest. Drops those that no longer hold, so that it stays within twice the entries:
    /// amortised, a rest costs O(log n).
    fn compact(&mut self, entries: &dyn Entries) {
        if self.farthest.len() > 2 * entries.count() + 64 {
            let mut records = std::mem::take(&mut self.farthest).into_vec();
            records.retain(|record| self.holds(record, entries));
            records.sort_unstable();
            records.dedup();
            self.farthest = records.into();
        }
    }

    fn holds(&self, (next_use, Reverse(rest), key): &(u64, Reverse<u64>, u64), entries: &dyn Entries) -> bool {
        entries.evictable(*key) == Some(*next_use) && (*next_use < u64::MAX || self.rests.get(key) == Some(rest))
    }
}

impl Policy for NextUse {
    fn rested(&mut self, key: u64, next_use: u64, entries: &dyn Entries) {
        self.compact(entries);
        let mut rest = 0;
        if next_use == u64::MAX {
            self.clock += 1;
            rest = self.clock;
            self.rests.insert(key, rest);
        }
        self.farthest.push((next_use, Reverse(rest), key));
    }

    fn removed(&mut self, key: u64) {
        if !self.rests.is_empty() {
            self.rests.remove(&key);
        }
    }

    fn victim(&mut self, item: &Item, entries: &dyn Entries) -> Option<u64> {
        while let Some(record) = self.farthest.peek() {
            if !self.holds(record, entries) {
                self.farthest.pop();
                continue;
            }
            let (next_use, _, key) = *record;
            // Two unknown futures are alike: the newer entry has at least its present use.
            let unknown = next_use == u64::MAX && !item.offer;
            return (next_use > item.next_use || unknown).then_some(key);
        }
        None
    }
}
