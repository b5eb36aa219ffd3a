//! The system calls that neither the standard library nor `rustix` offers safely.
#![allow(unsafe_code)]

use super::cgroup::Cgroup;
use rustix::fd::{AsRawFd, BorrowedFd, OwnedFd};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitOptions, getpid, getppid, kill_process_group};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;
const SIG_ERR: usize = usize::MAX;
/// Its number on every architecture. The C library has a function of this name only since 2.34.
const CLOSE_RANGE: i64 = 436;
const CLOSE_RANGE_CLOEXEC: i32 = 4;

// The C library is linked by the standard library; these are its documented signatures on Linux.
unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn fork() -> i32;
    fn _exit(code: i32) -> !;
    fn syscall(number: i64, ...) -> i64;
}

/// Signals that [`Signals`] takes from the launcher.
const TAKEN: [Signal; 7] =
    [Signal::HUP, Signal::INT, Signal::TERM, Signal::USR1, Signal::USR2, Signal::TSTP, Signal::CONT];

/// Writing end of the pipe that the handler writes to; -1: none.
static PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn on_signal(number: i32) {
    let fd = PIPE.load(Ordering::Relaxed);
    if fd >= 0 {
        // SAFETY: `Signals` stores a descriptor here and takes it away, handlers first, before closing it.
        let pipe = unsafe { BorrowedFd::borrow_raw(fd) };
        // A full pipe already wakes the loop. The raw system call leaves the thread's errno alone.
        let _ = rustix::io::write(pipe, &[number as u8]);
    }
}

/// While this lives, signals to the launcher arrive as bytes (their numbers) on [`Signals::pipe`].
pub struct Signals {
    pub pipe: OwnedFd,
    _writer: OwnedFd,
    /// Earlier handler of each of [`TAKEN`].
    before: [usize; TAKEN.len()],
}

impl Signals {
    /// # Errors
    /// `AlreadyExists` when another one lives in this process; else what the pipe or `signal` says.
    pub fn take() -> io::Result<Self> {
        use rustix::pipe::{PipeFlags, pipe_with};
        let (pipe, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        if PIPE.compare_exchange(-1, writer.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "another job is supervised by this process"));
        }
        let mut before = [SIG_DFL; TAKEN.len()];
        for (old, number) in before.iter_mut().zip(TAKEN) {
            // SAFETY: `on_signal` only loads an atomic and makes one system call, so it may run at any point.
            *old = unsafe { signal(number.as_raw(), on_signal as *const () as usize) };
            // `nohup launch …` must keep ignoring the hang-up; other signals are taken even from a background shell.
            if *old == SIG_IGN && number == Signal::HUP {
                // SAFETY: ignoring a signal runs no code.
                unsafe { signal(number.as_raw(), SIG_IGN) };
            }
        }
        Ok(Self { pipe, _writer: writer, before })
    }

    /// The first pending signal that asks for the end, if any. Others that are pending are done or dropped: there is no rank
    /// yet that they could reach.
    pub fn asked_to_end(&self) -> Option<Signal> {
        while let Some(signal) = self.receive() {
            match signal {
                Signal::TSTP => drop(rustix::process::kill_process(getpid(), Signal::STOP)),
                Signal::INT | Signal::TERM | Signal::HUP | Signal::USR1 => return Some(signal),
                _ => {}
            }
        }
        None
    }

    /// The next pending signal, if any.
    pub fn receive(&self) -> Option<Signal> {
        let mut number = [0];
        match rustix::io::read(&self.pipe, &mut number) {
            Ok(1) => Signal::from_named_raw(i32::from(number[0])),
            _ => None,
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (old, number) in self.before.iter().zip(TAKEN) {
            if *old != SIG_ERR {
                // SAFETY: `old` is what `signal` itself gave back for this number.
                unsafe { signal(number.as_raw(), *old) };
            }
        }
        PIPE.store(-1, Ordering::SeqCst);
    }
}

/// Points that the kernel adds to a rank when it looks for what to kill for memory: a tenth of the machine's memory. A rank goes
/// before its launcher, which then says why, and before a shell.
const OOM_POINTS: &[u8] = b"100";

/// Adds [`OOM_POINTS`] to this process, unless it has more. Makes system calls only.
fn prefer_for_oom() {
    use rustix::fs::{Mode, OFlags, open};
    let Ok(file) = open(c"/proc/self/oom_score_adj", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else { return };
    let mut now = [0; 8];
    let length = rustix::io::read(&file, &mut now).unwrap_or(0);
    let digits = now[..length].iter().filter(|byte| byte.is_ascii_digit()).count();
    let has_more = now[0] != b'-' && digits > 2;
    if !has_more {
        let _ = rustix::io::pwrite(&file, OOM_POINTS, 0);
    }
}

/// Prepares `command` to start a program that receives SIGTERM when the thread that spawned it has ended. The program
/// gets a process group, so that a terminal's signals reach it through its parent alone.
pub fn prepare_helper(command: &mut Command) {
    let parent = getpid();
    command.process_group(0);
    let setup = move || {
        // Where a sandbox refuses prctl, the helper outlives a killed launcher.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::TERM));
        // It may have died before the line above.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec `setup` makes system calls only: no allocation, no locks.
    unsafe { command.pre_exec(setup) };
}

/// Lets `command` start a rank that dies with the launcher, holds no descriptor but 0 to 2 and `keep`, meets every
/// signal with its default, and lives in the job's cgroups (`cgroup_procs`: open `cgroup.procs` files).
///
/// PDEATHSIG is tied to the *thread* that spawns: it must live as long as the job.
pub fn prepare_rank(command: &mut Command, keep: Vec<RawFd>, cgroup_procs: Vec<RawFd>) {
    let launcher = getpid();
    command.process_group(0);
    let setup = move || {
        prefer_for_oom();
        // Where a sandbox refuses prctl, the guard alone ends the rank: see `missing_calls`.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        // The launcher may have died before the line above: then no signal will ever come.
        if getppid() != Some(launcher) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        for number in TAKEN.into_iter().filter(|s| *s != Signal::HUP).chain([Signal::QUIT, Signal::CHILD, Signal::XFSZ])
        {
            // SAFETY: only resets a disposition, in a process of one thread.
            unsafe { signal(number.as_raw(), SIG_DFL) };
        }
        for fd in &cgroup_procs {
            // SAFETY: the launcher holds this descriptor open until after the spawn.
            let procs = unsafe { BorrowedFd::borrow_raw(*fd) };
            // "0" moves the writer. Without a cgroup PDEATHSIG and the process group still hold.
            let _ = rustix::io::write(procs, b"0");
        }
        // SAFETY: only marks descriptors; the standard library's own are close-on-exec anyway. An old kernel refuses.
        unsafe { syscall(CLOSE_RANGE, 3_u32, u32::MAX, CLOSE_RANGE_CLOEXEC) };
        for fd in &keep {
            // SAFETY: the launcher holds these open until after the spawn.
            fcntl_setfd(unsafe { BorrowedFd::borrow_raw(*fd) }, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec `setup` makes system calls only: no allocation, no locks.
    unsafe { command.pre_exec(setup) };
}

/// Most ranks of one node whose process groups the guard remembers.
const MOST_GROUPS: usize = 1024;

/// A tiny forked process that outlives a killed launcher just long enough to end what the ranks left behind.
///
/// It sleeps in `read` on a pipe of which only the launcher holds the other end. A process id adds a group, its negative
/// takes it away, zero ends the guard, the end of the pipe means that the launcher died.
pub struct Guard {
    pid: Pid,
    pipe: OwnedFd,
}

impl Guard {
    /// Forks the guard. Its memory is the launcher's, shared copy-on-write.
    pub fn start(cgroups: Vec<Cgroup>) -> io::Result<Self> {
        use rustix::pipe::{PipeFlags, pipe_with};
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: the child runs `guard`, which makes system calls on memory made before the fork and ends in `_exit`.
        match unsafe { fork() } {
            0 => guard(&reader, &cgroups),
            pid => {
                let pid = Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)?;
                Ok(Self { pid, pipe: writer })
            }
        }
    }

    /// A rank was started as the leader of this process group.
    pub fn watch(&self, group: Pid) {
        let _ = rustix::io::write(&self.pipe, &group.as_raw_nonzero().get().to_ne_bytes());
    }

    /// The group's leader is about to be reaped, after which its number may come to mean another group.
    pub fn forget(&self, group: Pid) {
        let _ = rustix::io::write(&self.pipe, &(-group.as_raw_nonzero().get()).to_ne_bytes());
    }

    /// The job ended in good order.
    pub fn dismiss(self) {
        let _ = rustix::io::write(&self.pipe, &0i32.to_ne_bytes());
        let _ = rustix::process::waitpid(Some(self.pid), WaitOptions::empty());
    }
}

fn guard(reader: &OwnedFd, cgroups: &[Cgroup]) -> ! {
    // Out of the terminal's reach, deaf to what stops the launcher, holding nothing but the pipe.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"launch-guard");
    for number in TAKEN.into_iter().chain([Signal::QUIT, Signal::PIPE]) {
        // SAFETY: ignoring a signal runs no code.
        unsafe { signal(number.as_raw(), SIG_IGN) };
    }
    // SAFETY: in this process nothing else uses a descriptor again: it leaves by `_exit`, without destructors.
    let pipe = unsafe {
        let _ = rustix::stdio::dup2_stdin(reader);
        syscall(CLOSE_RANGE, 1_u32, u32::MAX, 0_i32);
        BorrowedFd::borrow_raw(0)
    };
    let (mut groups, mut known) = ([0i32; MOST_GROUPS], 0);
    let mut word = [0u8; 4];
    let orderly = loop {
        match rustix::io::read(pipe, &mut word) {
            Ok(4) if word == [0; 4] => break true,
            Ok(4) => match i32::from_ne_bytes(word) {
                gone @ ..0 => groups[..known].iter_mut().filter(|group| **group == -gone).for_each(|group| *group = 0),
                new if known < MOST_GROUPS => {
                    groups[known] = new;
                    known += 1;
                }
                _ => {}
            },
            Err(rustix::io::Errno::INTR) => {}
            _ => break false,
        }
    };
    if !orderly {
        for group in groups[..known].iter().filter_map(|raw| Pid::from_raw(*raw)) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        for cgroup in cgroups {
            cgroup.end(500);
        }
    }
    // SAFETY: ends this process at once, as it must: the launcher's destructors are not ours to run.
    unsafe { _exit(0) }
}
/// Gives back the pages of code and constants that the start has used and the supervision does not: command line, config, plan.
/// Whatever is needed again after all comes back from the page cache.
pub fn forget_code() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for (start, length) in parts_of_files(&maps) {
        // SAFETY: the range is a private mapping of a segment that the file declares as not writable, so that every page of it is as
        // the file has it (what relocations write to lies in another segment): the kernel maps the same bytes when they are needed.
        let _ = unsafe {
            rustix::mm::madvise(std::ptr::with_exposed_provenance_mut(start), length, rustix::mm::Advice::LinuxDontNeed)
        };
    }
}

/// Start and length of mappings in `/proc/self/maps` that hold a file's code, or its constants: the one right before its code.
fn parts_of_files(maps: &str) -> Vec<(usize, usize)> {
    let parts: Vec<(usize, usize, &str, &str)> = maps.lines().filter_map(part_of_a_file).collect();
    let is_code = |&(_, _, rights, _): &(usize, usize, &str, &str)| rights == "r-xp";
    let code = parts.iter().filter(|part| is_code(part));
    let constants = parts.windows(2).filter(|pair| {
        let (own, next) = (pair[0], pair[1]);
        own.2 == "r--p" && is_code(&next) && own.1 == next.0 && own.3 == next.3
    });
    let found = code.chain(constants.map(|pair| &pair[0]));
    found.filter_map(|(start, end, ..)| Some((*start, end.checked_sub(*start)?))).collect()
}

/// Start, end, rights and path of a mapping, if it is of a file that is still there.
fn part_of_a_file(line: &str) -> Option<(usize, usize, &str, &str)> {
    let mut words = line.split_whitespace();
    let (range, rights, path) = (words.next()?, words.next()?, words.nth(3)?);
    let (start, end) = range.split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    (path.starts_with('/') && words.next().is_none()).then_some((start, end, rights, path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_and_constants_of_files_are_given_back_and_nothing_that_was_written_to() {
        let maps = "\
55d0c0000000-55d0c0002000 r--p 00000000 08:01 42                 /usr/bin/launch
55d0c0002000-55d0c0003000 r-xp 00002000 08:01 42                 /usr/bin/launch
55d0c0003000-55d0c0004000 r--p 00003000 08:01 42                 /usr/bin/launch
55d0c0004000-55d0c0005000 rw-p 00004000 08:01 42                 /usr/bin/launch
7f0000000000-7f0000001000 r--p 00000000 08:01 43                 /lib/libgone.so (deleted)
7f0000001000-7f0000002000 r-xp 00001000 08:01 43                 /lib/libgone.so (deleted)
7ffd00000000-7ffd00001000 r-xp 00000000 00:00 0                  [vdso]
7ffd00001000-7ffd00002000 r-xp 00000000 00:00 0
";
        let right = [(0x55d0_c000_2000, 0x1000), (0x55d0_c000_0000, 0x2000)];
        assert_eq!(parts_of_files(maps), right);
        forget_code();
    }
}
