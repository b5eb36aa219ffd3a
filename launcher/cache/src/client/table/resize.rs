//! The usable part of the mapping gets smaller or larger.

use super::{Entry, EntryState, Table};
use spec::contract::cache::ToDirectory;

impl Table {
    /// True while a part of the mapping may not be used, because memory is short or was a moment ago.
    pub(in crate::client) fn is_shrunk(&self) -> bool {
        self.limit_bytes < self.map.len() as u64
    }

    /// The usable part of the mapping ends at `bytes` from here on.
    pub(super) fn resize(&mut self, ticket: u64, bytes: u64) {
        self.limit_bytes = bytes;
        self.resize = Some(ticket);
        if let Some(slabs) = &mut self.slabs {
            slabs.set_limit(bytes);
            self.slabs_changed = true;
        }
        let share = bytes as f64 / self.map.len() as f64;
        self.ahead_bytes = (self.planned_ahead_bytes as f64 * share.min(1.0)) as u64;
        let beyond: Vec<u64> =
            self.entries.iter().filter(|(_, e)| e.place.end() > Some(bytes)).map(|(key, _)| *key).collect();
        beyond.into_iter().for_each(|key| self.give_back(key));
        self.ask_deferred();
        self.answer_resize();
    }

    /// Gives back an entry beyond the usable part unless a reader is at it; who announced it asks anew.
    pub(super) fn give_back(&mut self, key: u64) {
        if self.entries.get(&key).is_some_and(|entry| entry.place.end() > Some(self.limit_bytes))
            && self.give_up_kept(key)
        {
            return;
        }
        let limit = self.limit_bytes;
        let beyond = |entry: &&mut Entry| entry.readers == 0 && entry.place.end() > Some(limit);
        let Some(entry) = self.entries.get_mut(&key).filter(beyond) else { return };
        if matches!(entry.place, EntryState::Filling { .. }) {
            return;
        }
        let (bytes, next_use) = (entry.bytes, entry.next_use);
        (entry.fresh, entry.checked) = (false, false);
        let place = std::mem::replace(&mut entry.place, EntryState::Deferred);
        self.held_bytes -= bytes;
        self.deferred.push_back(key);
        let filled = matches!(place, EntryState::Ready(_));
        // The span leaves the mapping's register before the directory may grant its range anew.
        drop(place);
        if filled { self.release(key, next_use) } else { self.abandon(key) }
    }

    /// Says that nothing is held beyond the usable part, and known to a device, once that is so.
    pub(in crate::client) fn answer_resize(&mut self) {
        if self.resize.is_some()
            && !self.entries.values().any(|entry| entry.place.end() > Some(self.limit_bytes))
            && !self.slabs.as_ref().is_some_and(|slabs| slabs.beyond(self.limit_bytes))
            && let Some(ticket) = self.resize.take()
        {
            self.out.push(ToDirectory::Resized { ticket });
        }
    }
}
