//! Supervision of real jobs: `launch` with a rank program whose work each test writes.

use crate::support::{Ended, Running, Runs, launch_program};
use rustix::process::Signal;
use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/script_rank.py");
const RANKS: usize = 3;

/// A job as the tests describe it: one Python program for every rank.
struct Job {
    script: String,
    grace_s: f64,
    restarts: u32,
    runs: Runs,
}

/// Helpers of these tests' ranks: their number, and control messages.
const PRELUDE: &str = r#"
import json, os, signal, socket, struct, sys, time
rank = int(os.environ["RANK"])
folder = os.environ["TEST_DIR"]
def mark(name): open(os.path.join(folder, f"{name}.{rank}.part"), "w").write(str(os.getpid())); os.rename(os.path.join(folder, f"{name}.{rank}.part"), os.path.join(folder, f"{name}.{rank}"))
def wait_for(name, ranks=3):
    while not all(os.path.exists(os.path.join(folder, f"{name}.{r}")) for r in range(ranks)): time.sleep(0.002)
def connect():
    global control
    control = socket.socket(fileno=int(os.environ["HEADROOM_CONTROL_FD"]))
    send(kind="hello", version=int(os.environ["TEST_VERSION"]), rank=rank)
def send(**message):
    body = json.dumps(message).encode()
    control.sendall(struct.pack("<I", len(body)) + body)
def receive():
    size = struct.unpack("<I", control.recv(4, socket.MSG_WAITALL))[0]
    return json.loads(control.recv(size, socket.MSG_WAITALL))
"#;

fn job(script: &str) -> Job {
    Job { script: format!("{PRELUDE}\n{script}"), grace_s: 30.0, restarts: 0, runs: Runs::new(&[]) }
}

impl Job {
    fn command(&self) -> Command {
        let (ranks, restarts) = (RANKS.to_string(), self.restarts.to_string());
        let mut command = self.runs.command(&["--ranks", &ranks, "--max-restarts", &restarts, "--name", "job"]);
        command.arg("--set").arg(format!("train.stop_grace={}", self.grace_s));
        command.env("HEADROOM_RANK", PROGRAM).env("JOB_SCRIPT", &self.script).env("TEST_DIR", self.runs.path());
        command.env("TEST_VERSION", spec::contract::VERSION.to_string());
        command
    }

    fn start(&self) -> Running {
        Running::start(&mut self.command(), self.runs.path())
    }

    fn run(&self) -> Ended {
        self.start().wait()
    }

    /// Waits until every rank has left its mark.
    fn wait_for(&self, name: &str) -> Vec<i32> {
        (0..RANKS).map(|rank| self.pid_at(&format!("{name}.{rank}"))).collect()
    }

    fn pid_at(&self, file: &str) -> i32 {
        let path = self.runs.path().join(file);
        eventually(&format!("{file} appears"), || path.exists());
        fs::read_to_string(path).unwrap().parse().unwrap()
    }

    fn log(&self, rank: usize) -> Vec<u8> {
        fs::read(self.runs.run("job").path.join(format!("rank{rank}.log"))).unwrap()
    }
}

/// Far beyond what anything here takes; only a hang reaches it.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < end, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Letter of a process's state; `None`: gone, or dead and waiting to be reaped.
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next().filter(|state| !matches!(state, 'Z' | 'X'))
}

#[test]
fn output_is_prefixed_line_by_line_and_logged_in_full() {
    let job = job(r#"
sys.stdout.write(f"to out {rank}\npart"); sys.stdout.flush()
sys.stderr.buffer.write(b"to err \xff\n" + "".join(f"\r{i}%" for i in range(100)).encode() + b"\n"); sys.stderr.flush()
"#);
    let ended = job.run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for rank in 0..3 {
        let lines = |text: &str, line: &str| text.lines().filter(|l| *l == format!("[rank {rank}] {line}")).count();
        assert_eq!(lines(&ended.out, &format!("to out {rank}")), 1, "{}", ended.out);
        assert_eq!(lines(&ended.out, "part"), 1, "{}", ended.out);
        assert_eq!(lines(&ended.err, "to err \u{fffd}"), 1, "{}", ended.err);
        assert_eq!(lines(&ended.err, "99%"), 1, "{}", ended.err);
        assert!(!ended.err.contains('\r'));
        let log = job.log(rank);
        assert!(log.windows(8).any(|w| w == b"to err \xff") && log.windows(7).any(|w| w == b"50%\r51%"));
    }
}

/// Runs with a page cache of 4 MiB.
fn cached(policy: &str) -> Runs {
    Runs::new(&[&format!("data.cache={policy}"), "data.cache_size_gb=0.00390625"])
}

#[test]
fn ranks_get_the_page_cache_and_one_of_them_fills_for_all() {
    let mut job = job(r#"
import mmap, socket, struct
sock = socket.socket(fileno=int(os.environ["HEADROOM_CACHE_FD"]))
memory = mmap.mmap(int(os.environ["HEADROOM_CACHE_MEMFD"]), 4 << 20)
def send(body): sock.sendall(struct.pack("<I", len(body)) + body)
def receive():
    size, = struct.unpack("<I", sock.recv(4, socket.MSG_WAITALL))
    return sock.recv(size, socket.MSG_WAITALL)
send(struct.pack("<BQIQQQB", 2, 1, 1, 77, 1000, 5, 0))
grant = receive()[13:]
if grant[0] == 2: grant = receive()[9:]
offset, = struct.unpack("<Q", grant[1:9])
if grant[0] == 1:
    time.sleep(0.3)
    memory[offset:offset + 1000] = b"x" * 1000
    send(struct.pack("<BIQ", 3, 1, 77))
    print("filled")
else:
    print("read", memory[offset:offset + 1000] == b"x" * 1000)
# Replies in order: when this one is there, the message before it was taken.
send(struct.pack("<BQ", 6, 9)); receive()
"#);
    job.runs = cached("next_use");
    let ended = job.run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    let lines = |end: &str| ended.out.lines().filter(|line| line.ends_with(end)).count();
    assert_eq!((lines("] filled"), lines("] read True")), (1, 2), "{}", ended.out);
}

#[test]
fn a_rank_killed_while_filling_is_followed_by_the_next() {
    let mut job = job(r#"
import socket, struct
sock = socket.socket(fileno=int(os.environ["HEADROOM_CACHE_FD"]))
def send(body): sock.sendall(struct.pack("<I", len(body)) + body)
def receive():
    size, = struct.unpack("<I", sock.recv(4, socket.MSG_WAITALL))
    return sock.recv(size, socket.MSG_WAITALL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank: wait_for("filling", 1)
send(struct.pack("<BQIQQQB", 2, 1, 1, 77, 1000, 5, 0))
assert receive()[13] == (2 if rank else 1)
mark("waiting" if rank else "filling")
if not rank:
    while not all(os.path.exists(os.path.join(folder, f"waiting.{r}")) for r in (1, 2)): time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
# The second waiter's turn comes when the first has ended without publishing.
print("granted", receive()[9])
"#);
    job.runs = cached("pin");
    let ended = job.run();
    assert_eq!(ended.code, Some(137), "{}", ended.err);
    for rank in [1, 2] {
        assert!(ended.out.contains(&format!("[rank {rank}] granted 1")), "{}{}", ended.out, ended.err);
    }
}

#[test]
fn no_line_is_lost_in_a_flood() {
    let ended = job("for i in range(50000): print('line', i)").run();
    for rank in 0..3 {
        let prefix = format!("[rank {rank}] line ");
        let numbers: Vec<u32> = ended.out.lines().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok()).collect();
        assert!(numbers.iter().copied().eq(0..50000), "rank {rank}: {} lines", numbers.len());
    }
}

#[test]
fn a_failure_is_heard_while_nobody_reads_the_output() {
    let job = job(r#"
if rank == 0:
    mark("flooding")
    while True: print("x" * 1000)
wait_for("flooding", 1)
if rank == 2: mark("waiting"); signal.pause()
time.sleep(0.5)
while not os.path.exists(os.path.join(folder, "waiting.2")): time.sleep(0.002)
sys.exit(5)
"#);
    let mut child = job.command().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let peer = job.pid_at("waiting.2");
    eventually("the peer ends although the flood stands still", || state(peer).is_none());
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || out.read_to_end(&mut Vec::new()));
    let mut text = String::new();
    err.read_to_string(&mut text).unwrap();
    reader.join().unwrap().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5), "{text}");
    assert!(text.contains("rank 1 failed: exit code 5"), "{text}");
}

#[test]
fn exit_code_or_signal_of_the_failed_rank_is_the_launchers_own() {
    for (end, code, words) in [
        ("sys.exit(42)", 42, "rank 1 failed: exit code 42"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "rank 1 failed: SIGSEGV (signal 11)"),
    ] {
        let script = format!(
            r#"
if rank != 1: signal.pause()
for i in range(30): print("line", i, flush=True)
{end}"#
        );
        let ended = job(&script).run();
        assert_eq!(ended.code, Some(code), "{}", ended.err);
        assert!(ended.err.contains(words), "{}", ended.err);
        let (_, last) = ended.err.split_once("last lines of rank 1:").unwrap();
        assert!(last.contains("line 20\n") && last.contains("line 29") && !last.contains("line 19"), "{last}");
    }
}

#[test]
fn the_rank_that_failed_first_is_named_although_others_fail_too() {
    let job = job(r#"
signal.signal(signal.SIGTERM, signal.SIG_IGN)
mark("up"); wait_for("up")
if rank == 2: sys.exit(12)
first = open(os.path.join(folder, "up.2")).read()
def is_dead():
    try: return open(f"/proc/{first}/stat").read().rsplit(") ", 1)[1][0] in "ZX"
    except OSError: return True
while not is_dead(): pass
os._exit(10 + rank)
"#);
    let ended = job.run();
    assert_eq!(ended.code, Some(12), "{}", ended.err);
    assert!(ended.err.contains("rank 2 failed: exit code 12"), "{}", ended.err);
}

#[test]
fn what_a_rank_says_of_its_failure_is_passed_on_and_decides() {
    let job = job(r#"
connect(); mark("up"); wait_for("up")
if rank == 2:
    send(kind="failed", code=5, step=37, error="no space left on device")
    time.sleep(0.3)
    sys.exit(5)
message = receive()
send(kind="line", text=f"heard {message['kind']} of {message['rank']}: {message['error']}")
sys.exit(6 if rank == 0 else 9)
"#);
    let ended = job.run();
    assert_eq!(ended.code, Some(5), "{}", ended.err);
    assert!(ended.err.contains("rank 2 failed at step 37: no space left on device"), "{}", ended.err);
    for rank in [0, 1] {
        let heard = "heard peer_failed of 2: no space left on device";
        assert!(ended.out.contains(&format!("[rank {rank}] {heard}")), "{}", ended.out);
        assert!(String::from_utf8_lossy(&job.log(rank)).contains(heard));
    }
}

#[test]
fn ranks_share_one_memfd_and_inherit_nothing_else() {
    let job = job(r#"
connect()
comm = int(os.environ["HEADROOM_COMM_FD"])
if rank == 0: os.ftruncate(comm, 8); os.pwrite(comm, b"together", 0)
mark("up"); wait_for("up")
print("read", os.pread(comm, 8, 0).decode())
open_now = set(map(int, os.listdir("/proc/self/fd")))
known = {0, 1, 2, comm, control.fileno()}
known |= {int(os.environ[name]) for name in ("HEADROOM_CACHE_FD", "HEADROOM_CACHE_MEMFD") if name in os.environ}
print("others", [n for n in sorted(open_now - known) if os.path.exists(f"/proc/self/fd/{n}")])
taken = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP, signal.SIGCONT, signal.SIGCHLD, signal.SIGQUIT)
print("defaults", all(signal.getsignal(s) == signal.SIG_DFL for s in taken), signal.pthread_sigmask(signal.SIG_BLOCK, []) == set())
send(kind="done")
"#);
    let ended = job.run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for line in ["read together", "others []", "defaults True True"] {
        assert_eq!(ended.out.matches(line).count(), 3, "{line}\n{}", ended.out);
    }
}

#[test]
fn a_launcher_of_another_version_is_refused_with_a_reason() {
    let job = job(r#"
control = socket.socket(fileno=int(os.environ["HEADROOM_CONTROL_FD"]))
send(kind="hello", version=999, rank=rank)
signal.pause()
"#);
    let ended = job.run();
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    let versions = format!("contract version 999, the launcher {}", spec::contract::VERSION);
    assert!(ended.err.contains(&versions), "{}", ended.err);
}

#[test]
fn a_signal_reaches_every_rank_once_and_how_they_end_is_the_result() {
    for (handler, sent, code) in [
        ("lambda *_: stop(0)", Signal::TERM, 0),
        ("lambda *_: stop(75)", Signal::USR1, 75),
        // As ranks die while libtorch loads.
        ("signal.SIG_DFL", Signal::TERM, 76),
        ("lambda *_: stop(0)", Signal::INT, 0),
    ] {
        let script = format!(
            r#"
got = 0
def stop(code):
    global got
    got += 1
    if got == 1: time.sleep(0.2); print("stopped", got, flush=True); sys.exit(code)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(number, {handler})
mark("up")
while True: signal.pause()
"#
        );
        let job = job(&script);
        let child = job.start();
        job.wait_for("up");
        child.signal(sent);
        let ended = child.wait();
        assert_eq!(ended.code, Some(code), "{sent:?}: {}", ended.err);
        let stopped = if code == 76 { 0 } else { 3 };
        assert_eq!(ended.out.matches("stopped 1").count(), stopped, "{}", ended.out);
        assert!(!ended.err.contains("failed"), "{}", ended.err);
    }
}

const DEAF: &str = r#"
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(number, lambda *_: mark("asked"))
mark("up")
while True: time.sleep(1)
"#;

#[test]
fn ranks_that_do_not_stop_are_killed_after_the_grace() {
    let mut job = job(DEAF);
    job.grace_s = 0.2;
    let child = job.start();
    job.wait_for("up");
    child.signal(Signal::TERM);
    let ended = child.wait();
    assert_eq!(ended.code, Some(143), "{}", ended.err);
    assert!(ended.err.contains("not stopped within 0.2 s, killed: rank 0, 1, 2"), "{}", ended.err);
}

#[test]
fn a_second_interrupt_kills_at_once() {
    let mut job = job(DEAF);
    job.grace_s = 3600.0;
    let child = job.start();
    job.wait_for("up");
    child.signal(Signal::INT);
    job.wait_for("asked");
    child.signal(Signal::INT);
    let ended = child.wait();
    assert_eq!(ended.code, Some(130), "{}", ended.err);
}

#[test]
fn a_stopped_launcher_stops_its_ranks_and_continues_them() {
    let job = job("mark('up')\nwhile not os.path.exists(os.path.join(folder, 'go')): time.sleep(0.01)");
    let child = job.start();
    let ranks = job.wait_for("up");
    child.signal(Signal::TSTP);
    for pid in ranks.iter().copied().chain([child.child.id() as i32]) {
        eventually("it is stopped", || state(pid) == Some('T'));
    }
    fs::write(job.runs.path().join("go"), "").unwrap();
    child.signal(Signal::CONT);
    let ended = child.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
}

#[test]
fn a_killed_launcher_leaves_no_process() {
    let job = job(r#"
# Only a cgroup reaches a child that left the process group.
in_cgroup = "headroom-" in open("/proc/self/cgroup").read()
child = os.fork()
if child == 0 and in_cgroup: os.setsid()
mark("up" if child else "forked")
while True: time.sleep(1)
"#);
    let child = job.start();
    let mut pids = job.wait_for("up");
    pids.extend(job.wait_for("forked"));
    child.signal(Signal::KILL);
    for pid in pids {
        eventually("it ends with the launcher", || state(pid).is_none());
    }
    child.wait();
}

#[test]
fn what_a_rank_left_behind_ends_with_the_job() {
    let job = job("if os.fork() == 0:\n    mark('left')\n    while True: time.sleep(1)\nwait_for('left')");
    let ended = job.run();
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for pid in job.wait_for("left") {
        eventually("it ends with its rank", || state(pid).is_none());
    }
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let output = Command::new(launch_program()).args(["--ranks", "2", "--exec", "no-such-program"]).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(err.contains("rank 0: cannot start no-such-program"), "{err}");
}

#[test]
fn a_failed_job_is_started_again_as_often_as_allowed() {
    let script = "attempt = int(os.environ['HEADROOM_RESTARTS'])\nprint('attempt', attempt, flush=True)\nif rank == 1 and attempt < 2: sys.exit(6)";
    for (restarts, code) in [(2, 0), (1, 6)] {
        let mut job = job(script);
        job.restarts = restarts;
        let ended = job.run();
        assert_eq!(ended.code, Some(code), "{}", ended.err);
        assert_eq!(ended.err.matches("starting again").count(), restarts as usize, "{}", ended.err);
        let log = String::from_utf8_lossy(&job.log(1)).into_owned();
        assert!(log.contains("attempt 0\nattempt 1\n"), "{log}");
    }
}

/// What the start needs is given back: the ranks and their data need the memory. Pages of files and of the heap, all counted.
#[test]
fn a_launcher_that_supervises_three_ranks_holds_seven_mebibytes_at_most() {
    let folder = crate::support::folder();
    let mut command = Command::new(launch_program());
    command.args(["--ranks", "3", "--exec", "sh", "-c", "echo started; exec sleep 1000"]);
    let mut running = Running::start(&mut command, folder.path());
    let (files, pid) = (running.files(), running.child.id());
    let started = || fs::read_to_string(files.join("out")).unwrap_or_default().matches("started").count() == 3;
    assert!(running.until("three ranks", started), "{}", running.read("err"));
    let resident = || -> u64 {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    };
    // A moment after the start, and from then on: more than that is allowed to the start alone.
    let mut since = Instant::now();
    let stays = || {
        if resident() > 7 << 10 {
            since = Instant::now();
        }
        since.elapsed() > Duration::from_secs(3)
    };
    assert!(running.until("7 MiB for three seconds", stays), "{} KiB are resident", resident());
    println!("{} KiB are resident", resident());
    running.signal(Signal::TERM);
    running.wait();
}
