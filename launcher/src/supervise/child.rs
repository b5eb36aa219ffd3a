//! One rank: its process, its pipes, its log file.

use super::cgroup::Cgroup;
use super::lines::{Lines, Tail};
use super::record::ErrorFiles;
use super::unix::prepare_rank;
use super::verdict::End;
use super::zygote::Zygote;
use super::{RankSpec, Spec, Stream, Watcher};
use host::journal::{Begin, Journal, News};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, waitid};
use spec::contract::{self, Decoder, RecordGap, ToRank, env, shown};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Variables that name a rank's own descriptors, and the launchers' secret: a rank does not inherit them.
const OF_A_RANK: [&str; 5] = [env::CONTROL_FD, env::COMM_FD, env::CACHE_FD, env::CACHE_MEMFD, env::JOIN_SECRET];
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
    /// Starts one rank; it runs when this returns. `cache`: its end of the socket to the page cache's directory. `zygote` forks
    /// it, where there is one; one that fails is gone, and the rank is spawned.
    pub fn start(
        shared: &Shared,
        rank: &RankSpec,
        cache: Option<OwnedFd>,
        zygote: &mut Option<Zygote>,
    ) -> io::Result<Self> {
        let spec = shared.spec;
        let (out, out_end) = pipe()?;
        let (err, err_end) = pipe()?;
        let (mut named, mut control, mut theirs) = (Vec::new(), None, None);
        if spec.control {
            let (ours, end) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
            rustix::io::ioctl_fionbio(&ours, true)?;
            (control, theirs) = (Some(ours), Some(end));
        }
        named.extend(theirs.as_ref().map(|end| (env::CONTROL_FD, end.as_fd())));
        named.extend(shared.comm.map(|comm| (env::COMM_FD, comm.as_fd())));
        if let (Some(memfd), Some(socket)) = (shared.cache, &cache) {
            named.extend([(env::CACHE_FD, socket.as_fd()), (env::CACHE_MEMFD, memfd.as_fd())]);
        }
        let log = spec.log_dir.as_deref().map(|dir| open_log(dir, rank.rank)).transpose()?;
        let procs: Vec<OwnedFd> = shared.cgroups.iter().filter_map(|cgroup| cgroup.open_procs().ok()).collect();
        let pipes = [("1", out_end.as_fd()), ("2", err_end.as_fd())];
        let forked = zygote.as_mut().map(|zygote| {
            let groups = procs.iter().map(|procs| ("cgroup", procs.as_fd()));
            let descriptors: Vec<_> = pipes.into_iter().chain(named.iter().copied()).chain(groups).collect();
            let own = spec.env.iter().chain(&rank.env).map(|(name, value)| (name.as_str(), value.as_str()));
            zygote.fork(own, &OF_A_RANK, &descriptors)
        });
        let pid = match forked {
            Some(Ok(pid)) => pid,
            Some(Err(error)) => {
                tracing::warn!("{error}: ranks are started one by one");
                *zygote = None;
                spawn(shared, rank, pipes, &named, &procs)?
            }
            None => spawn(shared, rank, pipes, &named, &procs)?,
        };
        drop((theirs, cache));
        tracing::debug!(rank = rank.rank, pid = pid.as_raw_nonzero(), program = %shown(&spec.program), "rank started");
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

/// Starts the program of a rank.
fn spawn(
    shared: &Shared,
    rank: &RankSpec,
    [(_, out), (_, err)]: [(&str, BorrowedFd); 2],
    named: &[(&str, BorrowedFd)],
    procs: &[OwnedFd],
) -> io::Result<Pid> {
    let spec = shared.spec;
    let mut command = Command::new(&spec.program);
    command.args(&spec.args).envs(spec.env.iter().cloned()).envs(rank.env.iter().cloned());
    // Nothing to read: a rank in a background process group that reads the terminal would be stopped.
    command.stdin(Stdio::null()).stdout(out.try_clone_to_owned()?).stderr(err.try_clone_to_owned()?);
    for name in OF_A_RANK {
        command.env_remove(name);
    }
    for (name, fd) in named {
        command.env(name, fd.as_raw_fd().to_string());
    }
    if let Some(errors) = shared.errors {
        command.env(env::ELASTIC_ERROR_FILE, errors.path(rank.rank));
    }
    let keep = named.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    prepare_rank(&mut command, keep, procs.iter().map(AsRawFd::as_raw_fd).collect());
    let process = command.spawn().map_err(|e| {
        io::Error::new(e.kind(), format!("rank {}: cannot start {}: {e}", rank.rank, spec.program.display()))
    })?;
    Ok(Pid::from_child(&process))
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
