//! Real jobs under a real memory limit, with a hog beside them.

use crate::support::{Ended, Run, Running, Runs, read_lines};
use crate::watch::{cache_bytes, data, runs};
use rustix::process::Signal;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A memory cgroup (v1 or v2) of a test's own, with a hard limit.
pub struct Limited {
    dir: PathBuf,
    version: u32,
    limit_bytes: u64,
}

impl Limited {
    /// `None`: none may be made here, which is printed.
    pub fn make(name: &str, limit_bytes: u64) -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let path = |wanted: &str| {
            own.lines().find_map(|line| {
                let (names, path) = line.split_once(':')?.1.split_once(':')?;
                names.split(',').any(|name| name == wanted).then(|| path.trim_start_matches('/').to_owned())
            })
        };
        let (version, parent) = match (path("memory"), path("")) {
            (Some(path), _) => (1, Path::new("/sys/fs/cgroup/memory").join(path)),
            (None, path) => (2, Path::new("/sys/fs/cgroup").join(path?)),
        };
        let dir = parent.join(format!("test-{name}-{}", std::process::id()));
        let file = if version == 1 { "memory.limit_in_bytes" } else { "memory.max" };
        let made = fs::create_dir(&dir)
            .and_then(|()| fs::OpenOptions::new().write(true).open(dir.join("cgroup.procs")))
            .and_then(|_| fs::write(dir.join(file), limit_bytes.to_string()));
        match made {
            Ok(()) => Some(Self { dir, version, limit_bytes }),
            Err(error) => {
                let _ = fs::remove_dir(&dir);
                println!("no memory cgroup may be made here, so nothing is tested: {}: {error}", dir.display());
                None
            }
        }
    }

    /// The same command, run within the group.
    pub fn within(&self, command: &Command) -> Command {
        let mut inside = Command::new("sh");
        inside.args(["-c", "echo 0 > \"$0\" && exec \"$@\""]).arg(self.dir.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside
    }

    pub fn oom_kills(&self) -> u64 {
        let file = if self.version == 1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.dir.join(file)).unwrap();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Files of what is used and of its parts, and how the parts' names begin.
    pub fn usage(&self) -> [PathBuf; 3] {
        let (usage, prefix) =
            if self.version == 1 { ("memory.usage_in_bytes", "total_") } else { ("memory.current", "") };
        [self.dir.join(usage), self.dir.join("memory.stat"), prefix.into()]
    }

    /// Fills the group to the given level, and again whatever is given back.
    fn hog(&self, folder: &Path) -> Hog<'_> {
        let wanted = folder.join("wanted");
        fs::write(&wanted, "0").unwrap();
        let mut python = Command::new("python3");
        python.args(["-c", HOG]).args(self.usage()).arg(&wanted);
        let child = self.within(&python).stdin(Stdio::null()).spawn().unwrap();
        Hog { group: self, child, wanted }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        for _ in 0..500 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

const HOG: &str = r#"
import sys, time
usage, stat, prefix, wanted = sys.argv[1:]
def used():
    facts = dict(line.split() for line in open(stat))
    return int(open(usage).read()) - int(facts[prefix + "active_file"]) - int(facts[prefix + "inactive_file"])
kept = []
while True:
    while used() < int(open(wanted).read()): kept.append(bytearray(b"x") * (4 << 20))
    open(wanted + ".reached", "w").write(open(wanted).read())
    time.sleep(0.02)
"#;

struct Hog<'a> {
    group: &'a Limited,
    child: Child,
    wanted: PathBuf,
}

impl Hog<'_> {
    /// From now on the group is kept filled to `share` of its limit.
    fn fill(&self, share: f64) {
        let partial = self.wanted.with_extension("partial");
        fs::write(&partial, ((self.group.limit_bytes as f64 * share) as u64).to_string()).unwrap();
        fs::rename(partial, &self.wanted).unwrap();
    }

    fn wait_until_filled(&mut self) {
        let reached = self.wanted.with_extension("reached");
        while fs::read(&reached).ok() != fs::read(&self.wanted).ok() {
            assert_eq!(self.child.try_wait().unwrap(), None, "the hog lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(mut self) {
        self.child.kill().unwrap();
        assert_eq!(self.child.wait().unwrap().signal(), Some(9));
    }
}

impl Drop for Hog<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// All lines of a run's plan but what is left to others, bytes.
fn planned(run: &Run) -> u64 {
    let plan: serde_json::Value = serde_json::from_slice(&fs::read(run.path.join("plan.json")).unwrap()).unwrap();
    let lines = plan["budget"]["lines"].as_array().unwrap();
    lines.iter().filter(|line| line["name"] != "reserve").map(|line| line["bytes"].as_u64().unwrap()).sum()
}

/// Until `launch` says it.
pub fn wait_for_line(running: &mut Running, part: &str) {
    let said = |running: &Running| running.read("err").contains(part);
    while !said(running) {
        let alive = running.child.try_wait().unwrap().is_none();
        assert!(alive, "{part}: never\n{}\n{}", running.read("out"), running.read("err"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `memory: <what> …: <before> → <after>` among the lines of `launch`.
fn with_bytes(err: &str, what: &str) -> String {
    let line = err.lines().find(|line| line.contains(&format!("memory: {what}")));
    let line = line.unwrap_or_else(|| panic!("no line of {what}\n{err}"));
    let size =
        |text: &str| ["MB", "GB"].iter().any(|unit| text.strip_suffix(unit).is_some_and(|n| n.parse::<f64>().is_ok()));
    let (rest, after) = line.rsplit_once(" → ").unwrap_or_else(|| panic!("no bytes after: {line}"));
    let before = rest.rsplit_once(": ").unwrap().1;
    assert!(size(before) && size(after), "{line}");
    line.to_owned()
}

/// The step after which the ranks took smaller micro-batches.
fn halved_after(ended: &Ended) -> usize {
    let text = format!("{}\n{}", ended.out, ended.err);
    let step = text.split("memory is short after step ").nth(1).and_then(|rest| rest.split(':').next()?.parse().ok());
    step.unwrap_or_else(|| panic!("no step of the halving\n{text}"))
}

#[test]
fn real_pressure_takes_every_rung_in_order_is_recovered_from_and_changes_no_loss_but_by_rounding() {
    // SGD hands a rounding on as it is. AdamW divides it by the gradient's size, so after a halving late in a run (step
    // 1,513 on a fast machine) losses were 3.4e-5 apart.
    let sgd = ["train.optimizer=sgd", "train.momentum=0", "train.learning_rate=1e-2"];
    let short = ["train.num_workers=2", "watch.period=0.05", "watch.recover=0.3"];
    let runs = runs(&[sgd.as_slice(), &short].concat());
    // So that the plan fills three fifths: the thresholds stay at 70, 80 and 90 %.
    let limit_bytes = planned(&runs.finish("plan", &["--ranks", "2", "--set", "train.max_steps=1"])) / 6 * 10;
    let Some(group) = Limited::make("ladder", limit_bytes) else { return };
    let mut command = runs.command(&[]);
    command.args(["--name", "pressed", "--ranks", "2", "--set", "train.max_steps=1000000"]);
    let mut running = Running::start(&mut group.within(&command), runs.path());
    let run = runs.run("pressed");
    assert!(running.until("steps", || run.steps_so_far() >= 20), "{}", running.read("err"));
    let pid = running.child.id();
    assert_eq!(cache_bytes(pid), Some(64 * MIB));

    let hog = group.hog(runs.path());
    hog.fill(0.85);
    wait_for_line(&mut running, "memory: allocators give back");
    assert_eq!(cache_bytes(pid), Some(32 * MIB), "a warning takes half of the page cache");
    assert!(!running.read("err").contains("memory: micro-batch"));
    hog.fill(0.94);
    wait_for_line(&mut running, "memory: micro-batch halved");
    assert_eq!(cache_bytes(pid), Some(0), "before batches get smaller the whole page cache goes");
    hog.end();

    wait_for_line(&mut running, "memory: pressure is over");
    wait_for_line(&mut running, "memory: page cache grows: 0.0MB → 64.0MB");
    assert_eq!(cache_bytes(pid), Some(64 * MIB));
    let steps = run.steps_so_far();
    assert!(running.until("more steps", || run.steps_so_far() > steps + 20), "{}", running.read("err"));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!((ended.code, group.oom_kills()), (Some(75), 0), "{ended}");

    let rungs = [
        "prefetching is paused",
        "at most 1 decoding threads per rank",
        "page cache shrinks: 64.0MB → 32.0MB",
        "allocators give back what is free",
        "page cache shrinks: 32.0MB → 16.0MB",
        "page cache shrinks: 16.0MB → 0.0MB",
        "micro-batch halved, accumulation doubled",
        "pressure is over",
        "page cache grows",
    ];
    let lines = rungs.map(|rung| with_bytes(&ended.err, rung));
    lines.iter().for_each(|line| println!("{line}"));
    let text = |line: &serde_json::Value| {
        let event = serde_json::from_value(line.get("event")?.clone()).unwrap();
        Some(launcher::watch::event_text(spec::config::Language::En, &event))
    };
    let events: String = read_lines(&run.path.join("memory.node.jsonl")).iter().filter_map(text).collect();
    assert!(rungs.iter().all(|rung| events.contains(rung)), "{events}");

    // Orders are numbered as they are given; 3, 5 and 6 are the page cache's.
    let log = fs::read_to_string(run.path.join("rank0.log")).unwrap();
    for answer in [
        "relief 1: prefetching paused",
        "relief 2: at most 1 loader threads decode",
        "relief 4: allocators trimmed",
        "relief 7: micro-batch 4 → 2",
    ] {
        assert!(log.contains(answer), "{answer}\n{log}");
    }
    assert!(log.contains(": prefetching and decoders as planned"), "{log}");

    let halved = halved_after(&ended);
    let upto = format!("train.max_steps={}", halved + 50);
    let reference =
        runs.finish("undisturbed", &["--ranks", "2", "--set", &upto, "--set", "watch.enabled=false"]).losses();
    let losses = run.losses();
    assert_eq!(losses[..halved], reference[..halved], "the same bits until batches get smaller");
    let after = losses[halved..].iter().zip(&reference[halved..]);
    let furthest = after.map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
    println!("halved after step {halved}; within {furthest:.1e} in the next 50 steps");
    assert!(losses.len() >= halved + 20 && furthest < 1e-5, "{furthest}");
}

/// Starting point of the guides: every window a separate copy in memory.
const NAIVE: &str = r#"
import pathlib, sys
window, stride = 200 * 232, 10 * 232
kept = []
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.hdf5")):
    rows = path.read_bytes()
    kept += [rows[at:at + window] for at in range(0, len(rows) - window, stride)]
print(sum(map(len, kept)))
"#;

#[test]
fn training_completes_under_a_limit_that_kills_the_naive_path() {
    let runs = runs(&["data.stride=10", "train.max_steps=40"]);
    let limit_bytes = planned(&runs.finish("plan", &["--ranks", "2", "--set", "train.max_steps=1"])) / 10 * 12;
    let Some(group) = Limited::make("naive", limit_bytes) else { return };
    let mut naive = Command::new("python3");
    naive.args(["-c", NAIVE]).arg(data()).stdout(Stdio::null());
    let unlimited = Command::new("python3").args(["-c", NAIVE]).arg(data()).output().unwrap();
    let needs: u64 = String::from_utf8(unlimited.stdout).unwrap().trim().parse().unwrap();
    println!("every window a copy: {} MiB; limit {} MiB", needs / MIB, limit_bytes / MIB);
    assert!(needs > limit_bytes, "{needs}");
    assert_eq!(group.within(&naive).status().unwrap().signal(), Some(9), "Killed");
    let killed = group.oom_kills();
    assert_eq!(killed, 1);
    let mut command = runs.command(&[]);
    command.args(["--name", "capped", "--ranks", "2"]);
    let ended = Running::start(&mut group.within(&command), runs.path()).wait();
    assert_eq!((ended.code, group.oom_kills()), (Some(0), killed), "{ended}");
    assert_eq!(runs.run("capped").steps().len(), 40);
}

#[test]
fn on_a_machine_that_is_full_already_the_config_is_eased_before_training() {
    let Some(group) = Limited::make("full", 3072 * MIB) else { return };
    let runs = Runs::new(&["train.max_steps=10", "train.num_workers=4", "log.save_every=1", "watch.ease=true"]);
    let changes = "train.microbatch: 4 → 2, train.num_workers: 4 → 2";
    let plan = |sets: &[&str]| {
        let mut command = runs.command(&["plan"]);
        command.args(["--ranks", "1"]).args(sets);
        let ended = Running::start(&mut group.within(&command), runs.path()).wait();
        assert_eq!(ended.code, Some(0), "{ended}");
        // The table wraps its notes.
        ended.out.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(!plan(&[]).contains("smaller from the start"));
    let mut hog = group.hog(runs.path());
    hog.fill(0.82);
    hog.wait_until_filled();
    let full = plan(&[]);
    assert!(full.contains("full before training, smaller from the start: ") && full.contains(changes), "{full}");
    assert!(full.contains("log.save_every: 1 → 20") && full.contains("→ off"), "{full}");
    assert!(!plan(&["--set", "watch.ease=false"]).contains("smaller from the start"));
    hog.end();
}
