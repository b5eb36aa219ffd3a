//! Time in which processes run: suspension is distinguished from waiting.
//!
//! A process is suspended by SIGSTOP, by the freezer of its cgroup, or with its container. `CLOCK_MONOTONIC` goes on
//! meanwhile. Whoever waits looks at the clock often: a look that comes much too late means that the process itself did
//! not run. Others are asked for through `/proc`. The sleep of a whole machine needs no care: the clock sleeps as well.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long to wait at most before the next look at a [`Deadline`].
pub const SLICE: Duration = Duration::from_millis(250);
/// A look that comes later than its slice by this much was held up by a suspension.
const LATE: Duration = Duration::from_secs(1);
/// Pause of the ticking thread.
const TICK: Duration = Duration::from_millis(100);
/// How often the processes around this one are asked for.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// A limit on waiting. It counts time in which this process ran and, where the caller asks, nobody it waits for was
/// suspended.
#[derive(Debug)]
pub struct Deadline {
    limit: Duration,
    slice: Duration,
    waited: Cell<Duration>,
    last: Cell<Instant>,
    asked: Cell<(Instant, bool)>,
}

impl Deadline {
    pub fn new(limit: Duration) -> Self {
        Self::in_slices(limit, SLICE)
    }

    /// For a caller that looks at least every `slice`.
    pub fn in_slices(limit: Duration, slice: Duration) -> Self {
        let now = Instant::now();
        let asked = Cell::new((now, false));
        Self { limit, slice, waited: Cell::default(), last: Cell::new(now), asked }
    }

    /// The same, or `limit` from now where that is sooner.
    pub fn sooner(&self, limit: Duration) -> Self {
        Self::in_slices(self.left().min(limit), self.slice)
    }

    /// Returns the remaining time. Counts the time since the last look.
    pub fn left(&self) -> Duration {
        self.left_unless(|| false)
    }

    /// As [`Deadline::left`], where time in which `suspended` holds does not count. It is asked from time to time.
    pub fn left_unless(&self, suspended: impl FnOnce() -> bool) -> Duration {
        let now = Instant::now();
        let passed = now.duration_since(self.last.replace(now));
        let own = passed > self.slice + LATE.min((self.limit / 4).max(self.slice * 3));
        let counted = if own { self.slice } else { passed };
        let (at, was) = self.asked.get();
        let theirs = if now.duration_since(at) < ASK_EVERY { was } else { suspended() };
        if now.duration_since(at) >= ASK_EVERY {
            self.asked.set((now, theirs));
        }
        if theirs && !own {
            leave_out(passed);
        }
        if !theirs {
            self.waited.set(self.waited.get() + counted);
        }
        self.limit.saturating_sub(self.waited.get())
    }

    pub fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// As long as the next wait may last.
    pub fn next(&self) -> Duration {
        self.left().min(self.slice)
    }

    /// Time that counted.
    pub fn waited(&self) -> Duration {
        self.waited.get()
    }
}

/// True if a process is stopped by a signal or a debugger, or its cgroup is frozen. False where that is unknown.
pub fn is_suspended(pid: i32) -> bool {
    matches!(state_of(Path::new("/proc"), pid), Some('T' | 't')) || is_frozen(Path::new("/"), pid)
}

/// True if the parent of this process, or another child of it, is suspended: the launcher, and the node's other ranks.
pub fn others_are_suspended() -> bool {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let Some(parent) = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) else { return false };
    // Children of init have nothing to do with each other.
    parent > 1 && (is_suspended(parent) || children(parent).into_iter().any(|pid| pid != own && is_suspended(pid)))
}

/// Children that the main thread of `pid` started.
fn children(pid: i32) -> Vec<i32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

fn state_of(proc: &Path, pid: i32) -> Option<char> {
    // The name stands in brackets and may hold anything, bytes that are not UTF-8 too.
    let stat = std::fs::read(proc.join(pid.to_string()).join("stat")).ok()?;
    let behind = stat.iter().rposition(|byte| *byte == b')')?;
    stat[behind + 1..].iter().find(|byte| **byte != b' ').map(|byte| char::from(*byte))
}

fn is_frozen(root: &Path, pid: i32) -> bool {
    let groups = std::fs::read_to_string(root.join(format!("proc/{pid}/cgroup"))).unwrap_or_default();
    groups.lines().any(|line| {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { return false };
        let below = |base: &str| root.join(base).join(path.trim_start_matches('/'));
        let read = |file: PathBuf| std::fs::read_to_string(file).unwrap_or_default();
        match controllers {
            "" => read(below("sys/fs/cgroup").join("cgroup.events")).lines().any(|line| line == "frozen 1"),
            list if list.split(',').any(|name| name == "freezer") => {
                read(below("sys/fs/cgroup/freezer").join("freezer.state")).starts_with("FR")
            }
            _ => false,
        }
    })
}

/// Nanoseconds: suspended so far, and the last tick on the clock of [`base`].
static SUSPENDED_NS: AtomicU64 = AtomicU64::new(0);
static TICKED_NS: AtomicU64 = AtomicU64::new(0);

fn base() -> Instant {
    static BASE: OnceLock<Instant> = OnceLock::new();
    *BASE.get_or_init(Instant::now)
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Starts the thread by which [`suspended`] knows of this process's own suspensions. Once per process.
///
/// # Errors
/// No thread can be started.
pub fn watch_own() -> std::io::Result<()> {
    TICKED_NS.store(nanoseconds(base().elapsed()).max(1), Ordering::Release);
    std::thread::Builder::new().name("awake".into()).stack_size(64 << 10).spawn(tick).map(drop)
}

fn tick() {
    let mut starved = starved_ns();
    loop {
        std::thread::sleep(TICK);
        let now = nanoseconds(base().elapsed());
        let late = late_ns(now, TICKED_NS.swap(now, Ordering::AcqRel));
        let before = std::mem::replace(&mut starved, starved_ns());
        // A core that others used is no suspension.
        SUSPENDED_NS.fetch_add(late.saturating_sub(starved.saturating_sub(before)), Ordering::AcqRel);
    }
}

/// By how much a tick is later than any that is not suspended.
fn late_ns(now: u64, last: u64) -> u64 {
    let late = now.saturating_sub(last).saturating_sub(nanoseconds(TICK));
    if late > nanoseconds(LATE) { late } else { 0 }
}

/// How long this thread was ready to run while no core took it.
fn starved_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Counts time in which this process waited for suspended ones.
pub fn leave_out(time: Duration) {
    SUSPENDED_NS.fetch_add(nanoseconds(time), Ordering::AcqRel);
}

/// Time since the process began in which it was suspended, or waited for processes that were. Rises only.
pub fn suspended() -> Duration {
    let last = TICKED_NS.load(Ordering::Acquire);
    // The ticking thread may not have run yet since a suspension.
    let now = if last == 0 { 0 } else { late_ns(nanoseconds(base().elapsed()), last) };
    Duration::from_nanos(SUSPENDED_NS.load(Ordering::Acquire).saturating_add(now))
}

/// Measures time without suspensions.
#[derive(Clone, Copy, Debug)]
pub struct Stopwatch {
    began: Instant,
    suspended: Duration,
}

impl Stopwatch {
    pub fn start() -> Self {
        Self { began: Instant::now(), suspended: suspended() }
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed().saturating_sub(suspended().saturating_sub(self.suspended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{Pid, Signal, kill_process};
    use std::process::Command;

    #[test]
    fn a_stopped_process_is_suspended_until_it_continues() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let (pid, id) = (Pid::from_child(&child), child.id() as i32);
        let is = |wanted: bool| (0..100_000).any(|_| is_suspended(id) == wanted);
        kill_process(pid, Signal::STOP).unwrap();
        let stopped = is(true);
        kill_process(pid, Signal::CONT).unwrap();
        let continued = is(false);
        let _ = child.kill();
        let _ = child.wait();
        assert!(stopped && continued && !is_suspended(id), "a process that is gone is not suspended");
    }

    #[test]
    fn frozen_groups_of_both_versions_are_known_and_names_may_be_anything() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &[u8]| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/7/cgroup", b"0::/job/a\n");
        write("sys/fs/cgroup/job/a/cgroup.events", b"populated 1\nfrozen 0\n");
        assert!(!is_frozen(root.path(), 7));
        write("sys/fs/cgroup/job/a/cgroup.events", b"populated 1\nfrozen 1\n");
        assert!(is_frozen(root.path(), 7));
        write("proc/8/cgroup", b"5:memory:/m\n4:freezer:/docker/x\n");
        for (text, frozen) in [("THAWED\n", false), ("FREEZING\n", true), ("FROZEN\n", true)] {
            write("sys/fs/cgroup/freezer/docker/x/freezer.state", text.as_bytes());
            assert_eq!(is_frozen(root.path(), 8), frozen, "{text}");
        }
        write("proc/9/stat", b"9 (a \xff) R (x) T 1 9 9");
        assert_eq!(state_of(&root.path().join("proc"), 9), Some('T'));
    }

    #[test]
    fn time_that_a_deadline_could_not_see_does_not_count() {
        let deadline = Deadline::in_slices(Duration::from_secs(8), Duration::from_millis(50));
        let ago = |s: f64| Instant::now().checked_sub(Duration::from_secs_f64(s)).unwrap();
        deadline.last.set(ago(100.0));
        assert!(deadline.left() > Duration::from_secs(7), "{:?}", deadline.left());
        for _ in 0..16 {
            deadline.last.set(ago(0.5));
            deadline.left();
        }
        assert!(deadline.is_over(), "{:?}", deadline.left());
    }

    #[test]
    fn time_in_which_others_are_suspended_does_not_count() {
        let deadline = Deadline::new(Duration::from_secs(1));
        let ago = |s: f64| Instant::now().checked_sub(Duration::from_secs_f64(s)).unwrap();
        for _ in 0..100 {
            deadline.last.set(ago(0.2));
            deadline.asked.set((ago(1.0), false));
            deadline.left_unless(|| true);
        }
        assert!(deadline.left() > Duration::from_millis(700), "{:?}", deadline.left());
        for _ in 0..10 {
            deadline.last.set(ago(0.2));
            deadline.asked.set((ago(1.0), true));
            deadline.left_unless(|| false);
        }
        assert!(deadline.is_over());
    }

    #[test]
    fn no_limit_is_ever_too_long_for_the_clock() {
        let deadline = Deadline::new(Duration::MAX);
        assert!(!deadline.is_over() && deadline.next() == SLICE);
        assert!(deadline.sooner(Duration::from_secs(1)).left() <= Duration::from_secs(1));
    }

    #[test]
    fn a_late_tick_is_a_suspension_and_a_little_late_one_is_none() {
        let s = |s: f64| (s * 1e9) as u64;
        assert_eq!(late_ns(s(10.5), s(10.0)), 0);
        assert_eq!(late_ns(s(16.1), s(10.0)), s(6.0));
    }
}
