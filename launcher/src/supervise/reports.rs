//! Reports of a user's own program: datagrams to an abstract socket, from whichever of its processes is rank 0.
//!
//! A datagram is one [`FromRank`] as JSON. Nobody waits for an answer, so a program is never held up by its launcher; what does
//! not fit into the queue is lost. Only processes of the same user are heard.

use super::Watcher;
use crate::watch::Told;
use cache::CacheHost;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, Shutdown, SocketAddrUnix,
    SocketFlags, SocketType, bind, recvmsg, sendto, shutdown, socket_with, sockopt,
};
use spec::contract::{FromRank, Progress};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::sync::mpsc::Sender;
use std::sync::{Mutex, PoisonError};
use std::thread::{Scope, ScopedJoinHandle};

/// Longest report.
const MOST_BYTES: usize = 4096;
/// Ends the thread that listens.
const END: &[u8] = b"end";

/// The socket that reports come to.
pub struct Reports {
    socket: OwnedFd,
    name: SocketAddrUnix,
    last: Mutex<Option<Progress>>,
}

/// The thread that hears them.
pub struct Hearing<'scope, 'a> {
    reports: &'a Reports,
    thread: ScopedJoinHandle<'scope, ()>,
}

impl Reports {
    /// # Errors
    /// The system refuses the socket, or the name is taken.
    pub fn open(name: &str) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let name = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        bind(&socket, &name)?;
        sockopt::set_socket_passcred(&socket, true)?;
        Ok(Self { socket, name, last: Mutex::default() })
    }

    /// Shows reports as they come, until [`Hearing::end`].
    ///
    /// # Errors
    /// A thread does not start.
    pub fn hear<'scope, 'a: 'scope>(
        &'a self,
        scope: &'scope Scope<'scope, '_>,
        watcher: &'a dyn Watcher,
        cache: Option<&'a CacheHost>,
        tell: Sender<Told>,
    ) -> io::Result<Hearing<'scope, 'a>> {
        let hear = move || {
            let mut step = None;
            while let Some(message) = self.next() {
                let Some(FromRank::Progress(mut progress)) = message else { continue };
                progress.cache_hit_rate =
                    progress.cache_hit_rate.or_else(|| cache.and_then(|cache| cache.stats().hit_rate()));
                watcher.progress(&progress);
                if step.replace(progress.step) != Some(progress.step) {
                    // The watch may have failed by itself, which does not concern the reports.
                    let _ = tell.send(Told::Step(progress.step));
                }
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(progress);
            }
        };
        let thread = std::thread::Builder::new().name("reports".into()).stack_size(256 << 10);
        Ok(Hearing { reports: self, thread: thread.spawn_scoped(scope, hear)? })
    }

    /// The next datagram, if it is a report; `None` at the end.
    fn next(&self) -> Option<Option<FromRank>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; MOST_BYTES];
        let received = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::empty());
        let bytes = match received {
            Ok(message) => &bytes[..message.bytes],
            Err(Errno::INTR) => return Some(None),
            Err(_) => return None,
        };
        let own = rustix::process::getuid();
        let is_ours = control.drain().any(|message| match message {
            RecvAncillaryMessage::ScmCredentials(sender) => sender.uid == own,
            _ => false,
        });
        match bytes {
            _ if !is_ours => Some(None),
            END => None,
            report => Some(serde_json::from_slice(report).ok()),
        }
    }
}

impl Hearing<'_, '_> {
    /// Ends the thread; returns the last report.
    pub fn end(self) -> Option<Progress> {
        // Whatever is queued before is shown first. A full queue is emptied by the thread.
        let told = sendto(&self.reports.socket, END, SendFlags::NOSIGNAL, &self.reports.name);
        if told.is_err() {
            let _ = shutdown(&self.reports.socket, Shutdown::Both);
        }
        let _ = self.thread.join();
        self.reports.last.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
