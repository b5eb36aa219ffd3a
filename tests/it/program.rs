//! `launch --exec` around a user's own program when things go wrong: kills, a full cgroup, ranks inside a rank, no right to a cgroup.

use crate::pressure::{Limited, wait_for_line};
use crate::python::{python, with_package};
use crate::support::{Running, folder, launch_program, read_lines};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// `launch` with `words`, then the script by the interpreter.
fn launch(place: &Path, words: &[&str], script: &str) -> Command {
    fs::write(place.join("train.py"), script).unwrap();
    let mut command = with_package(Command::new(launch_program()));
    command.current_dir(place).args(words).arg("--exec").arg(python()).arg("train.py");
    command
}

const ENDLESS: &str = "
import os, sys, time, numpy as np, headroom_train as headroom
class Data:
    def __len__(self): return 64
    def __getitem__(self, i): return np.full(1000, i, np.float32), i
loader = headroom.DataLoader(headroom.cached(Data()), batch_size=8, shuffle=True, num_workers=2)
loader.threads()
pids = [os.getpid(), *(process.pid for process in loader._pool.processes)]
with open(f'pids{loader.rank}.new', 'w') as file:
    file.write(' '.join(map(str, pids)))
os.rename(f'pids{loader.rank}.new', f'pids{loader.rank}')
step = 0
while not headroom.stopping():
    for x, y in loader:
        step += 1
        headroom.report(step, samples=16)
loader.close()
";

fn lives(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn gone(pids: &[i32]) {
    let since = Instant::now();
    while let Some(pid) = pids.iter().find(|pid| lives(**pid)) {
        assert!(since.elapsed() < Duration::from_secs(60), "process {pid} of {pids:?} outlives the run");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn listed(folder: &str) -> BTreeSet<String> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into())
        .collect()
}

/// Abstract sockets and files in memory that have this program's name.
fn traces() -> BTreeSet<String> {
    let sockets = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let sockets = sockets.lines().filter_map(|line| line.split_whitespace().last());
    sockets.filter(|name| name.starts_with("@headroom")).map(Into::into).chain(listed("/dev/shm")).collect()
}

/// One run in which `whom` is killed; its words at the end.
fn killed(whom: &str) -> String {
    let place = folder();
    let before = traces();
    let mut command = launch(place.path(), &["--ranks", "2", "--cache", "16MiB", "--name", "killed"], ENDLESS);
    let mut running = Running::start(&mut command, place.path());
    let there = |rank: usize| place.path().join(format!("pids{rank}"));
    assert!(running.until("ranks", || there(0).exists() && there(1).exists()), "{}", running.read("err"));
    let pids = |rank: usize| -> Vec<i32> {
        fs::read_to_string(there(rank)).unwrap().split(' ').map(|pid| pid.parse().unwrap()).collect()
    };
    let (first, second) = (pids(0), pids(1));
    let launcher = running.child.id() as i32;
    let victim = match whom {
        "launcher" => launcher,
        "rank" => second[0],
        _ => second[1],
    };
    kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL).unwrap();
    if whom == "worker" {
        // Its thread notices at the next sample, or at the loader's end.
        gone(&[victim]);
        running.signal(Signal::TERM);
    }
    let ended = running.wait();
    gone(&[&first[..], &second[..], &[launcher]].concat());
    let left: Vec<String> =
        traces().difference(&before).filter(|name| name.contains(&format!("-{launcher}"))).cloned().collect();
    assert_eq!(left, Vec::<String>::new(), "{whom}: {ended}");
    match whom {
        "launcher" => assert_eq!(ended.code, None, "{ended}"),
        "rank" => assert_eq!(ended.code, Some(137), "{ended}"),
        _ => assert!(ended.code.is_some(), "{ended}"),
    }
    format!("{}\n{}", ended.out, ended.err)
}

/// `HEADROOM_KILLS` says how often; 20 by hand.
#[test]
fn kill_9_of_launcher_rank_or_worker_leaves_nothing_and_is_named() {
    let rounds = std::env::var("HEADROOM_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    for round in 0..rounds {
        for whom in ["launcher", "rank", "worker"] {
            let said = killed(whom);
            if whom == "rank" {
                assert!(said.contains("rank 1") && said.contains("SIGKILL"), "{said}");
            }
        }
        println!("round {}: launcher, rank and worker killed, nothing left", round + 1);
    }
}

const KEEPS: &str = "
import os, sys, time
import numpy as np
def decode(key): return np.full(2 << 20, key, np.uint8)
if 'HEADROOM_CACHE_DOOR' in os.environ:
    import headroom_train as headroom
    cache = headroom.Cache()
    get = lambda key: cache.get_or(key, lambda: decode(key))
else:
    kept = {}
    def get(key):
        if key not in kept: kept[key] = decode(key)
        return kept[key]
def epoch():
    for key in range(64): assert get(key)[5] == key
epoch()
open('warm', 'w').close()
while not os.path.exists('go'):
    epoch()
    time.sleep(0.02)
more = bytearray(b'x') * (64 << 20)
epoch()
print('all', len(more), flush=True)
";

/// Fills its group once.
const ONCE: &str = "
import sys, time
usage, stat, prefix, wanted = sys.argv[1:5]
def used():
    facts = dict(line.split() for line in open(stat))
    return int(open(usage).read()) - int(facts[prefix + 'active_file']) - int(facts[prefix + 'inactive_file'])
kept = []
while used() < int(wanted): kept.append(bytearray(b'x') * (2 << 20))
open('filled' + wanted, 'w').close()
time.sleep(600)
";

#[test]
fn a_full_cgroup_kills_a_program_and_not_one_whose_samples_are_in_the_cache() {
    for with in [false, true] {
        let place = folder();
        let Some(group) = Limited::make(if with { "cached" } else { "plain" }, 400 << 20) else { return };
        let mut command = launch(place.path(), &["--cache", "128MiB", "--name", "pressed"], KEEPS);
        if !with {
            command = Command::new(python());
            command.arg("train.py").env("OMP_NUM_THREADS", "1");
        }
        let there = |name: &str| place.path().join(name).exists();
        let mut running = Running::start(group.within(&command).current_dir(place.path()), place.path());
        assert!(running.until("a first epoch", || there("warm")), "{}", running.read("err"));
        // Several, so that none of them is the largest process, which the kernel takes.
        let fillers = [230 << 20, 300 << 20, 368 << 20].map(|bytes: u64| {
            let mut filler = Command::new("python3");
            filler.args(["-c", ONCE]).args(group.usage()).arg(bytes.to_string());
            let mut filler = Running::start(group.within(&filler).current_dir(place.path()), place.path());
            let filled = filler.until("the hog", || there(&format!("filled{bytes}")));
            assert!(filled, "{}", filler.read("err"));
            filler
        });
        if with {
            wait_for_line(&mut running, "memory: page cache shrinks");
        }
        fs::write(place.path().join("go"), "").unwrap();
        let ended = running.wait();
        drop(fillers);
        match with {
            false => assert!(ended.code != Some(0) && group.oom_kills() > 0, "{ended}"),
            true => assert!(ended.code == Some(0) && ended.out.contains("all 67108864"), "{ended}"),
        }
    }
}

const DEAF: &str = "
import os, time
held = bytearray(b'x') * (100 << 20)
open('warm', 'w').close()
while not os.path.exists('go'): time.sleep(0.02)
print('all', len(held), flush=True)
";

/// The signal that asks for a checkpoint would end it.
#[test]
fn a_program_without_a_handler_is_not_ended_for_memory() {
    let place = folder();
    let Some(group) = Limited::make("deaf", 400 << 20) else { return };
    let there = |name: &str| place.path().join(name).exists();
    let command = launch(place.path(), &["--cache", "1MiB", "--memory-budget", "95%", "--name", "deaf"], DEAF);
    let mut running = Running::start(group.within(&command).current_dir(place.path()), place.path());
    assert!(running.until("the program", || there("warm")), "{}", running.read("err"));
    let full = 394 << 20;
    let mut filler = Command::new("python3");
    filler.args(["-c", ONCE]).args(group.usage()).arg(full.to_string());
    let mut filler = Running::start(group.within(&filler).current_dir(place.path()), place.path());
    assert!(filler.until("the hog", || there(&format!("filled{full}"))), "{}", filler.read("err"));
    wait_for_line(&mut running, "no process of the program takes SIGUSR1");
    drop(filler);
    fs::write(place.path().join("go"), "").unwrap();
    let ended = running.wait();
    assert!(ended.code == Some(0) && ended.out.contains("all 104857600"), "{ended}");
    assert!(!format!("{}{}", ended.out, ended.err).contains("stopped for memory"), "{ended}");
}

const AGENT: &str = "
import os, subprocess, sys
inner = '''
import os, time, signal
signal.signal(signal.SIGUSR1, lambda *_: (open(\"saved\" + os.environ[\"RANK\"], \"w\").close(), os._exit(0)))
import headroom_train as headroom
held = bytearray(b\"x\") * ((20 + 20 * int(os.environ[\"RANK\"])) << 20)
headroom.report(1, samples=1)
open(\"up\" + os.environ[\"RANK\"], \"w\").close()
time.sleep(float(os.environ[\"STAY\"]))
'''
start = lambda rank: subprocess.Popen([sys.executable, '-c', inner], start_new_session=True, env=dict(
    os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2'))
sys.exit(sum(child.wait() for child in [start(0), start(1)]))
";

/// As torchrun does: one process of the job starts the ranks.
#[test]
fn ranks_inside_one_process_are_recorded_by_their_own_numbers() {
    let place = folder();
    let mut command = launch(place.path(), &["--name", "inside"], AGENT);
    let ended = Running::start(command.env("STAY", "2.5"), place.path()).wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    let run = place.path().join("runs/inside");
    let most = |rank: usize| {
        let of_rank = |line: &serde_json::Value| line["ranks"].get(rank)?.get("uss_bytes")?.as_u64();
        read_lines(&run.join("memory.node.jsonl")).iter().filter_map(of_rank).max().unwrap_or(0)
    };
    assert!(most(0) > 20 << 20 && most(1) > 40 << 20, "{} {}", most(0), most(1));
    for rank in 0..2 {
        assert!(!read_lines(&run.join(format!("memory.rank{rank}.jsonl"))).is_empty());
    }
}

/// Stands in for systemd-run: says what it was asked, and does it.
const SYSTEMD_RUN: &str = "#!/bin/sh
echo \"$@\" >> asked
while [ \"$1\" != -- ]; do shift; done
shift
exec \"$@\"
";

#[test]
fn who_may_make_no_cgroup_gets_a_scope_of_systemd() {
    let place = folder();
    let fake = place.path().join("bin/systemd-run");
    fs::create_dir_all(place.path().join("bin")).unwrap();
    fs::create_dir_all(place.path().join("runtime/systemd")).unwrap();
    fs::write(&fake, SYSTEMD_RUN).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    // In a mount namespace of its own every cgroup is read-only.
    let readonly = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do mount --bind $d $d && mount -o remount,bind,ro $d; done 2>/dev/null; exec \"$@\"";
    let unshare = ["--mount", "sh", "-c", readonly, "sh"];
    let probe = Command::new("unshare")
        .args(unshare)
        .args(["sh", "-c", "! mkdir /sys/fs/cgroup/memory/x$$ && ! mkdir /sys/fs/cgroup/x$$"])
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        return println!("no mount namespace may be made here, so nothing is tested");
    }
    let path = format!("{}:{}", place.path().join("bin").display(), std::env::var("PATH").unwrap());
    let start = |runtime: &str| {
        let inner = launch(place.path(), &["--cache", "16MiB", "--memory-budget", "1GiB"], "print('ran')");
        let mut command = Command::new("unshare");
        command.args(unshare).arg(inner.get_program()).args(inner.get_args()).current_dir(place.path());
        command.env("PATH", &path).env("XDG_RUNTIME_DIR", place.path().join(runtime)).env("PYTHONPATH", "");
        Running::start(&mut command, place.path()).wait()
    };
    let ended = start("runtime");
    assert!(ended.code == Some(0) && ended.out.contains("ran"), "{ended}");
    let asked = fs::read_to_string(place.path().join("asked")).unwrap();
    let last = asked.lines().last().unwrap();
    assert!(last.starts_with("--user --scope --quiet -p MemoryHigh=1073741824 -p MemoryMax=1342177280 -- "), "{asked}");
    assert!(!ended.err.contains("no memory cgroup"), "{ended}");
    // Without a manager of the user's that is said, and the program runs.
    let ended = start("nothing");
    assert!(ended.code == Some(0) && ended.err.contains("no memory cgroup for the ranks"), "{ended}");
    assert_eq!(fs::read_to_string(place.path().join("asked")).unwrap(), asked);
}
