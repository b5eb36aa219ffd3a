//! Who goes when room is needed.

mod lru;
mod next_use;
mod pin;

use spec::contract::CacheMode;
use spec::contract::cache::Item;
use std::fmt;

/// The policies, by the names of the config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// Fill once, never evict: for sources where an epoch reads each entry once.
    Pin,
    /// Evict what was used longest ago.
    Lru,
    /// Evict what is needed farthest in the future; keep out what is needed later than all that is there.
    NextUse,
}

impl PolicyKind {
    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::Pin => "pin",
            PolicyKind::Lru => "lru",
            PolicyKind::NextUse => "next_use",
        }
    }

    /// The policy of this name, as benches take it.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Pin, Self::Lru, Self::NextUse].into_iter().find(|kind| kind.name() == name)
    }

    /// The policy of a mode; `None` where there is no page cache.
    pub fn of(mode: CacheMode) -> Option<Self> {
        match mode {
            CacheMode::Off => None,
            CacheMode::Pin => Some(Self::Pin),
            CacheMode::Lru => Some(Self::Lru),
            CacheMode::NextUse => Some(Self::NextUse),
        }
    }

    pub(super) fn make(self) -> Box<dyn Policy> {
        match self {
            PolicyKind::Pin => Box::new(pin::Pin),
            PolicyKind::Lru => Box::new(lru::Lru::new()),
            PolicyKind::NextUse => Box::new(next_use::NextUse::default()),
        }
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Questions that a policy may ask about the entries of the directory.
pub trait Entries {
    /// Next use of an entry that is filled and that no rank refers to; `None`: it must stay, or is not there.
    fn evictable(&self, key: u64) -> Option<u64>;
    /// How many entries there are, evictable or not.
    fn count(&self) -> usize;
}

/// Hears of every use and names victims. The directory evicts what it names.
pub trait Policy: Send {
    /// A rank was given the entry, or fills it.
    fn used(&mut self, _key: u64) {}
    /// No rank refers to the entry any longer, which is needed again at `next_use`.
    fn rested(&mut self, _key: u64, _next_use: u64, _entries: &dyn Entries) {}
    /// The entry is gone.
    fn removed(&mut self, _key: u64) {}
    /// An evictable entry that is worth less than `item`; `None`: `item` stays out.
    fn victim(&mut self, item: &Item, entries: &dyn Entries) -> Option<u64>;
}
