//! Kernels and containers that refuse system calls: the call is named, and the run continues without it where possible.

use crate::host::job_of;
use crate::support::{Ended, Running, Runs, assert_same_checkpoint, rank_program};
use crate::surroundings::{
    Call, EPOLL_CREATE, EVENTFD, FLOCK, LINK, MEMFD_CREATE, PIDFD_OPEN, PLAIN_LINK, PRCTL, sandboxed,
};
use rustix::process::{Signal, kill_process};
use serde_json::json;
use std::fs;
use std::process::Command;

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
const CACHED: [&str; 2] = ["data.cache=pin", "data.cache_size_gb=0.00390625"];

/// Calls, and the error that each ends with.
type Refused<'a> = &'a [(&'a Call, i32)];

fn start(runs: &Runs, name: &str, refused: Refused, words: &[&str]) -> Running {
    let mut command = runs.command(&[]);
    command.args(["--name", name, "--ranks", "2"]).args(words);
    sandboxed(&mut command, refused);
    Running::start(&mut command, runs.path())
}

/// How often a line about a refused call is there.
fn said(ended: &Ended, call: &Call) -> usize {
    (ended.err.clone() + &ended.out).matches(&format!("{} is refused here", call.0)).count()
}

#[test]
fn a_run_without_these_calls_is_the_same_run_and_says_so_once() {
    let runs = Runs::new(&CACHED);
    let reference = runs.finish("reference", &["--ranks", "2"]);
    let calls: [(&str, Refused, [usize; 3]); 6] = [
        ("pidfd", &[(&PIDFD_OPEN, ENOSYS)], [1, 0, 0]),
        ("memfd", &[(&MEMFD_CREATE, EPERM)], [0, 1, 0]),
        ("prctl", &[(&PRCTL, EPERM)], [0, 0, 1]),
        ("eventfd", &[(&EVENTFD, EPERM)], [0, 0, 0]),
        ("links", &[(&FLOCK, ENOSYS), (&LINK, EPERM), (&PLAIN_LINK, EPERM)], [0, 0, 0]),
        (
            "all",
            &[(&PIDFD_OPEN, EPERM), (&MEMFD_CREATE, ENOSYS), (&PRCTL, ENOSYS), (&EVENTFD, ENOSYS), (&FLOCK, EPERM)],
            [1, 1, 1],
        ),
    ];
    for (name, refused, lines) in calls {
        let ended = start(&runs, name, refused, &["--max-restarts", "1"]).wait();
        assert_eq!(ended.code, Some(0), "{name}: {ended}");
        let found = [&PIDFD_OPEN, &MEMFD_CREATE, &PRCTL].map(|call| said(&ended, call));
        assert_eq!(found, lines, "{name}: {ended}");
        assert_same_checkpoint(&runs.run(name), &reference, 20, name);
        assert!(!runs.run(name).path.join("run.lock").exists());
    }
}

#[test]
fn the_end_of_a_rank_is_seen_without_pidfds_and_a_stop_too() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let mut running = start(&runs, "killed", &[(&PIDFD_OPEN, EPERM)], &[]);
    assert!(running.until("steps", || runs.run("killed").steps_so_far() >= 3));
    kill_process(running.rank(1), Signal::KILL).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(137), "{ended}");
    assert!(ended.err.contains("rank 1 failed: SIGKILL"), "{ended}");
    let mut running = start(&runs, "stopped", &[(&PIDFD_OPEN, EPERM), (&PRCTL, EPERM)], &[]);
    assert!(running.until("steps", || runs.run("stopped").steps_so_far() >= 3));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
}

/// Without prctl no rank hears of its launcher's death from the kernel.
#[test]
fn a_killed_launcher_leaves_no_rank_without_prctl() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let mut running = start(&runs, "killed", &[(&PRCTL, EPERM)], &[]);
    assert!(running.until("steps", || runs.run("killed").steps_so_far() >= 3));
    let ranks = [running.rank(0), running.rank(1)];
    running.signal(Signal::KILL);
    running.wait();
    let ended = runs.train("killed", &["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=1"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    for rank in ranks {
        let stat = fs::read_to_string(format!("/proc/{}/stat", rank.as_raw_nonzero())).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z "), "{stat}");
    }
}

#[test]
fn a_call_that_nothing_stands_in_for_is_3_and_named() {
    let runs = Runs::new(&CACHED);
    for (name, errno, cache) in [("epoll", EPERM, "pin"), ("no-cache", ENOSYS, "off")] {
        let cache = format!("data.cache={cache}");
        let ended = start(&runs, name, &[(&EPOLL_CREATE, errno)], &["--set", &cache]).wait();
        assert_eq!(ended.code, Some(3), "{name}: {ended}");
        assert!(ended.err.contains("epoll_create1 is refused here"), "{name}: {ended}");
        assert!(ended.err.contains("seccomp profile"), "{name}: {ended}");
        assert!(!runs.run(name).path.join("run.lock").exists());
    }
}

#[test]
fn ranks_of_another_launcher_do_without_them_too() {
    let runs = Runs::new(&CACHED);
    let reference = runs.finish("reference", &["--ranks", "2"]);
    let job = job_of(&runs, &reference.path, "foreign");
    let path = runs.run("foreign").path.join("job.json");
    fs::write(&path, json!(job).to_string()).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let rank = |rank: &str| {
        let mut command = Command::new(rank_program());
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")] {
            command.env(name, value);
        }
        command.env("MASTER_PORT", &port).env("HEADROOM_JOB", &path).env("OMP_WAIT_POLICY", "passive");
        sandboxed(&mut command, &[(&PIDFD_OPEN, EPERM), (&MEMFD_CREATE, EPERM), (&EVENTFD, EPERM), (&PRCTL, EPERM)]);
        Running::start(&mut command, runs.path())
    };
    for ended in ["0", "1"].map(rank).map(Running::wait) {
        assert_eq!(ended.code, Some(0), "{ended}");
    }
    assert_same_checkpoint(&runs.run("foreign"), &reference, 20, "foreign");
}
