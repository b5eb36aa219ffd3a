//! The tools beside a run: monitor, analyze, recommend, doctor, the smart loop, the bench of memory features.

use super::support::{Running, Runs, folder, launch_program, rank_program, run};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn launch(words: &[&str]) -> Command {
    let mut command = Command::new(launch_program());
    command.args(words);
    command
}

/// Files of `folder` whose names begin with `word`, sorted.
fn named(folder: &Path, word: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    let of_word = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(word);
    let mut found: Vec<PathBuf> = entries.filter(of_word).collect();
    found.sort();
    found
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn assert_png(path: &Path) {
    assert!(fs::read(path).unwrap().starts_with(b"\x89PNG"), "{}", path.display());
}

/// All figures of a run, and no sibling that was left behind.
pub fn assert_figures(run: &Path) {
    let names: Vec<_> =
        named(&run.join("plots"), "").into_iter().map(|path| path.file_name().unwrap().to_owned()).collect();
    assert_eq!(names, ["loss.png", "memory.png", "metrics.png", "throughput.png"]);
    named(&run.join("plots"), "").iter().for_each(|path| assert_png(path));
}

#[test]
fn the_launcher_draws_a_runs_figures_and_needs_no_rank_program_for_a_picture() {
    let runs = Runs::new(&["log.plots=true", "train.max_steps=8"]);
    let path = runs.finish("drawn", &["--ranks", "2"]).path;
    assert_figures(&path);
    fs::remove_dir_all(path.join("plots")).unwrap();
    let nowhere = |words: &[&str]| {
        let mut command = launch(words);
        command.arg(&path).env("HEADROOM_RANK", "/no/such/program");
        command
    };
    let ended = run(&mut nowhere(&["plot"]), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_figures(&path);
    let png = runs.path().join("memory.png");
    let ended = run(nowhere(&["analyze"]).arg("--plot").arg(&png), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_png(&png);
    let ended = run(Command::new(rank_program()).arg("plot"), runs.path());
    assert_eq!(ended.code, Some(2), "{ended}");
}

#[test]
fn monitor_ends_after_its_duration_with_plots_at_its_interval() {
    let dir = folder();
    let pid = std::process::id().to_string();
    let mut command = launch(&["monitor", "--pid", &pid, "--duration", "3", "--interval", "0.2"]);
    command.args(["--plot-interval", "1", "--out"]).arg(dir.path());
    let began = std::time::Instant::now();
    let ended = run(&mut command, dir.path());
    // Not before; how long a plot takes on a busy machine is another matter.
    assert!(began.elapsed().as_secs_f64() >= 3.0, "{ended}");
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("RAM ") && ended.out.contains(&format!("pid {pid}")), "{ended}");
    let (logs, reports) = (named(dir.path(), "memory_log_"), named(dir.path(), "memory_report_"));
    assert_eq!((logs.len(), reports.len()), (1, 1));
    let report = json(&reports[0]);
    assert!((0.0..10.0).contains(&report["duration_s"].as_f64().unwrap()), "{report}");
    assert_eq!(report["samples"].as_u64().unwrap() as usize, json(&logs[0]).as_array().unwrap().len());
    assert!(report["max_job_gb"].as_f64().unwrap() > 0.0, "{report}");
    // memory_log_YYYYmmdd_HHMMSS.json, and the same stamp in the other names.
    let stamp = logs[0].file_stem().unwrap().to_string_lossy().replacen("memory_log_", "", 1);
    let digits: String = stamp.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(digits, "00000000_000000");
    let plots = named(dir.path(), &format!("memory_plot_{stamp}_"));
    // One at the end of each whole second; drawing takes longer than that on a busy machine.
    assert!((1..=3).contains(&plots.len()), "{plots:?}");
    plots.iter().for_each(|plot| assert_png(plot));
    assert!(reports[0].ends_with(format!("memory_report_{stamp}.json")), "{reports:?}");
}

#[test]
fn an_endless_monitor_ends_on_request_and_its_log_can_be_read_at_any_time() {
    let dir = folder();
    let pid = std::process::id().to_string();
    let mut command = launch(&["monitor", "--pid", &pid, "--interval", "0.01", "--out"]);
    let mut monitor = Running::start(command.arg(dir.path()), dir.path());
    let (mut readings, mut torn, mut samples) = (0, 0, 0);
    assert!(monitor.until("a hundred samples", || {
        if let Some(log) = named(dir.path(), "memory_log_").first() {
            readings += 1;
            // A sample may come between the two reads that a file takes.
            match serde_json::from_slice::<Vec<Value>>(&fs::read(log).unwrap()) {
                Ok(now) => {
                    assert!(now.len() >= samples, "{} after {samples}", now.len());
                    samples = now.len();
                }
                Err(_) => torn += 1,
            }
        }
        samples >= 100
    }));
    println!("{torn} of {readings} readings met a sample that was being written");
    assert!(torn * 20 <= readings, "{torn} of {readings}");
    monitor.signal(rustix::process::Signal::INT);
    let ended = monitor.wait();
    assert_eq!(ended.code, Some(0), "{ended}");
    let report = json(&named(dir.path(), "memory_report_")[0]);
    assert!(report["samples"].as_u64().unwrap() >= 100, "{report}");
    assert_eq!(named(dir.path(), "memory_plot_").len(), 1, "one plot at the end");
}

#[test]
fn the_memory_line_comes_at_the_start_and_at_every_hundredth_step() {
    let runs = Runs::new(&["train.max_steps=250", "log.memory_every=100"]);
    let ended = runs.train("lines", &["--ranks", "2"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    for rank in 0..2 {
        let log = fs::read_to_string(runs.run("lines").path.join(format!("rank{rank}.log"))).unwrap();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("Memory - Process: ")).collect();
        let tags: Vec<&str> =
            lines.iter().map(|line| &line[line.find('[').unwrap()..=line.find(']').unwrap()]).collect();
        assert_eq!(tags, ["[After dataset creation]", "[Step 100]", "[Step 200]"], "{log}");
        for line in lines {
            let form: String = line[line.find(']').unwrap()..].chars().filter(|c| !c.is_ascii_digit()).collect();
            assert_eq!(form, "] Memory - Process: .MB (.%), System: ./.GB (.%)", "{line}");
        }
    }
    assert!(ended.out.contains("[rank 1] [Step 200] Memory - Process: "), "{ended}");
}

#[test]
fn the_allocators_setting_reaches_every_rank_and_is_echoed() {
    const NAME: &str = "PYTORCH_CUDA_ALLOC_CONF";
    let dir = folder();
    let mut command = launch(&["--ranks", "2", "--exec", "sh", "-c", "echo rank $RANK: $PYTORCH_CUDA_ALLOC_CONF"]);
    let ended = run(command.env(NAME, "max_split_size_mb:64"), dir.path());
    for rank in 0..2 {
        assert!(ended.out.contains(&format!("rank {rank}: max_split_size_mb:64")), "{ended}");
    }
    let runs = Runs::new(&["train.max_steps=1"]);
    let train = |name: &str, conf: Option<&str>| {
        let mut command = runs.command(&[]);
        command.args(["--name", name, "--ranks", "1"]).env_remove(NAME).envs(conf.map(|conf| (NAME, conf)));
        run(&mut command, runs.path())
    };
    let told = train("told", Some("max_split_size_mb:128"));
    assert!(told.out.contains("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128"), "{told}");
    let untold = train("untold", None);
    assert!(untold.code == Some(0) && !untold.out.contains(NAME), "{untold}");
}

#[test]
fn a_monitors_log_is_analysed_and_drawn_and_a_missing_one_is_an_error() {
    let dir = folder();
    let log = dir.path().join("memory_log_20241205_143022.json");
    let sample = |t: u32| {
        serde_json::json!({"ram_used_gb": 7.5, "ram_total_gb": 16.0, "ram_percent": 46.9, "elapsed_time": 5 * t,
            "timestamp": "2024-12-05T14:30:22"})
    };
    fs::write(&log, serde_json::to_vec(&(0..30).map(sample).collect::<Vec<_>>()).unwrap()).unwrap();
    let png = dir.path().join("out.png");
    let ended = run(launch(&["analyze"]).arg(&log).arg("--plot").arg(&png), dir.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("30 over 145.0 s") && ended.out.contains("most 7.50 GiB"), "{ended}");
    assert_png(&png);
    let ended = run(&mut launch(&["analyze", "no_such_log.json"]), dir.path());
    assert_eq!(ended.code, Some(4), "{ended}");
    assert!(ended.err.contains("no_such_log.json: no such run or log"), "{ended}");
}

#[test]
fn a_healthy_run_is_watched_analysed_and_found_healthy() {
    let runs = Runs::new(&["train.max_steps=100000"]);
    let mut job = runs.start("watched", &["--ranks", "2"]);
    let path = runs.run("watched").path;
    assert!(job.until("the first steps", || runs.run("watched").steps_so_far() > 5));
    let mut monitor = launch(&["monitor", "--duration", "1.5", "--interval", "0.5", "--run"]);
    let ended = run(monitor.arg(&path), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("run watched") && ended.out.contains("samples/s"), "{ended}");
    assert_eq!(named(&path, "memory_log_").len(), 1);
    job.signal(rustix::process::Signal::TERM);
    assert_eq!(job.wait().code, Some(75));

    let png = runs.path().join("memory.png");
    let ended = run(launch(&["analyze"]).arg(&path).arg("--plot").arg(&png), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("runtime  ") && ended.out.contains("rank, in all"), "{ended}");
    assert_png(&png);
    let ended = run(launch(&["doctor"]).arg(&path), runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let ended = run(launch(&["monitor", "--run"]).arg(&path), runs.path());
    assert_eq!(ended.code, Some(4), "{ended}");
    assert!(ended.err.contains("nothing of it runs"), "{ended}");
}

#[test]
fn the_smart_loop_trains_in_legs_of_fresh_processes_without_growth() {
    let sets = [
        "train.max_steps=null",
        "data.max_train_windows=16",
        "data.max_val_windows=8",
        "smart.leg_epochs=2",
        "smart.increment=1",
        "smart.max_total_epochs=4",
        "smart.targets=val.loss<=0",
        // More than there can be: progress is never ruled out.
        "smart.threshold=0",
        "smart.window=100",
    ];
    let runs = Runs::new(&sets);
    let done = runs.finish("legs", &["--ranks", "2", "--smart"]);
    let report = json(&done.path.join("smart_report.json"));
    let legs = report["legs"].as_array().unwrap();
    let epochs: Vec<u64> = legs.iter().map(|leg| leg["epochs"].as_u64().unwrap()).collect();
    assert!(epochs.starts_with(&[2]) && epochs.is_sorted(), "{report}");
    let last = legs.last().unwrap();
    assert!(last["decision"] == "epochs_done" || last["decision"] == "no_progress", "{report}");
    // 16 windows, 2 ranks of batch 4: two steps per epoch, each once.
    let steps = done.steps();
    assert_eq!(steps, (1..=2 * epochs.last().unwrap()).collect::<Vec<_>>());
    let peaks: Vec<f64> = report["peak_pss_bytes"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert_eq!(peaks.len(), legs.len());
    // What other processes share with a rank changes from moment to moment; its own memory does not grow from leg to leg.
    let records = fs::read_to_string(done.path.join("memory.rank0.jsonl")).unwrap();
    let mut own = vec![0; legs.len()];
    for record in records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let leg = epochs.iter().position(|epochs| record["step"].as_u64().unwrap() <= 2 * epochs).unwrap();
        own[leg] = own[leg].max(record["anon_bytes"].as_u64().unwrap());
    }
    assert!(own.iter().all(|bytes| (1..own[0] / 10 * 13).contains(bytes)), "{own:?}");
}

#[test]
fn a_smart_loop_that_was_broken_off_goes_on_in_its_leg_and_keeps_the_legs_before() {
    let sets = [
        "train.max_steps=null",
        "data.max_train_windows=128",
        "data.max_val_windows=8",
        "smart.leg_epochs=1",
        "smart.increment=10",
        "smart.max_total_epochs=14",
        "smart.targets=val.loss<=0",
        "smart.threshold=0",
        "smart.window=100",
    ];
    let runs = Runs::new(&sets);
    let mut first = runs.start("legs", &["--ranks", "2", "--smart"]);
    let path = runs.run("legs").path;
    // 128 windows, a batch of 8: the first leg ends with step 16, the second with step 176.
    assert!(first.until("the second leg", || runs.run("legs").steps_so_far() >= 20), "{}", first.read("err"));
    first.signal(rustix::process::Signal::TERM);
    assert_eq!(first.wait().code, Some(75));
    let before = json(&path.join("smart_report.json"));
    assert_eq!(before["legs"].as_array().unwrap().len(), 1, "{before}");

    let done = runs.finish("legs", &["--ranks", "2", "--smart", "--resume", "auto"]);
    let after = json(&path.join("smart_report.json"));
    let epochs: Vec<u64> =
        after["legs"].as_array().unwrap().iter().map(|leg| leg["epochs"].as_u64().unwrap()).collect();
    assert_eq!((&after["legs"][0], &epochs[..]), (&before["legs"][0], &[1, 11, 14][..]), "{after}");
    assert_eq!(done.steps(), (1..=224).collect::<Vec<_>>());
    // All is done: nothing is trained or tested again.
    let again = runs.train("legs", &["--ranks", "2", "--smart", "--resume", "auto"]);
    assert_eq!(again.code, Some(0), "{again}");
    assert!(again.out.contains("smart: 14 epochs") && !again.out.contains("smart: leg"), "{again}");
    assert_eq!(json(&path.join("smart_report.json")), after);
}

#[test]
fn a_target_that_is_never_measured_ends_the_loop_after_its_first_leg() {
    let sets = ["train.max_steps=null", "data.max_train_windows=8", "smart.leg_epochs=1", "smart.targets=val.los<=0"];
    let ended = Runs::new(&sets).train("wrong", &["--ranks", "1", "--smart"]);
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("no val.los is recorded; did you mean val.loss? Recorded are loss,"), "{ended}");
}

#[test]
fn a_target_that_is_no_comparison_is_a_config_error() {
    let runs = Runs::new(&["smart.targets=val.loss"]);
    let ended = runs.train("bad", &["--smart"]);
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("smart.targets: \"val.loss\" is no comparison"), "{ended}");
}

#[test]
fn recommend_answers_for_this_machine_as_text_and_json() {
    let dir = folder();
    let ended = run(&mut launch(&["recommend", "--json"]), dir.path());
    let found: Value = serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended}"));
    assert!(["low_memory", "default", "high_performance"].contains(&found["config"].as_str().unwrap()), "{found}");
    let ended = run(&mut launch(&["recommend"]), dir.path());
    assert!(ended.out.contains("launch --gpus"), "{ended}");
}

#[test]
fn the_bench_measures_a_feature_off_and_on() {
    let dir = folder();
    let mut command = launch(&["bench-memory", "--steps", "2", "--only", "accumulation", "--json", "--data"]);
    let ended = run(command.arg(super::support::sample_data()), dir.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    let rows: Value = serde_json::from_str(&ended.out).unwrap();
    let peak = |which: &str| rows[0][which]["peak_rank_bytes"].as_u64().unwrap();
    assert!(peak("on") < peak("off"), "{rows}");
}

/// A bench that is ended leaves neither its runs nor its folder.
#[test]
fn a_bench_that_is_asked_to_end_ends_its_run_and_takes_its_folder_away() {
    let dir = folder();
    let mut command = launch(&["bench-memory", "--steps", "100000", "--only", "accumulation", "--data"]);
    command.arg(super::support::sample_data()).env("TMPDIR", dir.path());
    let mut bench = Running::start(&mut command, dir.path());
    let left = || named(dir.path(), "headroom-bench-");
    let records = || left().first().map(|folder| folder.join("accumulation-off/accumulation-off/metrics.jsonl"));
    assert!(bench.until("steps", || records().is_some_and(|path| path.exists())));
    bench.signal(rustix::process::Signal::TERM);
    let ended = bench.wait();
    assert_eq!(ended.code, Some(128 + 15), "{ended}");
    assert!(ended.out.contains("config default, 100000 steps"), "{ended}");
    assert!(left().is_empty(), "{:?}", left());
    let folder = dir.path().display().to_string();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).replace('\0', " ");
        assert!(!words.contains(&folder), "{}: {words}", entry.path().display());
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let dir = folder();
    let pid = std::process::id().to_string();
    let out = dir.path().join("out").display().to_string();
    let monitor = format!("monitor --interval 0.2 --pid {pid} --out {out}");
    for line in ["recommend", "plan --gpus 1 --config default", "--help", &monitor] {
        let program = launch_program();
        let piped = format!("{{ {} {line}; echo code $? >&2; }} | head -1", program.display());
        let ended = run(Command::new("sh").args(["-c", &piped]), dir.path());
        assert!(ended.err.contains("code 0") && !ended.err.contains("panicked"), "{line}: {ended}");
        assert_eq!(ended.out.lines().count(), 1, "{line}: {ended}");
    }
    let out = Path::new(&out);
    assert_eq!([named(out, "memory_report_").len(), named(out, "memory_plot_").len()], [1, 1]);
}

#[test]
fn a_run_begins_with_a_look_at_memory_and_ends_with_a_report_of_it() {
    let runs = Runs::new(&["train.max_steps=40"]);
    let ended = runs.train("report", &[]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("memory, ranks") && ended.out.contains("memory, node"), "{ended}");
    let summary = runs.run("report").summary();
    assert!(summary["peak_node_bytes"].as_u64().unwrap() > 0, "{summary}");
    let ended = runs.train("zh", &["--set", "log.language=zh"]);
    assert!(ended.out.contains("可用内存: "), "{ended}");
}

#[test]
fn a_key_set_at_the_start_is_kept_with_the_run_and_an_unknown_one_is_refused() {
    let runs = Runs::new(&["train.max_steps=1"]);
    let run = runs.finish("set", &["--set", "train.batch_size=3"]);
    let kept = fs::read_to_string(run.path.join("config.yaml")).unwrap();
    assert!(kept.contains("batch_size: 3"), "{kept}");
    let ended = runs.train("unknown", &["--set", "train.batchsize=3"]);
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("train.batch_size"), "{ended}");
}

#[test]
fn named_configs_load_a_copy_works_and_an_unknown_name_is_an_error() {
    let dir = folder();
    let plan = |name: &str| run(launch(&["plan", "--gpus", "1", "--config", name]).current_dir(dir.path()), dir.path());
    for name in ["default", "low_memory", "high_performance", "quick_demo"] {
        let ended = plan(name);
        assert_eq!(ended.code, Some(0), "{name}: {ended}");
    }
    fs::write(dir.path().join("my_config.yaml"), "task: emg\ntrain: {batch_size: 5}\n").unwrap();
    assert_eq!(plan("my_config.yaml").code, Some(0));
    let ended = plan("no_such_config");
    assert_eq!(ended.code, Some(2), "{ended}");
    assert!(ended.err.contains("no_such_config"), "{ended}");
}
