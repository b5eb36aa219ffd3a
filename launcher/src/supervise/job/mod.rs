//! The loop: one attempt at a job, from the first fork to the last exit.
//!
//! Two epoll sets: `urgent` holds pidfds, control sockets and signals, and, as one member, the set `outputs` of pipes.
//! So a flood of output never delays a failure or a signal. epoll gives events in the order they happened, which
//! decides between failures that arrive in one wake-up. Where pidfds are refused the ends of ranks are polled for.

mod hear;

use super::cgroup::Cgroup;
use super::child::{Child, Shared, has_ended};
use super::limits::MemoryGroup;
use super::orders::{Order, OrderQueue};
use super::record::ErrorFiles;
use super::reports::{Hearing, Reports};
use super::unix::{Guard, Signals, forget_code};
use super::verdict::{Said, Verdict};
use super::zygote::Zygote;
use super::{Outcome, Spec, Stream, Watcher};
use crate::watch::{Findings, Told, Watch};
use cache::refused::{EPOLL_CREATE, Once, PIDFD_OPEN, PRCTL};
use cache::{CacheHost, Door, HostPlan};
use cache::{SharedMemory, shared_memory};
use host::machine::awake::{Deadline, SLICE};
use host::machine::{MemoryMeter, Probe, memfd_room};
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::process::Signal;
use spec::contract::{Progress, RecordGap, Summary, ToRank, env};
use std::io;
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

/// Time between two looks at ranks whose end nothing tells of.
pub const POLL: Duration = Duration::from_millis(20);
/// How long output waits before it is looked at again when the watcher cannot take more.
const HOLD: Duration = Duration::from_millis(20);
/// Time after which the start is over, of the launcher and of ranks that train.
const CALM: Duration = Duration::from_secs(1);
/// Longest error text passed on to other ranks, characters: must fit into a socket's buffer.
const LONGEST_ERROR: usize = 2000;

/// Event sources, as stored with epoll: kind in the high half, index of the rank in the low half.
const SIGNALS: u64 = 0;
const OUTPUTS: u64 = 1;
const EXIT: u64 = 2;
const CONTROL: u64 = 3;
const OUT: u64 = 4;
const ERR: u64 = 5;
const CACHE: u64 = 6;
const ORDERS: u64 = 7;

struct Job<'a> {
    spec: &'a Spec,
    watcher: &'a dyn Watcher,
    signals: &'a Signals,
    guard: &'a Guard,
    cache: Option<&'a CacheHost>,
    orders: &'a OrderQueue<'a>,
    /// Channel to the watch.
    tell: Sender<Told>,
    children: Vec<Child>,
    urgent: OwnedFd,
    outputs: OwnedFd,
    /// Output is left in the pipes because the watcher is behind.
    held: bool,
    verdict: Verdict,
    /// When ranks that still run are killed.
    deadline: Option<Deadline>,
    told: bool,
    interrupts: u32,
    progress: Option<Progress>,
    /// Gaps that ranks reported of their records, and the summary that rank 0 could not write.
    gaps: Vec<RecordGap>,
    summary: Option<Summary>,
}

pub fn run(spec: &Spec, watcher: &dyn Watcher, signals: &Signals) -> io::Result<Outcome> {
    run_with(spec, watcher, signals, start_cache)
}

/// As [`run`], with the page cache that `start_cache` gives.
fn run_with(
    spec: &Spec,
    watcher: &dyn Watcher,
    signals: &Signals,
    start_cache: fn(&Spec) -> io::Result<Option<CacheHost>>,
) -> io::Result<Outcome> {
    let started = Instant::now();
    let memory_group = memory_group(spec, watcher);
    let limited = memory_group.as_ref();
    let own = Cgroup::make(limited.map(|group| group.dir.as_path()));
    let cgroups: Vec<Cgroup> = own.into_iter().chain(limited.map(|group| group.cgroup.clone())).collect();
    // Dropped without `dismiss` on any error below: then the guard ends what was started.
    let guard = Guard::start(cgroups.clone())?;
    let comm = if spec.control { Some(comm_memory(watcher)?) } else { None };
    let mut cache = match start_cache(spec) {
        Ok(cache) => cache,
        Err(e) => {
            end_cgroups(&cgroups);
            guard.dismiss();
            return Err(e);
        }
    };
    let reports = variable(spec, env::REPORTS).map(Reports::open).transpose()?;
    let _door = open_door(spec, cache.as_ref())?;
    // Each end goes to its rank alone, so that it closes when the rank dies.
    let mut sockets: Vec<Option<OwnedFd>> =
        spec.ranks.iter().map(|rank| cache.as_mut().and_then(|host| host.take_socket(rank.rank))).collect();
    let memfd = cache.as_ref().map(|host| &host.memfd);
    let errors = if spec.control { None } else { ErrorFiles::make() };
    let shared = Shared { spec, cgroups: &cgroups, comm: comm.as_ref(), cache: memfd, errors: errors.as_ref() };
    let mut children = Vec::with_capacity(spec.ranks.len());
    let mut zygote = zygote(spec, watcher, &guard, signals);
    for (rank, socket) in spec.ranks.iter().zip(&mut sockets) {
        match Child::start(&shared, rank, socket.take(), &mut zygote) {
            Ok(child) => {
                guard.watch(child.pid);
                children.push(child);
            }
            Err(e) => {
                children.iter_mut().for_each(kill_now);
                end_cgroups(&cgroups);
                guard.dismiss();
                return Err(e);
            }
        }
    }
    if let Some(zygote) = zygote {
        zygote.end(&guard);
    }
    missing_calls(&children, watcher);
    let pids: Vec<(u32, i32)> = children.iter().map(|child| (child.rank, child.pid.as_raw_nonzero().get())).collect();
    let meter = MemoryMeter::new(&Probe::default(), memory_group.as_ref().map(|group| group.dir.as_path()));
    let orders = OrderQueue::new(watcher, cache.as_ref())?;
    let (tell, told) = mpsc::channel();
    let heard = tell.clone();
    let mut job = Job::new(spec, signals, &guard, &orders, tell, children)?;
    let findings = std::thread::scope(|scope| -> io::Result<Findings> {
        let orders = &orders;
        let watch = move || Watch::new(&spec.watch, &pids, meter, orders).run(&told);
        let watch =
            std::thread::Builder::new().name("memory".into()).stack_size(512 << 10).spawn_scoped(scope, watch)?;
        let hearing = reports.as_ref().map(|reports| reports.hear(scope, watcher, orders.cache, heard)).transpose();
        let hearing = hearing.unwrap_or_else(|error| {
            watcher.note(&format!("warning: reports of the program are not heard: {error}"));
            None
        });
        let end = job.watch();
        job.progress = hearing.and_then(Hearing::end).or(job.progress.take());
        job.hush();
        let findings = watch.join().unwrap_or_default();
        end.map(|()| findings)
    })?;
    job.children.iter_mut().for_each(|child| child.finish(watcher));
    let mut outcome = job.outcome(started.elapsed(), findings);
    if let (Some(errors), Some(failure)) = (&errors, &mut outcome.first_failure) {
        failure.explanation.extend(errors.read(failure.rank));
    }
    // After the last look at the groups' counters.
    end_cgroups(&cgroups);
    drop(job);
    guard.dismiss();
    reap_strangers();
    if let Some(host) = &mut cache {
        host.stop();
        outcome.cache = Some(host.stats());
    }
    Ok(outcome)
}

/// The process that forks the ranks, where the job wants one and it is ready.
fn zygote(spec: &Spec, watcher: &dyn Watcher, guard: &Guard, signals: &Signals) -> Option<Zygote> {
    if !spec.forks {
        return None;
    }
    let started = Zygote::start(spec, guard, signals).unwrap_or_else(|error| Err(error.to_string()));
    started.inspect_err(|why| watcher.note(&format!("ranks are started one by one, not forked: {why}"))).ok()
}

/// Memory in which the ranks meet.
fn comm_memory(watcher: &dyn Watcher) -> io::Result<OwnedFd> {
    let SharedMemory { fd, note, .. } = shared_memory("headroom-comm", 0)?;
    note.iter().for_each(|note| watcher.note(note));
    Ok(fd)
}

/// Calls that are refused here, and how the job does without; once per process.
fn missing_calls(children: &[Child], watcher: &dyn Watcher) {
    static PIDFD: Once = Once::new();
    static DEATH: Once = Once::new();
    if let Some(error) = children.iter().find_map(|child| child.pidfd.as_ref().err()) {
        let ms = POLL.as_millis();
        let line = || format!("{}; the ends of ranks are looked for every {ms} ms instead", PIDFD_OPEN.refused(*error));
        PIDFD.say(line).iter().for_each(|line| watcher.note(line));
    }
    if let Err(error) = rustix::process::parent_process_death_signal() {
        let line = || format!("{}; if launch is killed, its guard process ends the ranks", PRCTL.refused(error));
        DEATH.say(line).iter().for_each(|line| watcher.note(line));
    }
}

/// As the first process of a container this one inherits what ranks left behind, and nobody else reaps it.
fn reap_strangers() {
    use rustix::process::{WaitOptions, getpid, wait};
    if getpid().is_init() {
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    }
}

fn start_cache(spec: &Spec) -> io::Result<Option<CacheHost>> {
    let Some(cache) = spec.cache else { return Ok(None) };
    // Those who come in by the door have numbers of their own; a rank that never speaks would hold up a shrinking cache.
    let by_door = variable(spec, env::CACHE_DOOR).is_some();
    let ranks = spec.ranks.iter().filter(|_| !by_door).map(|rank| rank.rank).collect();
    let plan = HostPlan { capacity_bytes: cache.capacity_bytes, policy: cache.policy, ranks };
    CacheHost::start(&plan, memfd_room).map(Some).map_err(io::Error::other)
}

/// The value of a variable that all ranks get.
fn variable<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.env.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
}

/// The way into the page cache for processes that inherit no socket.
fn open_door(spec: &Spec, cache: Option<&CacheHost>) -> io::Result<Option<Door>> {
    let Some((name, host)) = variable(spec, env::CACHE_DOOR).zip(cache) else { return Ok(None) };
    Door::open(name, host.joiner()?).map(Some)
}

/// The ranks' own memory cgroup; where it may not be made, that is said.
fn memory_group(spec: &Spec, watcher: &dyn Watcher) -> Option<MemoryGroup> {
    match MemoryGroup::make(spec.limits?) {
        Ok(group) => Some(group),
        Err(why) => {
            watcher
                .note(&format!("no memory cgroup for the ranks: {why}; the plan and the watch keep the budget alone"));
            None
        }
    }
}

fn end_cgroups(cgroups: &[Cgroup]) {
    cgroups.iter().for_each(|cgroup| {
        // Milliseconds: giving a killed process's memory back takes time on a busy node.
        cgroup.end(2000);
    });
}

fn kill_now(child: &mut Child) {
    child.signal_group(Signal::KILL);
    let _ = rustix::process::waitpid(Some(child.pid), rustix::process::WaitOptions::empty());
    child.ended = true;
}

impl<'a> Job<'a> {
    fn new(
        spec: &'a Spec,
        signals: &'a Signals,
        guard: &'a Guard,
        orders: &'a OrderQueue<'a>,
        tell: Sender<Told>,
        children: Vec<Child>,
    ) -> io::Result<Self> {
        let (watcher, cache) = (orders.watcher, orders.cache);
        let set = || epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| EPOLL_CREATE.error(error));
        let (urgent, outputs) = (set()?, set()?);
        add(&urgent, &signals.pipe, SIGNALS, 0)?;
        add(&urgent, &outputs, OUTPUTS, 0)?;
        add(&urgent, &orders.bell, ORDERS, 0)?;
        if let Some(host) = cache {
            add(&urgent, &host.alarm, CACHE, 0)?;
        }
        for (index, child) in children.iter().enumerate() {
            if let Ok(pidfd) = &child.pidfd {
                add(&urgent, pidfd, EXIT, index)?;
            }
            if let Some(control) = &child.control {
                add(&urgent, control, CONTROL, index)?;
            }
            for (pipe, kind) in [(&child.out, OUT), (&child.err, ERR)] {
                if let Some(pipe) = pipe {
                    add(&outputs, pipe, kind, index)?;
                }
            }
        }
        let verdict = Verdict::new(children.len(), spec.control);
        let (held, told, interrupts) = (false, false, 0);
        let (deadline, progress) = (None, None);
        Ok(Self {
            spec,
            watcher,
            signals,
            guard,
            cache,
            orders,
            tell,
            children,
            urgent,
            outputs,
            held,
            verdict,
            deadline,
            told,
            interrupts,
            progress,
            gaps: Vec::new(),
            summary: None,
        })
    }

    /// Until every rank has ended.
    fn watch(&mut self) -> io::Result<()> {
        let mut calm = Some(Instant::now() + CALM);
        while self.children.iter().any(|child| !child.ended) {
            let (mut output, mut ended) = (false, Vec::new());
            let until_calm = calm.map(|at| at.saturating_duration_since(Instant::now()));
            if until_calm.is_some_and(|left| left.is_zero()) {
                forget_code();
                calm = None;
            }
            let timeout = [self.timeout(), until_calm.filter(|left| !left.is_zero())].into_iter().flatten().min();
            for (kind, index) in wait(&self.urgent, timeout)? {
                match kind {
                    SIGNALS => self.take_signals(),
                    OUTPUTS => output = true,
                    EXIT => {
                        self.take_exit(index)?;
                        ended.push(index);
                    }
                    CACHE => self.take_cache()?,
                    ORDERS => self.take_orders(),
                    _ => self.take_control(index),
                }
            }
            ended.extend(self.poll_exits()?);
            // Before anything is written: the other ranks wait for one that will never come.
            self.spread_failure();
            ended.iter().for_each(|index| self.children[*index].drain(self.watcher));
            self.keep_deadline();
            self.hold_output()?;
            if output && !self.held {
                self.take_output()?;
            }
        }
        Ok(())
    }

    /// Takes the exits of ranks whose end nothing tells of.
    fn poll_exits(&mut self) -> io::Result<Vec<usize>> {
        let polled = self.children.iter().enumerate().filter(|(_, child)| child.is_polled() && has_ended(child.pid));
        let ended: Vec<usize> = polled.map(|(index, _)| index).collect();
        for index in &ended {
            self.take_exit(*index)?;
        }
        Ok(ended)
    }

    /// The watch hears nothing more and ends.
    fn hush(&mut self) {
        self.tell = mpsc::channel().0;
    }

    fn tell_watch(&self, told: Told) {
        // The watch may have failed by itself, which does not concern the job.
        let _ = self.tell.send(told);
    }

    fn take_orders(&mut self) {
        for order in self.orders.take() {
            match order {
                Order::Relieve { order, action } => {
                    let message = ToRank::Relieve { order, action };
                    let heard = |(index, child): &(usize, &Child)| self.verdict.has_greeted(*index) && !child.ended;
                    self.children.iter().enumerate().filter(heard).for_each(|(_, child)| {
                        child.tell(&message);
                    });
                }
                Order::Stop if self.children.iter().any(|child| !child.ended) => self.ask_for_checkpoint(),
                Order::Stop => {}
            }
        }
    }

    /// `None`: nothing is due.
    fn timeout(&self) -> Option<Duration> {
        // Looked at often: the time in which the launcher itself is stopped does not count.
        let until = self.deadline.as_ref().map(|deadline| deadline.left().min(SLICE));
        let polled = self.children.iter().any(Child::is_polled).then_some(POLL);
        [until, self.held.then_some(HOLD), polled].into_iter().flatten().min()
    }

    fn signal_groups(&self, signal: Signal) {
        self.children.iter().filter(|child| !child.ended).for_each(|child| child.signal_group(signal));
    }

    fn start_grace(&mut self) {
        self.deadline.get_or_insert_with(|| Deadline::new(self.spec.grace));
    }

    fn keep_deadline(&mut self) {
        if self.deadline.as_ref().is_some_and(Deadline::is_over) {
            let late: Vec<String> =
                self.children.iter().filter(|child| !child.ended).map(|child| child.rank.to_string()).collect();
            if !late.is_empty() {
                let (s, late) = (self.spec.grace.as_secs_f64(), late.join(", "));
                self.watcher.note(&format!("not stopped within {s} s, killed: rank {late}"));
            }
            self.signal_groups(Signal::KILL);
            // SIGKILL cannot be refused: all that is left is to wait for the exits.
            self.deadline = Some(Deadline::new(Duration::from_secs(3600)));
        }
    }

    fn take_exit(&mut self, index: usize) -> io::Result<()> {
        if self.children[index].ended {
            return Ok(());
        }
        // Its last messages are read before its exit is handled.
        self.take_control(index);
        let child = &mut self.children[index];
        // While it is not reaped its number is still its own; whatever it left in its group ends now.
        child.signal_group(Signal::KILL);
        self.guard.forget(child.pid);
        if let Some(host) = self.cache {
            host.rank_gone(child.rank);
        }
        if let Some(end) = child.reap()? {
            tracing::debug!(rank = child.rank, "rank ended: {end}");
            if let Ok(pidfd) = &child.pidfd {
                epoll::delete(&self.urgent, pidfd)?;
            }
            self.pass_on_stop(index, end);
            self.verdict.ended(index, end);
        }
        Ok(())
    }

    /// The launcher itself finds fault with a rank, which has to end.
    fn fail(&mut self, index: usize, code: u8, error: String) {
        self.verdict.said(index, Said { code, step: None, error });
        self.children[index].signal(Signal::TERM);
    }

    /// Once, when a failure is known: the other ranks are asked to end.
    fn spread_failure(&mut self) {
        let Some(cause) = self.verdict.cause().filter(|_| !self.told) else {
            return;
        };
        let at = cause.index;
        let error = match (&cause.said, self.verdict.end_of(at)) {
            (Some(said), _) => said.error.chars().take(LONGEST_ERROR).collect(),
            (None, Some(end)) => end.to_string(),
            (None, None) => String::new(),
        };
        let message = ToRank::PeerFailed { rank: self.children[at].rank, error };
        for (index, child) in self.children.iter().enumerate().filter(|(index, _)| *index != at) {
            if !(self.verdict.has_greeted(index) && child.tell(&message)) {
                child.signal(Signal::TERM);
            }
        }
        self.told = true;
        self.verdict.told();
        self.start_grace();
    }

    /// Stops and resumes looking at the pipes as the watcher falls behind and catches up.
    fn hold_output(&mut self) -> io::Result<()> {
        let held = !self.watcher.ready();
        if held != self.held {
            let interest = if held { epoll::EventFlags::empty() } else { epoll::EventFlags::IN };
            epoll::modify(&self.urgent, &self.outputs, epoll::EventData::new_u64(OUTPUTS << 32), interest)?;
            self.held = held;
        }
        Ok(())
    }

    fn take_output(&mut self) -> io::Result<()> {
        for (kind, index) in wait(&self.outputs, Some(Duration::ZERO))? {
            let stream = if kind == OUT { Stream::Out } else { Stream::Err };
            // At its end the pipe is closed, which takes it out of the epoll set.
            self.children[index].read_output(stream, self.watcher);
        }
        Ok(())
    }
}

fn add(set: &OwnedFd, source: &OwnedFd, kind: u64, index: usize) -> io::Result<()> {
    Ok(epoll::add(set, source, epoll::EventData::new_u64(kind << 32 | index as u64), epoll::EventFlags::IN)?)
}

/// Kind and index of what is ready, in the order it became so.
fn wait(set: &OwnedFd, timeout: Option<Duration>) -> io::Result<Vec<(u64, usize)>> {
    let mut events = Vec::with_capacity(64);
    let timeout = timeout
        .map(|t| Timespec { tv_sec: t.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: t.subsec_nanos().into() });
    match epoll::wait(set, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let split = |event: &epoll::Event| {
        let data = event.data.u64();
        (data >> 32, (data & u64::from(u32::MAX)) as usize)
    };
    Ok(events.iter().map(split).collect())
}

#[cfg(test)]
mod tests;
