//! Entries whose length shows when they are decoded, for programs that store whatever a user's code makes.
//!
//! ```text
//! announce_open ─► room for a guess ─► Filling: write, shorten or enlarge ─► published with its true length
//! ```

use super::{CacheClient, CacheError, FillGuard, Filler, Inner, Item, Kind, REPLY_LIMIT, silent};
use crate::mapping::ReadSpan;
use spec::contract::cache::CacheStats;
use std::ops::{Deref, RangeInclusive};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Makes an entry's bytes. `E` is the error of whoever makes them.
pub type OpenFn<'a, E> = dyn FnMut(&mut Filling) -> Result<(), E> + 'a;

/// An entry that is being made. All its room counts as its bytes unless it is cut to a length.
pub struct Filling<'g, 'a> {
    guard: &'g mut FillGuard<'a>,
    length: Option<usize>,
}

impl<'g, 'a> Filling<'g, 'a> {
    pub(super) fn of(guard: &'g mut FillGuard<'a>) -> Self {
        Self { guard, length: None }
    }

    pub fn key(&self) -> u64 {
        self.guard.key
    }

    /// Bytes that the entry may have now; 0 when there is no room for it.
    pub fn room(&self) -> usize {
        self.guard.span.as_ref().map_or(0, |span| span.len())
    }

    /// Where its room begins, bytes from the mapping's start.
    pub fn offset(&self) -> u64 {
        self.guard.span.as_ref().map_or(0, |span| span.start())
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.guard.span.as_mut().map(|span| span.bytes_mut()).unwrap_or_default()
    }

    /// The entry is `bytes` long, at most its room; 0: it is not stored.
    pub fn set_length(&mut self, bytes: usize) {
        self.length = Some(bytes.min(self.room()));
    }

    /// Asks for room for `bytes`, elsewhere: what was written is lost. False: there is none, the entry will not be stored.
    ///
    /// # Errors
    /// The directory is gone or silent.
    pub fn enlarge(&mut self, bytes: usize) -> Result<bool, CacheError> {
        // The span leaves the mapping's register before the directory may grant its range anew.
        if self.guard.span.take().is_none() {
            return Ok(false);
        }
        let (inner, key) = (&self.guard.client.inner, self.guard.key);
        let mut table = inner.lock();
        let ticket = table.enlarge(key, bytes as u64);
        inner.send(&mut table);
        let since = Instant::now();
        loop {
            if let Some(span) = table.take_enlarged(ticket) {
                let found = span.is_some();
                self.guard.span = span;
                if !found {
                    table.without_room(key);
                    inner.send(&mut table);
                }
                return Ok(found);
            }
            if let Some(problem) = &table.failed {
                return Err(CacheError::Lost(problem.clone()));
            }
            if since.elapsed() >= REPLY_LIMIT {
                return Err(silent(key));
            }
            let waited = inner.changed.wait_timeout(table, Duration::from_secs(1));
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives back the memory behind the entry's bytes. An entry without bytes is abandoned.
    pub(super) fn end(self) {
        match self.length {
            Some(0) => {
                if let Some(span) = self.guard.span.take() {
                    self.guard.client.inner.lock().not_filled(self.guard.key, span);
                }
            }
            Some(length) => self.guard.span.iter_mut().for_each(|span| span.shorten(length)),
            None => {}
        }
    }
}

/// Bytes of an entry, which stays in its place until this is dropped; of no thread or scope.
pub struct Taken {
    client: Arc<CacheClient>,
    key: u64,
    /// Taken on drop alone.
    span: Option<Arc<ReadSpan>>,
}

impl Taken {
    /// Where it begins, bytes from the mapping's start.
    pub fn offset(&self) -> u64 {
        self.span.as_ref().map_or(0, |span| span.start())
    }

    /// Where it lies in this process.
    pub fn address(&self) -> usize {
        self.client.map.address() + self.offset() as usize
    }
}

impl Deref for Taken {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.span.as_ref().map(|span| span.bytes()).unwrap_or_default()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        drop(self.span.take());
        leave(&self.client.inner, self.key);
    }
}

fn leave(inner: &Inner, key: u64) {
    let mut table = inner.lock();
    table.exit(key);
    inner.send(&mut table);
}

impl CacheClient {
    /// References without a user are kept from now on, until the directory says that entries displace each other: while
    /// all fits, an entry is asked for once.
    pub fn keep_idle(&self) {
        self.inner.lock().keep_idle();
    }

    /// As [`CacheClient::announce`], for entries whose bytes are guesses.
    pub fn announce_open(&self, wants: &[Item]) {
        let mut table = self.inner.lock();
        table.announce(wants.iter().copied(), true, Kind::Open);
        self.inner.send(&mut table);
    }

    /// As [`CacheClient::read`], for an entry whose bytes are a guess. `keys`: entries that `fill` can make, so that it works
    /// ahead while this one is waited for. `again`: an entry that was refused when it was announced is asked for once more.
    ///
    /// # Errors
    /// As [`CacheClient::read`].
    pub fn open<E: From<CacheError>>(
        self: &Arc<Self>,
        want: Item,
        again: bool,
        keys: RangeInclusive<u64>,
        fill: &mut OpenFn<E>,
    ) -> Result<Option<Taken>, E> {
        self.take(want, (Kind::Open, again), &mut Filler::Open { fill, keys })
    }

    /// An entry that is stored, or is being filled now; `None`: it is not there.
    ///
    /// # Errors
    /// As [`CacheClient::read`].
    pub fn stored(self: &Arc<Self>, key: u64, next_use: u64) -> Result<Option<Taken>, CacheError> {
        let want = Item { key, bytes: 0, next_use, offer: false };
        self.take(want, (Kind::Find, false), &mut Filler::None)
    }

    /// The node's counters now; as last heard where the directory does not answer within `limit`.
    pub fn fresh_stats(&self, limit: Duration) -> CacheStats {
        let (inner, since) = (&self.inner, Instant::now());
        let mut table = inner.lock();
        // An answer to an earlier question may be on its way, and is older.
        for _ in 0..2 {
            table.ask_stats();
            inner.send(&mut table);
            while table.awaits_stats() && table.failed.is_none() && since.elapsed() < limit {
                let left = limit.saturating_sub(since.elapsed());
                table = inner.changed.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        table.directory
    }

    /// An entry to which this client has a reference already. Never waits.
    pub fn kept(self: &Arc<Self>, key: u64) -> Option<Taken> {
        let mut table = self.inner.lock();
        let span = table.enter_kept(key)?;
        Some(Taken { client: Arc::clone(self), key, span: Some(span) })
    }

    fn take<E: From<CacheError>>(
        self: &Arc<Self>,
        want: Item,
        how: (Kind, bool),
        fill: &mut Filler<E>,
    ) -> Result<Option<Taken>, E> {
        // Made before the lock is taken, so that it ends after the lock is let go.
        let mut taken = Taken { client: Arc::clone(self), key: want.key, span: None };
        taken.span = self.find(want, how, fill)?;
        Ok(taken.span.is_some().then_some(taken))
    }

    /// As [`CacheClient::work_ahead`], for entries of `keys` whose bytes are guesses.
    pub fn work_ahead_open<E>(&self, keys: RangeInclusive<u64>, fill: &mut OpenFn<E>) -> bool {
        let Some((key, span)) = self.inner.lock().take_fill(keys.clone()) else { return false };
        // Whoever needs it meets the error.
        let _ = self.fill(key, span, &mut Filler::Open { fill, keys });
        true
    }
}
