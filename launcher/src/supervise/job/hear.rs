//! Input of the loop: signals, notes of the page cache, messages of the ranks; and the outcome.

use super::Job;
use crate::supervise::verdict::{End, STOPS, Said, signal_name};
use crate::supervise::{Failure, Outcome};
use crate::watch::{Findings, REQUEST, Told};
use cache::CacheHost;
use host::machine::{ProcessLimits, catches, first_that_catch, inner_ranks, is_first_here};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, kill_process};
use spec::contract::{self, Event, FrameError, FromRank, RecordGap, exit};
use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

impl Job<'_> {
    pub(super) fn take_signals(&mut self) {
        while let Some(signal) = self.signals.receive() {
            self.take_signal(signal);
        }
    }

    fn take_signal(&mut self, signal: Signal) {
        match signal {
            Signal::TSTP => {
                self.watcher.pause();
                self.signal_groups(Signal::STOP);
                let _ = kill_process(getpid(), Signal::STOP);
            }
            Signal::CONT => self.signal_groups(Signal::CONT),
            Signal::INT => {
                self.interrupts += 1;
                self.forward(Signal::INT);
                if self.interrupts > 1 {
                    self.watcher.note("interrupted again: killing every rank now");
                    self.signal_groups(Signal::KILL);
                }
            }
            Signal::USR2 => {
                self.watcher.note("SIGUSR2: giving memory back");
                self.tell_watch(Told::Now);
            }
            // A terminal that went away, and a job manager that wants the node back, mean the same.
            Signal::HUP => self.forward(Signal::TERM),
            signal => self.forward(signal),
        }
    }

    /// A rank of a training run that a signal ended before its first step was asked to stop; so are all others then. Whoever
    /// asked may have signalled every process, this one too.
    pub(super) fn pass_on_stop(&mut self, index: usize, end: End) {
        let by = match end {
            End::Code(exit::UNSTARTED) => Some(Signal::TERM),
            End::Signal(number) => Signal::from_named_raw(number).filter(|signal| STOPS.contains(signal)),
            End::Code(_) => None,
        };
        let asked = self.verdict.stopped_by().is_some() || self.told;
        let begun = self.progress.is_some() || self.verdict.cause().is_some();
        if let Some(signal) = by.filter(|_| self.spec.control && !asked && !begun) {
            let rank = self.children[index].rank;
            self.forward_for(
                if signal == Signal::HUP { Signal::TERM } else { signal },
                &format!(" reached rank {rank}"),
            );
        }
    }

    pub(super) fn forward(&mut self, signal: Signal) {
        self.forward_for(signal, "");
    }

    /// Asks ranks for a checkpoint and their end. Of a user's program those processes are asked that have a handler: the signal ends
    /// others, and what is below them with them. Where it has started ranks itself (torchrun, say) it is these; one that is the first
    /// of its ranks itself (Lightning) is asked as well.
    pub(super) fn ask_for_checkpoint(&mut self) {
        if !self.spec.watch.foreign {
            return self.forward(REQUEST);
        }
        let running = self.children.iter().filter(|child| !child.ended).map(|child| child.pid.as_raw_nonzero().get());
        let asked: BTreeSet<i32> = running.flat_map(|pid| asked_of(pid, REQUEST.as_raw())).collect();
        let grace = self.spec.grace.as_secs_f64();
        self.watcher.note(&format!("SIGUSR1: asking every rank inside to stop, at most {grace} s"));
        self.verdict.forwarded(REQUEST.as_raw());
        asked.into_iter().filter_map(Pid::from_raw).for_each(|pid| {
            let _ = kill_process(pid, REQUEST);
        });
        self.start_grace();
    }

    fn forward_for(&mut self, signal: Signal, whom: &str) {
        if self.verdict.stopped_by().is_none() && !self.told {
            let (name, grace) = (signal_name(signal.as_raw()), self.spec.grace.as_secs_f64());
            self.watcher.note(&format!("{name}{whom}: asking every rank to stop, at most {grace} s"));
        }
        self.verdict.forwarded(signal.as_raw());
        self.children.iter().for_each(|child| child.signal(signal));
        self.start_grace();
    }

    /// The page cache has something to say, or is at its end, which no rank survives.
    pub(super) fn take_cache(&mut self) -> io::Result<()> {
        let Some(host) = self.cache else { return Ok(()) };
        // Asked first: its last note comes before its end.
        let ended = host.ended();
        let notes = host.notes();
        notes.iter().for_each(|note| self.watcher.note(&format!("page cache: {note}")));
        if ended {
            epoll::delete(&self.urgent, &host.alarm)?;
            if let Some(index) = self.children.iter().position(|child| !child.ended) {
                let why = notes.last().map(|note| format!(": {note}")).unwrap_or_default();
                let error =
                    format!("the page cache's directory in the launcher is gone, and no rank can continue{why}");
                self.fail(index, exit::INTERNAL, error);
            }
        }
        Ok(())
    }

    /// Reads all messages that a rank has sent so far.
    pub(super) fn take_control(&mut self, index: usize) {
        let mut bytes = [0; 16 << 10];
        loop {
            let Some(control) = &self.children[index].control else {
                return;
            };
            match rustix::io::read(control, &mut bytes) {
                Ok(n @ 1..) => self.children[index].decoder.push(&bytes[..n]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return,
                // A closed channel is no failure: the exit status decides.
                Ok(_) | Err(_) => return self.close_control(index),
            }
            loop {
                match self.children[index].decoder.next_message() {
                    Ok(Some(message)) => self.take_message(index, message),
                    Ok(None) => break,
                    Err(FrameError::Body(e)) => {
                        let rank = self.children[index].rank;
                        self.watcher.note(&format!("rank {rank}: control message not understood: {e}"));
                    }
                    Err(e) => {
                        self.fail(index, exit::INTERNAL, e.to_string());
                        return self.close_control(index);
                    }
                }
            }
        }
    }

    fn close_control(&mut self, index: usize) {
        // Closing takes it out of the epoll set: no other descriptor stands for the same socket end.
        self.children[index].control = None;
    }

    fn take_message(&mut self, index: usize, message: FromRank) {
        match message {
            FromRank::Hello { version, .. } if version != contract::VERSION => {
                let ours = contract::VERSION;
                self.fail(
                    index,
                    exit::INTERNAL,
                    format!("the rank speaks contract version {version}, the launcher {ours}: build both together"),
                );
            }
            FromRank::Hello { .. } => self.verdict.greeted(index),
            FromRank::Progress(mut progress) => {
                let stats = self.cache.map(CacheHost::stats);
                progress.cache_hit_rate = stats.and_then(|stats| stats.hit_rate()).or(progress.cache_hit_rate);
                self.watcher.progress(&progress);
                if self.progress.as_ref().is_none_or(|last| last.step != progress.step) {
                    self.tell_watch(Told::Step(progress.step));
                }
                self.progress = Some(progress);
            }
            FromRank::Line { text } => self.children[index].line(&text, self.watcher),
            FromRank::Failed { code, step, error } => self.verdict.said(index, Said { code, step, error }),
            FromRank::Relieved(relieved) => {
                let rank = self.children[index].rank;
                self.tell_watch(Told::Relieved { rank, relieved });
            }
            FromRank::Gap(gap) => self.gaps.push(gap),
            FromRank::Summary(summary) => self.summary = Some(*summary),
            FromRank::Done => {}
        }
    }

    pub(super) fn outcome(&mut self, wall: Duration, mut findings: Findings) -> Outcome {
        let mut killed_for_memory = false;
        let first_failure = self.verdict.cause().map(|cause| {
            let child = &self.children[cause.index];
            let status = self.verdict.end_of(cause.index);
            let killed = status == Some(End::Signal(Signal::KILL.as_raw())) && cause.said.is_none();
            let killed = killed.then(|| findings.explain_kill(cause.index));
            // Without a word of its own: a limit may have ended it.
            let limits = if cause.said.is_none() { ProcessLimits::now().in_force() } else { Vec::new() };
            killed_for_memory = killed.as_ref().is_some_and(|killed| killed.for_memory);
            Failure {
                rank: child.rank,
                pid: child.pid.as_raw_nonzero().get().unsigned_abs(),
                status,
                step: cause.said.as_ref().and_then(|said| said.step),
                error: cause.said.as_ref().map(|said| said.error.clone()),
                explanation: killed.map(|killed| killed.lines).unwrap_or_default().into_iter().chain(limits).collect(),
                last_lines: child.tail.lines(),
            }
        });
        if let Some(failure) = &first_failure {
            let event = Event::Failed { rank: failure.rank, step: failure.step, text: failure.words() };
            let error = findings.keep(self.spec.watch.run_dir.as_deref(), event);
            error.iter().for_each(|error| self.watcher.note(error));
        }
        Outcome {
            exit_code: self.verdict.exit_code(),
            first_failure,
            stopped_by: self.verdict.stopped_by(),
            ended: Vec::new(),
            stopped_for: findings.stopped_for,
            killed_for_memory,
            wall,
            peaks: findings.peaks.clone(),
            last_peaks: std::mem::take(&mut findings.peaks),
            restarts: 0,
            progress: self.progress.take(),
            cache: None,
            gaps: self.take_gaps(findings.gaps),
            summary: self.summary.take(),
        }
    }

    fn take_gaps(&mut self, of_node: Vec<RecordGap>) -> Vec<RecordGap> {
        let of_logs = self.children.iter_mut().flat_map(|child| std::mem::take(&mut child.gaps));
        self.gaps.drain(..).chain(of_logs).chain(of_node).collect()
    }
}

/// Processes of the program `pid` that are asked to stop by `signal`.
fn asked_of(pid: i32, signal: i32) -> Vec<i32> {
    let inner: Vec<i32> = inner_ranks(pid).into_iter().map(|(_, pid)| pid).collect();
    let is_rank = inner.is_empty() || !inner.iter().any(|pid| is_first_here(*pid));
    let mut asked: Vec<i32> =
        inner.into_iter().chain(is_rank.then_some(pid)).filter(|pid| catches(*pid, signal)).collect();
    if asked.is_empty() {
        asked = first_that_catch(pid, signal);
    }
    asked
}
