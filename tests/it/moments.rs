//! Momentary troubles that must not end a run: a full disk, a suspension, rotated records, a stop while it starts, a
//! clock that was set back; and words and names that must arrive.

use crate::support::{Ended, Running, Runs, folder, launch_program, read_lines, run};
use headroom::data::source::hdf5::write::Row;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A tmpfs of 16 MiB; `None`: none may be mounted here.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf) -> Option<Self> {
        fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16m", "none"]).arg(&at).output();
        if !mounted.is_ok_and(|done| done.status.success()) {
            eprintln!("skipped: no small tmpfs may be mounted");
            return None;
        }
        Some(Self(at))
    }

    /// Takes all room until the file is removed.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("hog");
        let mut hog = File::create(&path).unwrap();
        for size in [64 << 10, 1] {
            while hog.write_all(&vec![1; size]).is_ok() {}
        }
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Waits until the program has written `word` somewhere.
fn until_said(running: &mut Running, word: &str) {
    for _ in 0..240_000 {
        if (running.read("out") + &running.read("err")).contains(word) {
            return;
        }
        assert!(running.child.try_wait().unwrap().is_none(), "{word}: never\n{}", running.read("err"));
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{word}: never\n{}\n{}", running.read("out"), running.read("err"));
}

fn lines_of(path: &Path) -> usize {
    fs::read(path).map_or(0, |text| text.iter().filter(|&&byte| byte == b'\n').count())
}

#[test]
fn a_disk_that_is_full_for_a_moment_costs_no_record_and_not_the_run() {
    let runs = Runs::new(&["train.max_steps=1000000", "log.save_every_steps=20"]);
    let Some(small) = Small::mount(runs.path().join("small")) else { return };
    let there = format!("log.runs_dir={}", small.0.display());
    let mut running = runs.start("full", &["--ranks", "1", "--set", &there]);
    let folder = small.0.join("full");
    let records = folder.join("metrics.jsonl");
    assert!(running.until("records", || lines_of(&records) >= 30), "{}", running.read("err"));
    let hog = small.fill();
    // Both while it trains.
    until_said(&mut running, "metrics.jsonl: cannot be written: No space left");
    until_said(&mut running, "is not written: ");
    fs::remove_file(hog).unwrap();
    until_said(&mut running, "metrics.jsonl: could not be written for");
    let now = lines_of(&records);
    assert!(running.until("more records", || lines_of(&records) > now + 20), "{}", running.read("err"));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    let steps: Vec<u64> = read_lines(&records).iter().map(|record| record["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "every record, whole and in order");
    let summary: Value = serde_json::from_slice(&fs::read(folder.join("summary.json")).unwrap()).unwrap();
    assert_eq!((summary["status"].as_str(), summary["steps"].as_u64()), (Some("stopped"), steps.last().copied()));
    let gaps = summary["record_gaps"].as_array().unwrap();
    let gap = gaps.iter().find(|gap| gap["file"] == "metrics.jsonl").unwrap_or_else(|| panic!("{gaps:?}"));
    assert!(gap["late"].as_u64().unwrap() > 0 && gap["lost"] == 0, "{gap}");
    assert!(folder.join(format!("checkpoints/step-{}/state.json", steps.len())).is_file());
    for file in ["memory.rank0.jsonl", "memory.node.jsonl"] {
        assert!(!read_lines(&folder.join(file)).is_empty());
    }
}

/// Launcher and ranks.
fn all_of(running: &Running, ranks: usize) -> Vec<Pid> {
    std::iter::once(Pid::from_child(&running.child)).chain((0..ranks).map(|rank| running.rank(rank))).collect()
}

#[test]
fn suspended_ranks_and_jobs_are_waited_for_and_speed_leaves_the_time_out() {
    let sets = ["train.max_steps=1000000", "train.step_timeout=1", "watch.period=0.1"];
    let runs = Runs::new(&sets);
    let mut running = runs.start("held", &["--ranks", "2"]);
    let run = runs.run("held");
    assert!(running.until("a step", || run.steps_so_far() > 20), "{}", running.read("err"));
    // One rank: its peer waits for three times the limit.
    let one = running.rank(1);
    kill_process(one, Signal::STOP).unwrap();
    until_said(&mut running, "rank 1 suspended (stopped by a signal");
    std::thread::sleep(Duration::from_secs(3));
    kill_process(one, Signal::CONT).unwrap();
    until_said(&mut running, "rank 1 continued after ");
    let seen = run.steps_so_far();
    assert!(running.until("steps behind it", || run.steps_so_far() > seen + 20), "{}", running.read("err"));
    // The whole job, as a paused container.
    let all = all_of(&running, 2);
    all.iter().for_each(|pid| kill_process(*pid, Signal::STOP).unwrap());
    std::thread::sleep(Duration::from_secs(6));
    all.iter().rev().for_each(|pid| kill_process(*pid, Signal::CONT).unwrap());
    until_said(&mut running, "the job was suspended for ");
    let seen = run.steps_so_far();
    assert!(running.until("steps behind it", || run.steps_so_far() > seen + 20), "{}", running.read("err"));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    assert!(!(ended.out + &ended.err).contains("grows"), "no leak");
    let records = run.metrics();
    let mut pauses: Vec<(f64, f64)> = records
        .windows(2)
        .map(|pair| {
            let of = |at: usize, key: &str| pair[at][key].as_f64().unwrap();
            (of(1, "t") - of(0, "t"), of(1, "step_s"))
        })
        .collect();
    pauses.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (passed, step_s) in &pauses[..2] {
        assert!(*passed > 2.5 && *step_s < passed - 2.0, "{passed} s passed, of which a step took {step_s} s");
    }
}

#[test]
fn records_that_are_copied_and_truncated_stay_readable_and_are_gone_on_with() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let mut running = runs.start("rotated", &["--ranks", "1"]);
    let run = runs.run("rotated");
    let files = ["metrics.jsonl", "memory.rank0.jsonl", "memory.node.jsonl", "rank0.log"];
    let there = || run.steps_so_far() > 30 && lines_of(&run.path.join("memory.node.jsonl")) > 0;
    assert!(running.until("records", there), "{}", running.read("err"));
    for file in files {
        fs::copy(run.path.join(file), run.path.join(format!("{file}.1"))).unwrap();
        File::options().write(true).open(run.path.join(file)).unwrap().set_len(0).unwrap();
    }
    assert!(running.until("more records", || run.steps_so_far() > 30), "{}", running.read("err"));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    for file in files {
        assert!(!fs::read(run.path.join(file)).unwrap().contains(&0), "{file} begins with zero bytes");
    }
    let before: Vec<u64> =
        read_lines(&run.path.join("metrics.jsonl.1")).iter().map(|record| record["step"].as_u64().unwrap()).collect();
    let steps = run.steps();
    assert!(steps[0] > *before.last().unwrap() && steps.is_sorted(), "{steps:?}");
    let last = *steps.last().unwrap();
    assert_eq!(run.summary()["steps"].as_u64(), Some(last));
    let analyzed = crate::support::run(Command::new(launch_program()).args(["analyze"]).arg(&run.path), runs.path());
    assert_eq!(analyzed.code, Some(0), "{analyzed}");
    // Resume cuts what is there.
    let more = format!("train.max_steps={}", last + 5);
    let ended = runs.train("rotated", &["--ranks", "1", "--resume", "auto", "--set", &more]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(run.steps()[..], (steps[0]..=last + 5).collect::<Vec<_>>()[..]);
}

/// A rank program that never says a word.
fn sleeper(folder: &Path) -> PathBuf {
    let path = folder.join("sleeper");
    // The plan asks the rank program to measure the model first.
    let real = crate::support::rank_program();
    let text = format!("#!/bin/sh\n[ \"$1\" = describe ] && exec '{}' \"$@\"\nexec sleep 1000\n", real.display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_run_that_is_stopped_while_it_starts_has_a_summary_of_that_start() {
    let runs = Runs::new(&[]);
    let first = runs.finish("early", &["--ranks", "1"]).summary();
    assert_eq!(first["status"], "finished");
    // Once afresh and once on top of a finished run, whose summary is not this start's.
    for (name, words, steps) in [("new", vec![], 0), ("early", vec!["--resume", "auto"], 20)] {
        let mut command = runs.command(&[]);
        command.args(["--name", name, "--ranks", "1"]).args(words).env("HEADROOM_RANK", sleeper(runs.path()));
        let running = Running::start(&mut command, runs.path());
        until_asleep(&running);
        running.signal(Signal::TERM);
        let ended = running.wait();
        assert!(ended.code.is_some_and(|code| code != 0), "{ended}");
        let summary = runs.run(name).summary();
        assert_eq!(summary["status"], "stopped", "{name}: {summary}");
        let reason = summary["reason"].as_str().unwrap();
        assert!(reason.contains("before the first step") && reason.contains("SIGTERM"), "{name}: {reason}");
        assert_eq!(summary["steps"], steps, "{name}");
        assert_ne!(summary["start"], first["start"]);
    }
}

/// Until the rank has become the program that it runs.
fn until_asleep(running: &Running) {
    let parent = running.child.id() as i32;
    for _ in 0..240_000 {
        let is_rank = |process: procfs::process::Process| {
            let stat = process.stat().ok()?;
            (stat.ppid == parent && stat.comm == "sleep").then_some(())
        };
        if procfs::process::all_processes().unwrap().flatten().find_map(is_rank).is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("no rank\n{}", running.read("err"));
}

#[test]
fn analyze_is_right_after_the_clock_was_set_back() {
    let runs = Runs::new(&[]);
    let found = runs.finish("clock", &["--ranks", "1"]);
    let analysis = || {
        let mut command = Command::new(launch_program());
        let ended = run(command.args(["analyze", "--json"]).arg(&found.path), runs.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        serde_json::from_str::<Value>(&ended.out).unwrap()
    };
    let before = analysis();
    for file in ["metrics.jsonl", "memory.rank0.jsonl", "memory.node.jsonl"] {
        let path = found.path.join(file);
        let mut records = read_lines(&path);
        let half = records.len() / 2;
        for record in &mut records[half..] {
            record["t"] = (record["t"].as_f64().unwrap() - 3600.0).into();
        }
        let text: Vec<String> = records.iter().map(Value::to_string).collect();
        fs::write(&path, text.join("\n") + "\n").unwrap();
    }
    let now = analysis();
    let duration = |of: &Value| of["duration_s"].as_f64().unwrap();
    assert!(
        duration(&now) >= 0.0 && duration(&now) <= duration(&before) + 1e-6,
        "{} {}",
        duration(&now),
        duration(&before)
    );
    for key in ["samples", "used", "by_phase", "checks", "starts"] {
        assert_eq!(now[key], before[key], "{key}");
    }
}

#[test]
fn words_of_ranks_arrive_with_their_prefix_at_the_level_that_was_asked_for() {
    let data = folder();
    // Rows in the header of a data set are left to libhdf5.
    for n in 0..4 {
        let row = |i: usize| Row {
            time: i as f64,
            joint_angles: std::array::from_fn(|k| 0.1 + 0.01 * ((i * (k + 3)) as f64 * 0.01).sin()),
            emg: std::array::from_fn(|k| ((i * (k + 5)) as f32 * 0.01).sin()),
        };
        let rows: Vec<Row> = (0..260).map(row).collect();
        let file = hdf5::File::create(data.path().join(format!("s{n}.hdf5"))).unwrap();
        let group = file.create_group("emg2pose").unwrap();
        let compact = hdf5::plist::dataset_create::Layout::Compact;
        group.new_dataset_builder().with_data(&rows).layout(compact).create("timeseries").unwrap();
    }
    let data = format!("data.dataset_path={}", data.path().display());
    let runs = Runs::new(&[&data, "data.stride=5"]);
    let all = |ended: &Ended| format!("{}{}", ended.out, ended.err);
    let ended = runs.train("plain", &["--ranks", "1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(all(&ended).contains("[rank 0] warning: ") && all(&ended).contains("read through libhdf5"), "{ended}");
    assert!(!all(&ended).contains("debug "), "{ended}");
    // Messages that users must know come at every level.
    let ended = runs.train("quiet", &["--ranks", "1", "--log-level", "off"]);
    assert!(all(&ended).contains("read through libhdf5"), "{ended}");
    let ended = runs.train("loud", &["--ranks", "1", "--log-level", "debug"]);
    assert!(all(&ended).contains("[launch] debug launcher::supervise"), "{ended}");
    let mut command = runs.command(&[]);
    command.args(["--name", "wrong", "--ranks", "1"]).env("HEADROOM_LOG", "wran");
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("HEADROOM_LOG is \"wran\": expected off, error, warn"), "{ended}");
}

#[test]
fn names_that_are_not_utf8_are_refused_by_their_bytes() {
    let runs = Runs::new(&[]);
    let odd = runs.path().join(OsStr::from_bytes(b"work\xff"));
    fs::create_dir(&odd).unwrap();
    let mut command = runs.command(&[]);
    command.args(["--name", "odd", "--ranks", "1", "--set", "log.runs_dir=runs"]).current_dir(&odd);
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains(r#"/work\xFF/runs": its name is not UTF-8"#), "{ended}");
    assert_eq!(fs::read_dir(&odd).unwrap().count(), 0, "nothing is left there");
    // Two files whose names differ in such a byte alone.
    let data = runs.path().join("data");
    fs::create_dir(&data).unwrap();
    for (n, entry) in fs::read_dir(crate::support::sample_data()).unwrap().flatten().enumerate() {
        fs::copy(entry.path(), data.join(format!("s{n}.hdf5"))).unwrap();
    }
    for name in [b"t\xfe.hdf5", b"t\xff.hdf5"] {
        fs::copy(data.join("s0.hdf5"), data.join(OsStr::from_bytes(name))).unwrap();
    }
    let there = format!("data.dataset_path={}", data.display());
    let ended = runs.train("named", &["--ranks", "1", "--set", &there]);
    assert_eq!(ended.code, Some(0), "{ended}");
    for name in
        [r#"/t\xFE.hdf5": its name is not UTF-8: rename it"#, r#"/t\xFF.hdf5": its name is not UTF-8: rename it"#]
    {
        assert!(ended.out.contains(name), "{name}: {ended}");
    }
    assert_eq!(runs.run("named").summary()["files_skipped"], 2);
    // A folder of records may have such a name: it is only read.
    let moved = runs.path().join(OsStr::from_bytes(b"run\xff"));
    fs::rename(runs.run("named").path, &moved).unwrap();
    let ended = run(Command::new(launch_program()).arg("analyze").arg(&moved), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains(r#"run\xFF""#), "{ended}");
}

#[test]
fn nodes_meet_at_an_address_in_brackets() {
    let Ok(free) = std::net::TcpListener::bind(("::1", 0)) else {
        eprintln!("skipped: this machine has no IPv6");
        return;
    };
    let port = free.local_addr().unwrap().port().to_string();
    drop(free);
    let files = folder();
    let start = |node: &str| {
        let mut command = Command::new(launch_program());
        command.args(["--nnodes", "2", "--node-rank", node, "--ranks", "1", "--master-addr", "[::1]"]);
        command.args(["--master-port", &port, "--exec", "sh", "-c", "echo $RANK $MASTER_ADDR"]);
        Running::start(&mut command, files.path())
    };
    let both = [start("0"), start("1")].map(Running::wait);
    for (node, ended) in both.iter().enumerate() {
        assert_eq!(ended.code, Some(0), "{ended}");
        assert_eq!(ended.out.trim(), format!("[rank {node}] {node} ::1"));
    }
    let mut command = Command::new(launch_program());
    command.args(["--nnodes", "2", "--ranks", "1", "--master-addr", "[::1]:7", "--master-port", "7", "--exec", "true"]);
    let ended = run(&mut command, files.path());
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("names a port, which --master-port gives"), "{ended}");
}
