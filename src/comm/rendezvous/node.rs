//! The ranks of one node meet at an abstract socket: one memfd for all, and a link from local rank 0 to each other one.
//!
//! An abstract name lives in the kernel and ends with its socket, so nothing is left behind whatever dies.

use super::{CommError, RankEnv};
use crate::comm::shm::create_memfd;
use host::machine::awake::{self, Deadline};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, recv, recvmsg, sendmsg,
    socket_with, sockopt,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Most descriptors in one message of a link.
const MOST_SENT: usize = 2;

/// Ranks of a node that no launcher of ours started.
pub struct Node {
    /// Memory that all of them share, from local rank 0.
    pub memfd: OwnedFd,
    pub links: Links,
}

/// Connected stream sockets between local rank 0 and the others. An end that closes says that its rank has ended.
pub enum Links {
    /// Links of local rank 0: global rank and link of every other rank, by local rank from 1 on.
    Host(Vec<(u32, OwnedFd)>),
    Guest(OwnedFd),
}

/// Who connects: local and global rank, little-endian.
struct Greeting {
    local_rank: u32,
    rank: u32,
}

impl Greeting {
    fn of(env: &RankEnv) -> Self {
        Self { local_rank: env.local_rank as u32, rank: env.rank as u32 }
    }

    fn to_bytes(&self) -> [u8; 8] {
        ((u64::from(self.rank) << 32) | u64::from(self.local_rank)).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 8]) -> Self {
        let both = u64::from_le_bytes(bytes);
        Self { local_rank: both as u32, rank: (both >> 32) as u32 }
    }
}

/// Where a node's ranks meet, and until when.
struct MeetingPoint {
    name: String,
    address: SocketAddrUnix,
    port: u16,
    timeout: Duration,
    deadline: Deadline,
}

impl MeetingPoint {
    fn of(env: &RankEnv, run_id: &str, timeout: Duration) -> Result<Self, CommError> {
        let user = rustix::process::getuid().as_raw();
        // The kernel takes 107 bytes; a long run id is cut from its constant front.
        let run: String = run_id.chars().rev().take(40).collect::<Vec<_>>().into_iter().rev().collect();
        let name = format!("headroom-{user}-{}-{}-{run}", env.master_port, env.group_rank);
        let address =
            SocketAddrUnix::new_abstract_name(name.as_bytes()).map_err(|e| CommError::system(name.as_str(), e))?;
        let deadline = Deadline::new(timeout);
        Ok(Self { name, address, port: env.master_port, timeout, deadline })
    }

    fn failed(&self, error: Errno) -> CommError {
        match error {
            Errno::ADDRINUSE => CommError::Membership(format!(
                "MASTER_PORT {} is in use by another job on this node: set another one",
                self.port
            )),
            e => CommError::system(format!("meeting the node's ranks at {}", self.name), e),
        }
    }
}

/// Meets the ranks of this node: local rank 0 makes a memfd and hands it to the others over an abstract socket named
/// after port, run and node. `run_id` separates jobs that share a port; it may be empty.
///
/// # Errors
/// The name is in use, two processes have the same local rank, or ranks do not come within `timeout`.
pub fn meet_node(env: &RankEnv, run_id: &str, timeout: Duration) -> Result<Node, CommError> {
    if env.local_world_size == 1 {
        return Ok(Node { memfd: create_memfd(true)?, links: Links::Host(Vec::new()) });
    }
    let place = MeetingPoint::of(env, run_id, timeout)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(|e| place.failed(e))?;
    if env.local_rank == 0 { host(&socket, &place, env) } else { visit(socket, &place, env) }
}

fn host(socket: &OwnedFd, place: &MeetingPoint, env: &RankEnv) -> Result<Node, CommError> {
    let memfd = create_memfd(true)?;
    bind(socket, &place.address).map_err(|e| place.failed(e))?;
    listen(socket, env.local_world_size as i32).map_err(|e| place.failed(e))?;
    let mut links: Vec<Option<(u32, OwnedFd)>> = (1..env.local_world_size).map(|_| None).collect();
    loop {
        let missing = links.iter().filter(|link| link.is_none()).count();
        if missing == 0 {
            break;
        }
        wait_readable(socket, &place.deadline).map_err(|e| place.failed(e))?.ok_or_else(|| {
            late("rendezvous", format!("({missing} of the node's {} ranks)", env.local_world_size), place.timeout)
        })?;
        let peer = accept_with(socket, SocketFlags::CLOEXEC).map_err(|e| place.failed(e))?;
        // Abstract names have no file permissions: whoever asks must be the same user.
        let same_user = sockopt::socket_peercred(&peer).is_ok_and(|cred| cred.uid == rustix::process::getuid());
        let Some(who) = same_user.then(|| greeting(&peer, &place.deadline)).flatten() else { continue };
        let seat = (who.local_rank as usize).checked_sub(1).and_then(|seat| links.get_mut(seat));
        let Some(seat) = seat.filter(|seat| seat.is_none()) else {
            let (local, ranks) = (who.local_rank, env.local_world_size);
            return Err(CommError::Membership(format!(
                "rank {} came as local rank {local} of {ranks}, which is taken or out of range: give each process of this node its own",
                who.rank
            )));
        };
        // A rank that died after connecting will be missed at the first barrier.
        let _ = send(peer.as_fd(), &[memfd.as_fd()]);
        *seat = Some((who.rank, peer));
    }
    Ok(Node { memfd, links: Links::Host(links.into_iter().flatten().collect()) })
}

/// `None`: it ended, or says nothing.
fn greeting(peer: &OwnedFd, deadline: &Deadline) -> Option<Greeting> {
    let mut bytes = [0; 8];
    let mut have = 0;
    while have < bytes.len() {
        wait_readable(peer, deadline).ok()??;
        match recv(peer, &mut bytes[have..], RecvFlags::empty()) {
            Ok((_, n @ 1..)) => have += n,
            Err(Errno::INTR) => {}
            Ok(_) | Err(_) => return None,
        }
    }
    Some(Greeting::from_bytes(bytes))
}

fn visit(socket: OwnedFd, place: &MeetingPoint, env: &RankEnv) -> Result<Node, CommError> {
    loop {
        match connect(&socket, &place.address) {
            Ok(()) => break,
            // Rank 0 is not listening yet, and nothing announces when it will.
            Err(Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR) if !is_over(&place.deadline) => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::CONNREFUSED | Errno::AGAIN) => return Err(late("rendezvous", "0".to_owned(), place.timeout)),
            Err(e) => return Err(place.failed(e)),
        }
    }
    // Eight bytes always fit into the buffer of a new socket.
    rustix::net::send(&socket, &Greeting::of(env).to_bytes(), SendFlags::NOSIGNAL).map_err(|e| place.failed(e))?;
    let left = place.deadline.left();
    let mut fds = receive(socket.as_fd(), 1, "the node's shared memory", left)?;
    let memfd = fds.pop().ok_or_else(|| host_ended("the node's shared memory"))?;
    Ok(Node { memfd, links: Links::Guest(socket) })
}

/// Sends descriptors, at most two, to the rank at the other end of a link.
///
/// # Errors
/// It has ended.
pub fn send(link: BorrowedFd, fds: &[BorrowedFd]) -> Result<(), CommError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(fds));
    let sent = sendmsg(link, &[IoSlice::new(&[1])], &mut control, SendFlags::NOSIGNAL);
    sent.map(drop).map_err(|e| CommError::system("handing out what a node's ranks share", e))
}

/// Takes `count` descriptors that local rank 0 sends; `what` they are is for the error.
///
/// # Errors
/// Local rank 0 ended, or sends nothing within `timeout`.
pub fn receive(link: BorrowedFd, count: usize, what: &str, timeout: Duration) -> Result<Vec<OwnedFd>, CommError> {
    let failed = |e: Errno| CommError::system(format!("{what} from local rank 0"), e);
    wait_readable(&link, &Deadline::new(timeout))
        .map_err(failed)?
        .ok_or_else(|| late(what, "0".to_owned(), timeout))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(link, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC).map_err(failed)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            fds.extend(some);
        }
    }
    if fds.len() == count { Ok(fds) } else { Err(host_ended(what)) }
}

fn host_ended(what: &str) -> CommError {
    CommError::PeerFailed { rank: 0, error: format!("local rank 0 ended before it handed out {what}") }
}

/// True once the time is over. Time in which the node's other ranks or their launcher are suspended does not count.
pub(super) fn is_over(deadline: &Deadline) -> bool {
    deadline.left_unless(awake::others_are_suspended).is_zero()
}

fn wait_readable(socket: &impl AsFd, deadline: &Deadline) -> Result<Option<()>, Errno> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    loop {
        let next = deadline.next();
        let next = Timespec { tv_sec: next.as_secs() as i64, tv_nsec: i64::from(next.subsec_nanos()) };
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&next)) {
            Ok(0) if is_over(deadline) => return Ok(None),
            Err(Errno::INTR) | Ok(0) => {}
            other => return other.map(|_| Some(())),
        }
    }
}

pub(super) fn late(collective: &str, missing: String, timeout: Duration) -> CommError {
    let waited = timeout.as_secs_f64();
    CommError::Timeout { collective: collective.to_owned(), waited_s: waited, missing, timeout_s: waited }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Collective, ShmCollective};

    #[test]
    fn ranks_of_a_foreign_launcher_meet_and_reduce() {
        // The process id keeps concurrent test runs apart.
        let run = format!("meet-{}", std::process::id());
        let sums = std::thread::scope(|scope| {
            let start = |rank: usize| {
                let run = run.as_str();
                scope.spawn(move || {
                    let env =
                        RankEnv { rank, local_rank: rank, world_size: 3, local_world_size: 3, ..RankEnv::alone() };
                    let fd = meet_node(&env, run, Duration::from_secs(20)).unwrap().memfd;
                    let comm = ShmCollective::new(fd, rank, 3, Duration::from_secs(20)).unwrap();
                    let tensor = tch::Tensor::from_slice(&[rank as f32 + 1.0]);
                    comm.all_reduce_sum(&tensor).unwrap();
                    tensor.double_value(&[0])
                })
            };
            // Rank 0 last: the others must wait for it.
            let ranks: Vec<_> = [2, 1, 0].map(start).into_iter().collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(sums, [6.0; 3]);
    }

    #[test]
    fn a_used_port_and_a_missing_rank_are_errors() {
        let run = format!("missing-{}", std::process::id());
        let zero = RankEnv { world_size: 2, local_world_size: 2, ..RankEnv::alone() };
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| meet_node(&zero, &run, Duration::from_millis(400)).err().unwrap().to_string());
            std::thread::sleep(Duration::from_millis(100));
            let second = meet_node(&zero, &run, Duration::from_millis(400)).err().unwrap().to_string();
            (first.join().unwrap(), second)
        });
        let mut both = [first, second];
        both.sort();
        assert!(both[0].contains("is in use by another job"), "{both:?}");
        assert!(both[1].contains("1 of the node's 2 ranks"), "{both:?}");
    }
}
