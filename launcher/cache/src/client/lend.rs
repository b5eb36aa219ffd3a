//! Large entries lent to a device's copies instead of being copied, and the device's knowledge of the mapping.

use super::Item;
use super::slabs::{Registrar, Registration, Work};
use super::{CacheClient, CacheError, FillFn, Held, Inner};
use crate::mapping::{ReadSpan, SharedMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

/// How a read ended.
pub enum Reading<'a> {
    /// The whole entry, to be read by this thread.
    Held(Held<'a>),
    /// The part that was asked for, which a device may read where it lies.
    Lent(Lent),
    /// The cache has no room: read into memory of your own.
    Bypass,
}

/// Bytes of an entry that a device knows, kept in their place until this is dropped: the entry is not released, and its
/// slabs are not given back.
pub struct Lent {
    client: Arc<CacheClient>,
    key: u64,
    /// Taken on drop alone.
    span: Option<Arc<ReadSpan>>,
    /// Range of the entry's bytes.
    part: Range<usize>,
    slab_bytes: u64,
}

impl Lent {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.span.as_ref().and_then(|span| span.bytes().get(self.part.clone())).unwrap_or_default()
    }

    /// The bytes, cut where one registration ends and the next begins: a copy must not cross from one into the other.
    pub fn pieces(&self) -> Vec<&[u8]> {
        let (mut rest, mut at) = (self.bytes(), self.range().start);
        let mut pieces = Vec::with_capacity(1);
        while !rest.is_empty() {
            let to_end = self.slab_bytes - at % self.slab_bytes;
            let (piece, after) = rest.split_at(rest.len().min(usize::try_from(to_end).unwrap_or(usize::MAX)));
            pieces.push(piece);
            (rest, at) = (after, at + piece.len() as u64);
        }
        pieces
    }

    /// Bytes from the mapping's start.
    fn range(&self) -> Range<u64> {
        let start = self.span.as_ref().map_or(0, |span| span.start());
        start + self.part.start as u64..start + self.part.end as u64
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let range = self.range();
        // The span leaves the mapping's register before the directory may grant its range anew.
        drop(self.span.take());
        let inner = &self.client.inner;
        let mut table = inner.lock();
        let work = table.slabs.as_mut().is_some_and(|slabs| slabs.give_back(range.start, range.end));
        table.exit(self.key);
        inner.send(&mut table);
        drop(table);
        if work {
            inner.registering.notify_all();
        }
    }
}

impl CacheClient {
    /// Registers the mapping with a device, slab by slab, as far as it has pages. Slabs come and go with the cache's
    /// size. `tell` receives the reason if the device refuses a slab: then no more slabs are tried, and nothing of them
    /// is lent.
    ///
    /// # Errors
    /// A second call, or a thread that does not start.
    pub fn register(
        &self,
        registrar: Arc<dyn Registrar>,
        sizes: Registration,
        tell: impl Fn(String) + Send + 'static,
    ) -> Result<(), CacheError> {
        let mut thread = self.registering.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return Err(CacheError::Registered);
        }
        let mut table = self.inner.lock();
        table.register(sizes);
        self.inner.send(&mut table);
        drop(table);
        let (inner, map, closing) = (Arc::clone(&self.inner), Arc::clone(&self.map), Arc::clone(&self.closing));
        let keep = move || inner.keep_registered(&map, registrar.as_ref(), &closing, &tell);
        let started = std::thread::Builder::new().name("hr-cache-pin".into()).spawn(keep);
        *thread = Some(started.map_err(CacheError::Thread)?);
        Ok(())
    }

    /// As [`CacheClient::read`], but `part` of the entry is lent where it is large and lies where a device reads.
    ///
    /// # Errors
    /// As [`CacheClient::read`].
    pub fn read_or_lend<E: From<CacheError>>(
        self: &Arc<Self>,
        want: Item,
        part: Range<usize>,
        fill: &mut FillFn<E>,
    ) -> Result<Reading<'_>, E> {
        let Some(held) = self.hold(want, false, fill)? else { return Ok(Reading::Bypass) };
        let inside = !part.is_empty() && part.end <= held.bytes;
        let slab_bytes = if inside { self.lend(&held.span, &part) } else { None };
        let Some(slab_bytes) = slab_bytes else { return Ok(Reading::Held(held)) };
        let Held { span, user, .. } = held;
        // The use of the entry passes to the lent part, which ends it.
        std::mem::forget(user);
        Ok(Reading::Lent(Lent { client: Arc::clone(self), key: want.key, span: Some(span), part, slab_bytes }))
    }

    /// Size of slabs where the device will read the part.
    fn lend(&self, span: &ReadSpan, part: &Range<usize>) -> Option<u64> {
        let start = span.start();
        let mut table = self.inner.lock();
        let slabs = table.slabs.as_mut()?;
        slabs.lend(start + part.start as u64, start + part.end as u64).then(|| slabs.slab_bytes())
    }
}

impl Inner {
    /// Does for a device's slabs what is to be done, until closing; then gives all back.
    fn keep_registered(&self, map: &SharedMap, registrar: &dyn Registrar, closing: &AtomicBool, tell: &dyn Fn(String)) {
        let mut table = self.lock();
        loop {
            let closes = closing.load(Ordering::Acquire);
            let Some(slabs) = &mut table.slabs else { return };
            if closes {
                slabs.close();
            }
            match slabs.next() {
                Some(work) => {
                    // Never under the lock: a slab takes a device tens of milliseconds.
                    drop(table);
                    let done = self.tell_device(map, registrar, work, tell);
                    table = self.lock();
                    if let Some(slabs) = &mut table.slabs {
                        slabs.done(work, done);
                    }
                    table.answer_resize();
                    self.send(&mut table);
                }
                None if closes => return,
                None => table = self.registering.wait(table).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn tell_device(&self, map: &SharedMap, registrar: &dyn Registrar, work: Work, tell: &dyn Fn(String)) -> bool {
        let (Work::Register { start, end } | Work::Unregister { start, end }) = work;
        // Inside the mapping, whose length is a usize.
        let (address, bytes) = (map.address() + start as usize, (end - start) as usize);
        let done = match work {
            Work::Register { .. } => registrar.register(address, bytes).map_err(|problem| {
                format!(
                    "bytes {start}..{end} of the page cache are not page-locked ({problem}): what lies there, and beyond, \
                     goes to the device through batch slots"
                )
            }),
            Work::Unregister { .. } => registrar.unregister(address, bytes).map_err(|problem| {
                format!("bytes {start}..{end} of the page cache stay page-locked ({problem}): they cannot be given back")
            }),
        };
        done.map_err(tell).is_ok()
    }
}
