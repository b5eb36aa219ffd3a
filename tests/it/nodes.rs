//! Two launchers on this host stand for two nodes: they meet, count their ranks, and refuse what does not fit together.

use crate::support::{Ended, Running, Runs, launch_program};
use serde_json::Value;
use std::fs;
use std::process::Command;

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/script_rank.py");
const NAMES: [&str; 6] = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"];

fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// `command` as node `node` of two.
fn node(mut command: Command, node: usize, ranks: &str, port: u16) -> Command {
    command.args(["--nnodes", "2", "--node-rank", &node.to_string(), "--ranks", ranks]);
    command.args(["--master-addr", "127.0.0.1", "--master-port", &port.to_string()]);
    command
}

fn both(commands: [Command; 2], runs: &Runs) -> [Ended; 2] {
    commands.map(|mut command| Running::start(&mut command, runs.path())).map(Running::wait)
}

#[test]
fn two_ranks_and_one_are_a_world_of_three() {
    let (runs, port) = (Runs::new(&[]), free_port());
    let script = format!("echo {}", NAMES.map(|name| format!("${name}")).join(" "));
    let exec = |number: usize, ranks: &str| {
        let mut command = node(Command::new(launch_program()), number, ranks, port);
        command.args(["--exec", "sh", "-c", &script]);
        command
    };
    let ended = both([exec(0, "2"), exec(1, "1")], &runs);
    let lines = |ended: &Ended| {
        assert_eq!(ended.code, Some(0), "{ended}");
        let mut lines: Vec<String> = ended.out.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&ended[0]), ["[rank 0] 0 0 3 2 0 127.0.0.1", "[rank 1] 1 1 3 2 0 127.0.0.1"]);
    assert_eq!(lines(&ended[1]), ["[rank 2] 2 0 3 1 1 127.0.0.1"]);
}

#[test]
fn a_node_that_does_not_come_is_named() {
    let (runs, port) = (Runs::new(&[]), free_port());
    for (number, says) in [(0, "node 1 did not come within 0.3 s"), (1, "node 0 did not come within 0.3 s")] {
        let mut command = node(Command::new(launch_program()), number, "1", port);
        command.args(["--join-timeout", "0.3", "--exec", "true"]);
        let ended = Running::start(&mut command, runs.path()).wait();
        assert_eq!(ended.code, Some(6), "{ended}");
        assert!(ended.err.contains(says) && ended.err.contains(&port.to_string()), "{ended}");
    }
}

/// A training job whose ranks only say what they are.
fn train(runs: &Runs, number: usize, ranks: &str, port: u16) -> Command {
    let mut command = node(runs.command(&[]), number, ranks, port);
    command.args(["--name", "job", "--device", "cpu"]).env("HEADROOM_RANK", PROGRAM);
    command.env(
        "JOB_SCRIPT",
        "import os; print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['HEADROOM_JOB'])",
    );
    command
}

#[test]
fn nodes_plan_for_the_ranks_of_all_and_share_one_folder() {
    let (runs, port) = (Runs::new(&[]), free_port());
    // Node 1 first: it waits.
    let second = Running::start(&mut train(&runs, 1, "1", port), runs.path());
    let first = Running::start(&mut train(&runs, 0, "2", port), runs.path());
    let (first, second) = (first.wait(), second.wait());
    let job = runs.run("job");
    for (ended, ranks) in [(&first, &[0, 1][..]), (&second, &[2][..])] {
        assert_eq!(ended.code, Some(0), "{ended}");
        for rank in ranks {
            assert!(ended.out.contains(&format!("[rank {rank}] {rank} of 3")), "{ended}");
        }
    }
    assert!(second.out.contains("job.node1.json"), "{second}");
    let plan = |file: &str| serde_json::from_slice::<Value>(&fs::read(job.path.join(file)).unwrap()).unwrap();
    for (file, local) in [("plan.json", 2), ("plan.node1.json", 1)] {
        let plan = plan(file);
        assert_eq!(plan["topology"]["local_world_size"], local, "{plan}");
        assert_eq!(plan["topology"]["world_size"], 3, "{plan}");
        assert_eq!(plan["topology"]["node_ranks"], serde_json::json!([2, 1]), "{plan}");
        assert_eq!(plan["batch"]["global_batch"], 12, "batch_size 4 on each of three ranks: {plan}");
    }
    assert_eq!(fs::read_dir(job.path.parent().unwrap()).unwrap().count(), 1);
}

/// A failure on one node before its plan is known ends the others, too.
#[test]
fn what_fails_on_one_node_alone_is_told_to_the_others_at_once() {
    let (runs, port) = (Runs::new(&[]), free_port());
    let mut first = node(runs.command(&[]), 0, "2", port);
    first.args(["--name", "job", "--device", "cuda", "--strict"]).env("CUDA_VISIBLE_DEVICES", "");
    let [first, second] = both([first, train(&runs, 1, "1", port)], &runs);
    assert_eq!((first.code, second.code), (Some(8), Some(6)), "{first}\n{second}");
    assert!(second.err.contains("node 0 cannot take part"), "{second}");
    // A runs folder that cannot be used, on the other node.
    let (runs, port) = (Runs::new(&[]), free_port());
    let file = runs.path().join("file");
    fs::write(&file, "").unwrap();
    let mut second = train(&runs, 1, "1", port);
    second.args(["--set", &format!("log.runs_dir={}", file.display())]);
    let [first, second] = both([train(&runs, 0, "2", port), second], &runs);
    assert_eq!(first.code, Some(6), "{first}\n{second}");
    assert!(first.err.contains("node 1 cannot take part"), "{first}");
    assert!(second.code.is_some_and(|code| code != 0) && second.err.contains("file"), "{second}");
    assert!(!runs.run("job").path.exists(), "the new folder is empty: it goes");
}

#[test]
fn nodes_that_disagree_or_cannot_take_part_end_together_and_leave_no_folder() {
    let other: (&[&str], &str, Option<i32>) =
        (&["--set", "train.batch_size=8"], "train.batch_size: 4 on node 0, 8 on node 1", Some(2));
    let poor: (&[&str], &str, Option<i32>) =
        (&["--set", "memory.budget=1MiB"], "the memory plan does not fit", Some(6));
    for (words, says, code) in [other, poor] {
        let (runs, port) = (Runs::new(&[]), free_port());
        let mut second = train(&runs, 1, "1", port);
        second.args(words);
        let [first, second] = both([train(&runs, 0, "2", port), second], &runs);
        assert_eq!(first.code, code, "{first}");
        assert!(first.err.contains(says) && second.err.contains(says), "{first}\n{second}");
        assert!(code == Some(2) || first.err.contains("node 1 cannot take part"), "{first}");
        assert!(second.code == Some(2) || second.code == Some(3), "{second}");
        assert!(!runs.run("job").path.exists());
    }
}
