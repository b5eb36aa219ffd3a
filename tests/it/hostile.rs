//! Bad input, end to end: one clear error that names file or key and the way out, the documented exit code, nothing left
//! running, earlier checkpoints whole.

use headroom::data::source::hdf5::write::{Row, Storage, write_session};
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A hang ends the test here; nothing else is timed.
const HANG: Duration = Duration::from_secs(60);

const CONFIG: &str = "
task: emg
data: {dataset_path: data, window_size: 200, stride: 100, max_samples_for_normalize: 1000, max_val_windows: 8}
model:
  tds_stages:
    - {in_conv_kernel: 5, in_conv_stride: 4, num_blocks: 1, channels: 2, feature_width: 4, kernel_width: 5}
  decoder_hidden_size: 16
  decoder_num_layers: 1
train: {batch_size: 4, num_epochs: 50, max_steps: 3, warmup_epochs: 0, early_stopping: false, monitor_metric: val.loss}
log: {log_every: 1, plots: false, runs_dir: runs}
";

fn launch_program() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_rank")).with_file_name("launch")
}

/// One folder for all: data, configs and runs, under names of their own.
fn lab() -> &'static Path {
    static LAB: OnceLock<PathBuf> = OnceLock::new();
    LAB.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile");
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        std::fs::write(root.join("tiny.yaml"), CONFIG).unwrap();
        (0..4).for_each(|n| session(&root.join(format!("data/s{n}.hdf5")), &Storage::contiguous(), &rows(1200)));
        root
    })
}

fn rows(count: usize) -> Vec<Row> {
    let wave = |n: usize, k: usize| ((n * (k + 3)) as f64 * 0.01).sin();
    let row = |n| Row {
        time: n as f64 / 2000.0,
        joint_angles: std::array::from_fn(|k| 0.1 + 0.05 * wave(n, k)),
        emg: std::array::from_fn(|k| (1e-3 * wave(n, k + 5)) as f32),
    };
    (0..count).map(row).collect()
}

fn session(path: &Path, storage: &Storage, rows: &[Row]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    // libhdf5 locks what it opens, without close-on-exec: a process that another test starts now may hold the lock awhile.
    for _ in 0..200 {
        match write_session(path, storage, &[], rows) {
            Err(error) if error.to_string().contains("lock") => std::thread::sleep(Duration::from_millis(20)),
            other => return other.unwrap(),
        }
    }
    panic!("{}: still locked", path.display());
}

/// A data set of three good files and `bad.hdf5`.
fn with_bad(name: &str, make: impl FnOnce(&Path)) -> String {
    let folder = lab().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    (0..3).for_each(|n| {
        std::fs::copy(lab().join(format!("data/s{n}.hdf5")), folder.join(format!("s{n}.hdf5"))).unwrap();
    });
    make(&folder.join("bad.hdf5"));
    format!("data.dataset_path={name}")
}

struct Ended {
    code: i32,
    out: String,
    err: String,
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(launch_program());
    command.args(words).current_dir(lab()).env_remove("RUST_BACKTRACE");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `launch --config tiny` on `ranks`, overrides and further words.
fn training(name: &str, ranks: &str, sets: &[&str], more: &[&str]) -> Command {
    let mut words = vec!["--ranks", ranks, "--config", "tiny.yaml", "--name", name];
    sets.iter().for_each(|set| words.extend(["--set", set]));
    words.extend(more);
    command(&words)
}

fn end(mut command: Command) -> Ended {
    let child = command.spawn().unwrap();
    finish(child)
}

/// Waits; kills what hangs.
fn finish(child: Child) -> Ended {
    let pid = Pid::from_child(&child);
    let (done, watch) = std::sync::mpsc::channel::<()>();
    let guard = std::thread::spawn(move || {
        if watch.recv_timeout(HANG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(done);
    guard.join().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let ended = Ended { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) };
    assert_ne!(ended.code, -1, "hung: {}{}", ended.out, ended.err);
    ended
}

impl Ended {
    /// One error with all of `says`, and nothing that only a programmer reads.
    fn fails(&self, code: i32, says: &[&str]) {
        let Ended { out, err, .. } = self;
        let all = format!("{out}{err}");
        assert_eq!(self.code, code, "{all}");
        assert_eq!(all.matches("error:").count(), 1, "{all}");
        says.iter().for_each(|say| assert!(err.contains(say), "{say:?} is not in: {err}"));
        for noise in ["panicked", "stack backtrace", "RUST_BACKTRACE", "Some(", "Err(", "Os {"] {
            assert!(!all.contains(noise), "{noise}: {all}");
        }
    }
}

fn summary(run: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(lab().join("runs").join(run).join("summary.json")).unwrap()).unwrap()
}

/// Steps of the checkpoints of a run, oldest first; nothing else may lie beside them.
fn checkpoints(run: &str) -> Vec<u64> {
    let entries = std::fs::read_dir(lab().join("runs").join(run).join("checkpoints")).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut steps: Vec<u64> =
        entries.map(name).map(|name| name.strip_prefix("step-").unwrap().parse().unwrap()).collect();
    steps.sort_unstable();
    steps
}

#[test]
fn files_that_cannot_be_used_are_left_out_and_counted() {
    let contiguous = Storage::contiguous;
    let write = |storage: Storage, rows: Vec<Row>| move |path: &Path| session(path, &storage, &rows);
    let spoiled = |spoil: fn(&mut Row)| {
        let mut rows = rows(1200);
        rows[100..110].iter_mut().for_each(spoil);
        rows
    };
    type Make = Box<dyn FnOnce(&Path)>;
    let cut = |path: &Path| {
        let whole = std::fs::read(lab().join("data/s3.hdf5")).unwrap();
        std::fs::write(path, &whole[..whole.len() / 2]).unwrap();
    };
    let pipe =
        |path: &Path| rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o644.into(), 0).unwrap();
    let cases: Vec<(&str, &str, Make)> = vec![
        ("truncated", "is truncated", Box::new(cut)),
        ("garbage", "cannot be read as HDF5", Box::new(|path: &Path| std::fs::write(path, "hello").unwrap())),
        (
            "group",
            "no group /emg2pose: it holds other",
            Box::new(write(Storage { group: "other".into(), ..contiguous() }, rows(1200))),
        ),
        (
            "table",
            "no dataset timeseries",
            Box::new(write(Storage { dataset: "other".into(), ..contiguous() }, rows(1200))),
        ),
        ("zero", "no rows", Box::new(write(contiguous(), vec![]))),
        ("short", "too short for one window: 50 rows", Box::new(write(contiguous(), rows(50)))),
        ("nan", "bad.hdf5", Box::new(write(contiguous(), spoiled(|row| row.emg[3] = f32::NAN)))),
        ("inf", "bad.hdf5", Box::new(write(contiguous(), spoiled(|row| row.joint_angles[3] = f64::INFINITY)))),
        ("pipe", "is not a regular file", Box::new(pipe)),
        ("dangling", "No such file", Box::new(|path: &Path| std::os::unix::fs::symlink("nowhere", path).unwrap())),
    ];
    for (name, says, make) in cases {
        let path = with_bad(name, make);
        let ended = end(training(name, "1", &[&path, "train.max_steps=1"], &[]));
        assert_eq!(ended.code, 0, "{name}: {}{}", ended.out, ended.err);
        let warnings: Vec<&str> = ended.out.lines().filter(|line| line.contains("warning: left out:")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains(says), "{name}: {warnings:?}");
        assert_eq!(summary(name)["files_skipped"], 1, "{name}");
    }
    let path = with_bad("strictly", |path| std::fs::write(path, "hello").unwrap());
    end(training("strictly", "2", &[&path, "data.skip_bad=false"], &[])).fails(4, &["bad.hdf5", "data.skip_bad: true"]);
    let status = &summary("strictly")["status"];
    assert_eq!(status, "failed");
}

#[test]
fn a_data_set_without_a_usable_file_is_refused() {
    let write_all = |name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(lab().join(name)).unwrap();
        (0..2).for_each(|n| std::fs::write(lab().join(name).join(format!("{n}.hdf5")), bytes).unwrap());
    };
    std::fs::create_dir_all(lab().join("empty")).unwrap();
    write_all("all_bad", b"hello");
    let run = |name: &str, sets: &[&str]| end(training(name, "2", sets, &[]));
    run("e1", &["data.dataset_path=empty"]).fails(4, &["empty: no .hdf5 or .h5 file", "data.dataset_path"]);
    run("e2", &["data.dataset_path=nowhere"]).fails(4, &["nowhere", "data.sample_if_missing"]);
    run("e3", &["data.dataset_path=all_bad"]).fails(4, &["none of 2 files is usable", "0.hdf5"]);
    run("e4", &["data.emg_channels=8", "model.input_size=8"]).fails(4, &["field emg has 16 channels, 8 expected"]);
    run("e5", &["data.window_size=5000"]).fails(4, &["too short", "emg.window_size"]);
    run("e6", &["train.batch_size=500"]).fails(4, &["fewer than one global batch of 1000", "train.batch_size"]);
}

#[test]
fn one_file_two_files_and_few_validation_windows_train() {
    for (name, files) in [("one", 1), ("two", 2)] {
        std::fs::create_dir_all(lab().join(name)).unwrap();
        (0..files).for_each(|n| {
            let file = format!("s{n}.hdf5");
            std::fs::copy(lab().join("data").join(&file), lab().join(name).join(&file)).unwrap();
        });
        let ended = end(training(name, "1", &[&format!("data.dataset_path={name}"), "train.max_steps=1"], &[]));
        assert_eq!(ended.code, 0, "{}", ended.err);
    }
    let ended = end(training("fewval", "3", &["data.max_val_windows=1", "train.batch_size=1"], &[]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(summary("fewval")["metrics"]["val.loss"].is_f64());
}

#[test]
fn a_file_that_may_not_be_read_is_named() {
    if !rustix::process::getuid().is_root() {
        use std::os::unix::fs::PermissionsExt;
        let path = with_bad("secret", |path| session(path, &Storage::contiguous(), &rows(300)));
        let closed = std::fs::Permissions::from_mode(0o000);
        std::fs::set_permissions(lab().join("secret/bad.hdf5"), closed).unwrap();
        let ended = end(training("secret", "1", &[&path, "data.skip_bad=false"], &[]));
        return ended.fails(4, &["bad.hdf5", "Permission denied"]);
    }
    // Root may read everything: without its capabilities it may not.
    let path = with_bad("secret", |path| session(path, &Storage::contiguous(), &rows(300)));
    rustix::fs::chmod(lab().join("secret/bad.hdf5"), 0o000.into()).unwrap();
    let train = training("secret", "1", &[&path, "data.skip_bad=false"], &[]);
    let mut dropped = Command::new("setpriv");
    dropped.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(train.get_program()).args(train.get_args());
    dropped.current_dir(lab()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    match dropped.spawn() {
        Ok(child) => finish(child).fails(4, &["bad.hdf5", "Permission denied"]),
        Err(error) => eprintln!("skipped: setpriv: {error}"),
    }
}

#[test]
fn mistakes_in_configs_are_named_with_line_or_key() {
    let cases: [(&str, &[u8], &[&str]); 7] = [
        ("type", b"train: {batch_size: many}\n", &["type.yaml:1", "train.batch_size", "whole number"]),
        ("unknown", b"train:\n  batch_sise: 3\n", &["unknown.yaml:2", "did you mean train.batch_size?"]),
        ("twice", b"seed: 1\nseed: 2\n", &["twice.yaml:2", "seed"]),
        ("syntax", b"train: [1,\n", &["syntax.yaml:"]),
        ("bytes", b"seed: 1\n# \xff\n", &["bytes.yaml", "UTF-8"]),
        ("list", b"- seed\n", &["list.yaml:1"]),
        ("task", b"task: chess\n", &["task is chess", "emg"]),
    ];
    for (name, text, says) in cases {
        let file = format!("{name}.yaml");
        std::fs::write(lab().join(&file), text).unwrap();
        end(command(&["--ranks", "1", "--config", &file])).fails(2, says);
    }
    end(command(&["--ranks", "1", "--config", "nobody"])).fails(2, &["nobody"]);
}

#[test]
fn absurd_numbers_are_refused_before_anything_starts() {
    let cases: [(&str, i32, &str); 18] = [
        ("train.batch_size=1000000000000", 3, "train.batch_size"),
        ("data.window_size=1000000000", 3, "staging slots"),
        ("train.num_workers=1000000", 3, "train.num_workers"),
        ("train.stop_grace=-1", 2, "train.stop_grace is -1"),
        ("train.stop_grace=.nan", 2, "train.stop_grace: expected a number"),
        ("train.step_timeout=0", 2, "train.step_timeout is 0; it must be above 0"),
        ("memory.budget=100MiB", 3, "memory.budget"),
        ("data.cache_size_gb=1e9", 3, "data.cache_size_gb"),
        ("model.rollout_freq=1e300", 2, "model.rollout_freq"),
        ("model.decoder_hidden_size=1000000000", 3, "model sizes"),
        ("train.num_epochs=0", 2, "train.num_epochs is 0"),
        ("train.max_steps=0", 2, "train.max_steps is 0"),
        ("data.stride=0", 2, "data.stride is 0"),
        ("seed=-1", 2, "seed: expected a whole number of 0 or more"),
        ("train.monitor_metric=foo", 2, "val.loss"),
        ("train", 2, "expected key=value"),
        ("=3", 2, "expected key=value"),
        ("train.learning_rate={", 2, "not valid YAML"),
    ];
    for (set, code, says) in cases {
        let ended = end(training("absurd", "2", &[set], &[]));
        ended.fails(code, &[says]);
        assert!(!lab().join("runs/absurd").exists(), "{set}");
    }
    let endless = ["train.num_epochs=18446744073709551615", "train.step_timeout=1e300", "train.max_steps=1"];
    let ended = end(training("endless", "2", &endless, &[]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    end(training("metric", "2", &["train.monitor_metric=val.nothing"], &[])).fails(2, &["val.nothing", "val.mae_deg"]);
}

#[test]
fn places_that_cannot_be_used_are_named() {
    assert_eq!(end(training("taken", "1", &["train.max_steps=1"], &[])).code, 0);
    end(training("taken", "1", &[], &[])).fails(2, &["the run taken exists already", "--resume auto"]);
    std::fs::write(lab().join("a_file"), "").unwrap();
    end(training("x", "1", &["log.runs_dir=a_file"], &[])).fails(2, &["a_file", "log.runs_dir"]);
    end(training("x", "1", &["log.runs_dir=/proc/none"], &[])).fails(2, &["/proc/none", "log.runs_dir"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    end(training("port", "2", &[], &["--master-port", &port])).fails(2, &[&port, "--master-port"]);
    let mut nonsense = training("nonsense", "1", &[], &[]);
    nonsense.env("HEADROOM_RANK", "/no/such/program");
    end(nonsense).fails(2, &["/no/such/program", "HEADROOM_RANK"]);
}

#[test]
fn weights_of_another_model_are_refused() {
    std::fs::write(lab().join("garbage.safetensors"), [0xff; 100]).unwrap();
    for (name, set) in [("init1", "train.init_from=absent"), ("init2", "train.init_from=garbage.safetensors")] {
        end(training(name, "1", &[set], &[])).fails(5, &["train.init_from", &set["train.init_from=".len()..]]);
    }
}

#[test]
fn checkpoints_that_do_not_fit_are_refused_and_stay() {
    let train = |sets: &[&str], more: &[&str]| end(training("saved", "2", sets, more));
    assert_eq!(train(&["log.save_every_steps=1", "log.keep_last=3"], &[]).code, 0);
    assert_eq!(checkpoints("saved"), [1, 2, 3]);
    let resume = |set: &str| train(&["train.max_steps=4", set], &["--resume", "auto"]);
    resume("seed=5").fails(5, &["step-3", "its seed is 42", "set seed=42"]);
    resume("train.batch_size=2").fails(5, &["step-3", "its global batch is 8", "train.batch_size"]);
    resume("model.decoder_hidden_size=8").fails(5, &["step-3", " decoder_hidden_size is 16 there, 8 here"]);
    resume("train.optimizer=sgd").fails(5, &["step-3", "train.optimizer"]);
    let newest = lab().join("runs/saved/checkpoints/step-3");
    let spoil = |file: &str, change: &dyn Fn(&mut Vec<u8>), says: &[&str]| {
        let path = newest.join(file);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(&path, &bad).unwrap();
        resume("train.batch_size=4").fails(5, says);
        std::fs::write(&path, good).unwrap();
    };
    let earlier = "resume from an earlier checkpoint";
    spoil("model.safetensors", &|bytes| bytes.truncate(100), &["model.safetensors", "100 bytes", earlier]);
    spoil("model.safetensors", &|bytes| *bytes.last_mut().unwrap() ^= 1, &["model.safetensors", "damaged", earlier]);
    let named = "\"step\": 3";
    let other =
        |bytes: &mut Vec<u8>| *bytes = String::from_utf8_lossy(bytes).replacen(named, "\"step\": 9", 1).into_bytes();
    spoil("state.json", &other, &["state.json", "damaged", earlier]);
    let (optimizer, away) = (newest.join("optimizer.safetensors"), lab().join("away"));
    std::fs::rename(&optimizer, &away).unwrap();
    resume("train.batch_size=4").fails(5, &["optimizer.safetensors", "missing", earlier]);
    std::fs::rename(&away, &optimizer).unwrap();
    assert_eq!(checkpoints("saved"), [1, 2, 3], "refusals leave all as it was");
    // Another world size with the same global batch resumes.
    let ended = end(training("saved", "1", &["train.max_steps=4", "train.batch_size=8"], &["--resume", "auto"]));
    assert_eq!(ended.code, 0, "{}", ended.err);
}

#[test]
fn a_loss_that_is_not_finite_stops_with_the_last_good_state() {
    let sets = ["train.learning_rate=1e30", "train.optimizer=sgd", "train.gradient_clip_norm=0", "train.max_steps=6"];
    let ended = end(training("diverged", "2", &sets, &[]));
    ended.fails(7, &["at step", "on rank", "lower train.learning_rate", "checkpoints/step-"]);
    assert_eq!(summary("diverged")["status"], "failed");
    let steps = checkpoints("diverged");
    assert_eq!(steps.len(), 1, "{steps:?}");
    assert!(ended.err.contains(&format!("checkpoints/step-{}", steps[0])), "{}", ended.err);
    // The state that was kept is whole: resuming meets the same loss, not a broken file.
    end(training("diverged", "2", &sets, &["--resume", "auto"])).fails(7, &["at step"]);
    assert_eq!(checkpoints("diverged"), steps);
}

#[test]
fn a_checkpoint_without_room_names_the_folder_and_keeps_the_earlier_ones() {
    let small = lab().join("small");
    std::fs::create_dir_all(&small).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=320k", "none"]).arg(&small).output();
    if !mounted.is_ok_and(|done| done.status.success()) {
        return eprintln!("skipped: no small tmpfs may be mounted");
    }
    let sets = ["log.runs_dir=small", "log.save_every_steps=1", "log.keep_last=9", "train.max_steps=9"];
    let ended = end(training("full", "2", &sets, &[]));
    let kept = std::fs::read_dir(small.join("full/checkpoints"))
        .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>());
    let unmounted = Command::new("umount").arg(&small).status().unwrap();
    ended.fails(5, &["small/full/checkpoints/step-", "no room for the checkpoint", "earlier checkpoints are whole"]);
    let kept = kept.unwrap();
    assert!(!kept.is_empty() && kept.iter().all(|name| name.starts_with("step-")), "{kept:?}");
    assert!(unmounted.success());
}

/// Starts a long run and waits for its `count`-th record.
fn long_run(name: &str, sets: &[&str], count: usize) -> Child {
    let mut all = vec!["train.max_steps=1000000", "train.num_epochs=1000000", "log.save_every=0"];
    all.extend(sets);
    let child = training(name, "2", &all, &[]).spawn().unwrap();
    let records = lab().join("runs").join(name).join("metrics.jsonl");
    let since = Instant::now();
    while std::fs::read_to_string(&records).map_or(0, |text| text.lines().count()) < count {
        assert!(since.elapsed() < HANG, "no step of {name}");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}

/// Ranks that `launch` started, by rank.
fn ranks_of(launcher: &Child) -> Vec<(usize, Pid)> {
    let parent = launcher.id() as i32;
    let processes = procfs::process::all_processes().unwrap().flatten();
    let children = processes.filter(|p| p.stat().is_ok_and(|stat| stat.ppid == parent));
    let rank =
        |p: &procfs::process::Process| p.environ().ok()?.get(std::ffi::OsStr::new("RANK"))?.to_str()?.parse().ok();
    children.filter_map(|p| Some((rank(&p)?, Pid::from_raw(p.pid)?))).collect()
}

#[test]
fn a_rank_that_hangs_in_a_collective_is_named() {
    let child = long_run("hangs", &["train.step_timeout=2", "train.stop_grace=1"], 2);
    let ranks = ranks_of(&child);
    // Its next validation writes into a pipe that nobody reads. (A rank that is stopped would be waited for.)
    let (_, hangs) = ranks.iter().find(|(rank, _)| *rank == 0).unwrap();
    let folder = lab().join("runs/hangs/metrics");
    std::fs::create_dir_all(&folder).unwrap();
    for step in 1..10_000 {
        let pipe = folder.join(format!("val_step_{step}.json.tmp-{}", hangs.as_raw_nonzero()));
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    }
    let ended = finish(child);
    ended.fails(6, &["rank 0", "train.step_timeout"]);
    for (rank, pid) in ranks {
        assert!(rustix::process::test_kill_process(pid).is_err(), "rank {rank} is still there");
    }
}

#[test]
fn ctrl_c_during_training_leaves_a_checkpoint() {
    let child = long_run("stopped", &[], 2);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = finish(child);
    assert_eq!(ended.code, 75, "{}{}", ended.out, ended.err);
    let summary = summary("stopped");
    assert_eq!(summary["status"], "stopped");
    assert_eq!(checkpoints("stopped").last().copied(), summary["steps"].as_u64());
}

#[test]
fn data_that_shrink_while_training_end_it_with_the_file() {
    let path = with_bad("shrinks", |path| session(path, &Storage::contiguous(), &rows(1200)));
    // With a page cache that holds all of it nothing would be read again.
    let child = long_run("shrinks", &[&path, "data.chunk_cache_size=0", "data.cache=off"], 2);
    for file in std::fs::read_dir(lab().join("shrinks")).unwrap() {
        std::fs::File::options().write(true).open(file.unwrap().path()).unwrap().set_len(4096).unwrap();
    }
    finish(child).fails(4, &["shrinks/", ".hdf5", "rows"]);
}
