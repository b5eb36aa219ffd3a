//! The connection of a rank to the directory of the node's page cache.
//!
//! ```text
//! announce ─► Table ─► Acquire ─► directory ─► Ready | Fill | Wait | Bypass ─► Table ─► read: bytes of the mapping
//! retire   ─► Table ─► Release ─►
//! ```
//!
//! A rank with a device registers the mapping with it, slab by slab ([`Registrar`]), and lends large entries to copies
//! ([`Lent`]) instead of copying them. When the cache shrinks: references end, slabs beyond the new end are given back, then
//! the directory hears of it, and only then pages go.
//!
//! Architecture invariant: no lock is held in shared memory, and no lock of this process while bytes are read or filled.
//!
//! Two threads speak with the directory, so that nobody who trains or loads ever blocks on the socket. A read of an entry
//! that was announced and granted takes two short locks and no round trip.

mod fill;
mod lend;
mod offer;
mod open;
mod slabs;
mod table;
#[cfg(test)]
mod testing;

pub use crate::error::CacheError;
use fill::{FillGuard, Filler};
pub use lend::{Lent, Reading};
pub use open::{Filling, OpenFn, Taken};
pub use slabs::{Registrar, Registration};
pub use spec::contract::cache::Item;
pub use table::{ClientStats, Offer};

use crate::mapping::{ReadSpan, SharedMap};
use spec::contract::VERSION;
use spec::contract::cache::{CacheStats, FromDirectory, ToDirectory};
use spec::contract::wire::{Decoder, encode};
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use table::{Busy, Kind, Look, Table};

/// Longest wait for the directory's reply to an `Acquire`.
const REPLY_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for another rank's fill; the reader reads for itself then.
const FILL_LIMIT: Duration = Duration::from_secs(10);
/// Longest time that a message may take to leave.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// Time between two looks at these limits.
const SLICE: Duration = Duration::from_secs(1);
/// Checksum and key, behind the bytes of an entry when [`ClientSpec::verify`] is on.
const SEAL_BYTES: usize = 12;

/// Writes the bytes of entry `key` into the slice, all of them. `E` is the error of whoever makes the bytes.
pub type FillFn<'a, E> = dyn FnMut(u64, &mut [u8]) -> Result<(), E> + 'a;

/// A thread that can fill entries ahead of need.
pub trait Wake: Send + Sync {
    /// There is something for [`CacheClient::work_ahead`]. Returns at once.
    fn wake(&self);
}

/// How a rank uses the cache.
#[derive(Clone, Copy, Debug)]
pub struct ClientSpec {
    /// Global rank.
    pub rank: u32,
    /// Most bytes that announced batches may hold at once; the rest is asked for as these are read.
    pub ahead_bytes: u64,
    /// A checksum is stored beside every entry and verified at every acquire.
    pub verify: bool,
}

struct Inner {
    table: Mutex<Table>,
    /// An entry changed, a fill was granted, or all failed.
    changed: Condvar,
    /// There are messages to send, or it is time to end.
    outgoing: Condvar,
    /// There is something to do for a device's slabs, or it is time to end.
    registering: Condvar,
    wakers: Mutex<Vec<Weak<dyn Wake>>>,
    /// Called once when the directory is gone.
    lost: Mutex<Option<Lost>>,
}

type Lost = Box<dyn FnOnce(String) + Send>;

/// A rank's view of the page cache. Any thread may read.
pub struct CacheClient {
    inner: Arc<Inner>,
    map: Arc<SharedMap>,
    socket: UnixStream,
    threads: Vec<JoinHandle<()>>,
    /// Thread that registers the mapping with a device, if any.
    registering: Mutex<Option<JoinHandle<()>>>,
    closing: Arc<AtomicBool>,
    verify: bool,
}

impl CacheClient {
    /// Speaks with the directory over `socket`; entries lie in `memfd`.
    ///
    /// # Errors
    /// The memory cannot be mapped, or a thread cannot be started.
    pub fn connect(socket: UnixStream, memfd: &File, spec: ClientSpec) -> Result<Arc<Self>, CacheError> {
        let failed = CacheError::Socket;
        let map = SharedMap::new(memfd)?;
        let mut table = Table::new(Arc::clone(&map), spec.ahead_bytes);
        table.out.push(ToDirectory::Hello { version: VERSION, rank: spec.rank });
        let inner = Arc::new(Inner {
            table: Mutex::new(table),
            changed: Condvar::new(),
            outgoing: Condvar::new(),
            registering: Condvar::new(),
            wakers: Mutex::default(),
            lost: Mutex::default(),
        });
        socket.set_write_timeout(Some(SEND_LIMIT)).map_err(failed)?;
        let closing = Arc::new(AtomicBool::new(false));
        let (from, to) = (socket.try_clone().map_err(failed)?, socket.try_clone().map_err(failed)?);
        let (threads, registering, verify) = (Vec::new(), Mutex::default(), spec.verify);
        let mut client = Self { inner: Arc::clone(&inner), map, socket, threads, registering, closing, verify };
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let (hearing, sending, closing) = (Arc::clone(&inner), inner, Arc::clone(&client.closing));
        client.threads.push(thread("hr-cache-in").spawn(move || hearing.hear_all(from)).map_err(failed)?);
        let sender = thread("hr-cache-out").spawn(move || sending.send_all(to, &closing)).map_err(failed)?;
        client.threads.push(sender);
        Ok(Arc::new(client))
    }

    /// A batch will need `wants`, each key once. Asks for what this rank does not hold yet.
    pub fn announce(&self, wants: &[Item]) {
        self.announce_all(wants, true);
    }

    /// As [`CacheClient::announce`] for entries that [`CacheClient::read_again`] reads: what is stored is held for the batch,
    /// for the rest no room is reserved ahead of need.
    pub fn announce_stored(&self, wants: &[Item]) {
        self.announce_all(wants, false);
    }

    fn announce_all(&self, wants: &[Item], reserve: bool) {
        let seal = self.seal_bytes() as u64;
        let mut table = self.inner.lock();
        let wants = wants.iter().map(|want| Item { bytes: want.bytes + seal, ..*want });
        table.announce(wants, reserve, Kind::Exact);
        self.inner.send(&mut table);
    }

    /// The batch was read, or never will be: the inverse of [`CacheClient::announce`].
    pub fn retire(&self, keys: impl Iterator<Item = u64>) {
        let mut table = self.inner.lock();
        keys.for_each(|key| table.leave(key));
        self.inner.send(&mut table);
    }

    /// The bytes of an entry, filled by `fill` where they are not there. While it has to wait it fills what this rank was
    /// granted for later, so ranks never wait for each other in a circle. `None` means that the cache has no room, and the
    /// caller reads into other memory.
    ///
    /// # Errors
    /// The directory is gone or says what cannot be; the entry cannot be filled; its checksum is wrong.
    pub fn read<E: From<CacheError>>(&self, want: Item, fill: &mut FillFn<E>) -> Result<Option<Held<'_>>, E> {
        self.hold(want, false, fill)
    }

    /// As [`CacheClient::read`]; an entry that was refused when it was announced is asked for once more, which costs a
    /// round trip. For entries that others may have offered since.
    ///
    /// # Errors
    /// As [`CacheClient::read`].
    pub fn read_again<E: From<CacheError>>(&self, want: Item, fill: &mut FillFn<E>) -> Result<Option<Held<'_>>, E> {
        self.hold(want, true, fill)
    }

    fn hold<E: From<CacheError>>(&self, want: Item, again: bool, fill: &mut FillFn<E>) -> Result<Option<Held<'_>>, E> {
        // Made before the lock is taken, so that it ends after the lock is let go.
        let user = User { client: self, key: want.key };
        let want = Item { bytes: want.bytes + self.seal_bytes() as u64, ..want };
        let span = self.find(want, (Kind::Exact, again), &mut Filler::Exact(fill))?;
        let want = Item { bytes: want.bytes - self.seal_bytes() as u64, ..want };
        Ok(span.map(|span| Held { span, bytes: want.bytes as usize, user }))
    }

    /// The entry once it is stored; `None`: the cache has no room. The caller's [`User`] counts as its reader until it ends.
    fn find<E: From<CacheError>>(
        &self,
        want: Item,
        (kind, again): (Kind, bool),
        fill: &mut Filler<E>,
    ) -> Result<Option<Arc<ReadSpan>>, E> {
        let mut table = self.inner.lock();
        table.enter(want, kind);
        self.inner.send(&mut table);
        let mut waited = Duration::ZERO;
        loop {
            if let Some(problem) = &table.failed {
                return Err(CacheError::Lost(problem.clone()).into());
            }
            match table.look(want.key, again, kind) {
                Look::Ready { span, checked } => {
                    drop(table);
                    if self.verify && !checked {
                        self.check(want.key, span.bytes())?;
                    }
                    return Ok(Some(span));
                }
                Look::Bypass => return Ok(None),
                Look::Fill(span) => {
                    drop(table);
                    self.fill(want.key, span, fill)?;
                    table = self.inner.lock();
                }
                Look::Busy(busy) => {
                    self.inner.send(&mut table);
                    if let Some((key, span)) = fill.keys().and_then(|keys| table.take_fill(keys)) {
                        drop(table);
                        // Whoever needs this one meets the error.
                        let _ = self.fill(key, span, fill);
                        table = self.inner.lock();
                        continue;
                    }
                    if busy == Busy::Elsewhere && waited >= FILL_LIMIT {
                        table.stats.bypasses += 1;
                        return Ok(None);
                    }
                    if busy == Busy::Asked && waited >= REPLY_LIMIT {
                        return Err(silent(want.key).into());
                    }
                    let began = Instant::now();
                    let (woken, _) =
                        self.inner.changed.wait_timeout(table, SLICE).unwrap_or_else(PoisonError::into_inner);
                    table = woken;
                    // Time in which this process, or the directory's, does not run is no silence.
                    if !is_stopped(&self.socket) {
                        waited += began.elapsed().min(2 * SLICE);
                    }
                }
            }
        }
    }

    /// Fills one granted entry that no thread fills. False means that there was no such entry.
    pub fn work_ahead<E>(&self, fill: &mut FillFn<E>) -> bool {
        let Some((key, span)) = self.inner.lock().take_fill(0..=u64::MAX) else {
            return false;
        };
        // Whoever needs it meets the error.
        let _ = self.fill(key, span, &mut Filler::Exact(fill));
        true
    }

    /// Wakes `waker` when there is something for [`CacheClient::work_ahead`].
    pub fn wake_by(&self, waker: Weak<dyn Wake>) {
        let mut wakers = self.inner.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.retain(|waker| waker.strong_count() > 0);
        wakers.push(waker);
    }

    /// Registers `tell`, which is called once with the reason as soon as the directory is gone, or at once if it is
    /// gone already.
    pub fn when_lost(&self, tell: impl FnOnce(String) + Send + 'static) {
        *self.inner.lost() = Some(Box::new(tell));
        let problem = self.inner.lock().failed.clone();
        if let Some(problem) = problem {
            self.inner.tell_lost(problem);
        }
    }

    /// Stops reporting loss of the directory. Later reads still fail.
    pub fn expect_end(&self) {
        self.inner.lost().take();
    }

    /// Bytes of the mapping.
    pub fn capacity_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// True while a part of the mapping may not be used, because memory is short or was a moment ago.
    pub fn is_shrunk(&self) -> bool {
        self.inner.lock().is_shrunk()
    }

    /// Reads of this rank so far.
    pub fn stats(&self) -> ClientStats {
        self.inner.lock().stats
    }

    /// The node's counters as last heard; asks for newer ones.
    pub fn node_stats(&self) -> CacheStats {
        let mut table = self.inner.lock();
        table.ask_stats();
        self.inner.send(&mut table);
        table.directory
    }

    fn seal_bytes(&self) -> usize {
        if self.verify { SEAL_BYTES } else { 0 }
    }

    fn check(&self, key: u64, bytes: &[u8]) -> Result<(), CacheError> {
        let (bytes, seal) = bytes.split_at(bytes.len() - SEAL_BYTES);
        if *seal != seal_of(key, bytes) {
            return Err(CacheError::Checksum { key });
        }
        self.inner.lock().checked(key);
        Ok(())
    }
}

impl Drop for CacheClient {
    /// Sends what is left to send; the directory takes back the rest when the socket closes.
    fn drop(&mut self) {
        self.expect_end();
        {
            self.inner.lock().tell_hits();
            self.closing.store(true, Ordering::Release);
            self.inner.outgoing.notify_all();
            self.inner.registering.notify_all();
        }
        let own = std::thread::current().id();
        // First: the device forgets the mapping before it goes.
        if let Some(thread) = self.registering.get_mut().unwrap_or_else(PoisonError::into_inner).take()
            && thread.thread().id() != own
        {
            let _ = thread.join();
        }
        for thread in self.threads.drain(..).rev() {
            // The last handle may be let go by one of these threads, through a waker.
            if thread.thread().id() != own {
                let _ = thread.join();
            }
            // After the sender: nothing more will be said, so the hearing thread ends.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}

/// The page cache's memory by the number of the inherited descriptor. It is opened anew: the descriptor stays whose it is.
///
/// # Errors
/// No such descriptor, or it cannot be opened for writing.
pub fn inherited_memory(number: &str) -> Result<File, CacheError> {
    let failed = |source| CacheError::Descriptor { descriptor: number.into(), source };
    let number: u32 = number.parse().map_err(|e: std::num::ParseIntError| failed(e.into()))?;
    let opened = File::options().read(true).write(true).open(format!("/proc/self/fd/{number}"));
    opened.map_err(|e| failed(e.into()))
}

/// Bytes of an entry, which stays in its place until this is dropped.
pub struct Held<'a> {
    // Ends before the use does: the span leaves the mapping's register before the directory may grant its range anew.
    span: Arc<ReadSpan>,
    /// Without the seal behind them.
    bytes: usize,
    user: User<'a>,
}

impl Deref for Held<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.span.bytes()[..self.bytes]
    }
}

/// A reader's use of an entry, ended however the read ends.
struct User<'a> {
    client: &'a CacheClient,
    key: u64,
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let mut table = self.client.inner.lock();
        table.exit(self.key);
        self.client.inner.send(&mut table);
    }
}

fn silent(key: u64) -> CacheError {
    CacheError::Silent { key, limit_s: REPLY_LIMIT.as_secs() }
}

fn seal_of(key: u64, bytes: &[u8]) -> [u8; SEAL_BYTES] {
    let mut seal = [0; SEAL_BYTES];
    seal[..4].copy_from_slice(&libdeflater::crc32(bytes).to_le_bytes());
    seal[4..].copy_from_slice(&key.to_le_bytes());
    seal
}

impl Inner {
    /// Nothing under this lock panics half-way through an update.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the sending thread, once for all messages until it takes them: each wake is a system call.
    fn send(&self, table: &mut Table) {
        if !table.out.is_empty() && !std::mem::replace(&mut table.told, true) {
            self.outgoing.notify_one();
        }
    }

    fn fail(&self, problem: String) {
        let problem = self.lock().failed.get_or_insert(problem).clone();
        self.changed.notify_all();
        self.outgoing.notify_all();
        self.tell_lost(problem);
    }

    fn lost(&self) -> MutexGuard<'_, Option<Lost>> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_lost(&self, problem: String) {
        // The lock is let go first: the callback may call this client.
        let tell = self.lost().take();
        if let Some(tell) = tell {
            tell(problem);
        }
    }

    /// Takes in messages until the socket ends.
    fn hear_all(&self, mut from: UnixStream) {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let bytes = match from.read(&mut buffer) {
                Ok(0) => return self.fail(gone("it closed the connection")),
                Ok(bytes) => bytes,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return self.fail(gone(&e.to_string())),
            };
            decoder.push(&buffer[..bytes]);
            if let Err(problem) = self.take_in(&mut decoder) {
                let what = "the page cache's directory says what cannot be";
                return self.fail(format!("{what}: {problem}; start the run again"));
            }
        }
    }

    fn take_in(&self, decoder: &mut Decoder) -> Result<(), String> {
        let mut table = self.lock();
        while let Some(message) = decoder.next_message::<FromDirectory>().map_err(|e| e.to_string())? {
            table.hear(message)?;
        }
        self.send(&mut table);
        let (work, slabs) = (table.has_fill(), std::mem::take(&mut table.slabs_changed));
        drop(table);
        self.changed.notify_all();
        if slabs {
            self.registering.notify_all();
        }
        if work {
            let wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner).clone();
            wakers.iter().filter_map(Weak::upgrade).for_each(|waker| waker.wake());
        }
        Ok(())
    }

    /// Sends messages until all is said at closing, or nothing can be said any more.
    fn send_all(&self, mut to: UnixStream, closing: &AtomicBool) {
        let mut bytes = Vec::new();
        loop {
            let mut table = self.lock();
            while table.out.is_empty() {
                if closing.load(Ordering::Acquire) || table.failed.is_some() {
                    return;
                }
                table = self.outgoing.wait(table).unwrap_or_else(PoisonError::into_inner);
            }
            let messages = std::mem::take(&mut table.out);
            table.told = false;
            if table.failed.is_some() {
                return;
            }
            drop(table);
            bytes.clear();
            for message in &messages {
                if let Err(error) = encode(message, &mut bytes) {
                    return self.fail(format!("the page cache's directory cannot be asked: {error}"));
                }
            }
            if let Err(error) = write_all(&mut to, &bytes) {
                return self.fail(gone(&error.to_string()));
            }
        }
    }
}

/// As [`Write::write_all`], where a directory whose process is stopped may take its time.
fn write_all(to: &mut UnixStream, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && is_stopped(to) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// True while the process that made the socket (the directory's) is stopped by a signal.
fn is_stopped(socket: &UnixStream) -> bool {
    let Ok(peer) = rustix::net::sockopt::socket_peercred(socket) else { return false };
    let stat = std::fs::read(format!("/proc/{}/stat", peer.pid.as_raw_nonzero())).unwrap_or_default();
    // The state stands behind the name, which is in brackets.
    let state = stat.iter().rposition(|byte| *byte == b')').and_then(|at| stat.get(at + 2));
    matches!(state, Some(b'T' | b't'))
}

fn gone(problem: &str) -> String {
    format!("the page cache's directory is gone ({problem}): its process died or was stopped; start the run again")
}

#[cfg(test)]
mod tests;
