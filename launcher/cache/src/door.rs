//! How processes that inherited no socket come to the node's page cache: those that ranks start themselves, and ranks of
//! another launcher, of which the first one hosts.
//!
//! A door is an abstract socket. Its name lives in the kernel and ends with the process that made it, so nothing is left
//! behind whatever dies. Both sides look at each other's user: nobody else comes in, and nobody is let into another user's.

use crate::server::Joiner;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, recvmsg, sendmsg,
    socket_with, sockopt,
};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Connections that may wait to be let in.
const BACKLOG: i32 = 256;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(5);

/// Why a process did not get in.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Nobody hosts a page cache under this name.
    #[error("no page cache is hosted as {name}")]
    Nobody { name: String },
    #[error("the page cache {name} belongs to user {owner}")]
    Stranger { name: String, owner: u32 },
    #[error("the page cache {name} lets nobody in: {source}")]
    Refused {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// Place of a process that was let in.
#[derive(Debug)]
pub struct Joined {
    /// Number to greet the directory with.
    pub rank: u32,
    pub socket: UnixStream,
    pub memory: File,
}

/// An open door; dropping it closes it, and those inside stay.
pub struct Door {
    listener: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

fn address(name: &str) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(name.as_bytes())?)
}

fn stream() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

impl Door {
    /// Lets every process of this user in that knows `name`.
    ///
    /// # Errors
    /// `AddrInUse`: somebody hosts under this name already. Otherwise the system refuses sockets or threads.
    pub fn open(name: &str, joiner: Joiner) -> io::Result<Self> {
        let listener = Arc::new(stream()?);
        bind(&*listener, &address(name)?)?;
        listen(&*listener, BACKLOG)?;
        let own = Arc::clone(&listener);
        let serve = move || {
            loop {
                match accept_with(&*own, SocketFlags::CLOEXEC) {
                    // A guest that is gone already misses nothing.
                    Ok(guest) => drop(let_in(&guest, &joiner)),
                    Err(Errno::INTR | Errno::CONNABORTED) => {}
                    Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => std::thread::sleep(RETRY),
                    // The door was shut.
                    Err(_) => return,
                }
            }
        };
        let thread = std::thread::Builder::new().name("cache-door".into()).stack_size(256 << 10).spawn(serve)?;
        Ok(Self { listener, thread: Some(thread) })
    }

    /// The listening socket, which a forked child has to close.
    pub fn descriptor(&self) -> impl AsFd {
        &*self.listener
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn let_in(guest: &OwnedFd, joiner: &Joiner) -> io::Result<()> {
    if sockopt::socket_peercred(guest)?.uid != rustix::process::getuid() {
        return Ok(());
    }
    let (rank, socket) = joiner.join()?;
    let fds = [joiner.memory(), socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(guest, &[IoSlice::new(&rank.to_le_bytes())], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Comes in by the door `name`.
///
/// # Errors
/// Nobody hosts under this name, another user does, or the host does not answer.
pub fn knock(name: &str) -> Result<Joined, DoorError> {
    let refused = |source| DoorError::Refused { name: name.to_owned(), source };
    let guest = approach(name)?;
    let owner = sockopt::socket_peercred(&guest).map_err(|e| refused(e.into()))?.uid;
    if owner != rustix::process::getuid() {
        return Err(DoorError::Stranger { name: name.to_owned(), owner: owner.as_raw() });
    }
    sockopt::set_socket_timeout(&guest, sockopt::Timeout::Recv, Some(PATIENCE)).map_err(|e| refused(e.into()))?;
    receive(&guest).map_err(refused)
}

/// A connection to the door; one that has no room in its queue is waited for.
fn approach(name: &str) -> Result<OwnedFd, DoorError> {
    let refused = |source| DoorError::Refused { name: name.to_owned(), source };
    let at = address(name).map_err(refused)?;
    let since = Instant::now();
    loop {
        let guest = stream().map_err(refused)?;
        match connect(&guest, &at) {
            Ok(()) => return Ok(guest),
            Err(Errno::CONNREFUSED | Errno::NOENT) => return Err(DoorError::Nobody { name: name.to_owned() }),
            Err(Errno::AGAIN | Errno::INTR) if since.elapsed() < PATIENCE => {
                std::thread::sleep(RETRY);
            }
            Err(error) => return Err(refused(error.into())),
        }
    }
}

fn receive(guest: &OwnedFd) -> io::Result<Joined> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut rank = [0; 4];
    let got = recvmsg(guest, &mut [IoSliceMut::new(&mut rank)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
        _ => Vec::new(),
    });
    match (got.bytes, fds.next(), fds.next()) {
        (4, Some(memory), Some(socket)) => {
            Ok(Joined { rank: u32::from_le_bytes(rank), memory: memory.into(), socket: socket.into() })
        }
        _ => Err(io::Error::other("the host closed the connection: it is ending, or is short of descriptors")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{CacheClient, CacheError, ClientSpec, Item};
    use crate::{CacheHost, HostPlan, PolicyKind};

    #[test]
    fn processes_come_in_by_name_and_see_each_others_entries() {
        let name = format!("headroom-test-door-{}", std::process::id());
        let nobody = knock(&name).unwrap_err();
        assert!(matches!(nobody, DoorError::Nobody { .. }), "{nobody}");
        let plan = HostPlan { capacity_bytes: 1 << 20, policy: PolicyKind::NextUse, ranks: Vec::new() };
        let host = CacheHost::start(&plan, || None).unwrap();
        let door = Door::open(&name, host.joiner().unwrap()).unwrap();
        assert_eq!(Door::open(&name, host.joiner().unwrap()).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let Joined { rank, socket, memory } = knock(&name).unwrap();
                CacheClient::connect(socket, &memory, ClientSpec { rank, ahead_bytes: 1 << 18, verify: false }).unwrap()
            })
            .collect();
        for client in &clients {
            let item = Item { key: 5, bytes: 100, next_use: 1, offer: false };
            let mut fill = |_, out: &mut [u8]| {
                out.fill(7);
                Ok::<(), CacheError>(())
            };
            let held = client.read(item, &mut fill).unwrap().unwrap();
            assert!(held.iter().all(|byte| *byte == 7));
        }
        assert_eq!((host.stats().misses, host.stats().hits), (1, 2));
        drop(door);
        assert!(matches!(knock(&name).unwrap_err(), DoorError::Nobody { .. }));
    }
}
