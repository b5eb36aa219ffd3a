//! Entries whose length shows when they are decoded, and references that are kept for later.

use super::offers::Asked;
use super::{Entry, EntryState, Table};
use crate::mapping::{ReadSpan, WriteSpan};
use spec::contract::cache::{Grant, ToDirectory};
use std::sync::Arc;

/// Reads of kept entries between two messages on them.
const UNTOLD: u64 = 4096;

impl Table {
    /// From now on references without a user are kept until the directory says that entries displace each other.
    pub(in crate::client) fn keep_idle(&mut self) {
        (self.keeps, self.kept) = (true, true);
    }

    /// Keeps an entry without users, where that is wished. What is kept does not count as announced.
    pub(super) fn keep(&mut self, key: u64) -> bool {
        let limit = self.limit_bytes;
        match self.entries.get(&key) {
            Some(Entry { place: EntryState::Ready(span), bytes, .. }) if self.keeps && span.end() <= limit => {
                self.held_bytes -= bytes;
                true
            }
            _ => false,
        }
    }

    /// Counts one more user; of a kept entry the first.
    pub(super) fn add_user(&mut self, key: u64) {
        if let Some(entry) = self.entries.get_mut(&key) {
            if entry.users == 0 && matches!(entry.place, EntryState::Ready(_)) {
                self.held_bytes += entry.bytes;
            }
            entry.users += 1;
        }
    }

    /// A question for the directory's counters is under way.
    pub(in crate::client) fn awaits_stats(&self) -> bool {
        self.stats_asked
    }

    /// A reader of an entry that is there; paired with [`Table::exit`].
    pub(in crate::client) fn enter_kept(&mut self, key: u64) -> Option<Arc<ReadSpan>> {
        let Some(Entry { place: EntryState::Ready(span), .. }) = self.entries.get(&key) else { return None };
        let span = Arc::clone(span);
        self.add_user(key);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.readers += 1;
            entry.fresh = false;
        }
        self.stats.hits += 1;
        Some(span)
    }

    /// Hits that the directory has not counted: an entry that is kept is asked for once, however often it is read.
    fn untold_hits(&self) -> u64 {
        if self.kept { self.stats.hits.saturating_sub(self.counted_hits) } else { 0 }
    }

    /// Tells the directory of them, for the counters of the node.
    pub(in crate::client) fn tell_hits(&mut self) {
        let count = self.untold_hits();
        if count > 0 {
            self.counted_hits += count;
            self.out.push(ToDirectory::Hits { count });
        }
    }

    /// The same now and then.
    pub(super) fn tell_many_hits(&mut self) {
        if self.untold_hits() >= UNTOLD {
            self.tell_hits();
        }
    }

    /// Gives back what is kept, and keeps nothing from now on.
    pub(super) fn keep_no_more(&mut self) {
        if std::mem::replace(&mut self.keeps, false) {
            let kept = |(_, entry): &(&u64, &Entry)| entry.users == 0 && matches!(entry.place, EntryState::Ready(_));
            let keys: Vec<u64> = self.entries.iter().filter(kept).map(|(key, _)| *key).collect();
            for key in keys {
                self.give_up_kept(key);
            }
        }
    }

    /// Releases a kept entry. False: it is in use.
    pub(super) fn give_up_kept(&mut self, key: u64) -> bool {
        match self.entries.get(&key) {
            Some(Entry { users: 0, place: EntryState::Ready(_), .. }) => {}
            _ => return false,
        }
        if let Some(Entry { place: EntryState::Ready(span), next_use, .. }) = self.entries.remove(&key) {
            // The span leaves the mapping's register before the directory may grant its range anew.
            drop(span);
            self.release(key, next_use);
        }
        true
    }

    /// The entry that a thread fills is `bytes` long, which the directory hears before it is published.
    pub(super) fn set_length(&mut self, key: u64, bytes: u64) {
        if let Some(entry) = self.entries.get_mut(&key)
            && bytes != entry.bytes
        {
            self.held_bytes = self.held_bytes - entry.bytes + bytes;
            entry.bytes = bytes;
            self.out.push(ToDirectory::Length { keys: vec![(key, bytes)] });
        }
    }

    /// Asks for a longer place for an entry that a thread fills; returns the ticket of the reply.
    pub(in crate::client) fn enlarge(&mut self, key: u64, bytes: u64) -> u64 {
        let ticket = self.await_reply(Asked::Enlarged(key));
        self.out.push(ToDirectory::Enlarge { ticket, key, bytes });
        ticket
    }

    /// The reply to [`Table::enlarge`]; the inner `None`: there is no room.
    pub(in crate::client) fn take_enlarged(&mut self, ticket: u64) -> Option<Option<WriteSpan>> {
        self.enlarged.remove(&ticket)
    }

    pub(super) fn settle_enlarged(&mut self, ticket: u64, key: u64, grant: Option<Grant>) -> Result<(), String> {
        let Some(entry @ Entry { place: EntryState::Filling { .. }, .. }) = self.entries.get_mut(&key) else {
            return Err(format!("{grant:?} for entry {key}, which nobody fills"));
        };
        let span = match grant {
            Some(Grant::Fill { offset, bytes }) => {
                let span = self.map.write_span(offset, bytes).map_err(|problem| format!("entry {key}: {problem}"))?;
                self.held_bytes = self.held_bytes - entry.bytes + bytes;
                entry.bytes = bytes;
                entry.place = EntryState::Filling { end: span.end() };
                Some(span)
            }
            // The entry is gone: its readers read for themselves.
            Some(Grant::Bypass) => {
                self.held_bytes -= entry.bytes;
                (entry.place, entry.again) = (EntryState::Bypass, true);
                None
            }
            grant => return Err(format!("{grant:?} for entry {key}, which is to be longer")),
        };
        self.enlarged.insert(ticket, span);
        Ok(())
    }

    /// The thread that filled `key` is done, and found no room for it.
    pub(in crate::client) fn without_room(&mut self, key: u64) {
        if self.entries.get(&key).is_some_and(|entry| entry.users == 0) {
            self.let_go(key);
        }
        self.ask_deferred();
        self.answer_resize();
    }
}
