//! A process that has imported what all ranks need, and forks them: they share its memory until they write to it.
//!
//! ```text
//! launch ── program … zygote FD ──► imports ──► ready | refused (why)
//!        ── JSON, descriptors ──► fork, fork ──► rank: adopted by launch, which is its subreaper meanwhile
//! ```
//! Afterwards the process ends; ranks are children as if they had been spawned.

use super::Spec;
use super::unix::{Guard, Signals, prepare_rank};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv,
    sendmsg, socketpair,
};
use rustix::process::{Pid, getpid, set_child_subreaper};
use serde::{Deserialize, Serialize};
use spec::contract::env;
use std::collections::BTreeMap;
use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time that imports may take.
const READY_LIMIT: Duration = Duration::from_secs(300);
/// Longest time that a fork may take.
const FORK_LIMIT: Duration = Duration::from_secs(30);
/// Time between two looks at signals.
const LOOK_MS: i64 = 100;
/// Most descriptors of one rank.
const MOST_DESCRIPTORS: usize = 64;

/// Environment and descriptors of one rank, as the forking process gets them.
#[derive(Serialize)]
struct Order<'a> {
    /// This process.
    parent: i32,
    env: BTreeMap<&'a str, &'a str>,
    /// Variables that the rank must not have.
    unset: Vec<&'a str>,
    /// Uses of the descriptors: `1`, `2`, `cgroup`, or a variable that names its number.
    roles: Vec<&'a str>,
}

#[derive(Deserialize)]
struct Ready {
    refused: Option<String>,
}

#[derive(Deserialize)]
struct Forked {
    pid: i32,
}

/// The forking process, ready.
pub struct Zygote {
    process: Child,
    socket: OwnedFd,
}

impl Zygote {
    /// Starts it and waits until it is ready. The inner error says why ranks have to be spawned instead.
    ///
    /// # Errors
    /// No socket, or the program cannot be started.
    pub fn start(spec: &Spec, guard: &Guard, signals: &Signals) -> io::Result<Result<Self, String>> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).arg("zygote").arg(theirs.as_raw_fd().to_string());
        command.envs(spec.env.iter().cloned()).env_remove(env::JOIN_SECRET);
        // Libraries read their number of threads when they are loaded.
        command.envs(spec.ranks.iter().take(1).flat_map(|rank| rank.env.iter().cloned()));
        let err = io::stderr().as_fd().try_clone_to_owned()?;
        command.stdin(Stdio::null()).stdout(Stdio::from(err)).stderr(Stdio::inherit());
        prepare_rank(&mut command, vec![theirs.as_raw_fd()], Vec::new());
        let process = command
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot start {}: {e}", spec.program.display())))?;
        drop(theirs);
        guard.watch(Pid::from_child(&process));
        let mut zygote = Self { process, socket: ours };
        let answer = zygote.answer::<Ready>(READY_LIMIT, Some(signals));
        let refused = answer.map_or_else(Some, |ready| ready.refused);
        Ok(match refused {
            None => Ok(zygote),
            Some(why) => {
                zygote.end(guard);
                Err(why)
            }
        })
    }

    /// Forks a rank, which has `env` beside the environment of the forking process, and `descriptors` by their roles.
    ///
    /// # Errors
    /// The process has ended, or cannot fork.
    pub fn fork<'a>(
        &mut self,
        env: impl Iterator<Item = (&'a str, &'a str)>,
        unset: &[&'a str],
        descriptors: &[(&'a str, BorrowedFd)],
    ) -> io::Result<Pid> {
        let roles = descriptors.iter().map(|(role, _)| *role).collect();
        let order = Order { parent: getpid().as_raw_nonzero().get(), env: env.collect(), unset: unset.to_vec(), roles };
        let text = serde_json::to_vec(&order)?;
        let fds: Vec<BorrowedFd> = descriptors.iter().map(|(_, fd)| *fd).take(MOST_DESCRIPTORS).collect();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        set_child_subreaper(Some(getpid()))?;
        let sent = sendmsg(&self.socket, &[io::IoSlice::new(&text)], &mut ancillary, SendFlags::NOSIGNAL);
        let forked = sent.map_err(|e| self.ended(e)).and_then(|_| self.answer::<Forked>(FORK_LIMIT, None));
        // From here on orphans of ranks go where they always went.
        let _ = set_child_subreaper(None);
        let forked = forked.map_err(io::Error::other)?;
        Pid::from_raw(forked.pid).filter(|_| forked.pid > 0).ok_or_else(|| io::Error::other("it cannot fork"))
    }

    /// Lets it end, and waits for that.
    pub fn end(mut self, guard: &Guard) {
        let pid = Pid::from_child(&self.process);
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(2) && matches!(self.process.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        guard.forget(pid);
    }

    /// The next message.
    fn answer<T: for<'de> Deserialize<'de>>(
        &mut self,
        limit: Duration,
        signals: Option<&Signals>,
    ) -> Result<T, String> {
        let began = Instant::now();
        while began.elapsed() < limit {
            let mut fds = vec![PollFd::new(&self.socket, PollFlags::IN)];
            fds.extend(signals.map(|signals| PollFd::new(&signals.pipe, PollFlags::IN)));
            let period = Timespec { tv_sec: 0, tv_nsec: LOOK_MS * 1_000_000 };
            match poll(&mut fds, Some(&period)) {
                Ok(0) | Err(Errno::INTR) => continue,
                Err(error) => return Err(self.ended(error)),
                Ok(_) => {}
            }
            let [ours, theirs] = [0, 1].map(|at| fds.get(at).is_some_and(|fd| !fd.revents().is_empty()));
            if !ours && theirs {
                // The job's own loop takes it.
                return Err("a signal came meanwhile".into());
            }
            let mut bytes = vec![0; 64 << 10];
            return match recv(&self.socket, &mut bytes[..], RecvFlags::empty()) {
                Ok((0, _)) => Err(self.ended(Errno::PIPE)),
                Ok((_, n)) => serde_json::from_slice(&bytes[..n]).map_err(|e| e.to_string()),
                Err(error) => Err(self.ended(error)),
            };
        }
        Err(format!("no answer in {} s", limit.as_secs()))
    }

    /// How the process ended, if it has.
    fn ended(&mut self, error: Errno) -> String {
        std::thread::sleep(Duration::from_millis(50));
        match self.process.try_wait() {
            Ok(Some(status)) => format!("the process that forks ranks (pid {}) ended: {status}", self.process.id()),
            _ => format!("the process that forks ranks (pid {}): {error}", self.process.id()),
        }
    }
}
