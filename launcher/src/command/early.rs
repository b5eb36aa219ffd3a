//! Signals before the ranks run: while the plan is made, data are counted or written, nodes are waited for.
//!
//! A thread waits for them, since the main one is busy. It undoes what is half done and ends the program, also where it is
//! the first process of a container, to which the kernel delivers no signal that has no handler.

use super::around::requeue;
use super::print;
use crate::supervise::{Signals, signal_name};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::OwnedFd;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Signal;
use spec::contract::exit;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Line on a signal that comes when one stage is over and the next has not begun.
pub(super) const BETWEEN_STAGES: &str =
    "stopped between two stages: what is done stays; to continue, add --resume auto";

/// Signals of this process, from its first moment on.
pub(super) struct Early {
    signals: Arc<Signals>,
    /// The thread, which ends when the other end of this pipe is closed.
    waiting: Option<(OwnedFd, JoinHandle<()>)>,
    undo: Undo,
}

/// Situation in which a signal ends the program; decides on words and exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    /// A job of ranks.
    BeforeRanks,
    /// A stage is over, the next one is planned.
    BetweenStages,
    /// A program under `--exec`.
    OfOthers,
}

/// Files and folders that go when a signal ends the program.
#[derive(Clone, Default)]
pub(super) struct Undo(Arc<Mutex<Vec<PathBuf>>>);

impl Undo {
    pub fn add(&self, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    }

    /// `path` is whole, or gone.
    pub fn forget(&self, path: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|kept| kept != path);
    }

    fn run(&self) {
        for path in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
}

impl Early {
    /// Takes the signals.
    ///
    /// # Errors
    /// As [`Signals::take`]; no thread can be started.
    pub fn take(moment: Moment) -> io::Result<Self> {
        let mut early = Self { signals: Arc::new(Signals::take()?), waiting: None, undo: Undo::default() };
        early.wait(moment)?;
        Ok(early)
    }

    /// From now on a signal ends the program again, as before any rank ran.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn wait(&mut self, moment: Moment) -> io::Result<()> {
        self.hand_over();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let (theirs, to_undo) = (Arc::clone(&self.signals), self.undo.clone());
        let wait = move || {
            if let Some(signal) = next(&theirs, &reader) {
                to_undo.run();
                end(signal, moment);
            }
        };
        let thread = std::thread::Builder::new().name("early-signals".into()).stack_size(128 << 10).spawn(wait)?;
        self.waiting = Some((writer, thread));
        Ok(())
    }

    pub fn undo(&self) -> &Undo {
        &self.undo
    }

    /// From now on the caller reads the signals.
    pub fn hand_over(&mut self) -> &Signals {
        if let Some((pipe, thread)) = self.waiting.take() {
            drop(pipe);
            let _ = thread.join();
        }
        &self.signals
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.hand_over();
    }
}

/// The signal that asks for the end; `None`: handed over.
fn next(signals: &Signals, handed_over: &OwnedFd) -> Option<Signal> {
    loop {
        let mut fds = [PollFd::new(&signals.pipe, PollFlags::IN), PollFd::new(handed_over, PollFlags::IN)];
        let polled = poll(&mut fds, None);
        if !fds[1].revents().is_empty() || polled.is_err_and(|error| error != rustix::io::Errno::INTR) {
            return None;
        }
        if let Some(signal) = signals.asked_to_end() {
            return Some(signal);
        }
    }
}

fn end(signal: Signal, moment: Moment) -> ! {
    let name = signal_name(signal.as_raw());
    let by_signal = exit::SIGNAL_BASE.saturating_add(u8::try_from(signal.as_raw()).unwrap_or(0));
    let (what, code) = match moment {
        Moment::BeforeRanks => ("stopped before the first step: no rank was started", exit::UNSTARTED),
        Moment::BetweenStages => (BETWEEN_STAGES, exit::STOPPED),
        Moment::OfOthers => ("stopped", by_signal),
    };
    print::note(format_args!("{name}: {what}"));
    if signal != Signal::INT {
        requeue::now();
    }
    std::process::exit(i32::from(code))
}
