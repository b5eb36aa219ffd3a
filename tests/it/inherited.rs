//! State that a process inherits from its parent: signals, limits, descriptors, rights, priorities.

use crate::host::job_of;
use crate::support::{Ended, Running, Runs, rank_program, run};
use crate::surroundings::{blocking, idle_for_disks, ignoring, limited, with_umask, without_descriptors};
use rustix::process::{Resource, Signal};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

/// `launch` of the tiny config, with its surroundings.
fn launch(runs: &Runs, name: &str, words: &[&str], surround: impl Fn(&mut Command)) -> Running {
    let mut command = runs.command(&[]);
    command.args(["--name", name, "--ranks", "2"]).args(words);
    surround(&mut command);
    Running::start(&mut command, runs.path())
}

/// A rank that no launcher of ours started, alone.
fn rank_alone(runs: &Runs, name: &str, surround: impl Fn(&mut Command)) -> Running {
    let reference = runs.run("reference");
    if !reference.path.exists() {
        runs.finish("reference", &["--ranks", "1", "--set", "train.max_steps=2"]);
    }
    let mut job = job_of(runs, &reference.path, name);
    job["config"]["train"]["max_steps"] = 1_000_000.into();
    let path = runs.run(name).path.join("job.json");
    fs::write(&path, job.to_string()).unwrap();
    let mut command = Command::new(rank_program());
    command.env("HEADROOM_JOB", &path).env("OMP_WAIT_POLICY", "passive");
    surround(&mut command);
    Running::start(&mut command, runs.path())
}

/// Stops by SIGTERM after some steps.
fn stopped(runs: &Runs, name: &str, mut running: Running) -> Ended {
    let run = runs.run(name);
    assert!(running.until("steps", || run.steps_so_far() >= 3), "{}", running.read("err"));
    running.signal(Signal::TERM);
    running.wait()
}

#[test]
fn ignored_child_signals_hide_no_exit_code() {
    let runs = Runs::new(&[]);
    let ignore = |command: &mut Command| ignoring(command, Signal::CHILD.as_raw());
    let ended = launch(&runs, "good", &[], ignore).wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    let ended = launch(&runs, "nothing", &["--set", "data.dataset_path=/nowhere"], ignore).wait();
    assert_eq!(ended.code, Some(4), "{ended}");
    let mut running = launch(&runs, "killed", &["--set", "train.max_steps=1000000"], ignore);
    assert!(running.until("steps", || runs.run("killed").steps_so_far() >= 3));
    rustix::process::kill_process(running.rank(1), Signal::KILL).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(137), "{ended}");
    assert!(ended.err.contains("rank 1 failed: SIGKILL"), "{ended}");
}

#[test]
fn blocked_and_ignored_signals_stop_a_run_all_the_same() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let numbers = [Signal::TERM, Signal::INT, Signal::USR1, Signal::CHILD].map(Signal::as_raw);
    let block = |command: &mut Command| blocking(command, &numbers);
    let ignore = |command: &mut Command| numbers.iter().for_each(|number| ignoring(command, *number));
    for (name, ended) in [
        ("blocked", stopped(&runs, "blocked", launch(&runs, "blocked", &[], block))),
        ("ignored", stopped(&runs, "ignored", launch(&runs, "ignored", &[], ignore))),
        ("blocked rank", stopped(&runs, "blocked-rank", rank_alone(&runs, "blocked-rank", block))),
        ("ignored rank", stopped(&runs, "ignored-rank", rank_alone(&runs, "ignored-rank", ignore))),
    ] {
        assert_eq!(ended.code, Some(75), "{name}: {ended}");
    }
}

#[test]
fn a_hang_up_stops_a_rank_and_nohup_keeps_it_running() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let hang_up = |name: &str, surround: &dyn Fn(&mut Command)| {
        let mut running = rank_alone(&runs, name, surround);
        let run = runs.run(name);
        assert!(running.until("steps", || run.steps_so_far() >= 3), "{}", running.read("err"));
        running.signal(Signal::HUP);
        let seen = run.steps_so_far();
        // Far more steps than a stop takes.
        let lives = running.until("more steps", || run.steps_so_far() >= seen + 200);
        running.child.try_wait().unwrap().is_none().then(|| running.signal(Signal::TERM));
        (lives, running.wait())
    };
    let (lives, ended) = hang_up("hangs-up", &|_| {});
    assert_eq!((lives, ended.code), (false, Some(75)), "{ended}");
    let (lives, ended) = hang_up("nohup", &|command| ignoring(command, Signal::HUP.as_raw()));
    assert_eq!((lives, ended.code), (true, Some(75)), "{ended}");
}

#[test]
fn closed_descriptors_are_no_place_for_output() {
    let runs = Runs::new(&[]);
    let ended = launch(&runs, "closed", &["--set", "train.max_steps=8"], without_descriptors).wait();
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(0), "", ""));
    let run = runs.run("closed");
    assert_eq!(run.steps(), (1..=8).collect::<Vec<_>>());
    assert_eq!(run.summary()["status"], "finished");
    let ended = stopped(&runs, "rank", rank_alone(&runs, "rank", without_descriptors));
    assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(75), "", ""));
    // Every line is a record: nothing else was written into the files that were opened first.
    assert!(runs.run("rank").steps().len() >= 3);
}

#[test]
fn limits_that_make_a_run_impossible_are_3_with_the_limit_and_the_way_out() {
    let runs = Runs::new(&[]);
    let cached = ["--set", "data.cache=pin", "--set", "data.cache_size_gb=0.00390625"];
    for (name, resource, bytes, words, says) in [
        ("f", Resource::Fsize, 100_000, &[][..], ["ulimit -f is 100000 bytes", "LimitFSIZE="]),
        ("f-cache", Resource::Fsize, 2 << 20, &cached[..], ["ulimit -f is 2097152 bytes", "data.cache: off"]),
        ("v", Resource::As, 500 << 20, &[][..], ["ulimit -v is 524288000 bytes", "ulimit -v unlimited"]),
        ("n", Resource::Nofile, 20, &[][..], ["ulimit -n is 20", "LimitNOFILE="]),
    ] {
        let limit = |command: &mut Command| limited(command, resource, bytes, bytes);
        let ended = launch(&runs, name, words, limit).wait();
        assert_eq!(ended.code, Some(3), "{name}: {ended}");
        assert!(says.iter().all(|part| ended.err.contains(part)), "{name}: {ended}");
        assert!(!runs.run(name).path.exists(), "{name}: refused after it began");
        let mut plan = runs.command(&["plan", "--ranks", "2"]);
        plan.args(words);
        limit(&mut plan);
        assert_eq!(run(&mut plan, runs.path()).code, Some(3), "{name}");
    }
    let ended = rank_alone(&runs, "rank", |command| limited(command, Resource::Fsize, 100_000, 100_000)).wait();
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(ended.err.contains("ulimit -f is 100000 bytes"), "{ended}");
    // Limits that leave room, and a soft one that may be raised.
    let enough = |command: &mut Command| {
        limited(command, Resource::Fsize, 64 << 20, 64 << 20);
        limited(command, Resource::Nofile, 20, 4096);
    };
    let ended = launch(&runs, "enough", &cached, enough).wait();
    assert_eq!(ended.code, Some(0), "{ended}");
}

/// A limit that no plan can foresee: the records grow past it. The write fails, and no signal ends the rank without a word.
#[test]
fn a_file_that_may_not_grow_is_named_and_no_signal_ends_the_run() {
    let runs = Runs::new(&["train.max_steps=1000000", "data.cache=off", "log.save_every_steps=100000"]);
    let limit = 1 << 20;
    let mut command = runs.command(&["--ranks", "1", "--name", "grows"]);
    limited(&mut command, Resource::Fsize, limit, limit);
    let mut running = Running::start(&mut command, runs.path());
    let run = runs.run("grows");
    let size = |name: &str| run.path.join(name).metadata().map_or(0, |facts| facts.len());
    let full = || ["metrics.jsonl", "memory.rank0.jsonl", "rank0.log"].iter().any(|name| size(name) >= limit);
    running.until("a full file", full);
    // Whatever the run does about its records, it is no death by SIGXFSZ, and the fault is named.
    let files = running.files();
    let says = |name: &str| fs::read_to_string(files.join(name)).is_ok_and(|text| text.contains("File too large"));
    running.until("words", || says("out") || says("err"));
    running.child.try_wait().unwrap().is_none().then(|| running.signal(Signal::TERM));
    let ended = running.wait();
    assert!(!matches!(ended.code, None | Some(153)), "{ended}");
    assert!(ended.err.contains("File too large") || ended.out.contains("File too large"), "{ended}");
}

/// A soft limit of processor time is a request to stop, a hard one the end, with its name.
#[test]
fn processor_time_that_is_used_up_saves_or_is_named() {
    let runs = Runs::new(&["train.max_steps=100000000"]);
    let limit = |hard| move |command: &mut Command| limited(command, Resource::Cpu, 2, hard);
    let ended = launch(&runs, "soft", &[], limit(600)).wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    assert!(ended.err.contains("ulimit -t is 2 s"), "{ended}");
    let ended = launch(&runs, "hard", &[], limit(2)).wait();
    assert_eq!(ended.code, Some(137), "{ended}");
    assert!(ended.err.contains("ulimit -t (processor time of a process) is 2 s"), "{ended}");
}

#[test]
fn a_mask_that_takes_the_owners_rights_is_replaced() {
    let runs = Runs::new(&[]);
    let ended = launch(&runs, "masked", &[], |command| with_umask(command, 0o777)).wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("umask 0777 would take the owner's own rights: 0077 is used"), "{ended}");
    let folder = runs.run("masked").path;
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&folder.join("metrics.jsonl"))), (0o700, 0o600));
}

#[test]
fn low_priorities_are_said() {
    let runs = Runs::new(&["train.max_steps=2"]);
    let mut command = Command::new("nice");
    let inner = runs.command(&["--ranks", "1", "--name", "nice"]);
    command.args(["-n", "5"]).arg(inner.get_program()).args(inner.get_args()).env("OMP_WAIT_POLICY", "passive");
    idle_for_disks(&mut command);
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("niceness is 5") && ended.err.contains("ionice -c 3"), "{ended}");
    let usual = runs.train("usual", &["--ranks", "1"]);
    assert!(!usual.err.contains("niceness") && !usual.err.contains("ionice"), "{usual}");
}
