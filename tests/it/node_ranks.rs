//! CPU ranks of two nodes that train together: two launchers on this machine, also in network namespaces with a cable between.

use crate::support::{Ended, Run, Running, Runs, distance, launch_program};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

/// SGD hands the rounding of a sum on as it is.
const SGD: [&str; 5] = [
    "train.optimizer=sgd",
    "train.momentum=0.9",
    "train.learning_rate=0.1",
    "train.gradient_clip_norm=0.0",
    "log.save_every_steps=1",
];
const STEPS: u64 = 12;

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// `launch` as node `node` of two, with so many ranks.
fn node(mut command: Command, name: &str, node: usize, ranks: &str, at: (&str, u16), words: &[&str]) -> Command {
    command.args([
        "--name",
        name,
        "--device",
        "cpu",
        "--nnodes",
        "2",
        "--node-rank",
        &node.to_string(),
        "--ranks",
        ranks,
    ]);
    command.args(["--master-addr", at.0, "--master-port", &at.1.to_string()]).args(words);
    command.env_remove("HEADROOM_JOIN_SECRET");
    command
}

fn start(runs: &Runs, name: &str, ranks: [&str; 2], words: &[&str]) -> [Running; 2] {
    let port = free_port();
    [0, 1].map(|number| {
        let mut command = node(runs.command(&[]), name, number, ranks[number], ("127.0.0.1", port), words);
        // Both nodes are this machine: the secret is for the way there.
        command.env("HEADROOM_JOIN_SECRET", "known to the two of us");
        Running::start(&mut command, runs.path())
    })
}

fn assert_close(run: &Run, reference: &Run, what: &str) {
    let [found, right] = [run, reference].map(|run| run.tensors(STEPS, "model.safetensors"));
    let found = distance(&found, &right);
    println!("{what}: {:.1e} of the norm ({}), {:.1e} of the largest element", found.norm, found.worst, found.element);
    assert!(found.norm <= 1e-5 && found.element <= 1e-5, "{what}: {:e} in {}", found.norm, found.worst);
    assert_eq!(run.steps(), reference.steps(), "{what}");
    for (a, b) in run.losses().iter().zip(reference.losses()) {
        assert!((a - b).abs() <= 1e-5 * b, "{what}: loss {a} against {b}");
    }
}

fn steps_of(steps: u64) -> String {
    format!("train.max_steps={steps}")
}

#[test]
fn two_nodes_train_as_one_does_and_go_on_on_another_number_of_nodes() {
    let runs = Runs::new(&SGD);
    let (all, many) = (steps_of(STEPS), steps_of(100_000));
    let reference = runs.finish("one", &["--ranks", "3", "--set", &all]);
    let ended = start(&runs, "two", ["2", "1"], &["--set", &all]).map(Running::wait);
    assert!(ended.iter().all(|node| node.code == Some(0)), "{}\n{}", ended[0], ended[1]);
    assert!(ended[0].out.contains("3 ranks on 2 nodes: Gloo between them"), "{}", ended[0]);
    assert_close(&runs.run("two"), &reference, "two nodes");

    // Asked on one node, ranks of both stop at the same step; one node goes on, and then again two.
    let run = runs.run("moved");
    let mut nodes = start(&runs, "moved", ["1", "2"], &["--set", &many]);
    assert!(nodes[0].until("steps", || run.steps_so_far() >= 3), "{}", nodes[0].read("err"));
    nodes[1].signal(Signal::TERM);
    let ended = nodes.map(Running::wait);
    assert!(ended.iter().all(|node| node.code == Some(75)), "{}\n{}", ended[0], ended[1]);
    let stopped = run.steps_so_far() as u64;
    if stopped < STEPS {
        let next = steps_of((stopped + 2).min(STEPS));
        runs.finish("moved", &["--ranks", "3", "--resume", "auto", "--set", &next]);
    }
    let last = run.steps_so_far() as u64;
    if last < STEPS {
        let ended = start(&runs, "moved", ["2", "1"], &["--resume", "auto", "--set", &all]).map(Running::wait);
        assert!(ended.iter().all(|node| node.code == Some(0)), "{}\n{}", ended[0], ended[1]);
        assert_close(&run, &reference, "moved between nodes");
    } else {
        println!("stopped at step {stopped}: nothing is left to go on with");
    }
}

/// Ports at which the process takes connections over TCP.
fn listening(pid: Pid) -> Vec<u16> {
    let folder = format!("/proc/{}", pid.as_raw_nonzero());
    let links = std::fs::read_dir(format!("{folder}/fd")).into_iter().flatten().flatten();
    let inodes: Vec<String> = links
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned()))
        .collect();
    let table = std::fs::read_to_string(format!("{folder}/net/tcp")).unwrap_or_default();
    let port = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // 0A: a socket that listens.
        let own = words.get(3) == Some(&"0A") && inodes.iter().any(|inode| words.get(9) == Some(&inode.as_str()));
        own.then(|| u16::from_str_radix(words[1].rsplit(':').next().unwrap_or_default(), 16).unwrap_or_default())
    };
    table.lines().skip(1).filter_map(port).collect()
}

/// Pids of the ranks that a launcher has started.
fn ranks(running: &Running, ranks: &[usize]) -> Vec<Pid> {
    ranks.iter().map(|rank| running.rank(*rank)).collect()
}

/// Waits until no process of these lives; whoever reaps them takes its time.
fn gone(pids: &[Pid]) {
    let lives = |pid: &Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    let since = Instant::now();
    while let Some(pid) = pids.iter().find(|pid| lives(pid)) {
        assert!(since.elapsed() < Duration::from_secs(60), "process {pid:?} outlives the run");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_node_that_is_killed_is_named_on_the_other_and_strangers_find_no_way_in() {
    let runs = Runs::new(&SGD);
    let run = runs.run("killed");
    let mut nodes = start(&runs, "killed", ["2", "2"], &["--set", &steps_of(100_000)]);
    assert!(nodes[0].until("steps", || run.steps_so_far() >= 3), "{}", nodes[0].read("err"));
    let pids = [ranks(&nodes[0], &[0, 1]), ranks(&nodes[1], &[2, 3])].concat();
    let ports: Vec<u16> = pids.iter().flat_map(|pid| listening(*pid)).collect();
    assert_eq!(ports.len(), 2, "Gloo of each node's first rank listens, nobody else");
    for port in ports {
        let met = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_millis(300));
        assert!(met.is_err(), "a stranger is connected with port {port}");
    }
    let before = run.steps_so_far();
    assert!(nodes[0].until("more steps", || run.steps_so_far() > before + 2), "{}", nodes[0].read("err"));
    nodes[1].signal(Signal::KILL);
    let [first, second] = nodes.map(Running::wait);
    assert_eq!(second.code, None, "{second}");
    assert_eq!(first.code, Some(9), "{first}");
    // Its launcher is missed first, or a rank that dies with it and says why.
    let named = ["rank 2 failed: ", "rank 3 failed: "];
    assert!(named.iter().any(|words| first.err.contains(words)), "{first}");
    gone(&pids);
}

#[test]
fn a_rank_that_is_killed_is_named_on_the_other_node() {
    let runs = Runs::new(&SGD);
    let run = runs.run("killed");
    let mut nodes = start(&runs, "killed", ["1", "2"], &["--set", &steps_of(100_000)]);
    assert!(nodes[0].until("steps", || run.steps_so_far() >= 3), "{}", nodes[0].read("err"));
    kill_process(nodes[1].rank(2), Signal::KILL).unwrap();
    let [first, second] = nodes.map(Running::wait);
    assert_eq!((first.code, second.code), (Some(9), Some(137)), "{first}\n{second}");
    assert!(first.err.contains("rank 2 failed: SIGKILL"), "{first}");
}

#[test]
fn a_stranger_that_sends_half_a_frame_to_the_meeting_point_changes_nothing() {
    let runs = Runs::new(&SGD);
    let port = free_port();
    let words = ["--set", "train.max_steps=2"];
    let with = |number: usize| {
        let mut command = node(runs.command(&[]), "met", number, "1", ("127.0.0.1", port), &words);
        command.env("HEADROOM_JOIN_SECRET", "known to the two of us");
        Running::start(&mut command, runs.path())
    };
    let mut first = with(0);
    let mut open: Vec<TcpStream> = Vec::new();
    // At the launcher's meeting point, then at that of the ranks.
    for bytes in [&[9, 0][..], &[255, 255, 0, 0, 7], b"GET / HTTP/1.1\r\n\r\n"] {
        let met = first.until("a listener", || match TcpStream::connect(("127.0.0.1", port)) {
            Ok(mut stream) => stream.write_all(bytes).map(|()| open.push(stream)).is_ok(),
            Err(_) => false,
        });
        assert!(met, "{}", first.read("err"));
    }
    let second = with(1);
    let ended = [first, second].map(Running::wait);
    assert!(ended.iter().all(|node| node.code == Some(0)), "{}\n{}", ended[0], ended[1]);
}

/// Two network namespaces with a cable between them; they end with the value.
struct Cable {
    names: [String; 2],
}

const ADDRESSES: [&str; 2] = ["10.77.0.1", "10.77.0.2"];

fn ip(words: &[&str]) -> bool {
    let ended = Command::new("ip").args(words).output();
    ended.is_ok_and(|ended| ended.status.success())
}

impl Cable {
    /// `None`: not allowed here.
    fn new() -> Option<Self> {
        let names = [0, 1].map(|end| format!("headroom-{}-{end}", std::process::id()));
        let cable = Self { names };
        let [a, b] = &cable.names;
        let made = ip(&["netns", "add", a])
            && ip(&["netns", "add", b])
            && ip(&["-n", a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b]);
        let up = |end: usize| {
            let (name, address) = (&cable.names[end], format!("{}/24", ADDRESSES[end]));
            ip(&["-n", name, "addr", "add", &address, "dev", "cable"])
                && ip(&["-n", name, "link", "set", "cable", "up"])
                && ip(&["-n", name, "link", "set", "lo", "up"])
        };
        (made && up(0) && up(1)).then_some(cable)
    }

    /// `command` inside the namespace of an end.
    fn within(&self, end: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[end]]).arg(launch_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(name, value),
                None => inside.env_remove(name),
            };
        }
        inside
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&["netns", "del", name]);
        }
    }
}

#[test]
fn nodes_on_a_network_of_their_own_train_and_name_each_other_when_the_cable_is_cut() {
    let Some(cable) = Cable::new() else {
        eprintln!("skipped: no network namespaces here (root and `ip` make them)");
        return;
    };
    let runs = Runs::new(&SGD);
    let run = runs.run("cut");
    let (many, limit) = (steps_of(100_000), "train.step_timeout=4");
    let words = ["--set", &many, "--set", limit];
    let mut nodes = [0, 1].map(|end| {
        let command = node(runs.command(&[]), "cut", end, "1", (ADDRESSES[0], 29_511), &words);
        Running::start(&mut cable.within(end, &command), runs.path())
    });
    assert!(nodes[0].until("steps", || run.steps_so_far() >= 3), "{}\n{}", nodes[0].read("err"), nodes[1].read("err"));
    assert!(ip(&["-n", &cable.names[0], "link", "set", "cable", "down"]));
    let ended: [Ended; 2] = nodes.map(Running::wait);
    for (own, other) in [(0, 1), (1, 0)] {
        let node = &ended[own];
        assert!(node.code.is_some_and(|code| code != 0), "{node}");
        assert!(node.err.contains(&format!("for rank {other} (node {other})")), "{node}");
        assert_eq!(node.err.matches("the nodes meet without a secret").count(), 1, "{node}");
    }
}
