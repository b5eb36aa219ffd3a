//! Verbs and files around a run, with the programs that read them.

use crate::python::python;
use crate::support::{Ended, Running, Runs, folder, launch_program, rank_program, run};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const READERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/readers");
const SBATCH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/slurm.sbatch");

/// TensorBoard's reader and Prometheus' parsers, without what they need for more than reading.
fn packages() -> &'static Path {
    static PACKAGES: OnceLock<PathBuf> = OnceLock::new();
    PACKAGES.get_or_init(|| {
        let target = rank_program().with_file_name("reader-packages");
        let have = |name: &str| target.join(name).is_dir();
        if !["tensorboard", "prometheus_client", "google", "absl"].into_iter().all(have) {
            let wanted = ["tensorboard>=2.18,<3", "protobuf", "absl-py", "prometheus_client"];
            let mut pip = Command::new(python());
            pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]);
            let installed = pip.arg("--target").arg(&target).args(wanted).status();
            assert!(installed.is_ok_and(|status| status.success()), "pip cannot install into {}", target.display());
        }
        target
    })
}

fn reader(script: &str, words: &[&str]) -> Value {
    let mut command = Command::new(python());
    command.arg(Path::new(READERS).join(script)).args(words).env("PYTHONPATH", packages());
    let ended = run(&mut command, folder().path());
    assert_eq!(ended.code, Some(0), "{script}: {ended}");
    serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended}"))
}

fn launch(words: &[&str], cwd: &Path) -> Ended {
    run(Command::new(launch_program()).args(words).current_dir(cwd), cwd)
}

fn ok(words: &[&str], cwd: &Path) -> String {
    let ended = launch(words, cwd);
    assert_eq!(ended.code, Some(0), "{words:?}: {ended}");
    ended.out
}

#[test]
fn tensorboards_reader_finds_every_metric_also_of_a_run_that_was_resumed() {
    let sets = ["log.tensorboard=true", "train.max_steps=6", "log.save_every_steps=4", "watch.period=0.05"];
    let runs = Runs::new(&sets);
    let path = runs.finish("a", &["--ranks", "2"]).path;
    let first = reader("events.py", &[path.to_str().unwrap()]);
    assert!(first["compared"].as_u64().unwrap() > 40 && first["status"] == 1, "{first}");
    // Again from step 4: steps 5 and 6 come a second time, and count once.
    fs::remove_dir_all(path.join("checkpoints/step-6")).unwrap();
    runs.finish("a", &["--ranks", "2", "--resume", "auto", "--set", "train.max_steps=9"]);
    let second = reader("events.py", &[path.to_str().unwrap()]);
    assert!(second["compared"].as_u64() > first["compared"].as_u64(), "{first} {second}");
    // The same from the records alone.
    let out = runs.path().join("exported");
    fs::create_dir(&out).unwrap();
    let text = ok(&["export-metrics", path.to_str().unwrap(), "--to", "tensorboard", "--out", "exported"], runs.path());
    assert!(text.contains("events.out.tfevents."), "{text}");
    fs::copy(path.join("metrics.jsonl"), out.join("metrics.jsonl")).unwrap();
    let third = reader("events.py", &[out.to_str().unwrap()]);
    assert_eq!(third["compared"], second["compared"]);
}

#[test]
fn runs_are_listed_compared_exported_and_shown_on_a_page() {
    let runs = Runs::new(&["train.max_steps=3"]);
    for (name, seed) in [("a", "1"), ("b", "2")] {
        runs.finish(name, &["--set", &format!("seed={seed}")]);
    }
    let cwd = runs.path();
    let listed = ok(&["runs"], cwd);
    assert!(listed.contains("finished") && listed.lines().count() == 3, "{listed}");
    let all: Value = serde_json::from_str(&ok(&["runs", "--json"], cwd)).unwrap();
    assert_eq!((all[0]["steps"].as_u64(), all[0]["standing"].as_str()), (Some(3), Some("finished")));
    let compared = ok(&["compare", "a", "b"], cwd);
    let seeds = compared.lines().find(|line| line.starts_with("seed ")).unwrap_or_default();
    assert_eq!(seeds.split_whitespace().collect::<Vec<_>>(), ["seed", "1", "2"], "{compared}");
    assert!(!compared.contains("batch_size"), "only what differs: {compared}");
    let job: Value = serde_json::from_slice(&fs::read(cwd.join("runs/a/job.json")).unwrap()).unwrap();
    let words: Vec<&str> = job["origin"]["command"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(words.contains(&"--name") && !job["origin"]["host"].as_str().unwrap().is_empty(), "{words:?}");
    assert!(job["origin"]["environment"].as_array().unwrap().iter().all(|name| !name.as_str().unwrap().contains('=')));
    ok(&["report", "a", "b", "--out", "page.html"], cwd);
    let page = fs::read_to_string(cwd.join("page.html")).unwrap();
    let data = page.split("id=\"data\">").nth(1).unwrap().split("</script>").next().unwrap();
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!((data["runs"].as_array().unwrap().len(), &data["differs"][0][0]), (2, &"seed".into()));
    assert!(!data["runs"][0]["curves"].as_array().unwrap().is_empty());
    let csv = fs::read_to_string(cwd.join(ok(&["export-metrics", "a", "--to", "csv"], cwd).trim())).unwrap();
    assert_eq!((csv.lines().count(), csv.starts_with("step,t,epoch,loss,lr,")), (4, true), "{csv}");
    let findings: Value = serde_json::from_str(&ok(&["doctor", "a", "--json"], cwd)).unwrap();
    assert!(findings[0]["findings"].is_array(), "{findings}");
    let plan: Value = serde_json::from_str(&run(&mut runs.command(&["plan", "--json"]), cwd).out).unwrap();
    assert!(plan["budget"]["lines"].as_array().unwrap().len() > 4);
}

#[test]
fn a_sweep_is_a_grid_that_continues() {
    let runs = Runs::new(&["train.max_steps=2"]);
    let sweep = |more: &[&str]| {
        let mut command = runs.command(&["sweep", "--name", "s"]);
        command.args(["--set", "seed=1,2", "--set", "train.learning_rate=1e-3,2e-3"]).args(more);
        run(&mut command, runs.path())
    };
    let first = sweep(&[]);
    assert_eq!(first.code, Some(0), "{first}");
    let rows: Vec<&str> =
        first.out.lines().filter(|line| line.starts_with("s-00") && line.contains("finished")).collect();
    assert_eq!(rows.len(), 4, "{first}");
    let config = |name: &str| fs::read_to_string(runs.run(name).path.join("config.yaml")).unwrap();
    assert!(config("s-003").contains("seed: 2") && config("s-000").contains("seed: 1"));
    fs::remove_dir_all(runs.run("s-002").path).unwrap();
    let again = sweep(&[]);
    assert_eq!(again.out.matches("has finished already").count(), 3, "{again}");
    assert!(runs.run("s-002").summary()["status"] == "finished");
    let other = sweep(&["--set", "train.batch_size=2"]);
    assert!(other.code == Some(2) && other.err.contains("of another sweep"), "{other}");
}

#[test]
fn metrics_of_a_monitor_are_read_by_prometheus() {
    let dir = folder();
    let (file, socket) = (dir.path().join("headroom.prom"), dir.path().join("socket"));
    let listen = format!("unix:{}", socket.display());
    let mut command = Command::new(launch_program());
    command.args(["monitor", "--pid", &std::process::id().to_string(), "--interval", "0.05", "--json"]);
    command.arg("--textfile").arg(&file).args(["--listen", &listen]).current_dir(dir.path());
    let mut running = Running::start(&mut command, dir.path());
    running.until("a textfile", || file.is_file());
    let copy = dir.path().join("copy.prom");
    fs::copy(&file, &copy).unwrap();
    let values = reader("metrics.py", &[copy.to_str().unwrap(), "prometheus"]);
    assert!(values["headroom_machine_memory_bytes"].as_f64() > Some(1e6), "{values}");
    assert!(values["headroom_process_memory_bytes"].as_f64() > Some(1e6), "{values}");
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("200 OK") && head.contains("openmetrics-text"), "{head}");
    fs::write(&copy, body).unwrap();
    assert!(reader("metrics.py", &[copy.to_str().unwrap(), "openmetrics"])["headroom_oom_kills_total"].is_number());
    running.signal(Signal::INT);
    let ended = running.wait();
    let first: Value = serde_json::from_str(ended.out.lines().next().unwrap()).unwrap();
    assert!(first["memory_total_bytes"].as_u64() > Some(0), "{ended}");
    assert!(!file.exists() && !socket.exists(), "values of a monitor that has ended stay nowhere");
}

#[test]
fn a_program_has_torchruns_environment_and_its_recorded_error_is_shown() {
    let dir = folder();
    let script = dir.path().join("worker.py");
    // As `torch.distributed.elastic.multiprocessing.errors` writes it.
    let text = r#"
import json, os, sys, time
names = ["RANK", "ROLE_RANK", "ROLE_NAME", "GROUP_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"]
print("env", json.dumps([os.environ[name] for name in names]), flush=True)
print("secret" in str(os.environ.get("HEADROOM_JOIN_SECRET")), file=sys.stderr, flush=True)
if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    error = {"message": {"message": "ValueError: out of ideas", "extraInfo": {"py_callstack": "Traceback\n  line", "timestamp": "1"}}}
    open(os.environ["TORCHELASTIC_ERROR_FILE"], "w").write(json.dumps(error))
    sys.exit(3)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.exit(4)
time.sleep(60)
"#;
    fs::write(&script, text).unwrap();
    let mut command = Command::new(launch_program());
    command.args(["--nproc_per_node=2", "--rdzv-id", "job7", "--max-restarts", "1", "--local-ranks-filter", "1"]);
    command.args(["--exec", "python3", script.to_str().unwrap()]).env("HEADROOM_JOIN_SECRET", "a secret word");
    let ended = run(&mut command, dir.path());
    assert!(ended.out.contains(r#"[rank 1] env ["1", "1", "default", "1", "job7", "1", "1"]"#), "{ended}");
    assert!(!ended.out.contains("[rank 0]"), "{ended}");
    assert!(ended.err.contains("recorded: ValueError: out of ideas") && ended.err.contains("Traceback"), "{ended}");
    assert!(!ended.err.contains("True"), "ranks do not get the secret: {ended}");
}

#[test]
fn streams_are_redirected_and_teed_as_torchrun_does() {
    let dir = folder();
    let mut command = Command::new(launch_program());
    command.args(["--ranks", "2", "--redirects", "3", "--tee", "1:2", "--log-dir", "logs", "--name", "n", "--exec"]);
    command.args(["sh", "-c", "echo out $RANK; echo err $RANK >&2"]).current_dir(dir.path());
    let ended = run(&mut command, dir.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(!ended.out.contains("out ") && !ended.err.contains("err 0") && ended.err.contains("err 1"), "{ended}");
    let log = fs::read_to_string(dir.path().join("logs/n/rank0.log")).unwrap();
    assert!(log.contains("out 0") && log.contains("err 0"), "{log}");
}

/// A program of this name on PATH, which notes its words in `calls`.
fn fake(folder: &Path, name: &str, body: &str) {
    let path = folder.join(name);
    let calls = folder.join("calls").display().to_string();
    fs::write(&path, format!("#!/bin/bash\necho {name} \"$@\" >> {calls}\n{body}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn with_path(command: &mut Command, folder: &Path) {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:{path}", folder.display()));
}

#[test]
fn a_job_of_slurm_that_is_told_of_its_end_is_requeued() {
    let runs = Runs::new(&["train.max_steps=1000000"]);
    let bin = folder();
    fake(bin.path(), "scontrol", "");
    // By the script, as sbatch starts it; then by launch itself.
    let mut script = Command::new("bash");
    let line = runs.command(&[]);
    script.arg(SBATCH).args(line.get_args()).args(["--name", "night", "--ranks", "1"]);
    script.env("HEADROOM_LAUNCH", launch_program()).env("SLURM_JOB_ID", "77").env("SLURM_JOB_NUM_NODES", "1");
    let mut direct = runs.command(&[]);
    direct.args(["--name", "day", "--resume", "auto", "--requeue"]);
    direct.env("SLURM_JOB_ID", "9").env("SLURM_ARRAY_JOB_ID", "78").env("SLURM_ARRAY_TASK_ID", "3");
    for (command, name, code, call) in
        [(&mut script, "night", 0, "scontrol requeue 77\n"), (&mut direct, "day", 75, "scontrol requeue 78_3\n")]
    {
        with_path(command, bin.path());
        let mut running = Running::start(command, runs.path());
        let run = runs.run(name);
        assert!(running.until("a step", || run.steps_so_far() > 1), "{}", running.read("err"));
        running.signal(Signal::USR1);
        let ended = running.wait();
        assert_eq!(ended.code, Some(code), "{ended}");
        let calls = fs::read_to_string(bin.path().join("calls")).unwrap();
        assert!(calls.ends_with(call), "{calls}");
        assert!(run.path.join("checkpoints").read_dir().unwrap().count() > 0);
    }
}

#[test]
fn a_program_and_a_job_that_waits_are_requeued_by_a_schedulers_signal_alone() {
    let (dir, bin) = (folder(), folder());
    fake(bin.path(), "scontrol", "");
    let program = ["--exec", "sh", "-c", "trap 'exit 0' TERM; touch up; sleep 60 & wait"];
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).unwrap();
    let port = free.port().to_string();
    let waits = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", &port, "--exec", "true"];
    for (job, words, signal, requeued) in [
        ("80", &program[..], Signal::TERM, true),
        ("81", &waits[..], Signal::TERM, true),
        ("82", &program[..], Signal::INT, false),
    ] {
        let mut command = Command::new(launch_program());
        command.args(["--requeue", "--log-level", "info"]).args(words).env("SLURM_JOB_ID", job).current_dir(dir.path());
        with_path(&mut command, bin.path());
        let up = dir.path().join("up");
        let _ = fs::remove_file(&up);
        let mut running = Running::start(&mut command, dir.path());
        if words[0] == "--exec" {
            assert!(running.until("the program", || up.is_file()), "{}", running.read("err"));
        } else {
            // A node 0 that waits listens.
            let at = || std::net::TcpStream::connect(free).is_ok();
            assert!(running.until("the port", at), "{}", running.read("err"));
        }
        running.signal(signal);
        let ended = running.wait();
        let calls = fs::read_to_string(bin.path().join("calls")).unwrap_or_default();
        assert_eq!(calls.ends_with(&format!("scontrol requeue {job}\n")), requeued, "{calls}{ended}");
    }
}

/// Headroom's own ranks end with 2 where they are used wrongly, which no restart mends; a program's 2 means anything.
#[test]
fn a_program_starts_again_whatever_its_exit_code() {
    let dir = folder();
    let mut command = Command::new(launch_program());
    let ended = run(command.args(["--max-restarts", "1", "--exec", "sh", "-c", "exit 2"]), dir.path());
    assert!(ended.code == Some(2) && ended.err.contains("starting again (1 of 1 restarts)"), "{ended}");
}

#[test]
fn nodes_of_a_slurm_step_find_each_other_and_share_a_secret() {
    let (dir, bin) = (folder(), folder());
    // Two nodes of this machine; the real one starts a task on each.
    let body = r#"
while [ "$1" != "$HEADROOM_LAUNCH" ]; do shift; done
for node in 1 0; do SLURM_NODEID=$node SLURM_STEP_NODELIST=localhost "$@" & pids+=" $!"; done
code=0; for pid in $pids; do wait "$pid" || code=$?; done; exit $code"#;
    fake(bin.path(), "srun", body);
    let mut script = Command::new("bash");
    script.arg(SBATCH).args(["--name", "n", "--exec", "sh", "-c", "echo rank $RANK of $WORLD_SIZE"]);
    script.env("HEADROOM_LAUNCH", launch_program()).env("SLURM_JOB_NUM_NODES", "2").current_dir(dir.path());
    // A port that tests beside this one hardly have.
    script.env("SLURM_JOB_ID", (std::process::id() % 10_000).to_string());
    with_path(&mut script, bin.path());
    let ended = run(&mut script, dir.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("rank 0 of 2") && ended.out.contains("rank 1 of 2"), "{ended}");
    assert!(!ended.err.contains("without a secret"), "{ended}");
}

#[test]
fn bash_completes_verbs_options_and_keys() {
    let dir = folder();
    let script = ok(&["completions", "bash"], dir.path());
    fs::write(dir.path().join("launch.bash"), script).unwrap();
    let complete = |words: &str| {
        let last = words.split(' ').count() - 1;
        let text = format!(
            "source ./launch.bash; COMP_WORDS=({words}); COMP_CWORD={last}; compopt() {{ :; }}; \
             _launch_values launch \"${{COMP_WORDS[{last}]}}\" \"${{COMP_WORDS[{before}]}}\"; echo \"${{COMPREPLY[@]}}\"",
            before = last - 1
        );
        let mut command = Command::new("bash");
        let bin = launch_program().parent().unwrap().to_owned();
        with_path(command.args(["-c", &text]).current_dir(dir.path()), &bin);
        run(&mut command, dir.path()).out
    };
    assert!(complete("launch exp").contains("export-metrics"));
    assert!(complete("launch monitor --text").contains("--textfile"));
    assert!(complete("launch --set train.batch").contains("train.batch_size="));
    let man = ok(&["man", "monitor"], dir.path());
    assert!(man.contains(".TH launch-monitor 1") && man.contains("textfile"), "{man}");
    let facts: Value = serde_json::from_str(&ok(&["env", "--json"], dir.path())).unwrap();
    assert!(facts["machine"]["kernel"].is_string() && facts["programs"]["libtorch"].is_string(), "{facts}");
}

#[test]
fn licences_of_all_that_is_linked_are_known() {
    let dir = folder();
    let out = dir.path().join("rank.cdx.json");
    let mut command = Command::new("python3");
    command.args(["scripts/packages/sbom.py", "headroom"]).arg(&out).current_dir(env!("CARGO_MANIFEST_DIR"));
    let ended = run(&mut command, dir.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let bom: Value = serde_json::from_slice(&fs::read(&out).unwrap()).unwrap();
    assert!(bom["components"].as_array().unwrap().len() > 100 && bom["specVersion"] == "1.5");
}
