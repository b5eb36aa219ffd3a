//! The node's page cache under real jobs: the same bits whatever it does, ranks killed at any moment, files that change.

use crate::support::{Ended, Run, Running, Runs, assert_same_checkpoint, folder, read_tensors, run};
use headroom::data::source::hdf5::write::{Row, Storage, write_session};
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

/// 1 MiB: half of what the training files hold.
pub const SMALL: &str = "data.cache_size_gb=0.0009765625";
const STEPS: u64 = 20;
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/script_rank.py");

fn rows() -> Vec<Row> {
    let wave = |n: usize, k: usize| ((n * (k + 3)) as f64 * 0.01).sin();
    let row = |n| Row {
        time: n as f64 / 2000.0,
        joint_angles: std::array::from_fn(|k| 0.1 + 0.05 * wave(n, k)),
        emg: std::array::from_fn(|k| (1e-3 * wave(n, k + 5)) as f32),
    };
    (0..4800).map(row).collect()
}

/// Writes four sessions into `folder`.
fn sessions(folder: &Path, storage: &Storage) {
    fs::create_dir_all(folder).unwrap();
    for number in 0..4 {
        let path = folder.join(format!("s{number}.hdf5"));
        // libhdf5 locks what it opens; a process that another test starts now may hold the lock awhile.
        let mut tries = 0..200;
        while let Err(error) = write_session(&path, storage, &[], &rows()) {
            assert!(error.to_string().contains("lock") && tries.next().is_some(), "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn gzip() -> Storage {
    Storage { chunk_rows: Some(300), ..Storage::default() }
}

/// The same rows in `gzip` and `plain`.
fn data() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let at = folder().keep();
        sessions(&at.join("gzip"), &gzip());
        sessions(&at.join("plain"), &Storage::contiguous());
        at
    })
}

pub fn path_of(layout: &str) -> String {
    format!("data.dataset_path={}", data().join(layout).display())
}

/// A data set of this test's own, to be spoilt.
fn own(storage: &Storage) -> (TempDir, String) {
    let folder = folder();
    sessions(folder.path(), storage);
    let set = format!("data.dataset_path={}", folder.path().display());
    (folder, set)
}

/// `launch` with checksums on, and a separate folder for temporary files.
fn command(runs: &Runs, name: &str, words: &[&str]) -> Command {
    let mut command = runs.command(&[]);
    let temporary = runs.path().join("tmp");
    fs::create_dir_all(&temporary).unwrap();
    command.args(["--name", name]).args(words).env("HEADROOM_CACHE_VERIFY", "1").env("TMPDIR", temporary);
    command.env_remove("RUST_BACKTRACE");
    command
}

fn start(runs: &Runs, name: &str, words: &[&str]) -> Running {
    Running::start(&mut command(runs, name, words), runs.path())
}

pub fn finish(runs: &Runs, name: &str, words: &[&str]) -> Run {
    let ended = start(runs, name, words).wait();
    assert_eq!(ended.code, Some(0), "{name}: {ended}");
    runs.run(name)
}

fn fails(ended: &Ended, code: i32, says: &[&str]) {
    let all = format!("{}{}", ended.out, ended.err);
    assert_eq!(ended.code, Some(code), "{all}");
    assert_eq!(all.matches("error:").count(), 1, "{all}");
    says.iter().for_each(|say| assert!(ended.err.contains(say), "{say:?} is not in: {}", ended.err));
    assert!(!all.contains("panicked") && !all.contains("page cache entry"), "{all}");
}

fn processes() -> impl Iterator<Item = (i32, PathBuf)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Resources of a job that must be gone after it.
#[derive(Default)]
pub struct Traces {
    /// Device and inode of memory without a name.
    memory: BTreeSet<(u64, u64)>,
}

impl Traces {
    /// Adds what process `pid` holds now.
    pub fn look(&mut self, pid: u32) {
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
            let of_ours = fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains("memfd:headroom"));
            if let Some(facts) = fs::metadata(entry.path()).ok().filter(|_| of_ours) {
                self.memory.insert((facts.dev(), facts.ino()));
            }
        }
    }

    /// No process of `runs`, none that holds its memory, no file of its beside the run's own.
    pub fn assert_gone(&self, runs: &Runs, name: &str) {
        assert!(!self.memory.is_empty(), "no memory was seen: this check could not fail");
        let mark = runs.path().display().to_string();
        // Dead processes are reaped by whoever inherited them.
        let mut left = self.left(&mark);
        for _ in 0..1000 {
            if left.is_empty() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
            left = self.left(&mark);
        }
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(fs::read_dir(runs.path().join("tmp")).unwrap().count(), 0, "temporary files are left");
        let shared = fs::read_dir("/dev/shm").into_iter().flatten().flatten().map(|entry| entry.file_name());
        let shared: Vec<_> = shared.filter(|name| name.to_string_lossy().contains("headroom")).collect();
        assert!(shared.is_empty(), "{shared:?}");
        let run = runs.run(name).path;
        let half: Vec<_> = [run.clone(), run.join("checkpoints")]
            .iter()
            .flat_map(|folder| fs::read_dir(folder).unwrap())
            .map(|entry| entry.unwrap().path())
            .filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy();
                name.starts_with('.') || name.ends_with(".sock") || name.ends_with(".tmp") || name.ends_with(".part")
            })
            .collect();
        assert!(half.is_empty(), "{half:?}");
    }

    fn left(&self, mark: &str) -> Vec<String> {
        let own = std::process::id() as i32;
        let mut left = Vec::new();
        for (pid, at) in processes().filter(|(pid, _)| *pid != own) {
            let environment = fs::read(at.join("environ")).unwrap_or_default();
            if String::from_utf8_lossy(&environment).contains(mark) {
                left.push(format!("process {pid}"));
            }
            let descriptors = fs::read_dir(at.join("fd")).into_iter().flatten().flatten();
            let mut held = descriptors.filter_map(|entry| fs::metadata(entry.path()).ok());
            if held.any(|facts| self.memory.contains(&(facts.dev(), facts.ino()))) {
                left.push(format!("memory held by {pid}"));
            }
            let maps = fs::read_to_string(at.join("maps")).unwrap_or_default();
            let mut mapped = maps.lines().filter(|line| line.contains("memfd:headroom"));
            let inode = |line: &str| line.split_whitespace().nth(4).and_then(|word| word.parse::<u64>().ok());
            if mapped.any(|line| self.memory.iter().any(|(_, known)| inode(line) == Some(*known))) {
                left.push(format!("memory mapped by {pid}"));
            }
        }
        left
    }
}

/// The process that is `rank` of the job `parent` now.
fn rank_of(parent: u32, rank: usize) -> Option<Pid> {
    let (parent, wanted) = (parent.to_string(), format!("RANK={rank}"));
    let found = processes().find(|(_, at)| {
        let stat = fs::read_to_string(at.join("stat")).unwrap_or_default();
        let of_parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)) == Some(parent.as_str());
        let environment = if of_parent { fs::read(at.join("environ")).unwrap_or_default() } else { Vec::new() };
        environment.split(|&byte| byte == 0).any(|word| word == wanted.as_bytes())
    });
    found.and_then(|(pid, _)| Pid::from_raw(pid))
}

/// Numbers that differ from run to run; what they led to is in every failure's text.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        Self(now.as_nanos() as u64 | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

#[test]
fn ranks_killed_at_random_moments_leave_the_same_bits_and_nothing_else() {
    let kills: u64 = std::env::var("HEADROOM_KILLS").map_or(6, |count| count.parse().unwrap());
    const LONG: u64 = 300;
    let sets = ["train.max_steps=300", "train.num_workers=2", "model.dropout=0.1", "log.save_every_steps=10"];
    let runs = Runs::new(&[&sets[..], &[&path_of("gzip"), SMALL, "data.cache=lru"]].concat());
    let reference = finish(&runs, "reference", &["--ranks", "3"]);
    let cache = &reference.summary()["cache"];
    assert!(cache["evictions"].as_u64() > Some(0) && cache["hits"].as_u64() > Some(0), "{cache}");
    let mut random = Random::new();
    let (mut done, mut jobs) = (0, 0);
    while done < kills {
        let name = format!("killed{jobs}");
        let mut running = start(&runs, &name, &["--ranks", "3", "--max-restarts", "1000"]);
        let (pid, mut traces, mut moments) = (running.child.id(), Traces::default(), Vec::new());
        while done < kills && running.child.try_wait().unwrap().is_none() {
            let (rank, after) = (random.below(3) as usize, Duration::from_millis(random.below(1500)));
            if !running.until("a rank", || rank_of(pid, rank).is_some()) {
                break;
            }
            traces.look(pid);
            std::thread::sleep(after);
            traces.look(pid);
            let steps = runs.run(&name).steps_so_far();
            // A rank of a job that restarts just now may be gone.
            if rank_of(pid, rank).is_some_and(|rank| kill_process(rank, Signal::KILL).is_ok()) {
                moments.push((rank, after, steps));
                done += 1;
            }
        }
        let what = format!("{name}: {moments:?}");
        println!("{what}");
        let ended = running.wait();
        assert_eq!(ended.code, Some(0), "{what}: {ended}");
        assert!(!ended.err.contains("page cache entry"), "a half-written entry: {ended}");
        assert_same_checkpoint(&runs.run(&name), &reference, LONG, &what);
        assert_eq!(runs.run(&name).losses(), reference.losses(), "{what}");
        traces.assert_gone(&runs, &name);
        jobs += 1;
    }
    // Without restarts the job ends.
    let mut running = start(&runs, "once", &["--ranks", "3"]);
    let (pid, mut traces) = (running.child.id(), Traces::default());
    assert!(running.until("steps", || runs.run("once").steps_so_far() >= 2));
    traces.look(pid);
    kill_process(rank_of(pid, 1).unwrap(), Signal::KILL).unwrap();
    fails(&running.wait(), 137, &["rank 1 failed: SIGKILL"]);
    traces.assert_gone(&runs, "once");
}

#[test]
fn a_directory_that_dies_takes_its_ranks_with_it() {
    let runs = Runs::new(&["train.max_steps=1000000", &path_of("gzip"), SMALL]);
    let mut running = start(&runs, "gone", &["--ranks", "3"]);
    let (pid, mut traces) = (running.child.id(), Traces::default());
    assert!(running.until("steps", || runs.run("gone").steps_so_far() >= 3));
    traces.look(pid);
    let ranks: Vec<Pid> = (0..3).map(|rank| rank_of(pid, rank).unwrap()).collect();
    running.signal(Signal::KILL);
    let since = Instant::now();
    running.wait();
    let alive = |pid: &Pid| {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
    };
    while ranks.iter().any(alive) {
        assert!(since.elapsed() < Duration::from_secs(60), "ranks outlive the directory");
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("ranks are gone {:?} after the directory", since.elapsed());
    traces.assert_gone(&runs, "gone");
}

/// Rank 1 is the real one; a copy of its socket says what cannot be once it trains, so the directory closes this one.
const BETRAYED: &str = r#"
import os, sys, time
real = os.environ["TEST_RANK"]
if os.environ["RANK"] == "1" and os.fork() == 0:
    try:
        records = os.environ["TEST_RECORDS"]
        while not os.path.exists(records) or open(records, "rb").read().count(b"\n") < 3: time.sleep(0.005)
        open(os.environ["TEST_SENT"], "w").write(str(time.time()))
        os.write(int(os.environ["HEADROOM_CACHE_FD"]), b"\xff" * 64)
    finally:
        os._exit(0)
os.execv(real, [real] + sys.argv[1:])
"#;

#[test]
fn a_rank_that_loses_the_directory_ends_with_one_error() {
    let runs = Runs::new(&["train.max_steps=1000000", &path_of("gzip"), SMALL]);
    let mut job = command(&runs, "betrayed", &["--ranks", "3"]);
    let sent = runs.path().join("sent");
    job.env("HEADROOM_RANK", SCRIPT).env("JOB_SCRIPT", BETRAYED).env("TEST_RANK", crate::support::rank_program());
    job.env("TEST_RECORDS", runs.run("betrayed").path.join("metrics.jsonl")).env("TEST_SENT", &sent);
    let mut running = Running::start(&mut job, runs.path());
    let mut traces = Traces::default();
    let pid = running.child.id();
    assert!(running.until("the message", || sent.exists() || {
        traces.look(pid);
        false
    }));
    let ended = running.wait();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    let then: f64 = fs::read_to_string(sent).unwrap().parse().unwrap();
    println!("the job ended {:.3} s after the message", now - then);
    fails(&ended, 4, &["rank 1", "the page cache's directory is gone", "start the run again"]);
    assert!(ended.err.contains("page cache: rank 1"), "the directory says why: {ended}");
    traces.assert_gone(&runs, "betrayed");
}

#[test]
fn the_same_bits_for_any_threads_policy_storage_and_size_and_after_a_resume() {
    let runs = Runs::new(&["model.dropout=0.1"]);
    let train = |name: &str, layout: &str, policy: &str, size: &str, threads: &str, more: &[&str]| {
        let (path, policy) = (path_of(layout), format!("data.cache={policy}"));
        let (size, threads) = (format!("data.cache_size_gb={size}"), format!("train.num_workers={threads}"));
        let sets = [path, policy, size, threads];
        let mut words = vec!["--ranks", "2"];
        sets.iter().for_each(|set| words.extend(["--set", set]));
        words.extend(more);
        finish(&runs, name, &words)
    };
    const HALF: &str = "0.0009765625";
    let reference = train("reference", "gzip", "off", HALF, "1", &[]);
    let cases = [
        ("gzip", "pin", HALF, "0"),
        ("gzip", "lru", HALF, "1"),
        ("gzip", "next_use", HALF, "2"),
        ("gzip", "next_use", HALF, "8"),
        ("gzip", "off", HALF, "0"),
        ("plain", "pin", HALF, "8"),
        ("plain", "lru", HALF, "2"),
        ("plain", "next_use", HALF, "0"),
        ("plain", "off", HALF, "1"),
        // Smaller than any entry: all pass through.
        ("gzip", "lru", "0.000004", "2"),
        ("gzip", "auto", "0", "1"),
    ];
    for (layout, policy, size, threads) in cases {
        let name = format!("{layout}-{policy}-{size}-{threads}");
        let run = train(&name, layout, policy, size, threads, &[]);
        assert_same_checkpoint(&run, &reference, STEPS, &name);
        assert_eq!(run.losses(), reference.losses(), "{name}");
        let cache = &run.summary()["cache"];
        let count = |what: &str| cache[what].as_u64().unwrap_or(0);
        match (policy, size) {
            ("off", _) | (_, "0") => assert_eq!(count("hits") + count("misses"), 0, "{name}: {cache}"),
            (_, HALF) => assert!(count("hits") > 0 && count("used_bytes") <= 1 << 20, "{name}: {cache}"),
            _ => assert!(count("hits") == 0 && count("bypasses") > 0, "{name}: {cache}"),
        }
    }
    // Entries of single windows, with other threads, sizes and after a resume.
    let sample: &[&str] = &["--set", "data.cache_entries=sample"];
    for (size, threads) in [(HALF, "2"), (HALF, "0"), ("0.0002", "8")] {
        let name = format!("sample-{size}-{threads}");
        let run = train(&name, "gzip", "next_use", size, threads, sample);
        assert_same_checkpoint(&run, &reference, STEPS, &name);
        assert_eq!(run.losses(), reference.losses(), "{name}");
        let log = fs::read_to_string(run.path.join("rank0.log")).unwrap();
        assert!(log.contains("entries are single windows"), "{name}: {log}");
        let cache = &run.summary()["cache"];
        assert!(cache["hits"].as_u64() > Some(0) && cache["evictions"].as_u64() > Some(0), "{name}: {cache}");
    }
    train("windows", "gzip", "pin", HALF, "2", &["--set", "train.max_steps=9"]);
    let resumed = train("windows", "gzip", "next_use", HALF, "8", &[sample, &["--resume", "auto"]].concat());
    assert_same_checkpoint(&resumed, &reference, STEPS, "windows");
    // The files hold the same samples in another layout, so that their content is new: the names decide.
    train("resumed", "gzip", "pin", HALF, "2", &["--set", "train.max_steps=9"]);
    let resumed = train("resumed", "plain", "next_use", HALF, "8", &["--resume", "auto", "--resume-split", "keep"]);
    assert_same_checkpoint(&resumed, &reference, STEPS, "resumed");
    assert_eq!(resumed.losses(), reference.losses(), "resumed");
}

#[test]
fn batches_are_the_same_for_any_threads_and_storage() {
    let runs = Runs::new(&[]);
    let batch = |layout: &str, threads: &str, policy: &str| {
        let out = runs.path().join("batch.safetensors");
        let mut command = runs.command(&["batch", "--step", "13", "--rank", "1", "--world", "2"]);
        let (threads, policy) = (format!("train.num_workers={threads}"), format!("data.cache={policy}"));
        command.arg("--out").arg(&out).args(["--set", &path_of(layout), "--set", &threads, "--set", &policy]);
        let ended = run(&mut command, runs.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        read_tensors(&out)
    };
    let reference = batch("gzip", "1", "off");
    for (layout, threads, policy) in
        [("gzip", "0", "pin"), ("gzip", "8", "next_use"), ("plain", "2", "lru"), ("plain", "0", "off")]
    {
        assert!(batch(layout, threads, policy) == reference, "{layout} {threads} {policy}");
    }
}

/// Trains with a cache too small to keep all, spoils every file, and waits for the end.
fn spoilt(name: &str, storage: &Storage, spoil: impl Fn(&fs::File)) -> Ended {
    let (folder, path) = own(storage);
    let runs = Runs::new(&["train.max_steps=1000000", "data.cache=lru", &path, SMALL]);
    let mut running = start(&runs, name, &["--ranks", "3"]);
    let (pid, mut traces) = (running.child.id(), Traces::default());
    assert!(running.until("steps", || runs.run(name).steps_so_far() >= 3));
    traces.look(pid);
    for entry in fs::read_dir(folder.path()).unwrap() {
        spoil(&fs::File::options().write(true).open(entry.unwrap().path()).unwrap());
    }
    let ended = running.wait();
    traces.assert_gone(&runs, name);
    ended
}

#[test]
fn files_that_shrink_while_training_end_it_with_file_and_place() {
    // Where there are no chunks, the rows say the place.
    let cases = [("cut-gzip", gzip(), ".hdf5: chunk "), ("cut-plain", Storage::contiguous(), ".hdf5: ")];
    for (name, storage, place) in cases {
        let ended = spoilt(name, &storage, |file| file.set_len(4096).unwrap());
        fails(&ended, 4, &[place, "rows "]);
        // Found while reading, or when it was opened again.
        let found = ["it was cut while in use", "the file changed since it was opened"];
        assert!(found.iter().any(|words| ended.err.contains(words)), "{ended}");
    }
}

#[test]
fn chunks_overwritten_while_training_end_it_with_file_and_chunk() {
    let overwrite = |file: &fs::File| {
        let bytes = file.metadata().unwrap().len() - 4096;
        file.write_all_at(&vec![0x55; bytes as usize], 4096).unwrap();
    };
    fails(&spoilt("overwritten", &gzip(), overwrite), 4, &[".hdf5: chunk ", "(rows "]);
}

#[test]
fn a_corrupt_chunk_is_named_and_the_peers_end() {
    let (folder, path) = own(&Storage { fletcher32: true, ..gzip() });
    let file = folder.path().join("s1.hdf5");
    let bytes = fs::metadata(&file).unwrap().len();
    fs::File::options().write(true).open(&file).unwrap().write_all_at(&[0x55; 64], bytes / 2).unwrap();
    let runs = Runs::new(&["data.skip_bad=false", &path]);
    let ended = start(&runs, "corrupt", &["--ranks", "3"]).wait();
    fails(&ended, 4, &["s1.hdf5", "chunk "]);
}
