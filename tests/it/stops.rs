//! Stop signals in every moment of a run, to every process.

use crate::host::{Starter, job_of, start};
use crate::support::{Ended, Running, Runs, assert_same_checkpoint, run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::fs;
use std::process::Command;
use std::time::Duration;

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/script_rank.py");
const UNSTARTED: i32 = 76;

fn children(parent: u32) -> Vec<Pid> {
    let parent = parent.to_string();
    let of = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        (stat.rsplit_once(") ")?.1.split(' ').nth(1)? == parent).then_some(pid)
    };
    fs::read_dir("/proc").unwrap().filter_map(of).filter_map(Pid::from_raw).collect()
}

/// Children that run the rank program.
fn ranks(launch: u32) -> Vec<Pid> {
    let is_rank = |pid: &Pid| {
        let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|word| word.starts_with(b"HEADROOM_CONTROL_FD="))
    };
    children(launch).into_iter().filter(is_rank).collect()
}

fn assert_unstarted(ended: &Ended, what: &str) {
    assert_eq!(ended.code, Some(UNSTARTED), "{what}: {ended}");
    assert!(ended.err.contains("stopped before the first step"), "{what}: {ended}");
    assert!(!ended.err.contains("failed"), "{what}: {ended}");
}

/// While libtorch loads no handler is there: the rank dies as any program would.
#[test]
fn a_signal_before_the_first_step_has_a_code_and_a_reason_of_its_own() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    for (name, signal, whom) in [
        ("launch", Signal::TERM, "launch"),
        ("interrupt", Signal::INT, "launch"),
        ("all", Signal::TERM, "every process"),
        ("rank", Signal::TERM, "a rank"),
        ("hang-up", Signal::HUP, "every process"),
    ] {
        let mut running = runs.start(name, &["--ranks", "2"]);
        let pid = running.child.id();
        assert!(running.until("ranks", || ranks(pid).len() == 2));
        let found = ranks(pid);
        match whom {
            "launch" => running.signal(signal),
            "a rank" => kill_process(found[1], signal).unwrap(),
            _ => {
                found.iter().for_each(|rank| kill_process(*rank, signal).unwrap());
                running.signal(signal);
            }
        }
        let ended = running.wait();
        assert_unstarted(&ended, name);
        assert!(ended.err.contains(&format!("to start again, add: --name {name} --resume auto")), "{ended}");
        let summary = runs.run(name).summary();
        assert_eq!(summary["status"], "stopped", "{name}");
        let reason = summary["reason"].as_str().unwrap();
        assert!(reason.starts_with("stopped before the first step (SIG"), "{name}: {reason}");
        assert!(!runs.run(name).path.join("run.lock").exists(), "{name}");
    }
    let ended = runs.train("rank", &["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=2"]);
    assert_eq!(ended.code, Some(0), "{ended}");
}

#[test]
fn at_any_moment_of_the_start_a_run_is_either_unstarted_or_saved() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    for ms in [20, 60, 120, 200, 300, 450, 700] {
        let name = format!("after{ms}");
        let mut running = runs.start(&name, &["--ranks", "2"]);
        let pid = running.child.id();
        assert!(running.until("ranks", || ranks(pid).len() == 2));
        std::thread::sleep(Duration::from_millis(ms));
        running.signal(Signal::TERM);
        let ended = running.wait();
        println!("{ms} ms after its ranks appeared: {:?}", ended.code);
        match ended.code {
            Some(75) => assert!(runs.run(&name).summary()["steps"].as_u64() >= Some(1), "{ended}"),
            _ => assert_unstarted(&ended, &name),
        }
    }
}

/// A stop before the first step of a resumed run leaves the saved state.
#[test]
fn a_resumed_run_that_is_stopped_early_keeps_its_checkpoint() {
    let runs = Runs::new(&["train.max_steps=4"]);
    let before = runs.finish("r", &["--ranks", "2"]);
    let mut running = runs.start("r", &["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=1000000"]);
    let pid = running.child.id();
    assert!(running.until("ranks", || ranks(pid).len() == 2));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_unstarted(&ended, "resumed");
    assert!(ended.err.contains("step-4 stays"), "{ended}");
    assert_eq!(before.summary()["steps"], 4);
    assert_eq!((before.steps(), before.checkpoint(4).exists()), (vec![1, 2, 3, 4], true));
}

/// The launcher waits for another node: minutes in which there is no rank.
#[test]
fn a_signal_while_nodes_are_waited_for_ends_at_once() {
    let runs = Runs::new(&[]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let nodes = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "127.0.0.1", "--master-port", &port];
    let is_open = || std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok();
    for signal in [Signal::TERM, Signal::INT, Signal::USR1] {
        let mut running = runs.start("nodes", &[&["--ranks", "1"], &nodes[..]].concat());
        assert!(running.until("node 0 listens", is_open));
        running.signal(signal);
        let ended = running.wait();
        assert_unstarted(&ended, "nodes");
        assert!(ended.err.contains("no rank was started"), "{ended}");
    }
    // A program under --exec ends as any other.
    let mut command = Command::new(crate::support::launch_program());
    command.args(nodes).args(["--ranks", "1", "--exec", "true"]);
    let mut running = Running::start(&mut command, runs.path());
    assert!(running.until("node 0 listens", is_open));
    running.signal(Signal::TERM);
    assert_eq!(running.wait().code, Some(143));
}

#[test]
fn a_signal_while_sample_data_are_made_leaves_nothing_half_done() {
    let runs = Runs::new(&[]);
    let data = runs.path().join("new-data");
    let mut command = runs.command(&["--ranks", "1", "--name", "sample"]);
    command.args(["--set", "data.sample_if_missing=true", "--set", &format!("data.dataset_path={}", data.display())]);
    let script = "import os, time\nopen(os.environ['TEST_MARK'], 'w').write(str(os.getpid()))\ntime.sleep(600)";
    let mark = runs.path().join("mark");
    command.env("HEADROOM_RANK", PROGRAM).env("JOB_SCRIPT", script).env("TEST_MARK", &mark);
    let mut running = Running::start(&mut command, runs.path());
    let pid = || fs::read_to_string(&mark).ok().filter(|text| !text.is_empty());
    assert!(running.until("the helper", || pid().is_some()));
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_unstarted(&ended, "sample data");
    let helper = pid().unwrap();
    let lives = || fs::read_to_string(format!("/proc/{helper}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    (0..30_000).take_while(|_| lives()).for_each(|_| std::thread::sleep(Duration::from_millis(2)));
    assert!(!lives(), "the helper outlives launch");
    let left: Vec<_> = fs::read_dir(runs.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("new-data")), "{left:?}");
}

#[test]
fn a_hang_up_of_one_rank_or_of_all_saves_one_common_step() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    for (name, which) in [("one", 1..2), ("all", 0..2)] {
        let mut running = runs.start(name, &["--ranks", "2"]);
        let run = runs.run(name);
        assert!(running.until("steps", || run.steps_so_far() >= 3));
        which.for_each(|rank| kill_process(running.rank(rank), Signal::HUP).unwrap());
        let ended = running.wait();
        assert_eq!(ended.code, Some(75), "{name}: {ended}");
        let step = run.summary()["steps"].as_u64().unwrap();
        assert!(run.checkpoint(step).exists(), "{name}");
    }
}

#[test]
fn a_signal_while_a_checkpoint_is_written_or_in_the_last_validation_loses_nothing() {
    let last = ["train.max_steps=12", "log.save_every_steps=3", "model.dropout=0.1", "data.max_val_windows=2000"];
    let runs = Runs::new(&last);
    let reference = runs.finish("reference", &["--ranks", "2"]);
    let is_writing = |name: &str| {
        let entries = runs.run(name).path.join("checkpoints").read_dir();
        entries
            .is_ok_and(|mut list| list.any(|e| e.is_ok_and(|e| e.file_name().to_string_lossy().starts_with(".step-"))))
    };
    for (name, moment) in [("writing", "a checkpoint is written"), ("validation", "the last step is recorded")] {
        let mut running = runs.start(name, &["--ranks", "2"]);
        let run = runs.run(name);
        let came = || if name == "writing" { is_writing(name) } else { run.steps_so_far() >= 12 };
        if running.until(moment, came) {
            // It may end by itself just now.
            let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
        }
        let ended = running.wait();
        println!("{moment}: {:?}", ended.code);
        assert!(matches!(ended.code, Some(0 | 75)), "{moment}: {ended}");
        let run = runs.finish(name, &["--ranks", "2", "--resume", "auto"]);
        assert_same_checkpoint(&run, &reference, 12, moment);
        let (summary, whole) = (run.summary(), reference.summary());
        assert_eq!((&summary["status"], &summary["steps"]), (&whole["status"], &whole["steps"]), "{moment}");
    }
}

/// The run is over, its summary is written, plots are drawn: there is nothing to stop.
#[test]
fn a_signal_in_the_closing_changes_no_result() {
    let runs = Runs::new(&["train.max_steps=6", "log.plots=true"]);
    let mut running = runs.start("r", &["--ranks", "2"]);
    let run = runs.run("r");
    let closing = || run.path.join("summary.json").exists();
    if running.until("the summary", closing) {
        let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
    }
    let ended = running.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!((run.summary()["status"].clone(), run.steps().len()), (json!("finished"), 6));
}

#[test]
fn a_rank_of_another_launcher_says_why_it_ends_before_the_first_step() {
    let runs = Runs::new(&["train.max_steps=1"]);
    let reference = runs.finish("reference", &["--ranks", "3"]);
    let job = job_of(&runs, &reference.path, "alone");
    let mut ranks = start(&runs, "alone", &job, Starter::Torchrun);
    // One of three ranks never comes: the others wait for it, with their handlers in place.
    let missing = ranks.pop().unwrap();
    missing.signal(Signal::STOP);
    let heeds = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0").trim().to_owned();
        u64::from_str_radix(&caught, 16).is_ok_and(|bits| bits >> (Signal::TERM.as_raw() - 1) & 1 == 1)
    };
    for mut rank in ranks {
        let pid = rank.child.id();
        assert!(rank.until("a handler", || heeds(pid)));
        rank.signal(Signal::TERM);
        let ended = rank.wait();
        assert_unstarted(&ended, "foreign");
    }
}

/// The first process of a container gets no signal without a handler. Where this machine permits no namespaces, nothing is
/// held here.
#[test]
fn as_the_first_process_of_a_container_it_stops_in_every_moment() {
    let unshare = ["--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !Command::new("unshare").args(unshare).arg("true").status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine permits no process namespaces");
        return;
    }
    let inside = |command: Command, runs: &Runs| {
        let mut outer = Command::new("unshare");
        outer.args(unshare).arg(command.get_program()).args(command.get_args()).env("OMP_WAIT_POLICY", "passive");
        Running::start(&mut outer, runs.path())
    };
    let first = |running: &Running| children(running.child.id()).pop().unwrap();
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let mut running = inside(runs.command(&["--ranks", "2", "--name", "trains"]), &runs);
    let trained = runs.run("trains");
    assert!(running.until("steps", || trained.steps_so_far() >= 3), "{}", running.read("err"));
    kill_process(first(&running), Signal::TERM).unwrap();
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let nodes =
        ["--ranks", "1", "--name", "waits", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", &port];
    let mut running = inside(runs.command(&nodes), &runs);
    assert!(running.until("node 0 listens", || std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok()));
    kill_process(first(&running), Signal::TERM).unwrap();
    assert_unstarted(&running.wait(), "waits");
    // Killed in its container: the next one, of another namespace, takes over at once.
    let mut running = inside(runs.command(&["--ranks", "2", "--name", "killed"]), &runs);
    let killed = runs.run("killed");
    assert!(running.until("steps", || killed.steps_so_far() >= 3), "{}", running.read("err"));
    let refused = runs.train("killed", &["--ranks", "2", "--resume", "auto"]);
    assert_eq!(refused.code, Some(2), "{refused}");
    kill_process(first(&running), Signal::KILL).unwrap();
    running.wait();
    let mut again = runs.command(&["--ranks", "2", "--name", "killed", "--resume", "auto"]);
    let ended = run(again.args(["--set", "train.max_steps=1"]), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("is taken over: that process has ended"), "{ended}");
}
