//! Messages between a rank and the directory of the node's shared page cache.
//!
//! A frame is a little-endian `u32` length of what follows, one byte of kind, and the fields in order, little-endian,
//! no padding; a list is its `u32` length and its items. Binary, because the directory serves hundreds of thousands of
//! keys per second. A rank may have any number of `Acquire`s under way; replies to one rank keep their order.

/// One key that a batch needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    /// Entry of the data source, the same number on every rank.
    pub key: u64,
    /// Exact bytes of the entry.
    pub bytes: u64,
    /// Global position (epoch × samples + position in the epoch's order) at which some rank needs the entry after
    /// this use; `u64::MAX`: never, or not known. Read by the policy `next_use` alone.
    pub next_use: u64,
    /// Only worth storing when it displaces nothing that is needed sooner: never waits, may be bypassed at will.
    pub offer: bool,
}

/// From a rank to the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToDirectory {
    Hello {
        version: u32,
        rank: u32,
    },
    /// References to all `items`, answered by one [`FromDirectory::Granted`] with the same ticket.
    Acquire {
        ticket: u64,
        items: Vec<Item>,
    },
    /// As `Acquire`, for items that were refused by a `Bypass` since: the same use is counted once, by this answer.
    Again {
        ticket: u64,
        items: Vec<Item>,
    },
    /// The entry is filled: every rank may read it. The rank keeps its reference.
    Publish {
        keys: Vec<u64>,
    },
    /// As `Acquire`, where `bytes` of an item is a guess: how long an entry is shows when it is decoded. A
    /// [`Grant::Ready`] says its length; a [`Grant::Fill`] has room for the guess.
    Open {
        ticket: u64,
        items: Vec<Item>,
    },
    /// References to those of `items` that are stored or being filled; [`Grant::Bypass`], which counts as nothing, for the
    /// others. Their `bytes` mean nothing.
    Find {
        ticket: u64,
        items: Vec<Item>,
    },
    /// The entry that this rank fills needs this many bytes. Answered by one grant: [`Grant::Fill`] with another place, whose
    /// content is undefined, or [`Grant::Bypass`]: there is no room, and the entry is gone.
    Enlarge {
        ticket: u64,
        key: u64,
        bytes: u64,
    },
    /// Entries that this rank fills are this long, at most as long as their room: `(key, bytes)`.
    Length {
        keys: Vec<(u64, u64)>,
    },
    /// The entry could not be filled; its space is taken back and the next waiter fills.
    Abandon {
        keys: Vec<u64>,
    },
    /// References given back, with the next use as known now: `(key, next_use)`.
    Release {
        keys: Vec<(u64, u64)>,
    },
    Stats {
        ticket: u64,
    },
    /// This rank holds no reference to, registration of or fill in anything beyond the bytes of the
    /// [`FromDirectory::Resize`] with this ticket.
    Resized {
        ticket: u64,
    },
    /// This rank registers the mapping with its device: it wants to hear how much of it has pages.
    Registers,
    /// So many reads were of entries that this rank keeps a reference to: hits that the directory had no part in.
    Hits {
        count: u64,
    },
}

/// From the directory to a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDirectory {
    Granted {
        ticket: u64,
        grants: Vec<Grant>,
    },
    /// Outcome of a `Wait`.
    Settled {
        key: u64,
        grant: Grant,
    },
    Stats {
        ticket: u64,
        stats: CacheStats,
    },
    /// From here on grants lie within the first `bytes` of the mapping. A rank gives back what it holds beyond them as
    /// soon as no reader is at it (what is still needed is asked for anew), announces batches for so many bytes only,
    /// and then answers [`ToDirectory::Resized`]; only the newest ticket counts. The memory beyond goes after that.
    Resize {
        ticket: u64,
        bytes: u64,
    },
    /// From here on entries displace each other: a rank that keeps references beyond its need gives them back. Sent once to
    /// every rank that has asked by `Open` or `Find`.
    Full,
    /// The first `bytes` of the mapping have their pages, so a device may register them. Sent to ranks that said
    /// [`ToDirectory::Registers`], whenever it changes.
    Present {
        bytes: u64,
    },
}

/// Permission that a rank gets for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Read `bytes` at this offset of the mapping until released.
    Ready { offset: u64, bytes: u64 },
    /// Write `bytes` at this offset, then publish. Counts as a miss.
    Fill { offset: u64, bytes: u64 },
    /// Another rank fills it now; [`FromDirectory::Settled`] follows.
    Wait,
    /// No room, or an offer that is not wanted: read into memory of your own; holds no reference. Counts as a bypass.
    Bypass,
}

/// Counters of the directory. Lookups = hits + misses + bypasses; a `Wait` that becomes `Ready` is a hit, one that becomes
/// `Fill` a miss. Offers are no lookups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub entries: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub bypasses: u64,
}

impl CacheStats {
    /// Hits over lookups, 0 to 1; `None`: nothing was looked up yet.
    pub fn hit_rate(&self) -> Option<f64> {
        let lookups = self.hits + self.misses + self.bypasses;
        (lookups > 0).then(|| self.hits as f64 / lookups as f64)
    }

    /// Four lines in the form of the user's guide, without a line break at their end; MB are MiB. What had to be read counts as a
    /// miss, stored or not.
    pub fn text(&self, source: &str) -> String {
        let mib = |bytes: u64| bytes as f64 / (1u64 << 20) as f64;
        let (used, capacity) = (mib(self.used_bytes), mib(self.capacity_bytes));
        let (rate, misses) = (100.0 * self.hit_rate().unwrap_or(0.0), self.misses + self.bypasses);
        format!(
            "[{source}] Cache Stats:\n  - Size: {} items\n  - Memory: {used:.1} / {capacity:.1} MB\n  \
             - Hit Rate: {rate:.2}% ({} hits / {misses} misses)",
            self.entries, self.hits
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_guide() {
        let stats = CacheStats {
            capacity_bytes: 51_200 << 20,
            used_bytes: (49_876 << 20) + 300_000,
            entries: 374,
            hits: 8245,
            misses: 1000,
            bypasses: 755,
            evictions: 3,
        };
        let text = stats.text("SpikeDeblurDataset");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "[SpikeDeblurDataset] Cache Stats:",
                "  - Size: 374 items",
                "  - Memory: 49876.3 / 51200.0 MB",
                "  - Hit Rate: 82.45% (8245 hits / 1755 misses)"
            ]
        );
        assert!(CacheStats::default().text("emg").ends_with("Hit Rate: 0.00% (0 hits / 0 misses)"));
    }
}
