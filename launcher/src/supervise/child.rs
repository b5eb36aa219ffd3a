//! One rank: its process, its pipes, its log file.

use super::cgroup::Cgroup;
use super::lines::{Lines, Tail};
use super::record::ErrorFiles;
use super::unix::prepare_rank;
use super::verdict::End;
use super::{RankSpec, Spec, Stream, Watcher};
use crate::journal::{Begin, Journal, News};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid};
use spec::contract::{self, Decoder, RecordGap, ToRank, env, shown};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Most bytes read from one pipe before other events are looked at.
const READ_AT_ONCE: usize = 64 << 10;

pub struct Child {
    pub rank: u32,
    /// Not reaped before [`Child::reap`]: until then the number means this process.
    pub pid: Pid,
    /// Readable when the process has ended; else why its end must be polled for.
    pub pidfd: Result<OwnedFd, Errno>,
    pub out: Option<OwnedFd>,
    pub err: Option<OwnedFd>,
    pub control: Option<OwnedFd>,
    pub decoder: Decoder,
    pub tail: Tail,
    pub ended: bool,
    out_lines: Lines,
    err_lines: Lines,
    log: Option<Journal>,
    /// Times in which the log could not be written.
    pub gaps: Vec<RecordGap>,
}

/// State that all ranks of a job share when they start.
pub struct Shared<'a> {
    pub spec: &'a Spec,
    /// Groups of the job; each rank joins all of them.
    pub cgroups: &'a [Cgroup],
    /// The memfd of `HEADROOM_COMM_FD`.
    pub comm: Option<&'a OwnedFd>,
    /// The memfd of `HEADROOM_CACHE_MEMFD`.
    pub cache: Option<&'a OwnedFd>,
    /// Where programs that are not Headroom's write their errors.
    pub errors: Option<&'a ErrorFiles>,
}

impl Child {
    /// Starts one rank; it runs when this returns. `cache`: its end of the socket to the page cache's directory.
    pub fn start(shared: &Shared, rank: &RankSpec, cache: Option<OwnedFd>) -> io::Result<Self> {
        let spec = shared.spec;
        let mut command = Command::new(&spec.program);
        command.args(&spec.args).envs(spec.env.iter().cloned()).envs(rank.env.iter().cloned());
        let (out, out_end) = pipe()?;
        let (err, err_end) = pipe()?;
        // Nothing to read: a rank in a background process group that reads the terminal would be stopped.
        command.stdin(Stdio::null()).stdout(out_end).stderr(err_end);
        let (mut keep, mut control, mut theirs) = (Vec::new(), None, None);
        for name in [env::CONTROL_FD, env::COMM_FD, env::CACHE_FD, env::CACHE_MEMFD, env::JOIN_SECRET] {
            command.env_remove(name);
        }
        if spec.control {
            let (ours, end) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            rustix::io::ioctl_fionbio(&ours, true)?;
            command.env(env::CONTROL_FD, end.as_raw_fd().to_string());
            keep.push(end.as_raw_fd());
            (control, theirs) = (Some(ours), Some(end));
        }
        if let Some(comm) = shared.comm {
            command.env(env::COMM_FD, comm.as_raw_fd().to_string());
            keep.push(comm.as_raw_fd());
        }
        if let Some(errors) = shared.errors {
            command.env(env::ELASTIC_ERROR_FILE, errors.path(rank.rank));
        }
        if let (Some(memfd), Some(socket)) = (shared.cache, &cache) {
            command.env(env::CACHE_FD, socket.as_raw_fd().to_string());
            command.env(env::CACHE_MEMFD, memfd.as_raw_fd().to_string());
            keep.extend([socket.as_raw_fd(), memfd.as_raw_fd()]);
        }
        let log = spec.log_dir.as_deref().map(|dir| open_log(dir, rank.rank)).transpose()?;
        let procs: Vec<OwnedFd> = shared.cgroups.iter().filter_map(|cgroup| cgroup.open_procs().ok()).collect();
        prepare_rank(&mut command, keep, procs.iter().map(AsRawFd::as_raw_fd).collect());
        let process = command.spawn().map_err(|e| {
            io::Error::new(e.kind(), format!("rank {}: cannot start {}: {e}", rank.rank, spec.program.display()))
        })?;
        drop((theirs, cache));
        let pid = Pid::from_child(&process);
        tracing::debug!(rank = rank.rank, pid = process.id(), program = %shown(&spec.program), "rank started");
        let pidfd = pidfd_open(pid, PidfdFlags::empty());
        Ok(Self {
            rank: rank.rank,
            pid,
            pidfd,
            out: Some(out),
            err: Some(err),
            control,
            decoder: Decoder::default(),
            tail: Tail::default(),
            ended: false,
            out_lines: Lines::default(),
            err_lines: Lines::default(),
            log,
            gaps: Vec::new(),
        })
    }

    pub fn signal(&self, signal: Signal) {
        if !self.ended {
            let _ = kill_process(self.pid, signal);
        }
    }

    /// True if the process must be polled for its end, since no event announces it.
    pub fn is_polled(&self) -> bool {
        !self.ended && self.pidfd.is_err()
    }

    /// Signals the rank and whatever it started in its process group, which may outlive it.
    pub fn signal_group(&self, signal: Signal) {
        let _ = rustix::process::kill_process_group(self.pid, signal);
    }

    /// Sends a message. Returns false if the rank has no control channel.
    pub fn tell(&self, message: &ToRank) -> bool {
        let (Some(control), Ok(frame)) = (&self.control, contract::encode(message)) else {
            return false;
        };
        rustix::net::send(control, &frame, SendFlags::NOSIGNAL) == Ok(frame.len())
    }

    /// Takes the exit status of a process that has ended.
    pub fn reap(&mut self) -> io::Result<Option<End>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let Some(status) = waitid(WaitId::Pid(self.pid), options)? else {
            return Ok(None);
        };
        self.ended = true;
        let code = status.exit_status().map(|code| End::Code(u8::try_from(code).unwrap_or(u8::MAX)));
        Ok(code.or_else(|| status.terminating_signal().map(End::Signal)))
    }

    /// Reads one of the pipes, at most [`READ_AT_ONCE`] bytes. False: there is no more for now, or ever.
    pub fn read_output(&mut self, stream: Stream, watcher: &dyn Watcher) -> bool {
        let (pipe, lines) = match stream {
            Stream::Out => (&mut self.out, &mut self.out_lines),
            _ => (&mut self.err, &mut self.err_lines),
        };
        let Some(fd) = pipe else { return false };
        let mut bytes = [0; READ_AT_ONCE];
        let n = match rustix::io::read(fd, &mut bytes) {
            Ok(n) => n,
            Err(Errno::INTR) => return true,
            Err(Errno::AGAIN) => return false,
            Err(_) => 0,
        };
        let (rank, tail) = (self.rank, &mut self.tail);
        let mut give = |line: &str| {
            tail.push(line);
            watcher.line(rank, stream, line);
        };
        if n == 0 {
            lines.finish(&mut give);
            *pipe = None;
            return false;
        }
        lines.push(&bytes[..n], Instant::now(), &mut give);
        let news = self.log.as_mut().and_then(|log| log.write(bytes[..n].to_vec()));
        self.tell_news(news, watcher);
        true
    }

    /// A line sent over the control socket.
    pub fn line(&mut self, text: &str, watcher: &dyn Watcher) {
        let news = self.log.as_mut().and_then(|log| log.write(format!("{text}\n").into_bytes()));
        self.tell_news(news, watcher);
        text.lines().for_each(|line| watcher.line(self.rank, Stream::Control, line));
    }

    /// All that is in the pipes now; does not wait for what other holders of their ends may still write.
    pub fn drain(&mut self, watcher: &dyn Watcher) {
        for stream in [Stream::Out, Stream::Err] {
            // Bounded: a process that the rank left behind may write for ever.
            let _ = (0..64).all(|_| self.read_output(stream, watcher));
        }
    }

    /// Passes on the last line without a line break, after everything else.
    pub fn finish(&mut self, watcher: &dyn Watcher) {
        self.drain(watcher);
        let (rank, tail) = (self.rank, &mut self.tail);
        for (stream, lines) in [(Stream::Out, &mut self.out_lines), (Stream::Err, &mut self.err_lines)] {
            lines.finish(|line| {
                tail.push(line);
                watcher.line(rank, stream, line);
            });
        }
        let news = self.log.take().and_then(Journal::close);
        self.tell_news(news, watcher);
    }

    fn tell_news(&mut self, news: Option<News>, watcher: &dyn Watcher) {
        let Some(News { text, gap }) = news else { return };
        watcher.note(&text);
        self.gaps.extend(gap);
    }
}

/// True if a child has ended; it is not reaped.
pub fn has_ended(pid: Pid) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::Pid(pid), options), Ok(None))
}

fn open_log(dir: &Path, rank: u32) -> io::Result<Journal> {
    let path = dir.join(format!("rank{rank}.log"));
    let log = Journal::open(&path, Begin::AfterText);
    log.map_err(|e| io::Error::new(e.kind(), format!("rank {rank}: cannot open its log file {}: {e}", path.display())))
}

/// Reading end (not blocking) and writing end.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    Ok((reader, writer))
}
