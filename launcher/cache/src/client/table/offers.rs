//! Offers: entries that a rank could fill besides those that it needs, since it holds their bytes just now.
//!
//! The directory keeps those that are needed sooner than what they displace. A refused offer leaves nothing behind.

use super::{Entry, EntryState, MESSAGE_KEYS, Table};
use crate::mapping::WriteSpan;
use spec::contract::cache::{Grant, Item, ToDirectory};

/// An entry that could be filled now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    pub item: Item,
    /// Needed in the step that is being read now: of use only where this rank knows that it has not been read yet.
    pub due: bool,
}

/// A request under way.
pub(super) enum Asked {
    /// Keys.
    Wants(Vec<u64>),
    /// Keys and bytes.
    Offers(Vec<(u64, u64)>),
    /// A longer place for the entry of this key.
    Enlarged(u64),
}

impl Asked {
    pub(super) fn len(&self) -> usize {
        match self {
            Asked::Wants(keys) => keys.len(),
            Asked::Offers(items) => items.len(),
            Asked::Enlarged(_) => 1,
        }
    }
}

/// Offers that were sorted: some can be filled at once, for the others a reply is due.
#[derive(Default)]
pub(in crate::client) struct Offered {
    /// Granted to this rank already, to be filled by [`Table::take_granted`].
    pub(in crate::client) granted: Vec<u64>,
    /// Offered now.
    pub(in crate::client) asked: Vec<Offer>,
    /// The reply to await; `None`: nothing was offered.
    pub(in crate::client) ticket: Option<u64>,
}

impl Table {
    /// Offers what this rank neither holds nor has read already, in the order given, in one message.
    pub(in crate::client) fn offer(&mut self, offers: &[Offer]) -> Offered {
        let mut found = Offered::default();
        for offer in offers.iter().take(MESSAGE_KEYS) {
            match self.entries.get(&offer.item.key).map(|entry| (&entry.place, entry.passed)) {
                None if offer.due => {}
                None | Some((EntryState::Deferred, _) | (EntryState::Bypass, false)) => found.asked.push(*offer),
                Some((EntryState::Granted(_), _)) => found.granted.push(offer.item.key),
                Some(_) => {}
            }
        }
        if !found.asked.is_empty() {
            let items: Vec<Item> = found.asked.iter().map(|offer| offer.item).collect();
            let ticket = self.await_reply(Asked::Offers(items.iter().map(|item| (item.key, item.bytes)).collect()));
            found.ticket = Some(ticket);
            self.out.push(ToDirectory::Acquire { ticket, items });
        }
        found
    }

    /// The grant of `key`, when no thread fills it yet.
    pub(in crate::client) fn take_granted(&mut self, key: u64) -> Option<WriteSpan> {
        let Entry { place, .. } = self.entries.get_mut(&key)?;
        let EntryState::Granted(span) = &*place else { return None };
        let end = span.end();
        match std::mem::replace(place, EntryState::Filling { end }) {
            EntryState::Granted(span) => Some(span),
            _ => None,
        }
    }

    /// Room for the offers of `ticket`, in their order; `None`: no reply yet.
    pub(in crate::client) fn take_offered(&mut self, ticket: u64) -> Option<Vec<Option<WriteSpan>>> {
        self.offered.remove(&ticket)
    }

    /// Ends offers that got room: filled entries are published and released, the others given up.
    pub(in crate::client) fn stored(&mut self, filled: &[(u64, u64)], given_up: &[u64]) {
        if !filled.is_empty() {
            self.out.push(ToDirectory::Publish { keys: filled.iter().map(|(key, _)| *key).collect() });
            self.out.push(ToDirectory::Release { keys: filled.to_vec() });
        }
        given_up.iter().for_each(|key| self.abandon(*key));
    }

    pub(super) fn settle_offers(&mut self, ticket: u64, items: &[(u64, u64)], grants: &[Grant]) -> Result<(), String> {
        let mut spans = Vec::with_capacity(items.len());
        for ((key, bytes), grant) in items.iter().zip(grants) {
            spans.push(match grant {
                Grant::Fill { offset, .. } => {
                    let span = self.map.write_span(*offset, *bytes);
                    Some(span.map_err(|problem| format!("entry {key}: {problem}"))?)
                }
                Grant::Bypass => None,
                grant => return Err(format!("{grant:?} for entry {key}, which was offered")),
            });
        }
        self.offered.insert(ticket, spans);
        Ok(())
    }
}
