//! Storing what a rank holds by chance: the directory is asked, the caller fills what it wants.

use super::table::{Offer, Offered};
use super::{CacheClient, CacheError, FillFn, Filler, Item, REPLY_LIMIT, silent};
use crate::mapping::WriteSpan;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

impl CacheClient {
    /// Stores those of `offers`, the one needed soonest first, that the directory wants, and those granted to this rank
    /// already. One message, and one round trip during which the caller waits; none where there is nothing to ask.
    ///
    /// # Errors
    /// The directory is gone or silent; an entry cannot be filled.
    pub fn offer<E: From<CacheError>>(&self, offers: &[Offer], fill: &mut FillFn<E>) -> Result<(), E> {
        let seal = self.seal_bytes() as u64;
        let offers: Vec<Offer> =
            offers.iter().map(|o| Offer { item: Item { bytes: o.item.bytes + seal, ..o.item }, ..*o }).collect();
        let mut table = self.inner.lock();
        let Offered { granted, asked, ticket } = table.offer(&offers);
        self.inner.send(&mut table);
        drop(table);
        for key in granted {
            let span = self.inner.lock().take_granted(key);
            if let Some(span) = span {
                self.fill(key, span, &mut Filler::Exact(fill))?;
            }
        }
        let Some(ticket) = ticket else { return Ok(()) };
        let spans = self.await_offered(ticket, asked.first().map_or(0, |offer| offer.item.key))?;
        let mut room = Room { client: self, left: asked.iter().zip(spans).collect(), filled: Vec::new() };
        room.left.retain(|(_, span)| span.is_some());
        room.left.reverse();
        room.fill(fill)
    }

    fn await_offered(&self, ticket: u64, key: u64) -> Result<Vec<Option<WriteSpan>>, CacheError> {
        let since = Instant::now();
        let mut table = self.inner.lock();
        loop {
            if let Some(spans) = table.take_offered(ticket) {
                return Ok(spans);
            }
            if let Some(problem) = &table.failed {
                return Err(CacheError::Lost(problem.clone()));
            }
            if since.elapsed() >= REPLY_LIMIT {
                return Err(silent(key));
            }
            let second = Duration::from_secs(1);
            let waited = self.inner.changed.wait_timeout(table, second);
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Room that was given for offers. However it ends, the directory hears what became of each.
struct Room<'a> {
    client: &'a CacheClient,
    /// Not filled yet, the next one last.
    left: Vec<(&'a Offer, Option<WriteSpan>)>,
    /// Key and next use.
    filled: Vec<(u64, u64)>,
}

impl Room<'_> {
    fn fill<E>(&mut self, fill: &mut FillFn<E>) -> Result<(), E> {
        while let Some((offer, Some(span))) = self.left.last_mut() {
            self.client.write(offer.item.key, span, fill)?;
            self.filled.push((offer.item.key, offer.item.next_use));
            self.left.pop();
        }
        Ok(())
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        // Spans leave the mapping's register before the directory may grant their ranges anew.
        let given_up: Vec<u64> = self.left.drain(..).map(|(offer, _)| offer.item.key).collect();
        let mut table = self.client.inner.lock();
        table.stored(&self.filled, &given_up);
        self.client.inner.send(&mut table);
    }
}
