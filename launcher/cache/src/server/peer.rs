//! A rank at the directory's socket: what it sent, and what it has not taken yet.

use super::MOST_UNSENT_BYTES;
use rustix::event::epoll;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use spec::contract::wire::Decoder;

/// The directory's side of one rank.
pub(super) struct Peer {
    pub(super) rank: u32,
    /// `None`: the rank is gone.
    pub(super) socket: Option<OwnedFd>,
    pub(super) decoder: Decoder,
    pub(super) unsent: Vec<u8>,
    /// Events that epoll waits for.
    pub(super) interest: epoll::EventFlags,
    /// Present bytes in the last message to this rank. `None` means that it did not ask for such messages.
    pub(super) present: Option<u64>,
    /// It asks for entries of unknown length, and may keep what it does not need now.
    pub(super) opens: bool,
    /// It heard that the cache is full.
    pub(super) told_full: bool,
}

impl Peer {
    pub(super) fn new(rank: u32, socket: OwnedFd) -> Self {
        let interest = epoll::EventFlags::IN;
        let (decoder, unsent) = (Decoder::default(), Vec::new());
        Self { rank, socket: Some(socket), decoder, unsent, interest, present: None, opens: false, told_full: false }
    }

    /// Writes what can be written. False: the rank is gone.
    pub(super) fn flush(&mut self) -> bool {
        let Some(socket) = &self.socket else { return true };
        let mut sent = 0;
        let alive = loop {
            if sent == self.unsent.len() {
                break true;
            }
            match send(socket, &self.unsent[sent..], SendFlags::NOSIGNAL) {
                Ok(n) => sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break true,
                Err(_) => break false,
            }
        };
        self.unsent.drain(..sent);
        alive
    }

    pub(super) fn wanted(&self) -> epoll::EventFlags {
        let mut wanted = epoll::EventFlags::empty();
        wanted.set(epoll::EventFlags::OUT, !self.unsent.is_empty());
        wanted.set(epoll::EventFlags::IN, self.unsent.len() < MOST_UNSENT_BYTES);
        wanted
    }
}
