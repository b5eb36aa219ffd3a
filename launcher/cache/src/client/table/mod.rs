//! A rank's view of the directory: the entries it asked for, and which of its batches still need them.
//!
//! Pure state: messages in, messages out. An entry is acquired once however many batches in flight need it, and released
//! after the last of them.

mod offers;
mod open;
mod resize;
mod stats;

use super::slabs::{Registration, Slabs};
use crate::mapping::{ReadSpan, SharedMap, WriteSpan};
use offers::Asked;
pub use offers::Offer;
pub(super) use offers::Offered;
use spec::contract::cache::{CacheStats, FromDirectory, Grant, Item, ToDirectory};
pub use stats::ClientStats;
use std::collections::{HashMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Keys of one message: far below the longest frame.
const MESSAGE_KEYS: usize = 1024;

/// How an entry was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// With its length.
    Exact,
    /// With a guess of its length, which shows when it is decoded.
    Open,
    /// If it is there.
    Find,
}

/// The request for an item ahead of need. An entry that is never needed again displaces nothing; its true next use is sent at
/// release.
fn ahead(item: Item, reserve: bool) -> Item {
    if reserve { item } else { Item { next_use: u64::MAX, ..item } }
}

enum EntryState {
    /// Not asked for yet: too much is announced already.
    Deferred,
    /// An `Acquire` is under way.
    Asked,
    /// Another rank fills it.
    Waiting,
    Ready(Arc<ReadSpan>),
    /// This rank has to fill it; no thread does so yet.
    Granted(WriteSpan),
    /// A thread of this rank fills it; the span ends there.
    Filling {
        end: u64,
    },
    /// No room: every reader reads for itself.
    Bypass,
}

impl EntryState {
    /// Where its bytes end in the mapping; `None`: it has no bytes there, that this rank knows of.
    fn end(&self) -> Option<u64> {
        match self {
            EntryState::Ready(span) => Some(span.end()),
            EntryState::Granted(span) => Some(span.end()),
            EntryState::Filling { end } => Some(*end),
            _ => None,
        }
    }

    /// True if it counts as announced bytes: the directory keeps or may keep room for this rank.
    fn holds(&self) -> bool {
        !matches!(self, EntryState::Deferred | EntryState::Bypass)
    }
}

struct Entry {
    bytes: u64,
    /// Announcements not retired, and reads under way.
    users: usize,
    /// The reads among them.
    readers: usize,
    next_use: u64,
    place: EntryState,
    /// Filled by this rank and not read since: the next read is the miss.
    fresh: bool,
    /// Its checksum was looked at, or need not be.
    checked: bool,
    /// Room for it may displace others before it is read.
    reserve: bool,
    /// It was refused, and asked for once more.
    again: bool,
    /// A reader had to read it past the cache.
    passed: bool,
    kind: Kind,
    /// It was looked for, and is not there.
    absent: bool,
}

/// Answer to a reader.
pub(super) enum Look {
    Ready {
        span: Arc<ReadSpan>,
        checked: bool,
    },
    Fill(WriteSpan),
    Bypass,
    /// The reader has to wait.
    Busy(Busy),
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Busy {
    /// The directory has not replied.
    Asked,
    /// A thread of this rank fills it.
    Here,
    /// Another rank fills it.
    Elsewhere,
}

pub(super) struct Table {
    map: Arc<SharedMap>,
    entries: HashMap<u64, Entry>,
    /// `Acquire`s without a reply, oldest first.
    under_way: VecDeque<(u64, Asked)>,
    /// Replies to offers by ticket, in the order of the offers.
    offered: HashMap<u64, Vec<Option<WriteSpan>>>,
    /// Replies to [`ToDirectory::Enlarge`] by ticket.
    enlarged: HashMap<u64, Option<WriteSpan>>,
    /// References without a user are kept while the cache has room for all.
    keeps: bool,
    /// They were, once.
    kept: bool,
    next_ticket: u64,
    deferred: VecDeque<u64>,
    /// Keys granted for filling, oldest first; some are no longer.
    granted: VecDeque<u64>,
    /// Most bytes announced ahead, as planned and with the cache's present size, and the bytes announced now.
    planned_ahead_bytes: u64,
    ahead_bytes: u64,
    held_bytes: u64,
    /// Messages to send, in order.
    pub(super) out: Vec<ToDirectory>,
    /// The sending thread was woken for them.
    pub(super) told: bool,
    /// Why nothing can be read any more.
    pub(super) failed: Option<String>,
    pub(super) stats: ClientStats,
    /// The directory's own counters, as last heard.
    pub(super) directory: CacheStats,
    stats_asked: bool,
    /// Hits that the directory counted, by its grants or by what it was told.
    counted_hits: u64,
    /// Where the usable part of the mapping ends.
    limit_bytes: u64,
    /// The ticket to be answered once nothing is held, and nothing known to a device, beyond it.
    resize: Option<u64>,
    /// Slabs of the mapping that a device knows, where there is a device.
    pub(super) slabs: Option<Slabs>,
    /// There may be something to do for them.
    pub(super) slabs_changed: bool,
}

impl Table {
    pub(super) fn new(map: Arc<SharedMap>, ahead_bytes: u64) -> Self {
        Self {
            map,
            entries: HashMap::new(),
            under_way: VecDeque::new(),
            offered: HashMap::new(),
            enlarged: HashMap::new(),
            keeps: false,
            kept: false,
            next_ticket: 0,
            deferred: VecDeque::new(),
            granted: VecDeque::new(),
            planned_ahead_bytes: ahead_bytes,
            ahead_bytes,
            held_bytes: 0,
            out: Vec::new(),
            told: false,
            failed: None,
            stats: ClientStats::default(),
            directory: CacheStats::default(),
            stats_asked: false,
            counted_hits: 0,
            limit_bytes: u64::MAX,
            resize: None,
            slabs: None,
            slabs_changed: false,
        }
    }

    /// A device is to know the mapping.
    pub(super) fn register(&mut self, sizes: Registration) {
        self.slabs = Some(Slabs::new(self.map.len() as u64, sizes, self.limit_bytes));
        self.out.push(ToDirectory::Registers);
    }

    /// A batch will need `wants`, each key once. Without `reserve` nothing is displaced for what is not there: room is asked
    /// for when it is read.
    pub(super) fn announce(&mut self, wants: impl Iterator<Item = Item>, reserve: bool, kind: Kind) {
        let mut items = Vec::new();
        for want in wants {
            if let Some(entry) = self.entries.get_mut(&want.key) {
                entry.next_use = want.next_use;
                self.add_user(want.key);
                continue;
            }
            let now = self.deferred.is_empty() && self.room_for(want.bytes);
            self.insert(want, if now { EntryState::Asked } else { EntryState::Deferred }, reserve, kind);
            if now {
                items.push(ahead(want, reserve));
            } else {
                self.deferred.push_back(want.key);
            }
        }
        self.ask(items, kind);
    }

    /// A reader needs `want` now; paired with [`Table::exit`].
    pub(super) fn enter(&mut self, want: Item, kind: Kind) {
        match self.entries.get_mut(&want.key) {
            Some(entry) => {
                entry.readers += 1;
                if matches!(entry.place, EntryState::Deferred) {
                    entry.users += 1;
                    entry.place = EntryState::Asked;
                    self.held_bytes += entry.bytes;
                    let (items, kind) = (vec![Item { next_use: entry.next_use, ..want }], entry.kind);
                    self.ask(items, kind);
                } else {
                    self.add_user(want.key);
                }
            }
            None => {
                self.insert(want, EntryState::Asked, true, kind);
                if let Some(entry) = self.entries.get_mut(&want.key) {
                    entry.readers = 1;
                }
                self.ask(vec![want], kind);
            }
        }
    }

    /// A reader is done with `key`.
    pub(super) fn exit(&mut self, key: u64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.readers = entry.readers.saturating_sub(1);
        }
        self.leave(key);
        self.give_back(key);
        self.answer_resize();
    }

    /// One use of `key` ended: a batch was read, or never will be.
    pub(super) fn leave(&mut self, key: u64) {
        self.tell_many_hits();
        // What is kept has no users.
        if let Some(entry) = self.entries.get_mut(&key).filter(|entry| entry.users > 0) {
            entry.users -= 1;
            if entry.users == 0 {
                self.let_go(key);
            }
        }
    }

    /// `again`: what was refused when it was announced is asked for once more; another rank may have stored it since.
    pub(super) fn look(&mut self, key: u64, again: bool, kind: Kind) -> Look {
        let Some(entry) = self.entries.get_mut(&key) else {
            return Look::Bypass;
        };
        match &entry.place {
            EntryState::Ready(span) => {
                let counter = if entry.fresh { &mut self.stats.misses } else { &mut self.stats.hits };
                *counter += 1;
                entry.fresh = false;
                Look::Ready { span: Arc::clone(span), checked: entry.checked }
            }
            EntryState::Bypass if (again || (entry.absent && kind == Kind::Open)) && !entry.again => {
                self.ask_again(key);
                Look::Busy(Busy::Asked)
            }
            EntryState::Bypass => {
                entry.passed = true;
                // What is only looked for is not read.
                self.stats.bypasses += u64::from(kind != Kind::Find);
                Look::Bypass
            }
            EntryState::Granted(span) => {
                let end = span.end();
                match std::mem::replace(&mut entry.place, EntryState::Filling { end }) {
                    EntryState::Granted(span) => Look::Fill(span),
                    _ => Look::Busy(Busy::Here),
                }
            }
            EntryState::Waiting => Look::Busy(Busy::Elsewhere),
            EntryState::Filling { .. } => Look::Busy(Busy::Here),
            EntryState::Deferred | EntryState::Asked => Look::Busy(Busy::Asked),
        }
    }

    /// The oldest grant of one of `keys` that no thread fills.
    pub(super) fn take_fill(&mut self, keys: RangeInclusive<u64>) -> Option<(u64, WriteSpan)> {
        while let Some(at) = self.granted.iter().position(|key| keys.contains(key)) {
            let Some(key) = self.granted.remove(at) else { continue };
            let Some(Entry { place, .. }) = self.entries.get_mut(&key) else { continue };
            if matches!(place, EntryState::Granted(_))
                && let Some(end) = place.end()
                && let EntryState::Granted(span) = std::mem::replace(place, EntryState::Filling { end })
            {
                return Some((key, span));
            }
        }
        None
    }

    pub(super) fn has_fill(&self) -> bool {
        !self.granted.is_empty()
    }

    pub(super) fn checked(&mut self, key: u64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.checked = true;
        }
    }

    /// A thread filled `key`, all of `span`: every rank may read it.
    pub(super) fn filled(&mut self, key: u64, span: WriteSpan) {
        self.set_length(key, span.len() as u64);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.place = EntryState::Ready(Arc::new(span.freeze()));
            (entry.fresh, entry.checked) = (true, true);
            let unused = entry.users == 0;
            match self.out.last_mut() {
                Some(ToDirectory::Publish { keys }) if keys.len() < MESSAGE_KEYS => keys.push(key),
                _ => self.out.push(ToDirectory::Publish { keys: vec![key] }),
            }
            if unused {
                self.let_go(key);
            }
            self.give_back(key);
            self.answer_resize();
        }
    }

    /// A thread could not fill `key`: whoever needs it reads for itself and meets the error.
    pub(super) fn not_filled(&mut self, key: u64, span: WriteSpan) {
        drop(span);
        if let Some(entry) = self.entries.get_mut(&key) {
            (entry.place, entry.again) = (EntryState::Bypass, true);
            self.held_bytes -= entry.bytes;
            let unused = entry.users == 0;
            self.abandon(key);
            if unused {
                self.let_go(key);
            }
            self.ask_deferred();
            self.answer_resize();
        }
    }

    /// Nothing is held, under way or left to say.
    #[cfg(test)]
    pub(super) fn idle(&self) -> bool {
        self.entries.is_empty() && self.under_way.is_empty() && self.out.is_empty() && self.held_bytes == 0
    }

    /// Asks for the directory's counters, one question at a time.
    pub(super) fn ask_stats(&mut self) {
        if !std::mem::replace(&mut self.stats_asked, true) {
            self.tell_hits();
            self.out.push(ToDirectory::Stats { ticket: 0 });
        }
    }

    /// Takes in what the directory says.
    ///
    /// # Errors
    /// It cannot be true: nothing that the directory says can be trusted then.
    pub(super) fn hear(&mut self, message: FromDirectory) -> Result<(), String> {
        match message {
            FromDirectory::Granted { ticket, grants } => {
                let Some((known, asked)) = self.under_way.pop_front() else {
                    return Err(format!("a reply to request {ticket}, none is under way"));
                };
                if (known, asked.len()) != (ticket, grants.len()) {
                    let (found, wanted) = (grants.len(), asked.len());
                    return Err(format!("{found} grants for request {ticket}, {wanted} are due for request {known}"));
                }
                match asked {
                    Asked::Wants(keys) => {
                        keys.into_iter().zip(grants).try_for_each(|(key, grant)| self.settle(key, grant))
                    }
                    Asked::Offers(items) => self.settle_offers(ticket, &items, &grants),
                    Asked::Enlarged(key) => self.settle_enlarged(ticket, key, grants.first().copied()),
                }
            }
            FromDirectory::Settled { key, grant } => {
                if !matches!(self.entries.get(&key), Some(Entry { place: EntryState::Waiting, .. }))
                    || grant == Grant::Wait
                {
                    return Err(format!("{grant:?} for entry {key}, which does not wait for it"));
                }
                self.settle(key, grant)
            }
            FromDirectory::Stats { stats, .. } => {
                self.stats_asked = false;
                self.directory = stats;
                Ok(())
            }
            FromDirectory::Resize { ticket, bytes } => {
                self.resize(ticket, bytes);
                Ok(())
            }
            FromDirectory::Full => {
                self.keep_no_more();
                Ok(())
            }
            FromDirectory::Present { bytes } => {
                if let Some(slabs) = &mut self.slabs {
                    slabs.set_present(bytes);
                    self.slabs_changed = true;
                }
                Ok(())
            }
        }
    }

    fn settle(&mut self, key: u64, grant: Grant) -> Result<(), String> {
        let Some(entry) = self.entries.get_mut(&key) else {
            return Err(format!("{grant:?} for entry {key}, which nobody asked for"));
        };
        if !matches!(entry.place, EntryState::Asked | EntryState::Waiting) {
            return Err(format!("{grant:?} for entry {key}, which is settled"));
        }
        let wrong = |problem| format!("entry {key}: {problem}");
        if let Grant::Ready { bytes, .. } | Grant::Fill { bytes, .. } = grant
            && entry.kind != Kind::Exact
        {
            self.held_bytes = self.held_bytes - entry.bytes + bytes;
            entry.bytes = bytes;
        }
        entry.place = match grant {
            Grant::Ready { offset, .. } => {
                self.counted_hits += 1;
                EntryState::Ready(Arc::new(self.map.read_span(offset, entry.bytes).map_err(wrong)?))
            }
            Grant::Fill { offset, .. } => {
                self.granted.push_back(key);
                EntryState::Granted(self.map.write_span(offset, entry.bytes).map_err(wrong)?)
            }
            Grant::Wait => EntryState::Waiting,
            Grant::Bypass => EntryState::Bypass,
        };
        entry.absent = entry.kind == Kind::Find && grant == Grant::Bypass;
        let unused = entry.users == 0;
        if grant == Grant::Bypass {
            self.held_bytes -= entry.bytes;
        }
        if unused {
            self.let_go(key);
        }
        self.give_back(key);
        self.answer_resize();
        self.ask_deferred();
        Ok(())
    }

    fn room_for(&self, bytes: u64) -> bool {
        self.held_bytes == 0 || self.held_bytes + bytes <= self.ahead_bytes
    }

    fn insert(&mut self, want: Item, place: EntryState, reserve: bool, kind: Kind) {
        if place.holds() {
            self.held_bytes += want.bytes;
        }
        let Item { key, bytes, next_use, .. } = want;
        let entry = Entry {
            bytes,
            users: 1,
            readers: 0,
            next_use,
            place,
            fresh: false,
            checked: false,
            reserve,
            again: false,
            passed: false,
            kind,
            absent: false,
        };
        self.entries.insert(key, entry);
    }

    fn ask(&mut self, mut items: Vec<Item>, kind: Kind) {
        while !items.is_empty() {
            let rest = items.split_off(items.len().min(MESSAGE_KEYS));
            let ticket = self.await_reply(Asked::Wants(items.iter().map(|item| item.key).collect()));
            self.out.push(match kind {
                Kind::Exact => ToDirectory::Acquire { ticket, items },
                Kind::Open => ToDirectory::Open { ticket, items },
                Kind::Find => ToDirectory::Find { ticket, items },
            });
            items = rest;
        }
    }

    /// The ticket of a request that leaves now.
    fn await_reply(&mut self, asked: Asked) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.under_way.push_back((ticket, asked));
        ticket
    }

    fn ask_again(&mut self, key: u64) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        (entry.place, entry.again) = (EntryState::Asked, true);
        self.held_bytes += entry.bytes;
        let items = vec![Item { key, bytes: entry.bytes, next_use: entry.next_use, offer: false }];
        if entry.kind != Kind::Exact {
            entry.kind = Kind::Open;
            return self.ask(items, Kind::Open);
        }
        let ticket = self.await_reply(Asked::Wants(vec![key]));
        self.out.push(ToDirectory::Again { ticket, items });
    }

    /// Asks for what had to be put off, as far as there is room now.
    fn ask_deferred(&mut self) {
        let (mut items, mut open) = (Vec::new(), Vec::new());
        while let Some(&key) = self.deferred.front() {
            let waiting = match self.entries.get(&key) {
                Some(entry @ Entry { place: EntryState::Deferred, .. }) => {
                    Some((entry.bytes, entry.next_use, entry.reserve, entry.kind))
                }
                _ => None,
            };
            if let Some((bytes, next_use, reserve, kind)) = waiting {
                if !self.room_for(bytes) {
                    break;
                }
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.place = EntryState::Asked;
                }
                self.held_bytes += bytes;
                let list = if kind == Kind::Exact { &mut items } else { &mut open };
                list.push(ahead(Item { key, bytes, next_use, offer: false }, reserve));
            }
            self.deferred.pop_front();
        }
        self.ask(items, Kind::Exact);
        self.ask(open, Kind::Open);
    }

    /// Gives back an entry without users. What is under way is given back once it is settled.
    fn let_go(&mut self, key: u64) {
        let Some(Entry { place, .. }) = self.entries.get(&key) else {
            return;
        };
        if matches!(place, EntryState::Asked | EntryState::Waiting | EntryState::Filling { .. }) || self.keep(key) {
            return;
        }
        let Some(entry) = self.entries.remove(&key) else {
            return;
        };
        self.held_bytes -= if entry.place.holds() { entry.bytes } else { 0 };
        // The span leaves the mapping's register before the directory may grant its range anew.
        match entry.place {
            EntryState::Ready(span) => {
                drop(span);
                self.release(key, entry.next_use);
            }
            EntryState::Granted(span) => {
                drop(span);
                self.abandon(key);
            }
            _ => {}
        }
        self.ask_deferred();
    }

    fn release(&mut self, key: u64, next_use: u64) {
        let pair = (key, next_use);
        match self.out.last_mut() {
            Some(ToDirectory::Release { keys }) if keys.len() < MESSAGE_KEYS => keys.push(pair),
            _ => self.out.push(ToDirectory::Release { keys: vec![pair] }),
        }
    }

    fn abandon(&mut self, key: u64) {
        match self.out.last_mut() {
            Some(ToDirectory::Abandon { keys }) if keys.len() < MESSAGE_KEYS => keys.push(key),
            _ => self.out.push(ToDirectory::Abandon { keys: vec![key] }),
        }
    }
}
