//! Filling of entries that this rank was granted.

use super::{CacheClient, FillFn, Filling, OpenFn, SEAL_BYTES, seal_of};
use crate::mapping::WriteSpan;
use std::ops::RangeInclusive;

/// Whoever makes the bytes of entries.
pub(super) enum Filler<'f, 'e, E> {
    /// All bytes of an entry, whose length is known.
    Exact(&'f mut FillFn<'e, E>),
    /// Entries whose length shows as they are made; of others than these keys it knows nothing.
    Open { fill: &'f mut OpenFn<'e, E>, keys: RangeInclusive<u64> },
    /// Nobody: what is granted goes back.
    None,
}

impl<E> Filler<'_, '_, E> {
    /// Entries that it can make besides the one that is waited for.
    pub(super) fn keys(&self) -> Option<RangeInclusive<u64>> {
        match self {
            Filler::Exact(_) => Some(0..=u64::MAX),
            Filler::Open { keys, .. } => Some(keys.clone()),
            Filler::None => None,
        }
    }
}

impl CacheClient {
    /// Fills and publishes; whatever goes wrong, the directory hears of it.
    pub(super) fn fill<E>(&self, key: u64, span: WriteSpan, filler: &mut Filler<E>) -> Result<(), E> {
        let mut guard = FillGuard { client: self, key, span: Some(span) };
        match filler {
            Filler::Exact(fill) => {
                let Some(span) = guard.span.as_mut() else { return Ok(()) };
                self.write(key, span, fill)?;
            }
            Filler::Open { fill, .. } => {
                let mut filling = Filling::of(&mut guard);
                fill(&mut filling)?;
                filling.end();
            }
            Filler::None => return Ok(()),
        }
        guard.publish();
        Ok(())
    }

    /// An entry's bytes, and its seal behind them.
    pub(super) fn write<E>(&self, key: u64, span: &mut WriteSpan, fill: &mut FillFn<E>) -> Result<(), E> {
        let bytes = span.bytes_mut();
        let (bytes, seal) = bytes.split_at_mut(bytes.len() - self.seal_bytes());
        fill(key, bytes)?;
        if self.verify {
            debug_assert_eq!(seal.len(), SEAL_BYTES);
            seal.copy_from_slice(&seal_of(key, bytes));
        }
        Ok(())
    }
}

/// A fill under way. Dropped without [`FillGuard::publish`], by error or panic, the entry is abandoned.
pub(super) struct FillGuard<'a> {
    pub(super) client: &'a CacheClient,
    pub(super) key: u64,
    pub(super) span: Option<WriteSpan>,
}

impl FillGuard<'_> {
    fn publish(mut self) {
        if let Some(span) = self.span.take() {
            self.client.inner.lock().filled(self.key, span);
        }
    }
}

impl Drop for FillGuard<'_> {
    fn drop(&mut self) {
        let inner = &self.client.inner;
        let mut table = inner.lock();
        if let Some(span) = self.span.take() {
            table.not_filled(self.key, span);
        }
        inner.send(&mut table);
        inner.changed.notify_all();
    }
}
