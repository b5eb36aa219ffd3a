//! One job trains a run at a time: the lock of the run's folder, seen from outside.

use crate::host::{Starter, job_of, start};
use crate::support::{Ended, Run, Running, Runs};
use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};
use std::fs;

const ENDLESS: [&str; 2] = ["train.max_steps=1000000", "log.save_every_steps=5"];

fn holder(run: &Run) -> Value {
    serde_json::from_slice(&fs::read(run.path.join("run.lock")).unwrap()).unwrap()
}

/// Refused since process `holder` trains the run; both are named, and the way out.
fn assert_refused(ended: &Ended, holder: u32, program: &str) {
    assert_eq!(ended.code, Some(2), "{ended}");
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let first = format!("is training already: process {holder} on {} ({program}, since 20", host.trim());
    assert!(ended.err.contains(&first), "{first}\n{ended}");
    assert!(ended.err.contains("; this is process ") && ended.err.contains("--name"), "{ended}");
}

#[test]
fn a_second_launch_of_a_run_that_trains_is_refused_and_changes_nothing() {
    let runs = Runs::new(&ENDLESS);
    let mut first = runs.start("r", &["--ranks", "2"]);
    let run = runs.run("r");
    assert!(first.until("steps", || run.steps_so_far() >= 6 && run.checkpoint(5).exists()));
    let job = fs::read(run.path.join("job.json")).unwrap();
    let (folder, checkpoint) = (run.path.display().to_string(), run.checkpoint(5).display().to_string());
    for words in [&[][..], &["--resume", "auto"], &["--resume", &folder], &["--resume", &checkpoint]] {
        let more = ["--ranks", "2", "--set", "train.learning_rate=0.3"];
        assert_refused(&runs.train("r", &[words, &more[..]].concat()), first.child.id(), "launch");
    }
    // Without a name, `auto` means the newest run of the config.
    let ended = crate::support::run(&mut runs.command(&["--resume", "auto"]), runs.path());
    assert_refused(&ended, first.child.id(), "launch");
    assert_eq!(fs::read(run.path.join("job.json")).unwrap(), job);
    first.signal(Signal::TERM);
    let ended = first.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    assert!(!run.path.join("run.lock").exists());
    let steps = run.steps();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    let more = format!("train.max_steps={}", steps.len() + 2);
    let ended = runs.train("r", &["--ranks", "2", "--resume", "auto", "--set", &more]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(!ended.err.contains("taken over") && !run.path.join("run.lock").exists(), "{ended}");
}

#[test]
fn after_a_kill_of_the_launcher_the_next_start_takes_over_at_once() {
    let runs = Runs::new(&ENDLESS);
    let mut first = runs.start("r", &["--ranks", "2"]);
    let run = runs.run("r");
    assert!(first.until("steps", || run.steps_so_far() >= 6));
    first.signal(Signal::KILL);
    let (pid, second) = (first.child.id(), ["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=400"]);
    let ended = runs.train("r", &second);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains(&format!("the lock of process {pid} on ")), "{ended}");
    assert!(ended.err.contains("is taken over: that process has ended"), "{ended}");
    assert_eq!(run.steps(), (1..=400).collect::<Vec<_>>());
    assert!(!run.path.join("run.lock").exists());
    first.wait();
}

#[test]
fn a_lock_of_another_boot_is_taken_over_and_one_of_another_host_is_not() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let mut first = runs.start("r", &["--ranks", "1"]);
    let run = runs.run("r");
    assert!(first.until("steps", || run.steps_so_far() >= 2));
    let mut left = holder(&run);
    first.signal(Signal::TERM);
    assert_eq!(first.wait().code, Some(75));
    let leave = |left: &Value| fs::write(run.path.join("run.lock"), left.to_string()).unwrap();
    left["boot"] = json!("an earlier one");
    leave(&left);
    let again = ["--ranks", "1", "--resume", "auto", "--set", "train.max_steps=1"];
    let ended = runs.train("r", &again);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("is taken over: that host has been started again since"), "{ended}");
    (left["host"], left["machine"]) = (json!("node2"), json!("another"));
    leave(&left);
    let ended = runs.train("r", &again);
    assert_eq!(ended.code, Some(2), "{ended}");
    let says = "on node2 (launch, since 20";
    assert!(ended.err.contains(says) && ended.err.contains("taken over when it was not touched for 300 s"), "{ended}");
    let old = std::time::SystemTime::now() - std::time::Duration::from_secs(400);
    fs::File::options().write(true).open(run.path.join("run.lock")).unwrap().set_modified(old).unwrap();
    let ended = runs.train("r", &again);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("no sign of life for 6 minutes"), "{ended}");
}

#[test]
fn ranks_of_another_launcher_hold_the_lock_and_heed_it() {
    let runs = Runs::new(&ENDLESS);
    let reference = runs.finish("reference", &["--ranks", "3", "--set", "train.max_steps=1"]);
    let mut job = job_of(&runs, &reference.path, "r");
    job["config"]["train"]["max_steps"] = json!(1_000_000);
    let run = runs.run("r");
    let mut ranks = start(&runs, "r", &job, Starter::Torchrun);
    assert!(ranks[0].until("steps", || run.steps_so_far() >= 3), "{}", ranks[0].read("err"));
    let pid = ranks[0].child.id();
    assert_refused(&runs.train("r", &["--ranks", "3", "--resume", "auto"]), pid, "rank 0");
    let second: Vec<Ended> = start(&runs, "r", &job, Starter::Slurm).into_iter().map(Running::wait).collect();
    assert_refused(&second[0], pid, "rank 0");
    for ended in &second[1..] {
        assert_eq!(ended.code, Some(9), "{ended}");
    }
    ranks.iter().for_each(|rank| rank.signal(Signal::TERM));
    let ended: Vec<Ended> = ranks.into_iter().map(Running::wait).collect();
    ended.iter().for_each(|ended| assert_eq!(ended.code, Some(75), "{ended}"));
    let steps = run.steps();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    // The other way round.
    let mut launch = runs.start("r", &["--ranks", "3", "--resume", "auto"]);
    assert!(launch.until("steps", || run.steps_so_far() > steps.len()));
    let third: Vec<Ended> = start(&runs, "r", &job, Starter::OpenMpi).into_iter().map(Running::wait).collect();
    assert_refused(&third[0], launch.child.id(), "launch");
    launch.signal(Signal::TERM);
    assert_eq!(launch.wait().code, Some(75));
}

/// Ranks of a launcher that was killed, when nothing ends them: the next start waits for them.
#[test]
fn ranks_that_a_killed_launcher_left_are_waited_for() {
    let runs = Runs::new(&ENDLESS);
    let mut first = runs.start("r", &["--ranks", "1"]);
    let run = runs.run("r");
    assert!(first.until("steps", || run.steps_so_far() >= 2));
    let (rank, first_pid) = (first.rank(0), first.child.id());
    let left = fs::read(run.path.join("run.lock")).unwrap();
    first.signal(Signal::TERM);
    assert_eq!(first.wait().code, Some(75));
    assert!(kill_process(rank, Signal::KILL).is_err());
    // In its place a process with a rank's environment.
    fs::write(run.path.join("run.lock"), left).unwrap();
    let mut lingering = std::process::Command::new("sleep");
    lingering.arg("600").env("HEADROOM_JOB", run.path.join("job.json")).env("HEADROOM_CONTROL_FD", "9");
    let mut lingering = lingering.spawn().unwrap();
    let steps = run.steps_so_far();
    let more = format!("train.max_steps={}", steps + 3);
    let mut second = runs.start("r", &["--ranks", "1", "--resume", "auto", "--set", &more]);
    let waits = format!("waiting for the end of ranks that process {}", first_pid);
    let files = second.files();
    assert!(second.until("the wait", || fs::read_to_string(files.join("err")).unwrap().contains(&waits)));
    assert_eq!(run.steps_so_far(), steps);
    lingering.kill().unwrap();
    lingering.wait().unwrap();
    let ended = second.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(run.steps_so_far(), steps + 3);
}
