//! Which entry lies where, who fills it and who reads it: a pure state machine, fed with messages in order.
//!
//! ```text
//!            Acquire                Publish               last Release, room needed
//! (absent) ──────────► Filling{by} ─────────► Ready{refs} ─────────────────────────► (absent)
//!                        │   ▲ Abandon, rank gone: the next waiter fills
//!                        └───┘ or, with none waiting, (absent)
//! ```
//! An entry is readable only after its filler said that it is whole; space is reserved before bytes are made, so used
//! bytes cannot pass the capacity.

use super::arena::Arena;
use super::policy::{Entries, Policy, PolicyKind};
use spec::contract::VERSION;
use spec::contract::cache::{CacheStats, FromDirectory, Grant, Item, ToDirectory};
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

/// A rank broke the protocol: its socket has to be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("rank {rank} speaks contract version {version}, the directory {VERSION}: build both together")]
    Version { rank: u32, version: u32 },
    #[error("rank {said} greeted the page cache on the socket of rank {rank}")]
    Rank { rank: u32, said: u32 },
    #[error("rank {rank} published or abandoned entry {key}, which it does not fill")]
    NotFilling { rank: u32, key: u64 },
    #[error("rank {rank} released entry {key}, to which it holds no reference")]
    NotHeld { rank: u32, key: u64 },
    #[error("rank {rank} asked for entry {key} with {asked} bytes, it has {bytes}: its file changed while training")]
    Bytes { rank: u32, key: u64, asked: u64, bytes: u64 },
}

/// Replies in order, each with the rank that gets it.
pub type Replies = Vec<(u32, FromDirectory)>;

#[derive(Debug)]
struct Entry {
    offset: u64,
    bytes: u64,
    next_use: u64,
    /// The rank that fills it now.
    filler: Option<u32>,
    /// (rank, references), none of them zero; the filler's included.
    holders: Vec<(u32, u32)>,
    /// Ranks in the order they asked; one that asked twice stands here twice.
    waiters: VecDeque<u32>,
}

impl Entry {
    /// An entry without bytes has a place too.
    fn end(&self) -> u64 {
        self.offset + self.bytes.max(1)
    }

    fn ready(&self) -> Grant {
        Grant::Ready { offset: self.offset, bytes: self.bytes }
    }

    fn resting(&self) -> bool {
        self.filler.is_none() && self.holders.is_empty()
    }

    fn hold(&mut self, rank: u32) {
        match self.holders.iter_mut().find(|(holder, _)| *holder == rank) {
            Some((_, count)) => *count += 1,
            None => self.holders.push((rank, 1)),
        }
    }

    /// False: the rank holds no reference.
    fn let_go(&mut self, rank: u32) -> bool {
        let Some(at) = self.holders.iter().position(|(holder, _)| *holder == rank) else {
            return false;
        };
        self.holders[at].1 -= 1;
        if self.holders[at].1 == 0 {
            self.holders.swap_remove(at);
        }
        true
    }

    /// Ranks report the next use in any order: the farthest was reported by the latest use. After "never", the next
    /// epoch's order may have become known.
    fn needed_at(&mut self, next_use: u64) {
        self.next_use = match self.next_use {
            u64::MAX => next_use,
            known => known.max(next_use),
        };
    }
}

/// Multiplies and folds: keys are numbers of our own, nobody chooses them to collide.
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, key: u64) {
        let wide = u128::from(self.0 ^ key ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        self.0 = (wide as u64) ^ (wide >> 64) as u64;
    }
}

/// How a rank asks for entries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// With their lengths.
    Exact,
    /// With guesses of them.
    Open,
    /// For what is there.
    Find,
}

/// Makes memory for at least so many bytes more; returns where the usable part of the mapping ends then. `None`: there is
/// no more.
pub type More = Box<dyn FnMut(u64) -> Option<u64> + Send>;

#[derive(Debug, Default)]
struct Table {
    map: HashMap<u64, Entry, BuildHasherDefault<KeyHasher>>,
    /// Entries that could be evicted.
    resting: usize,
}

impl Entries for Table {
    fn evictable(&self, key: u64) -> Option<u64> {
        self.map.get(&key).filter(|entry| entry.resting()).map(|entry| entry.next_use)
    }

    fn count(&self) -> usize {
        self.map.len()
    }
}

/// The directory of one mapping.
pub struct Directory {
    arena: Arena,
    table: Table,
    policy: Box<dyn Policy>,
    total: CacheStats,
    ranks: HashMap<u32, CacheStats>,
    /// Where the usable part of the mapping ends; entries beyond it are on their way out.
    limit_bytes: u64,
    /// Entries that reach beyond the limit.
    beyond: usize,
    /// Memory that is made when it is needed.
    more: Option<More>,
    /// There was no room for an entry: from then on entries displace each other.
    full: bool,
}

impl Directory {
    /// Bytes of one place of the table.
    pub const PLACE_BYTES: usize = size_of::<(u64, Entry)>() + 1;

    /// A directory of an empty mapping of `capacity_bytes`.
    pub fn new(capacity_bytes: u64, policy: PolicyKind) -> Self {
        Self::growing(capacity_bytes, capacity_bytes, policy)
    }

    /// The same while only the first `present_bytes` of the mapping can be used; see [`Directory::grow`].
    pub fn growing(capacity_bytes: u64, present_bytes: u64, policy: PolicyKind) -> Self {
        Self {
            arena: Arena::new(present_bytes.min(capacity_bytes)),
            table: Table::default(),
            policy: policy.make(),
            total: CacheStats { capacity_bytes, ..CacheStats::default() },
            ranks: HashMap::new(),
            limit_bytes: u64::MAX,
            beyond: 0,
            more: None,
            full: false,
        }
    }

    /// Asks `more` for memory before an entry is displaced or refused.
    pub fn set_more(&mut self, more: More) {
        self.more = Some(more);
    }

    /// True once there was no room for an entry.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The first `present_bytes` of the mapping have memory behind them now. Ends a [`Directory::shrink`], which must
    /// have drained.
    pub fn grow(&mut self, present_bytes: u64) {
        debug_assert!(self.drained());
        self.limit_bytes = u64::MAX;
        self.arena.grow(present_bytes.min(self.total.capacity_bytes));
    }

    /// From here on nothing is given out beyond `limit_bytes`: entries there that nobody refers to go at once, the others
    /// after their last release. Returns bytes of the entries that went.
    pub fn shrink(&mut self, limit_bytes: u64) -> u64 {
        self.limit_bytes = limit_bytes;
        self.arena.cut(limit_bytes);
        let reach = |entry: &Entry| entry.end() > limit_bytes;
        let keys: Vec<u64> = self.table.map.iter().filter(|(_, entry)| reach(entry)).map(|(key, _)| *key).collect();
        self.beyond = keys.len();
        let before = self.total.used_bytes;
        for key in keys {
            if self.table.evictable(key).is_some() {
                self.evict(key);
            }
        }
        before - self.total.used_bytes
    }

    /// No entry reaches beyond the limit of the last [`Directory::shrink`].
    pub fn drained(&self) -> bool {
        self.beyond == 0
    }

    fn is_beyond(&self, key: u64) -> bool {
        self.beyond > 0 && self.table.map.get(&key).is_some_and(|entry| entry.end() > self.limit_bytes)
    }

    fn evict(&mut self, key: u64) {
        self.table.resting -= 1;
        self.remove(key);
        self.total.evictions += 1;
    }

    /// Counters of all ranks together.
    pub fn stats(&self) -> CacheStats {
        CacheStats { entries: self.table.map.len() as u64, ..self.total }
    }

    /// Hits, misses and bypasses of one rank; the other fields as in [`Directory::stats`].
    pub fn rank_stats(&self, rank: u32) -> CacheStats {
        let own = self.ranks.get(&rank).copied().unwrap_or_default();
        CacheStats { hits: own.hits, misses: own.misses, bypasses: own.bypasses, ..self.stats() }
    }

    /// Takes one message of `rank`; what it leads to is appended to `replies`.
    ///
    /// # Errors
    /// The message breaks the protocol; what came before it in a list has been done. Call [`Directory::rank_gone`].
    pub fn handle(&mut self, rank: u32, message: &ToDirectory, replies: &mut Replies) -> Result<(), Fault> {
        match message {
            ToDirectory::Hello { version, .. } if *version != VERSION => {
                return Err(Fault::Version { rank, version: *version });
            }
            ToDirectory::Hello { rank: said, .. } if *said != rank => return Err(Fault::Rank { rank, said: *said }),
            ToDirectory::Hello { .. } => {}
            ToDirectory::Acquire { ticket, items } => self.acquire_all(rank, *ticket, items, Ask::Exact, replies)?,
            ToDirectory::Open { ticket, items } => self.acquire_all(rank, *ticket, items, Ask::Open, replies)?,
            ToDirectory::Find { ticket, items } => self.acquire_all(rank, *ticket, items, Ask::Find, replies)?,
            ToDirectory::Again { ticket, items } => {
                // Counted when they were refused.
                self.count(rank, |stats| stats.bypasses = stats.bypasses.saturating_sub(items.len() as u64));
                self.acquire_all(rank, *ticket, items, Ask::Exact, replies)?;
            }
            ToDirectory::Enlarge { ticket, key, bytes } => {
                let grant = self.enlarge(rank, *key, *bytes, replies)?;
                replies.push((rank, FromDirectory::Granted { ticket: *ticket, grants: vec![grant] }));
            }
            ToDirectory::Length { keys } => {
                keys.iter().try_for_each(|(key, bytes)| self.shorten(rank, *key, *bytes))?;
            }
            ToDirectory::Publish { keys } => keys.iter().try_for_each(|key| self.publish(rank, *key, replies))?,
            ToDirectory::Abandon { keys } => keys.iter().try_for_each(|key| self.abandon(rank, *key, replies))?,
            ToDirectory::Release { keys } => {
                keys.iter().try_for_each(|(key, next_use)| self.release(rank, *key, *next_use))?;
            }
            // Who drains, who has answered and who registers is the server's to know.
            ToDirectory::Resized { .. } | ToDirectory::Registers => {}
            ToDirectory::Hits { count } => self.count(rank, |stats| stats.hits = stats.hits.saturating_add(*count)),
            ToDirectory::Stats { ticket } => {
                replies.push((rank, FromDirectory::Stats { ticket: *ticket, stats: self.stats() }));
            }
        }
        Ok(())
    }

    /// The rank died: its fills are abandoned, its references dropped, its questions forgotten.
    pub fn rank_gone(&mut self, rank: u32, replies: &mut Replies) {
        let concerns =
            |entry: &Entry| entry.waiters.contains(&rank) || entry.holders.iter().any(|(holder, _)| *holder == rank);
        let keys: Vec<u64> = self.table.map.iter().filter(|(_, e)| concerns(e)).map(|(key, _)| *key).collect();
        for key in keys {
            let Some(entry) = self.table.map.get_mut(&key) else { continue };
            entry.waiters.retain(|waiter| *waiter != rank);
            entry.holders.retain(|(holder, _)| *holder != rank);
            if entry.filler == Some(rank) {
                self.hand_over(key, replies);
            } else if entry.resting() {
                self.rest(key);
            }
        }
    }

    fn acquire_all(
        &mut self,
        rank: u32,
        ticket: u64,
        items: &[Item],
        ask: Ask,
        replies: &mut Replies,
    ) -> Result<(), Fault> {
        let mut grants = Vec::with_capacity(items.len());
        for item in items {
            grants.push(self.acquire(rank, item, ask)?);
        }
        replies.push((rank, FromDirectory::Granted { ticket, grants }));
        Ok(())
    }

    fn acquire(&mut self, rank: u32, item: &Item, ask: Ask) -> Result<Grant, Fault> {
        let Some(entry) = self.table.map.get_mut(&item.key) else {
            return Ok(if ask == Ask::Find { Grant::Bypass } else { self.admit(rank, item) });
        };
        if ask == Ask::Exact && entry.bytes != item.bytes {
            return Err(Fault::Bytes { rank, key: item.key, asked: item.bytes, bytes: entry.bytes });
        }
        if item.offer {
            return Ok(Grant::Bypass);
        }
        // On its way out: no new references.
        if entry.end() > self.limit_bytes {
            self.count(rank, |stats| stats.bypasses += 1);
            return Ok(Grant::Bypass);
        }
        entry.needed_at(item.next_use);
        if entry.filler.is_some() {
            entry.waiters.push_back(rank);
            return Ok(Grant::Wait);
        }
        self.table.resting -= usize::from(entry.resting());
        entry.hold(rank);
        let grant = entry.ready();
        self.policy.used(item.key);
        self.count(rank, |stats| stats.hits += 1);
        Ok(grant)
    }

    /// An entry that is not there: room for it, or none.
    fn admit(&mut self, rank: u32, item: &Item) -> Grant {
        let Some(offset) = self.place(item) else {
            if !item.offer {
                self.count(rank, |stats| stats.bypasses += 1);
            }
            return Grant::Bypass;
        };
        let entry = Entry {
            offset,
            bytes: item.bytes,
            next_use: item.next_use,
            filler: Some(rank),
            holders: vec![(rank, 1)],
            waiters: VecDeque::new(),
        };
        self.table.map.insert(item.key, entry);
        self.policy.used(item.key);
        self.total.used_bytes += item.bytes;
        debug_assert!(self.total.used_bytes <= self.total.capacity_bytes);
        if !item.offer {
            self.count(rank, |stats| stats.misses += 1);
        }
        Grant::Fill { offset, bytes: item.bytes }
    }

    fn place(&mut self, item: &Item) -> Option<u64> {
        if self.more.is_none() && !self.arena.can_hold(item.bytes) {
            return None;
        }
        loop {
            if let Some(offset) = self.arena.alloc(item.bytes) {
                return Some(offset);
            }
            if let Some(present) = self.more.as_mut().and_then(|more| more(item.bytes)) {
                self.arena.grow(present.min(self.total.capacity_bytes).min(self.limit_bytes));
                continue;
            }
            if !self.arena.can_hold(item.bytes) {
                return None;
            }
            self.full = true;
            if self.table.resting == 0 {
                return None;
            }
            let key = self.policy.victim(item, &self.table)?;
            // A policy that names what must stay would be wrong; nothing is evicted then.
            self.table.evictable(key)?;
            self.evict(key);
        }
    }

    fn publish(&mut self, rank: u32, key: u64, replies: &mut Replies) -> Result<(), Fault> {
        let entry = self.filled_by(rank, key)?;
        entry.filler = None;
        let grant = entry.ready();
        let waiters = std::mem::take(&mut entry.waiters);
        waiters.iter().for_each(|waiter| entry.hold(*waiter));
        for waiter in waiters {
            self.count(waiter, |stats| stats.hits += 1);
            replies.push((waiter, FromDirectory::Settled { key, grant }));
        }
        Ok(())
    }

    /// Another, longer place for an entry that is being filled; [`Grant::Bypass`]: there is none, and the entry is gone.
    fn enlarge(&mut self, rank: u32, key: u64, bytes: u64, replies: &mut Replies) -> Result<Grant, Fault> {
        let entry = self.filled_by(rank, key)?;
        let (offset, before, next_use) = (entry.offset, entry.bytes, entry.next_use);
        let found = match self.is_beyond(key) {
            true => None,
            false => self.place(&Item { key, bytes, next_use, offer: false }),
        };
        let Some(place) = found else {
            self.turn_away(key, replies);
            return Ok(Grant::Bypass);
        };
        self.arena.free(offset, before);
        self.total.used_bytes = self.total.used_bytes - before + bytes;
        let entry = self.filled_by(rank, key)?;
        (entry.offset, entry.bytes) = (place, bytes);
        Ok(Grant::Fill { offset: place, bytes })
    }

    /// The entry that is being filled has `bytes`; what is left of its room is free.
    fn shorten(&mut self, rank: u32, key: u64, bytes: u64) -> Result<(), Fault> {
        let limit = self.limit_bytes;
        let entry = self.filled_by(rank, key)?;
        let (offset, before, was_beyond) = (entry.offset, entry.bytes, entry.end() > limit);
        if bytes > before {
            return Err(Fault::Bytes { rank, key, asked: bytes, bytes: before });
        }
        entry.bytes = bytes;
        let leaves = was_beyond && entry.end() <= limit;
        self.beyond -= usize::from(leaves);
        self.arena.shorten(offset, before, bytes);
        self.total.used_bytes -= before - bytes;
        Ok(())
    }

    fn abandon(&mut self, rank: u32, key: u64, replies: &mut Replies) -> Result<(), Fault> {
        self.filled_by(rank, key)?.let_go(rank);
        self.hand_over(key, replies);
        Ok(())
    }

    /// The filler is gone: the next waiter fills the same extent, or it is free again.
    fn hand_over(&mut self, key: u64, replies: &mut Replies) {
        if self.is_beyond(key) {
            return self.turn_away(key, replies);
        }
        let Some(entry) = self.table.map.get_mut(&key) else { return };
        let Some(next) = entry.waiters.pop_front() else {
            return self.remove(key);
        };
        entry.filler = Some(next);
        entry.hold(next);
        let grant = Grant::Fill { offset: entry.offset, bytes: entry.bytes };
        self.count(next, |stats| stats.misses += 1);
        replies.push((next, FromDirectory::Settled { key, grant }));
    }

    /// An unfilled entry that is on its way out: who waits for it reads for itself.
    fn turn_away(&mut self, key: u64, replies: &mut Replies) {
        let waiters = self.table.map.get_mut(&key).map(|entry| std::mem::take(&mut entry.waiters)).unwrap_or_default();
        for waiter in waiters {
            self.count(waiter, |stats| stats.bypasses += 1);
            replies.push((waiter, FromDirectory::Settled { key, grant: Grant::Bypass }));
        }
        self.remove(key);
    }

    fn release(&mut self, rank: u32, key: u64, next_use: u64) -> Result<(), Fault> {
        let fault = Fault::NotHeld { rank, key };
        let entry = self.table.map.get_mut(&key).filter(|entry| entry.filler != Some(rank));
        let entry = entry.ok_or_else(|| fault.clone())?;
        if !entry.let_go(rank) {
            return Err(fault);
        }
        entry.needed_at(next_use);
        if entry.resting() {
            self.rest(key);
        }
        Ok(())
    }

    fn rest(&mut self, key: u64) {
        self.table.resting += 1;
        let next_use = self.table.evictable(key).unwrap_or(u64::MAX);
        if self.is_beyond(key) {
            return self.evict(key);
        }
        self.policy.rested(key, next_use, &self.table);
    }

    fn remove(&mut self, key: u64) {
        if let Some(entry) = self.table.map.remove(&key) {
            self.beyond -= usize::from(entry.end() > self.limit_bytes);
            self.arena.free(entry.offset, entry.bytes);
            self.total.used_bytes -= entry.bytes;
            self.policy.removed(key);
        }
    }

    fn filled_by(&mut self, rank: u32, key: u64) -> Result<&mut Entry, Fault> {
        let entry = self.table.map.get_mut(&key).filter(|entry| entry.filler == Some(rank));
        entry.ok_or(Fault::NotFilling { rank, key })
    }

    fn count(&mut self, rank: u32, add: impl Fn(&mut CacheStats)) {
        add(&mut self.total);
        add(self.ranks.entry(rank).or_default());
    }
}

#[cfg(test)]
mod tests;
