//! Memory watched and given back in real jobs of several ranks.

use crate::support::{Run, Running, Runs, assert_same_checkpoint, folder};
use headroom::data::source::hdf5::write::{Row, Storage, write_session};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Instant;

const MIB: u64 = 1 << 20;
/// 64 MiB of page cache over files of as much.
const CACHE: &str = "data.cache_size_gb=0.0625";

/// Four sessions of 16 MiB.
pub fn data() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let at = folder().keep();
        let row = |n: usize| Row {
            time: n as f64 / 2000.0,
            joint_angles: std::array::from_fn(|k| 0.1 + 0.05 * ((n * (k + 3)) as f64 * 0.01).sin()),
            emg: std::array::from_fn(|k| (1e-3 * ((n * (k + 5)) as f64 * 0.01).sin()) as f32),
        };
        let rows: Vec<Row> = (0..72_000).map(row).collect();
        for number in 0..4 {
            let path = at.join(format!("s{number}.hdf5"));
            // libhdf5 locks what it opens; a process that another test starts now may hold the lock awhile.
            let mut tries = 0..200;
            while let Err(error) = write_session(&path, &Storage::contiguous(), &[], &rows) {
                assert!(error.to_string().contains("lock") && tries.next().is_some(), "{error}");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        at
    })
}

pub fn runs(sets: &[&str]) -> Runs {
    let path = format!("data.dataset_path={}", data().display());
    let common = [path.as_str(), CACHE, "data.max_val_windows=8", "train.stop_grace=60"];
    Runs::new(&[&common, sets].concat())
}

/// `launch` with checksums on every entry of the page cache.
fn start(runs: &Runs, name: &str, words: &[&str]) -> Running {
    let mut command = runs.command(&[]);
    command.args(["--name", name]).args(words).env("HEADROOM_CACHE_VERIFY", "1");
    Running::start(&mut command, runs.path())
}

/// Bytes of memory behind the page cache of launcher `pid`, as the kernel counts them; `None`: it has none yet.
pub fn cache_bytes(pid: u32) -> Option<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let mut found = entries.filter_map(|entry| {
        let ours = fs::read_link(entry.path()).ok()?.to_string_lossy().contains("memfd:headroom-cache");
        ours.then(|| fs::metadata(entry.path()).ok().map(|facts| facts.blocks() * 512)).flatten()
    });
    found.next()
}

fn wait_for_steps(running: &mut Running, run: &Run, steps: usize) {
    assert!(running.until("steps", || run.steps_so_far() >= steps), "{}", running.read("err"));
}

/// Also checklist item 38: memory features on or off, the same losses.
#[test]
fn shrinking_the_cache_by_half_while_training_gives_its_bytes_back_and_changes_no_bit() {
    let runs = runs(&["train.max_steps=500"]);
    let mut running = start(&runs, "shrunk", &["--ranks", "2"]);
    let run = runs.run("shrunk");
    wait_for_steps(&mut running, &run, 20);
    let pid = running.child.id();
    let before = cache_bytes(pid).unwrap();
    assert_eq!(before, 64 * MIB);
    let began = Instant::now();
    running.signal(Signal::USR2);
    let mut steps = 0;
    assert!(running.until("half the bytes", || {
        steps = run.steps_so_far();
        cache_bytes(pid) == Some(before / 2)
    }));
    println!("{before} to {} bytes in {:?}, at step {steps}", before / 2, began.elapsed());
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("page cache shrinks: 64.0MB → 32.0MB"), "{ended}");
    stalls(&run, steps);

    let off = ["--ranks", "2", "--set", "watch.enabled=false"];
    let ended = start(&runs, "unwatched", &off).wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    let reference = runs.run("unwatched");
    assert_eq!(run.losses(), reference.losses());
    assert_same_checkpoint(&run, &reference, 500, "watched and shrunk against unwatched");
    let node = |run: &Run| run.path.join("memory.node.jsonl");
    assert!(node(&run).is_file() && !node(&reference).is_file());
}

/// Prints how long steps and their waits for data took, all of them and those around `at`, where the page cache shrank:
/// no wait there should be longer than one step.
fn stalls(run: &Run, at: usize) {
    let metrics = run.metrics();
    let of = |key: &str| metrics.iter().map(|line| 1e3 * line[key].as_f64().unwrap()).collect::<Vec<_>>();
    let (waits, steps) = (of("data_wait_s"), of("step_s"));
    let around = at.saturating_sub(5)..(at + 15).min(steps.len());
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    let mut sorted = steps[20..].to_vec();
    sorted.sort_by(f64::total_cmp);
    let (usual, slow) = (sorted[sorted.len() / 2], sorted[sorted.len() * 99 / 100]);
    println!(
        "step: median {usual:.2} ms, 99 of 100 within {slow:.2} ms, longest around the shrink {:.2} ms",
        most(&steps[around.clone()])
    );
    println!(
        "wait for data: longest of all {:.2} ms, around the shrink {:.2} ms",
        most(&waits[20..]),
        most(&waits[around])
    );
}

#[test]
fn the_nodes_memory_is_recorded_with_every_rank() {
    let runs = runs(&["train.max_steps=30", "watch.period=0.05"]);
    let run = runs.finish("recorded", &["--ranks", "2"]);
    let text = fs::read_to_string(run.path.join("memory.node.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!((last["level"].as_str(), last["ranks"].as_array().map(Vec::len)), (Some("normal"), Some(2)), "{text}");
    for key in ["t", "system_total_bytes", "system_available_bytes", "job_bytes", "launcher_bytes", "cache_bytes"] {
        assert!(last[key].as_f64().unwrap() > 0.0, "{key}: {text}");
    }
}

#[test]
fn a_rank_killed_by_hand_is_told_apart_from_one_killed_for_memory() {
    let runs = runs(&["train.max_steps=100000"]);
    let mut running = start(&runs, "killed", &["--ranks", "2"]);
    wait_for_steps(&mut running, &runs.run("killed"), 20);
    kill_process(running.rank(1), Signal::KILL).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(137), "{ended}");
    for part in ["rank 1 failed", "someone sent SIGKILL", "rank 1 was last seen at step", "others beside this job used"]
    {
        assert!(ended.err.contains(part), "{part} is not in {ended}");
    }
    let reason = runs.run("killed").summary()["reason"].as_str().unwrap().to_owned();
    assert!(reason.starts_with("rank 1 failed: SIGKILL"), "{reason}");
    assert!(reason.contains("the kernel counted no kill for memory"), "{reason}");
}

/// Folder of the memory cgroup (v1 or v2) that was made for rank `pid`; `None`: none may be made here.
fn memory_group(pid: Pid) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero())).ok()?;
    text.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let at = match controllers {
            "memory" => "/sys/fs/cgroup/memory",
            "" => "/sys/fs/cgroup",
            _ => return None,
        };
        let dir = PathBuf::from(format!("{at}{path}"));
        let limited = dir.join("memory.max").exists() || dir.join("memory.limit_in_bytes").exists();
        (path.contains("/headroom-") && limited).then_some(dir)
    })
}

/// A process in the ranks' own cgroup that takes memory without end.
fn hog(group: &Path) -> Child {
    let procs = group.join("cgroup.procs");
    let take = "import sys\nopen(sys.argv[1], 'w').write('0')\nkept = []\nwhile True: kept.append(bytearray(1 << 24))";
    Command::new("python3").args(["-c", take]).arg(procs).stderr(Stdio::null()).spawn().unwrap()
}

/// The kernel ends a rank at the group's limit; the restart resumes from the checkpoint with a smaller plan.
#[test]
fn a_rank_killed_for_memory_is_explained_and_started_again_with_less() {
    let runs = runs(&["train.max_steps=100000", "log.save_every_steps=10", "memory.budget=1GiB"]);
    let mut running = start(&runs, "oom", &["--ranks", "2", "--max-restarts", "1"]);
    let run = runs.run("oom");
    wait_for_steps(&mut running, &run, 30);
    let victim = running.rank(1);
    let Some(group) = memory_group(victim) else {
        assert!(running.read("err").contains("no memory cgroup for the ranks"), "{}", running.read("err"));
        println!("no memory cgroup may be made here");
        return;
    };
    fs::write(format!("/proc/{}/oom_score_adj", victim.as_raw_nonzero()), "1000").unwrap();
    let mut hog = hog(&group);
    assert!(running.until("a restart", || {
        let text = fs::read_to_string(run.path.join("job.json")).unwrap_or_default();
        serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|job| job["resume"].is_string())
    }));
    hog.wait().unwrap();
    let steps = run.steps_so_far();
    wait_for_steps(&mut running, &run, steps + 20);
    let started = serde_json::from_slice::<serde_json::Value>(&fs::read(run.path.join("job.json")).unwrap()).unwrap();
    assert_eq!(started["plan"]["batch"]["micro_batch"], 2);
    assert_eq!(started["plan"]["batch"]["global_batch"], 8);
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    for part in ["process", "of this job's cgroup for memory", "with less memory: train.microbatch: 4 → 2"] {
        assert!(ended.err.contains(part), "{part} is not in {ended}");
    }
    let summary = run.summary();
    assert!(summary["restarts"] == 1 && summary["reduced"].as_array().unwrap().len() >= 2, "{summary}");
    assert!(!group.exists(), "{} is left", group.display());
}
