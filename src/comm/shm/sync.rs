//! Waiting: barriers on futexes that end at once when a rank aborts, dies, or is too late.

use super::segment::{Header, RankLine};
use crate::comm::CommError;
use host::machine::awake::{self, Deadline};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open, test_kill_process};
use rustix::thread::futex;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Set in `generation` and `done` once any rank of the node has aborted; changing the word wakes its waiters.
pub(super) const POISON: u32 = 1;
/// How long a waiter sleeps before it looks after dead peers and the clock.
const SLICE: Duration = Duration::from_millis(50);
const SPINS: u32 = 4000;

/// Arguments of a rank's call: kind, element bytes, place, length. Equal on all ranks of a correct program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub name: Name,
    pub place: u64,
    pub len: u64,
    /// Differs between ranks where the collective allows it.
    pub own: u64,
}

macro_rules! names {
    ($($variant:ident $text:literal),* $(,)?) => {
        /// Which collective.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub(super) enum Name { $($variant),* }

        impl Name {
            fn text(code: u64) -> &'static str {
                $(if code == Name::$variant as u64 { return $text; })*
                "an unknown collective"
            }
        }
    };
}

names! {
    Join "join", Grow "flat_buffer", ReduceF32 "all_reduce_sum(f32)", ReduceF64 "all_reduce_sum(f64)",
    Broadcast "broadcast", Gather "all_gather", Barrier "barrier", Spread "what the node's first rank brings",
}

impl Name {
    pub fn as_str(self) -> &'static str {
        Name::text(self as u64)
    }
}

/// Another rank's process.
enum Peer {
    Pidfd(OwnedFd),
    /// Where pidfds are refused. A process that nobody has reaped counts as running.
    Number(Pid),
}

impl Peer {
    fn open(pid: Pid) -> Self {
        pidfd_open(pid, PidfdFlags::empty()).map_or(Peer::Number(pid), Peer::Pidfd)
    }

    fn has_ended(&self) -> bool {
        match self {
            // A pidfd becomes readable when its process ends.
            Peer::Pidfd(pidfd) => {
                let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
                poll(&mut fds, Some(&timespec(Duration::ZERO))).unwrap_or(0) > 0
            }
            Peer::Number(pid) => test_kill_process(*pid) == Err(rustix::io::Errno::SRCH),
        }
    }
}

/// One rank's side of the barriers.
pub(super) struct Sync {
    pub rank: usize,
    pub world: usize,
    pub timeout: Duration,
    /// Spin before sleeping: pays only while every rank has a core.
    pub spin: bool,
    /// Processes of the other ranks, where they can be watched.
    peers: OnceLock<Vec<(usize, Peer)>>,
    aborted: OnceLock<CommError>,
    /// Numbers of the node's ranks within the job, where they are not those within the node.
    pub names: OnceLock<Vec<usize>>,
}

impl Sync {
    pub fn new(rank: usize, world: usize, timeout: Duration) -> Sync {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Sync {
            rank,
            world,
            timeout,
            spin: cores >= world,
            peers: OnceLock::new(),
            aborted: OnceLock::new(),
            names: OnceLock::new(),
        }
    }

    /// Number of the node's `rank` within the job.
    fn name(&self, rank: usize) -> usize {
        self.names.get().and_then(|names| names.get(rank)).copied().unwrap_or(rank)
    }

    /// Waits until all ranks are here, and checks that all called the same. Returns every rank's [`Call::own`].
    pub fn barrier(&self, header: &Header, call: Call) -> Result<Vec<u64>, CommError> {
        self.barrier_within(header, call, self.timeout)
    }

    /// [`Sync::barrier`] with a limit of its own.
    ///
    /// The rank that comes last clears the chunk counters.
    pub fn barrier_within(&self, header: &Header, call: Call, limit: Duration) -> Result<Vec<u64>, CommError> {
        let now = header.generation.0.load(Ordering::Acquire);
        if now & POISON != 0 {
            return Err(self.reason(header));
        }
        let next = now.wrapping_add(2);
        let parity = (now >> 1) as usize & 1;
        let line = &header.ranks[self.rank];
        for (slot, value) in line.call[parity].iter().zip([call.name as u64, call.place, call.len, call.own]) {
            slot.store(value, Ordering::Relaxed);
        }
        line.arrived_at.store(next, Ordering::Release);
        if header.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == self.world as u32 {
            header.arrived.0.store(0, Ordering::Relaxed);
            header.next_chunk.0.store(0, Ordering::Relaxed);
            header.done.0.fetch_and(POISON, Ordering::Relaxed);
            header.generation.0.fetch_add(2, Ordering::AcqRel);
            wake(&header.generation.0);
        } else {
            let late = |line: &RankLine| line.arrived_at.load(Ordering::Acquire) != next;
            self.wait(header, &header.generation.0, |word| word & !POISON != now, (call.name, limit), late)?;
        }
        self.compare(header, parity)
    }

    /// Waits until `total` chunks are summed, by whichever rank.
    pub fn wait_done(&self, header: &Header, total: u32, name: Name) -> Result<(), CommError> {
        let busy = |line: &RankLine| line.working.load(Ordering::Acquire) != 0;
        self.wait(header, &header.done.0, |word| word >> 1 == total, (name, self.timeout), busy)
    }

    fn compare(&self, header: &Header, parity: usize) -> Result<Vec<u64>, CommError> {
        let read = |rank: usize| header.ranks[rank].call[parity].each_ref().map(|slot| slot.load(Ordering::Relaxed));
        let mine = read(self.rank);
        for rank in 0..self.world {
            let other = read(rank);
            if other[..3] != mine[..3] {
                return Err(CommError::Mismatch {
                    rank: self.name(rank),
                    call: Name::text(other[0]).to_string(),
                    bytes: other[2],
                    own_rank: self.name(self.rank),
                    own_call: Name::text(mine[0]).to_string(),
                    own_bytes: mine[2],
                });
            }
        }
        Ok((0..self.world).map(|rank| read(rank)[3]).collect())
    }

    fn wait(
        &self,
        header: &Header,
        word: &AtomicU32,
        ready: impl Fn(u32) -> bool,
        (name, limit): (Name, Duration),
        is_missing: impl Fn(&RankLine) -> bool,
    ) -> Result<(), CommError> {
        for _ in 0..if self.spin { SPINS } else { 0 } {
            if ready(word.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let deadline = Deadline::in_slices(limit, SLICE);
        let suspended = || self.is_held_up(header, &is_missing);
        let mut dead_before = None;
        loop {
            let value = word.load(Ordering::Acquire);
            if ready(value) {
                return Ok(());
            }
            if value & POISON != 0 {
                return Err(self.reason(header));
            }
            let slept = futex::wait(word, futex::Flags::empty(), value, Some(&timespec(SLICE)));
            let left = deadline.left_unless(suspended);
            if slept != Err(rustix::io::Errno::TIMEDOUT) {
                continue;
            }
            // Looked up before `ready` is asked again: a peer may do its part and then end rightly.
            let dead = self.dead_peer(|rank| is_missing(&header.ranks[rank]));
            let value = word.load(Ordering::Acquire);
            if ready(value) || value & POISON != 0 {
                continue;
            }
            if let (Some(rank), true) = (dead, dead == dead_before) {
                // Seen twice, so that the launcher, which knows why, could speak first.
                return Err(peer_ended(self.name(rank), name));
            }
            dead_before = dead;
            if left.is_zero() {
                let missing = (0..self.world).filter(|&rank| rank != self.rank && is_missing(&header.ranks[rank]));
                return Err(self.timed_out(name, deadline.waited(), missing));
            }
        }
    }

    /// True if a missing rank, or the process that started this one, is suspended: nobody can arrive meanwhile.
    fn is_held_up(&self, header: &Header, is_missing: impl Fn(&RankLine) -> bool) -> bool {
        let own = &header.ranks[self.rank];
        let (own_pid, namespace) = (own.pid.load(Ordering::Relaxed), own.pid_namespace.load(Ordering::Relaxed));
        let is_suspended = |line: &RankLine| {
            let pid = line.pid.load(Ordering::Relaxed);
            let same_view = namespace != 0 && line.pid_namespace.load(Ordering::Relaxed) == namespace;
            same_view && pid != 0 && pid != own_pid && is_missing(line) && awake::is_suspended(pid as i32)
        };
        header.ranks[..self.world].iter().any(is_suspended) || awake::others_are_suspended()
    }

    fn timed_out(&self, name: Name, waited: Duration, missing: impl Iterator<Item = usize>) -> CommError {
        let missing: Vec<String> = missing.map(|rank| self.name(rank).to_string()).collect();
        CommError::Timeout {
            collective: name.as_str().to_owned(),
            waited_s: waited.as_secs_f64(),
            missing: missing.join(", "),
            timeout_s: self.timeout.as_secs_f64(),
        }
    }

    /// Opens the other ranks' processes, once all have joined, so that a dead one ends a wait without a launcher.
    pub fn watch_peers(&self, header: &Header) {
        let own = &header.ranks[self.rank];
        let (own_pid, namespace) = (own.pid.load(Ordering::Relaxed), own.pid_namespace.load(Ordering::Relaxed));
        let open = |rank: usize| {
            let line = &header.ranks[rank];
            let pid = line.pid.load(Ordering::Relaxed);
            let same_view = namespace != 0 && line.pid_namespace.load(Ordering::Relaxed) == namespace;
            let pid = Pid::from_raw(pid as i32).filter(|_| same_view && pid != own_pid)?;
            Some((rank, Peer::open(pid)))
        };
        let _ = self.peers.set((0..self.world).filter_map(open).collect());
    }

    fn dead_peer(&self, is_missing: impl Fn(usize) -> bool) -> Option<usize> {
        let ended = |(rank, peer): &&(usize, Peer)| is_missing(*rank) && peer.has_ended();
        self.peers.get()?.iter().find(ended).map(|(rank, _)| *rank)
    }

    /// Ends all waits on this node, now and later. The first reason stays.
    pub fn abort(&self, header: &Header, reason: CommError) {
        let culprit = match &reason {
            CommError::PeerFailed { rank, .. } => *rank,
            _ => self.name(self.rank) as u32,
        };
        let _ = self.aborted.set(reason);
        let _ = header.culprit.0.compare_exchange(0, culprit.wrapping_add(1), Ordering::AcqRel, Ordering::Relaxed);
        for word in [&header.generation.0, &header.done.0] {
            word.fetch_or(POISON, Ordering::AcqRel);
            wake(word);
        }
    }

    fn reason(&self, header: &Header) -> CommError {
        self.aborted.get().cloned().unwrap_or_else(|| CommError::PeerFailed {
            rank: header.culprit.0.load(Ordering::Acquire).saturating_sub(1),
            error: "it left the job; its own log says why".to_owned(),
        })
    }

    /// The reason that [`Sync::abort`] was called with in this process, once there is one; at most `limit` later.
    pub fn told_within(&self, limit: Duration) -> Option<CommError> {
        let deadline = Deadline::new(limit);
        while self.aborted.get().is_none() && !deadline.is_over() {
            std::thread::sleep(SLICE);
        }
        self.aborted.get().cloned()
    }

    pub fn check(&self, header: &Header) -> Result<(), CommError> {
        match header.generation.0.load(Ordering::Acquire) & POISON {
            0 => Ok(()),
            _ => Err(self.reason(header)),
        }
    }
}

fn peer_ended(rank: usize, name: Name) -> CommError {
    let error = format!("its process ended while others waited for it in {}", name.as_str());
    CommError::PeerFailed { rank: rank as u32, error }
}

pub(super) fn wake(word: &AtomicU32) {
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_peer_is_seen_with_and_without_a_pidfd() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let peers = [Peer::open(pid), Peer::Number(pid)];
        assert!(peers.iter().all(|peer| !peer.has_ended()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(peers.iter().all(Peer::has_ended));
    }
}
