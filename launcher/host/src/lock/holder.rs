//! Identity of the process that holds a lock, and the judgement on whether it still runs.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A lock of a host that cannot be looked at is over when its file was not touched for this long: ten heartbeats, and more
/// than an NFS client keeps attributes (60 s).
pub const STALE: Duration = Duration::from_secs(300);

/// Holders made by this process.
static MADE: AtomicU64 = AtomicU64::new(0);

/// Content of the lock's file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub host: String,
    pub program: String,
    /// When the lock was taken, seconds since 1970.
    pub since: u64,
    /// Start of the process, clock ticks since boot.
    pub started: Option<u64>,
    /// `/proc/sys/kernel/random/boot_id`: the same for all containers of one running kernel.
    pub boot: Option<String>,
    /// `/etc/machine-id`.
    pub machine: Option<String>,
    /// Inode of the namespace in which `pid` counts.
    pub pid_namespace: Option<u64>,
    /// The holder also has the file locked with `flock`, which ends with the process.
    pub flocked: bool,
    /// Tells two locks of one process apart.
    pub nonce: u64,
}

impl Holder {
    /// This process.
    pub fn this(program: &str) -> Self {
        use std::os::unix::fs::MetadataExt;
        let text = |path| std::fs::read_to_string(path).ok().map(|text: String| text.trim().to_owned());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let count = MADE.fetch_add(1, Ordering::Relaxed);
        Self {
            pid: std::process::id(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            program: program.to_owned(),
            since: now.as_secs(),
            // By the link: where /proc shows another process namespace, the number would mean another process.
            started: stat_of("self").map(|(_, started)| started),
            boot: text("/proc/sys/kernel/random/boot_id").filter(|id| !id.is_empty()),
            machine: text("/etc/machine-id").filter(|id| !id.is_empty()),
            pid_namespace: std::fs::metadata("/proc/self/ns/pid").ok().map(|facts| facts.ino()),
            flocked: false,
            nonce: (u64::from(std::process::id()) << 32 | u64::from(now.subsec_nanos())) ^ (count << 50),
        }
    }

    /// `process 4242 on node7 (launch, since 2026-11-29 05:58:01 UTC)`.
    pub fn shown(&self) -> String {
        let Self { pid, host, program, .. } = self;
        format!("process {pid} on {host} ({program}, since {})", readable(self.since))
    }

    fn same_kernel(&self, other: &Self) -> bool {
        self.boot.is_some() && self.boot == other.boot
    }

    /// The machines' names agree. `localhost` without a machine id names any machine.
    fn same_host(&self, other: &Self) -> bool {
        let named = self.machine.is_some() || !self.host.starts_with("localhost");
        named && self.host == other.host && self.machine == other.machine
    }
}

/// The process that a lock names, as seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    Gone,
    /// It runs; its start, clock ticks since boot.
    Started(u64),
    /// It exists, and more cannot be read: it belongs to another user, or /proc is restricted.
    Hidden,
}

/// Judgement on a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Alive,
    /// Taken for alive since its file was touched so long ago.
    Beating(Duration),
    /// Over, with the reason.
    Over(String),
}

/// Ways to look at a holder from here.
pub struct Looks<'a> {
    pub process: &'a dyn Fn(u32) -> Process,
    /// True if the file can be locked with `flock`; `None` means unknown.
    pub flock_is_free: &'a dyn Fn() -> Option<bool>,
    /// Time since the file was touched, by the file system's clock.
    pub age: Duration,
}

/// Decides whether `holder` still runs, seen by the process `own`.
pub fn judge(holder: &Holder, own: &Holder, looks: &Looks) -> Verdict {
    let over = |why: &str| Verdict::Over(why.to_owned());
    if holder.same_kernel(own) {
        if holder.pid_namespace == own.pid_namespace {
            match ((looks.process)(holder.pid), holder.started) {
                (Process::Gone, _) => return over("that process has ended"),
                (Process::Started(now), Some(then)) if now == then => return Verdict::Alive,
                (Process::Started(_), Some(_)) => {
                    return over("that process has ended, its number means another one now");
                }
                _ => {}
            }
        }
        if holder.flocked
            && let Some(free) = (looks.flock_is_free)()
        {
            return if free { over("that process has ended") } else { Verdict::Alive };
        }
    } else if holder.boot.is_some() && own.boot.is_some() && holder.same_host(own) {
        return over("that host has been started again since");
    }
    by_age(looks.age)
}

/// Judgement by the heartbeat alone.
pub fn by_age(age: Duration) -> Verdict {
    match age < STALE {
        true => Verdict::Beating(age),
        false => Verdict::Over(format!("it has given no sign of life for {} minutes", age.as_secs() / 60)),
    }
}

/// Looks at process `pid` of this process's namespace.
pub fn process(pid: u32) -> Process {
    let Some(number) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return Process::Gone };
    // Before /proc, which may hide processes of other users.
    if rustix::process::test_kill_process(number) == Err(rustix::io::Errno::SRCH) {
        return Process::Gone;
    }
    match stat_of(&pid.to_string()) {
        Some(('Z' | 'X', _)) => Process::Gone,
        Some((_, started)) => Process::Started(started),
        None => Process::Hidden,
    }
}

/// State and start (field 22) from `/proc/<who>/stat`.
pub fn stat_of(who: &str) -> Option<(char, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{who}/stat")).ok()?;
    // The name in parentheses may hold anything; the state follows, and 18 fields later the start.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// `2026-11-29 05:58:01 UTC`.
fn readable(seconds: u64) -> String {
    let stamp = crate::stamp::time_stamp(UNIX_EPOCH + Duration::from_secs(seconds));
    let part = |from: usize, to: usize| stamp.get(from..to).unwrap_or_default();
    let (date, time) = ([part(0, 4), part(4, 6), part(6, 8)], [part(9, 11), part(11, 13), part(13, 15)]);
    format!("{} {} UTC", date.join("-"), time.join(":"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder() -> Holder {
        Holder {
            pid: 7,
            host: "node1".into(),
            program: "launch".into(),
            since: 1_763_655_609,
            started: Some(100),
            boot: Some("boot-a".into()),
            machine: Some("machine-a".into()),
            pid_namespace: Some(1),
            flocked: true,
            nonce: 5,
        }
    }

    fn judged(change: impl Fn(&mut Holder), process: Process, flock_is_free: Option<bool>, age_s: u64) -> Verdict {
        let mut changed = holder();
        change(&mut changed);
        let looks = Looks { process: &|_| process, flock_is_free: &|| flock_is_free, age: Duration::from_secs(age_s) };
        judge(&changed, &Holder { pid: 8, started: Some(900), nonce: 6, ..holder() }, &looks)
    }

    fn is_over(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Over(_))
    }

    #[test]
    fn a_process_of_this_kernel_is_looked_at() {
        let same = |_: &mut Holder| {};
        assert_eq!(judged(same, Process::Started(100), Some(true), 9999), Verdict::Alive);
        assert!(is_over(&judged(same, Process::Started(101), Some(false), 0)), "the number was given out again");
        assert!(is_over(&judged(same, Process::Gone, Some(false), 0)));
        // Hidden: the kernel's lock knows, and without one the heartbeat.
        assert_eq!(judged(same, Process::Hidden, Some(false), 9999), Verdict::Alive);
        assert!(is_over(&judged(same, Process::Hidden, Some(true), 0)));
        assert_eq!(judged(same, Process::Hidden, None, 10), Verdict::Beating(Duration::from_secs(10)));
    }

    #[test]
    fn another_container_of_this_kernel_is_judged_by_the_kernels_lock() {
        let container = |holder: &mut Holder| (holder.pid_namespace, holder.host) = (Some(2), "3f2a".into());
        // The number means another process here.
        assert_eq!(judged(container, Process::Gone, Some(false), 9999), Verdict::Alive);
        assert!(is_over(&judged(container, Process::Started(100), Some(true), 0)));
        let no_flock = |holder: &mut Holder| (holder.pid_namespace, holder.flocked) = (Some(2), false);
        assert!(matches!(judged(no_flock, Process::Gone, Some(true), 10), Verdict::Beating(_)));
    }

    #[test]
    fn another_boot_of_this_host_is_over_and_another_host_is_judged_by_its_heartbeat() {
        let boot = |holder: &mut Holder| holder.boot = Some("boot-b".into());
        assert!(is_over(&judged(boot, Process::Started(100), Some(false), 0)));
        let other = |holder: &mut Holder| {
            boot(holder);
            (holder.host, holder.machine) = ("node2".into(), Some("machine-b".into()));
        };
        assert!(matches!(judged(other, Process::Gone, Some(true), 299), Verdict::Beating(_)));
        let Verdict::Over(why) = judged(other, Process::Gone, Some(true), 300) else { panic!("stale") };
        assert_eq!(why, "it has given no sign of life for 5 minutes");
        // Two machines with one name, and any two that call themselves localhost.
        let cloned = |holder: &mut Holder| (holder.boot, holder.machine) = (Some("b".into()), Some("m".into()));
        assert!(matches!(judged(cloned, Process::Gone, None, 0), Verdict::Beating(_)));
        let unknown = |holder: &mut Holder| holder.boot = None;
        assert!(matches!(judged(unknown, Process::Gone, None, 0), Verdict::Beating(_)));
        let nameless = Holder { host: "localhost".into(), machine: None, ..holder() };
        assert!(!nameless.same_host(&nameless));
    }

    #[test]
    fn this_process_is_alive_and_named() {
        let own = Holder::this("launch");
        assert_eq!(process(own.pid), Process::Started(own.started.unwrap()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        while process(pid) != Process::Gone {
            std::thread::yield_now();
        }
        // Dead, though nobody has reaped it.
        child.wait().unwrap();
        assert_eq!(process(u32::MAX), Process::Gone);
        assert_eq!(holder().shown(), "process 7 on node1 (launch, since 2025-11-20 16:20:09 UTC)");
    }
}
