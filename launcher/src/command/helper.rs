//! A program that a verb starts and waits for: signals that the verb gets are the program's as well, and neither outlives the
//! other.

use crate::supervise::{POLL, Signals, has_ended, prepare_helper};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getpid, kill_process, pidfd_open};
use spec::contract::exit;
use std::io;
use std::process::{Child, Command, ExitStatus};

/// While this lives, signals are taken.
pub(super) struct Helpers {
    signals: Signals,
    /// The first one that asked for the end.
    asked: Option<Signal>,
}

impl Helpers {
    /// # Errors
    /// As [`Signals::take`].
    pub fn take() -> io::Result<Self> {
        Ok(Self { signals: Signals::take()?, asked: None })
    }

    /// Runs `command` to its end.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&mut self, command: &mut Command) -> io::Result<ExitStatus> {
        prepare_helper(command);
        let mut child = command.spawn()?;
        let waited = self.wait(&child);
        if waited.is_err() {
            let _ = child.kill();
        }
        let status = child.wait()?;
        waited.map(|()| status)
    }

    /// The exit code where a signal asked for the end.
    pub fn asked_to_end(&self) -> Option<u8> {
        self.asked.map(|signal| exit::SIGNAL_BASE + u8::try_from(signal.as_raw()).unwrap_or(0))
    }

    fn wait(&mut self, child: &Child) -> io::Result<()> {
        let pid = Pid::from_child(child);
        // Where it is refused, the end is polled for.
        let ended = pidfd_open(pid, PidfdFlags::empty()).ok();
        let period = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
        while !has_ended(pid) {
            let mut fds = vec![PollFd::new(&self.signals.pipe, PollFlags::IN)];
            fds.extend(ended.iter().map(|pidfd| PollFd::new(pidfd, PollFlags::IN)));
            match poll(&mut fds, ended.is_none().then_some(&period)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(signal) = self.signals.receive() {
                self.pass_on(signal, pid)?;
            }
        }
        Ok(())
    }

    fn pass_on(&mut self, signal: Signal, pid: Pid) -> io::Result<()> {
        // It is not reaped yet: the number is its own.
        kill_process(pid, signal)?;
        match signal {
            Signal::INT | Signal::TERM | Signal::HUP => {
                self.asked.get_or_insert(signal);
            }
            Signal::TSTP => kill_process(getpid(), Signal::STOP)?,
            _ => {}
        }
        Ok(())
    }
}
