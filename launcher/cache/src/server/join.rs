//! Processes that come in while the directory runs, and memory that is made when it is needed.

use super::{Memory, Peer, RESIZE_BYTES, Server, Shared, lock};
use crate::directory::More;
use crate::memory::{self, Room};
use crate::server::with_causes;
use rustix::event::epoll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use spec::contract::cache::FromDirectory;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Number of the first process that came in later; ranks have their own.
pub(super) const FIRST_GUEST: u32 = 1 << 24;
/// Where memory is made as it is needed: bytes at once, growing with what is there.
pub(super) const STEP_BYTES: std::ops::RangeInclusive<u64> = 8 << 20..=128 << 20;

/// Makes memory for `asked` bytes more, at the time when they are needed; for `Directory::set_more`.
pub(super) fn more_memory(memfd: OwnedFd, shared: Arc<Shared>, capacity: u64, room: Room) -> More {
    let mut refused = false;
    Box::new(move |asked| {
        // The keeper may give pages back at the same time: both change `present` under the lock.
        let mut memory = lock(&shared.memory);
        let Memory { present, wanted, cleared } = *memory;
        let limit = capacity.min(wanted).min(cleared);
        if refused || present > cleared || present >= limit {
            return None;
        }
        let step = asked.max(present.clamp(*STEP_BYTES.start(), *STEP_BYTES.end())).next_multiple_of(RESIZE_BYTES);
        match memory::extend(&memfd, present, limit.min(present + step), room) {
            Ok(end) => {
                memory.present = end;
                Some(end)
            }
            Err(e) => {
                drop(memory);
                refused = true;
                shared.note(format!("the page cache stays at {present} bytes: {}", with_causes(&e)));
                None
            }
        }
    })
}

/// Lets processes in that inherited no socket.
#[derive(Clone)]
pub struct Joiner {
    pub(super) shared: Arc<Shared>,
    pub(super) memfd: Arc<OwnedFd>,
}

impl Joiner {
    /// The mapping.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// A new process's number, which it greets with, and its end of the socket.
    ///
    /// # Errors
    /// The system refuses a socket, or the directory has ended.
    pub fn join(&self) -> io::Result<(u32, OwnedFd)> {
        if self.shared.ended.load(Ordering::Acquire) {
            return Err(io::Error::other("the page cache's directory has ended"));
        }
        let (ours, theirs) = pair()?;
        let guest = self.shared.next_guest.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.joining).push((guest, ours));
        self.shared.wake();
        Ok((guest, theirs))
    }
}

/// The directory's end of a socket, which never blocks, and the other one.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

impl Server {
    /// Takes in processes that join: a place that another one left, or a new one.
    pub(super) fn let_in(&mut self) -> io::Result<()> {
        for (rank, socket) in std::mem::take(&mut *lock(&self.shared.joining)) {
            let left = self.peers.iter().position(|peer| peer.socket.is_none() && peer.rank >= FIRST_GUEST);
            let index = left.unwrap_or(self.peers.len());
            epoll::add(&self.set, &socket, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)?;
            let peer = Peer::new(rank, socket);
            match left {
                Some(index) => self.peers[index] = peer,
                None => self.peers.push(peer),
            }
            if self.limit < self.directory.stats().capacity_bytes {
                // Its share of what is announced ahead follows the present size.
                let tell = FromDirectory::Resize { ticket: self.ticket, bytes: self.limit };
                self.replies.push((rank, tell));
            }
        }
        self.spread();
        Ok(())
    }

    /// Says once to everybody who may keep references that entries displace each other.
    pub(super) fn tell_full(&mut self) {
        if self.directory.is_full() {
            for peer in self.peers.iter_mut().filter(|peer| peer.opens && !peer.told_full && peer.socket.is_some()) {
                peer.told_full = true;
                self.replies.push((peer.rank, FromDirectory::Full));
            }
            self.spread();
        }
    }
}
