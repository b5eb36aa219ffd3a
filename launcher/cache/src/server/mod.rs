//! The directory at work: one thread that serves one stream socket per rank, and the memory behind it.

mod ending;
mod join;
mod peer;

use ending::Ending;
pub use join::Joiner;
use peer::Peer;

use super::directory::{Directory, Replies};
use super::memory::{self, MemoryError, Room};
use super::policy::PolicyKind;
use crate::refused::EPOLL_CREATE;
use crate::shared::SharedMemory;
use join::{FIRST_GUEST, STEP_BYTES, more_memory, pair};
use rustix::event::epoll;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use spec::contract::cache::{CacheStats, FromDirectory, ToDirectory};
use spec::contract::wire::encode;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Bytes read from one rank before others are looked at.
const READ_BYTES: usize = 64 << 10;
/// From this many unsent bytes on, a rank that does not read its replies is not listened to.
const MOST_UNSENT_BYTES: usize = 4 << 20;
/// The mapping changes its size by whole multiples of this: a huge page.
const RESIZE_BYTES: u64 = 2 << 20;
/// Event of [`Shared::wake`]; others are indices of peers.
const WAKE: u64 = u64::MAX;

/// The page cache to host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    pub capacity_bytes: u64,
    pub policy: PolicyKind,
    /// Ranks of this node.
    pub ranks: Vec<u32>,
}

/// Why the page cache could not be started.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot start the page cache's directory")]
    System(#[from] io::Error),
}

impl From<Errno> for HostError {
    fn from(errno: Errno) -> Self {
        HostError::System(errno.into())
    }
}

/// Text of an error and of all its causes.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// State that the host and its threads share.
struct Shared {
    /// Statistics of all ranks together, as of the last batch of messages.
    stats: Mutex<CacheStats>,
    by_rank: Mutex<Vec<(u32, CacheStats)>>,
    memory: Mutex<Memory>,
    /// The memory changed, or is to change, or it is time to end.
    memory_changed: Condvar,
    stop: AtomicBool,
    /// The server's thread is to panic: see [`CacheHost::panic`].
    panic: AtomicBool,
    /// The server's thread serves no more.
    ended: AtomicBool,
    gone: Mutex<Vec<u32>>,
    /// Processes that come in.
    joining: Mutex<Vec<(u32, OwnedFd)>>,
    next_guest: AtomicU32,
    guests: AtomicUsize,
    /// Memory is made when entries need it, not ahead.
    lazy: bool,
    notes: Mutex<Vec<String>>,
    /// Makes the server look at `stop` and `gone`: both ends of a pipe, since sandboxes may refuse an eventfd.
    wake: OwnedFd,
    woken: OwnedFd,
    /// A byte per note; closed when the server ends.
    alarm: Mutex<Option<OwnedFd>>,
}

/// How much of the mapping has pages, bytes from its start. Only the memory's thread changes `present`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    present: u64,
    /// Bytes that it should reach.
    wanted: u64,
    /// Nobody uses anything beyond: pages there may go.
    cleared: u64,
}

/// A guard also after a panic of the other thread: the values are plain numbers and lists, whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn note(&self, text: String) {
        lock(&self.notes).push(text);
        if let Some(alarm) = lock(&self.alarm).as_ref() {
            // A full pipe wakes its reader anyway.
            let _ = rustix::io::write(alarm, b"n");
        }
    }

    fn wake(&self) {
        // A full pipe wakes the server anyway.
        let _ = rustix::io::write(&self.wake, b"w");
    }

    /// One step towards the wanted size, or sleep. What failed is tried again only when another size is wanted.
    fn keep_memory(&self, memfd: &OwnedFd, room: Room) -> Result<(), (u64, MemoryError)> {
        let mut memory = lock(&self.memory);
        let Memory { present, wanted, cleared } = *memory;
        if present > cleared {
            // Before the pages go: from here on nobody is given any of them until they are made anew.
            memory.present = cleared;
            drop(memory);
            memory::punch(memfd, cleared, present).map_err(|e| (present, e))?;
        } else if !self.lazy && present < wanted && cleared >= wanted {
            drop(memory);
            let extended = memory::extend(memfd, present, wanted, room);
            let mut memory = lock(&self.memory);
            match extended {
                Ok(bytes) => memory.present = bytes,
                Err(e) => {
                    memory.wanted = memory.wanted.min(present);
                    return Err((present, e));
                }
            }
            drop(memory);
            self.wake();
        } else if !self.stop.load(Ordering::Acquire) {
            drop(self.memory_changed.wait(memory));
        }
        Ok(())
    }
}

/// A running directory with its memory. Dropping it ends both; ranks then see the end of their sockets.
pub struct CacheHost {
    /// The mapping, for every rank of the node.
    pub memfd: OwnedFd,
    /// Readable when there are [`CacheHost::notes`]; at its end when the directory has ended, which is an error while
    /// ranks run.
    pub alarm: OwnedFd,
    plan: HostPlan,
    sockets: Vec<Option<OwnedFd>>,
    shared: Arc<Shared>,
    server: Option<JoinHandle<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl CacheHost {
    /// Makes the memory and starts serving. The first slab has its pages when this returns, the others follow. `room` is
    /// asked before any pages are made.
    ///
    /// # Errors
    /// The node has too little room; the system refuses memory, sockets or threads.
    pub fn start(plan: &HostPlan, room: Room) -> Result<Self, HostError> {
        Self::start_with(plan, room, false)
    }

    /// As [`CacheHost::start`], with pages that are made when entries need them: for a process that does not know how much
    /// it will store.
    ///
    /// # Errors
    /// As [`CacheHost::start`].
    pub fn start_lazily(plan: &HostPlan, room: Room) -> Result<Self, HostError> {
        Self::start_with(plan, room, true)
    }

    fn start_with(plan: &HostPlan, room: Room, lazy: bool) -> Result<Self, HostError> {
        let SharedMemory { fd: memfd, note, .. } = memory::create(plan.capacity_bytes, room)?;
        let first = if lazy { plan.capacity_bytes.min(*STEP_BYTES.start()) } else { plan.capacity_bytes };
        let present = memory::extend(&memfd, 0, first, room)?;
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK);
        let ((alarm, alarm_end), (woken, wake)) = (pipe()?, pipe()?);
        let shared = Arc::new(Shared {
            stats: Mutex::new(CacheStats { capacity_bytes: plan.capacity_bytes, ..CacheStats::default() }),
            by_rank: Mutex::default(),
            memory: Mutex::new(Memory { present, wanted: plan.capacity_bytes, cleared: plan.capacity_bytes }),
            memory_changed: Condvar::new(),
            stop: AtomicBool::new(false),
            panic: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            gone: Mutex::default(),
            joining: Mutex::default(),
            next_guest: AtomicU32::new(FIRST_GUEST),
            guests: AtomicUsize::new(0),
            lazy,
            notes: Mutex::default(),
            wake,
            woken,
            alarm: Mutex::new(Some(alarm_end)),
        });
        note.into_iter().for_each(|note| shared.note(note));
        let (mut sockets, mut peers) = (Vec::new(), Vec::new());
        for rank in &plan.ranks {
            let (ours, theirs) = pair()?;
            peers.push(Peer::new(*rank, ours));
            sockets.push(Some(theirs));
        }
        let mut server = Server::new(plan, present, peers, Arc::clone(&shared))?;
        if lazy {
            let more = more_memory(memfd.try_clone()?, Arc::clone(&shared), plan.capacity_bytes, room);
            server.directory.set_more(more);
        }
        let server =
            std::thread::Builder::new().name("cache".into()).stack_size(512 << 10).spawn(move || server.run())?;
        let mut host = Self { memfd, alarm, plan: plan.clone(), sockets, shared, server: Some(server), keeper: None };
        host.keeper = Some(host.start_keeping(room)?);
        Ok(host)
    }

    /// The thread that makes pages and gives them back: neither may hold up the directory.
    fn start_keeping(&self, room: Room) -> io::Result<JoinHandle<()>> {
        let (memfd, shared) = (self.memfd.try_clone()?, Arc::clone(&self.shared));
        let keep = move || {
            while !shared.stop.load(Ordering::Acquire) {
                if let Err((present, e)) = shared.keep_memory(&memfd, room) {
                    shared.note(format!("the page cache stays at {present} bytes: {}", with_causes(&e)));
                }
            }
        };
        std::thread::Builder::new().name("cache-memory".into()).stack_size(256 << 10).spawn(keep)
    }

    /// Makes the usable part of the mapping end at `bytes` (whole huge pages, at most the planned capacity). Returns at
    /// once: less memory is given back to the node when the ranks have let go of it, more comes slab by slab. See
    /// [`CacheHost::present_bytes`]; returns what was set.
    pub fn resize(&self, bytes: u64) -> u64 {
        let wanted = match bytes {
            all if all >= self.plan.capacity_bytes => self.plan.capacity_bytes,
            some => some / RESIZE_BYTES * RESIZE_BYTES,
        };
        lock(&self.shared.memory).wanted = wanted;
        self.shared.memory_changed.notify_all();
        self.shared.wake();
        wanted
    }

    /// Processes that came in later and have not left, those of this process included.
    pub fn guests(&self) -> usize {
        self.shared.guests.load(Ordering::Acquire) + lock(&self.shared.joining).len()
    }

    /// Bytes that the mapping should come to, as last set.
    pub fn wanted_bytes(&self) -> u64 {
        lock(&self.shared.memory).wanted
    }

    /// Bytes of memory behind the mapping now, as the kernel counts them.
    pub fn resident_bytes(&self) -> u64 {
        memory::resident_bytes(&self.memfd)
    }

    /// Lets further processes in.
    ///
    /// # Errors
    /// No descriptor is left for the mapping.
    pub fn joiner(&self) -> io::Result<Joiner> {
        Ok(Joiner { shared: Arc::clone(&self.shared), memfd: Arc::new(self.memfd.try_clone()?) })
    }

    /// The end of the socket that `rank` talks on, blocking; once. Whoever holds it last decides when the rank is gone.
    pub fn take_socket(&mut self, rank: u32) -> Option<OwnedFd> {
        let at = self.plan.ranks.iter().position(|known| *known == rank)?;
        self.sockets[at].take()
    }

    /// Counters of all ranks together.
    pub fn stats(&self) -> CacheStats {
        *lock(&self.shared.stats)
    }

    /// Counters of one rank: hits, misses and bypasses are its own.
    pub fn rank_stats(&self, rank: u32) -> Option<CacheStats> {
        lock(&self.shared.by_rank).iter().find(|(known, _)| *known == rank).map(|(_, stats)| *stats)
    }

    /// Bytes of the mapping that have their pages by now.
    pub fn present_bytes(&self) -> u64 {
        lock(&self.shared.memory).present
    }

    /// Bytes as planned.
    pub fn capacity_bytes(&self) -> u64 {
        self.plan.capacity_bytes
    }

    pub fn policy(&self) -> PolicyKind {
        self.plan.policy
    }

    /// Notes since the last call: ranks that broke the protocol, memory that could not be had.
    pub fn notes(&self) -> Vec<String> {
        let mut bytes = [0; 64];
        while matches!(rustix::io::read(&self.alarm, &mut bytes), Ok(1..)) {}
        std::mem::take(&mut *lock(&self.shared.notes))
    }

    /// True once the directory's thread has ended.
    pub fn ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// The rank's process has ended, whoever may still hold its socket.
    pub fn rank_gone(&self, rank: u32) {
        lock(&self.shared.gone).push(rank);
        self.shared.wake();
    }

    /// Makes the directory's thread panic. For tests of what its death does to a job.
    #[doc(hidden)]
    pub fn panic(&self) {
        self.shared.panic.store(true, Ordering::Release);
        self.shared.wake();
    }

    /// Both threads end soon, and the alarm with them.
    pub fn ask_to_end(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        // Under the lock, or the keeper could miss it on its way to sleep.
        drop(lock(&self.shared.memory));
        self.shared.memory_changed.notify_all();
    }

    /// Ends both threads and waits for them; [`CacheHost::stats`] stay.
    pub fn stop(&mut self) {
        self.ask_to_end();
        for thread in [self.server.take(), self.keeper.take()].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

impl Drop for CacheHost {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Server {
    directory: Directory,
    peers: Vec<Peer>,
    set: OwnedFd,
    shared: Arc<Shared>,
    replies: Replies,
    bytes: Vec<u8>,
    /// End of the part that the directory may use, and the ticket of the newest message about it.
    limit: u64,
    ticket: u64,
    /// Ranks that have not answered the newest ticket yet.
    awaited: Vec<u32>,
    shrinking: bool,
}

impl Server {
    fn new(plan: &HostPlan, present: u64, peers: Vec<Peer>, shared: Arc<Shared>) -> Result<Self, HostError> {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| EPOLL_CREATE.error(e))?;
        epoll::add(&set, &shared.woken, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        for (index, peer) in peers.iter().enumerate() {
            if let Some(socket) = &peer.socket {
                epoll::add(&set, socket, epoll::EventData::new_u64(index as u64), peer.interest)?;
            }
        }
        let directory = Directory::growing(plan.capacity_bytes, present, plan.policy);
        let (replies, bytes, limit) = (Vec::new(), vec![0; READ_BYTES], plan.capacity_bytes);
        let (ticket, awaited, shrinking) = (0, Vec::new(), false);
        Ok(Self { directory, peers, set, shared, replies, bytes, limit, ticket, awaited, shrinking })
    }

    fn run(mut self) {
        let _ending = Ending(Arc::clone(&self.shared));
        if let Err(e) = self.serve() {
            lock(&self.shared.notes).push(format!("the page cache's directory cannot continue: {e}"));
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(&self.set, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
            for event in &events {
                match event.data.u64() {
                    WAKE => {
                        self.take_gone();
                        self.let_in()?;
                    }
                    index => self.take(index as usize, event.flags),
                }
            }
            self.fit();
            self.tell_full();
            self.publish_stats();
            // Checked only after `wake` is read: it may have announced an end that nothing else announces.
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(());
            }
            self.send_all()?;
        }
    }

    /// Makes the directory follow the size that is wanted and the memory that is there.
    fn fit(&mut self) {
        let Memory { mut present, wanted, .. } = *lock(&self.shared.memory);
        if wanted < self.limit {
            self.limit = wanted;
            self.directory.shrink(wanted);
            self.shrinking = true;
            self.tell_limit();
        }
        if self.shrinking && self.directory.drained() {
            if self.awaited.is_empty() {
                self.shrinking = false;
                present = self.clear();
            } else if wanted > self.limit && wanted >= present {
                // Called off before any page went: a rank that cannot let go, since its device keeps some, need not.
                self.shrinking = false;
            }
        }
        if !self.shrinking {
            if wanted > self.limit {
                self.limit = wanted;
                present = self.clear();
                self.tell_limit();
            }
            self.directory.grow(present.min(self.limit));
        }
        self.tell_present(present.min(self.limit));
    }

    fn tell_present(&mut self, bytes: u64) {
        for peer in &mut self.peers {
            if let Some(told) = peer.present.as_mut().filter(|told| **told != bytes) {
                *told = bytes;
                self.replies.push((peer.rank, FromDirectory::Present { bytes }));
            }
        }
        self.spread();
    }

    /// Nobody uses anything beyond the limit. Returns what has pages, looked up at the same time: pages may be going, and
    /// those of a limit that rises again before they have gone stay.
    fn clear(&self) -> u64 {
        // Counters first: whoever sees that pages have gone sees what was evicted for it.
        self.publish_stats();
        let mut memory = lock(&self.shared.memory);
        memory.cleared = self.limit;
        self.shared.memory_changed.notify_all();
        memory.present
    }

    fn tell_limit(&mut self) {
        self.ticket += 1;
        self.awaited = self.peers.iter().filter(|peer| peer.socket.is_some()).map(|peer| peer.rank).collect();
        let tell = FromDirectory::Resize { ticket: self.ticket, bytes: self.limit };
        self.replies.extend(self.awaited.iter().map(|rank| (*rank, tell.clone())));
        self.spread();
    }

    fn publish_stats(&self) {
        let inside = |peer: &&Peer| peer.rank >= FIRST_GUEST && peer.socket.is_some();
        self.shared.guests.store(self.peers.iter().filter(inside).count(), Ordering::Release);
        *lock(&self.shared.stats) = self.directory.stats();
        let mut by_rank = lock(&self.shared.by_rank);
        by_rank.clear();
        by_rank.extend(self.peers.iter().map(|peer| (peer.rank, self.directory.rank_stats(peer.rank))));
    }

    fn take_gone(&mut self) {
        assert!(!self.shared.panic.load(Ordering::Acquire), "asked to by a test");
        while matches!(rustix::io::read(&self.shared.woken, &mut [0; 64]), Ok(1..)) {}
        let gone = std::mem::take(&mut *lock(&self.shared.gone));
        for rank in gone {
            if let Some(index) = self.peers.iter().position(|peer| peer.rank == rank) {
                self.close(index);
            }
        }
    }

    fn take(&mut self, index: usize, flags: epoll::EventFlags) {
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            self.read(index);
        }
    }

    /// One read, and all messages that it completes. More bytes make the next round.
    fn read(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        let Some(socket) = &peer.socket else { return };
        match recv(socket, self.bytes.as_mut_slice(), RecvFlags::empty()) {
            Ok((_, n @ 1..)) => peer.decoder.push(&self.bytes[..n]),
            Err(Errno::INTR | Errno::AGAIN) => return,
            Ok(_) | Err(_) => return self.close(index),
        }
        loop {
            let peer = &mut self.peers[index];
            let fault = match peer.decoder.next_message::<ToDirectory>() {
                Ok(Some(ToDirectory::Resized { ticket })) => {
                    let rank = peer.rank;
                    self.awaited.retain(|awaited| *awaited != rank || ticket != self.ticket);
                    None
                }
                Ok(Some(ToDirectory::Registers)) => {
                    peer.present = Some(0);
                    None
                }
                Ok(Some(message)) => {
                    peer.opens |= matches!(message, ToDirectory::Open { .. } | ToDirectory::Find { .. });
                    match self.directory.handle(peer.rank, &message, &mut self.replies) {
                        Ok(()) => None,
                        Err(fault) => Some(fault.to_string()),
                    }
                }
                Ok(None) => break,
                Err(e) => Some(format!("rank {}: {e}", peer.rank)),
            };
            if let Some(fault) = fault {
                self.shared.note(fault);
                self.close(index);
                break;
            }
        }
        self.spread();
    }

    /// Puts replies into the buffers of those who get them.
    fn spread(&mut self) {
        for (rank, reply) in self.replies.drain(..) {
            if let Some(peer) = self.peers.iter_mut().find(|peer| peer.rank == rank && peer.socket.is_some())
                && let Err(e) = encode(&reply, &mut peer.unsent)
            {
                // A reply is shorter than its question: cannot be, and would leave the rank waiting.
                self.shared.note(format!("rank {rank}: {e}"));
            }
        }
    }

    fn close(&mut self, index: usize) {
        let peer = &mut self.peers[index];
        // Closing takes it out of the epoll set: no other descriptor stands for the same end.
        if peer.socket.take().is_some() {
            peer.unsent = Vec::new();
            let rank = peer.rank;
            self.awaited.retain(|awaited| *awaited != rank);
            self.directory.rank_gone(rank, &mut self.replies);
            self.spread();
        }
    }

    fn send_all(&mut self) -> io::Result<()> {
        // A rank found dead here hands its fills to others, whose replies go out in the next pass.
        let mut again = true;
        while std::mem::take(&mut again) {
            for index in 0..self.peers.len() {
                if !self.peers[index].unsent.is_empty() && !self.peers[index].flush() {
                    self.close(index);
                    again = true;
                }
            }
        }
        for (index, peer) in self.peers.iter_mut().enumerate() {
            let wanted = peer.wanted();
            if let Some(socket) = peer.socket.as_ref().filter(|_| wanted != peer.interest) {
                epoll::modify(&self.set, socket, epoll::EventData::new_u64(index as u64), wanted)?;
                peer.interest = wanted;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
