//! `launch predict` and `launch evaluate` with the two tasks: what they write, on any number of ranks, stopped and resumed,
//! and what they refuse.

use crate::deblur::{baseline, small_data};
use crate::support::{Ended, Run, Running, Runs, folder, launch_program, rank_program, read_lines, run, sample_data};
use headroom::data::source::hdf5::trajectory::Times;
use headroom::data::source::hdf5::{SessionData, Wanted};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A run that was trained for a few steps, validated at each epoch's end.
fn trained(sets: &[&str]) -> (Runs, Run) {
    let keys = ["train.max_steps=null", "train.num_epochs=2", "log.save_every=1", "data.stride=400"];
    let runs = Runs::new(&[&keys[..], sets].concat());
    let run = runs.finish("a", &["--ranks", "1"]);
    (runs, run)
}

/// `launch <words>` beside the runs.
fn command(folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(launch_program());
    command.args(words).args(["--runs-dir".as_ref(), folder.join("runs").as_os_str()]);
    command.current_dir(folder).env("OMP_WAIT_POLICY", "passive");
    command
}

fn launch(folder: &Path, words: &[&str]) -> Ended {
    run(&mut command(folder, words), folder)
}

fn done(folder: &Path, words: &[&str]) -> Ended {
    let ended = launch(folder, words);
    assert_eq!(ended.code, Some(0), "{words:?}: {ended}");
    ended
}

fn refused(folder: &Path, words: &[&str], code: i32, says: &str) {
    let ended = launch(folder, words);
    assert_eq!(ended.code, Some(code), "{words:?}: {ended}");
    assert!(ended.err.contains(says), "{words:?}: {says}: {ended}");
}

/// Files below `folder` that are no records, with their bytes.
fn outputs(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(inner) = folders.pop() {
        for path in fs::read_dir(inner).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.extend((!path.ends_with(".predict")).then_some(path));
            } else {
                found.push((path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn wanted(fields: &[(&str, usize)]) -> Wanted {
    let fields = fields.iter().map(|(name, len)| (name.to_string(), *len)).collect();
    Wanted { group: "emg2pose".into(), dataset: "timeseries".into(), fields }
}

#[test]
fn evaluation_repeats_what_training_validated_on_any_number_of_ranks() {
    for ema in ["null", "0.8"] {
        let ema = format!("train.ema_decay={ema}");
        let (runs, a) = trained(&[&ema, "data.normalize=true"]);
        let records = a.metrics();
        let last = records.iter().rev().find(|record| record.get("val.loss").is_some()).unwrap();
        let evaluate = |words: &[&str]| -> Value {
            let ended = done(runs.path(), &[&["evaluate", "a", "--json", "--weights", "last"], words].concat());
            serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended}"))
        };
        let one = evaluate(&["--ranks", "1"]);
        let names: Vec<&String> = last.as_object().unwrap().keys().filter(|name| name.starts_with("val.")).collect();
        assert!(names.len() > 10);
        for name in &names {
            assert_eq!(one["metrics"][name.as_str()], last[name.as_str()], "{name}, {ema}");
        }
        let three = evaluate(&["--ranks", "3"]);
        for name in &names {
            let (x, y) =
                (one["metrics"][name.as_str()].as_f64().unwrap(), three["metrics"][name.as_str()].as_f64().unwrap());
            assert!((x - y).abs() <= 1e-5 * x.abs(), "{name}: {x} {y}");
        }
        assert_eq!((&one["on"], &one["step"]), (&"val".into(), &last["step"]));
        let kept: Value =
            serde_json::from_slice(&fs::read(a.path.join("evaluate/val-last/metrics.json")).unwrap()).unwrap();
        assert_eq!(kept, three);
        let summary: Value =
            serde_json::from_slice(&fs::read(a.path.join("evaluate/val-last/summary.json")).unwrap()).unwrap();
        assert!(summary["samples_per_s"].as_f64().unwrap() > 0.0, "{summary}");
        // The training closed with the best weights' test metrics.
        let ended = done(runs.path(), &["evaluate", "a", "--split", "test", "--json", "--ranks", "1"]);
        let test: Value = serde_json::from_str(&ended.out).unwrap();
        assert_eq!(test["metrics"]["test.loss"], a.summary()["metrics"]["test.loss"], "{ema}");
    }
}

#[test]
fn other_data_are_evaluated_with_the_statistics_of_the_training_files() {
    let (runs, a) = trained(&["data.normalize=true"]);
    let all: Value = {
        let data = sample_data().display().to_string();
        let ended = done(runs.path(), &["evaluate", "a", "--data", &data, "--json", "--ranks", "2"]);
        serde_json::from_str(&ended.out).unwrap()
    };
    // One of the run's own files alone is its validation split.
    let split: Value = serde_json::from_slice(&fs::read(newest(&a).join("split.json")).unwrap()).unwrap();
    let unit = split["units"].as_array().unwrap().iter().find(|unit| unit["splits"][1] == true).unwrap();
    let file = sample_data().join(unit["name"].as_str().unwrap()).display().to_string();
    let evaluate = |words: &[&str]| -> Value {
        let ended = done(runs.path(), &[&["evaluate", "a", "--json", "--ranks", "1"], words].concat());
        serde_json::from_str(&ended.out).unwrap()
    };
    let (alone, val) = (evaluate(&["--data", &file]), evaluate(&[]));
    for (name, value) in val["metrics"].as_object().unwrap() {
        assert_eq!(&alone["metrics"][name.replace("val.", "data.")], value, "{name}");
    }
    assert!(all["samples"].as_u64() > alone["samples"].as_u64(), "{all}");
    // A run of before has no statistics: nothing is guessed.
    fs::remove_file(a.path.join("carried.json")).unwrap();
    refused(runs.path(), &["evaluate", "a", "--data", &file], 4, "has no carried.json");
    refused(runs.path(), &["predict", "a", "--data", &file, "--out", "p"], 4, "has no carried.json");
    assert!(!runs.path().join("p/s00.hdf5").exists());
}

fn newest(run: &Run) -> PathBuf {
    let steps = run.steps();
    steps.iter().rev().map(|step| run.checkpoint(*step)).find(|path| path.is_dir()).unwrap()
}

#[test]
fn trajectories_are_the_same_bytes_on_one_and_three_ranks_and_after_a_stop() {
    let (runs, _) = trained(&["data.normalize=true"]);
    let data = sample_data().display().to_string();
    let predict = |out: &str, words: &[&str]| {
        done(runs.path(), &[&["predict", "a", "--data", &data, "--out", out], words].concat());
        outputs(&runs.path().join(out))
    };
    let one = predict("one", &["--ranks", "1"]);
    assert_eq!(
        one.iter().map(|(name, _)| name.to_str().unwrap()).collect::<Vec<_>>(),
        ["s00.hdf5", "s01.hdf5", "s02.hdf5", "s03.hdf5"]
    );
    assert!(one == predict("three", &["--ranks", "3"]), "three ranks");
    // Rows of the source, its times and attributes; every row has angles.
    let read = |path: PathBuf, fields: &[(&str, usize)]| SessionData::open(&path, &wanted(fields)).unwrap();
    let source = read(sample_data().join("s01.hdf5"), &[("joint_angles", 20)]);
    let predicted = read(runs.path().join("one/s01.hdf5"), &[("joint_angles", 20)]);
    assert_eq!((predicted.len(), predicted.attributes()), (source.len(), source.attributes()));
    assert_eq!(predicted.field_names(), ["time", "joint_angles"]);
    let times = |path: &Path| Times::open(path, "emg2pose/timeseries").unwrap().unwrap().read(0..source.len()).unwrap();
    assert_eq!(times(&sample_data().join("s01.hdf5")), times(&runs.path().join("one/s01.hdf5")));
    let angles = predicted.window(0, source.len()).unwrap().remove(0);
    assert!(angles.iter().all(|angle| angle.is_finite() && angle.abs() < 10.0));

    // Stopped while ranges are done: more windows, so that there is time.
    let many = ["--set", "emg.predict_stride=4", "--ranks", "2"];
    let whole = predict("whole", &many);
    let parts = runs.path().join("cut/.predict/parts");
    let words = [&["predict", "a", "--data", &data, "--out", "cut"], &many[..]].concat();
    let mut running = Running::start(&mut command(runs.path(), &words), runs.path());
    let some = running.until("a part", || {
        let there = fs::read_dir(&parts).into_iter().flatten().flatten();
        there.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.')).count() > 0
    });
    assert!(some, "the prediction ended before it could be stopped");
    running.signal(Signal::TERM);
    let ended = running.wait();
    assert_eq!(ended.code, Some(75), "{ended}");
    assert!(ended.out.contains("stopped; what is whole stays; to continue, run the same command again"), "{ended}");
    let again =
        done(runs.path(), &[&["predict", "a", "--data", &data, "--out", "cut", "--ranks", "3"], &many[..2]].concat());
    assert!(again.out.contains("samples are done already"), "{again}");
    assert!(whole == outputs(&runs.path().join("cut")), "stopped and continued");
    assert!(!parts.exists());
    // All is done: nothing is done again, and what is there stays.
    let again = done(runs.path(), &[&["predict", "a", "--data", &data, "--out", "cut"], &many[..]].concat());
    assert!(again.out.contains("status          finished"), "{again}");
    assert!(whole == outputs(&runs.path().join("cut")));
}

#[test]
fn a_killed_prediction_leaves_whole_outputs_alone_and_the_same_command_ends_it() {
    let (runs, _) = trained(&[]);
    let data = sample_data().display().to_string();
    let words = ["predict", "a", "--data", &data, "--set", "emg.predict_stride=4", "--ranks", "2", "--out"];
    done(runs.path(), &[&words[..], &["whole"]].concat());
    let out = runs.path().join("cut");
    let mut running = Running::start(&mut command(runs.path(), &[&words[..], &["cut"]].concat()), runs.path());
    assert!(running.until("an output", || out.join("s00.hdf5").exists()), "it ended before it could be killed");
    running.signal(Signal::KILL);
    running.wait();
    let whole = outputs(&runs.path().join("whole"));
    for (name, bytes) in outputs(&out) {
        let same = whole.iter().find(|(other, _)| *other == name).unwrap();
        assert!(bytes == same.1, "{} is whole", name.display());
    }
    done(runs.path(), &[&words[..], &["cut"]].concat());
    assert!(whole == outputs(&out));
}

#[test]
fn a_prediction_of_one_file_without_angles_equals_that_among_others() {
    let (runs, _) = trained(&[]);
    let folder = folder();
    // The sample file with EMG alone: a plain dataset of 16 columns.
    let source = SessionData::open(&sample_data().join("s02.hdf5"), &wanted(&[("emg", 16)])).unwrap();
    let emg = source.window(0, source.len()).unwrap().remove(0);
    let file = hdf5::File::create(folder.path().join("alone.h5")).unwrap();
    let rows = emg.len() / 16;
    let table =
        file.create_group("emg2pose").unwrap().new_dataset::<f32>().shape([rows, 16]).create("timeseries").unwrap();
    table.write_raw(&emg).unwrap();
    drop((table, file));
    let data = folder.path().join("alone.h5").display().to_string();
    let ended = done(runs.path(), &["predict", "a", "--data", &data, "--out", "alone", "--ranks", "1"]);
    assert!(ended.out.contains("has no times") || ended.err.contains("has no times"), "{ended}");
    let all = sample_data().display().to_string();
    done(runs.path(), &["predict", "a", "--data", &all, "--out", "all", "--ranks", "1"]);
    let read = |path: &str| {
        let session = SessionData::open(&runs.path().join(path), &wanted(&[("joint_angles", 20)])).unwrap();
        session.window(0, session.len()).unwrap().remove(0)
    };
    assert_eq!(read("alone/alone.h5"), read("all/s02.hdf5"));
}

#[test]
fn wrong_data_weights_and_folders_are_refused_with_their_codes() {
    let (runs, a) = trained(&[]);
    let data = sample_data().display().to_string();
    let predict = |of: &[&str], code, says: &str| {
        refused(runs.path(), &[&["predict"], of].concat(), code, says);
    };
    predict(&["nobody", "--data", &data, "--out", "p"], 4, "no such run");
    predict(&["a", "--data", "nowhere", "--out", "p"], 4, "no such file or folder");
    predict(&["a", "--data", &data, "--out", &data], 2, "lie in each other");
    predict(&["a", "--data", &data, "--out", "runs/a/p"], 2, "lie in each other");
    fs::create_dir(runs.path().join("full")).unwrap();
    fs::write(runs.path().join("full/thesis.tex"), "").unwrap();
    predict(&["a", "--data", &data, "--out", "full"], 2, "holds files that are no predictions");
    predict(&["a", "--data", &data, "--out", "p", "--weights", "none.safetensors"], 5, "no such file");
    predict(&["a", "--data", &data, "--out", "p", "--weights", "ema:0.9"], 5, "keeps no average");
    predict(&["a", "--data", &data, "--out", "p", "--weights", "ema:2"], 2, "a decay from 0 to below 1");
    predict(&["a", "--data", &data, "--out", "p", "--stage", "first"], 2, "has no stages");
    predict(&["a", "--data", &data, "--out", "p", "--set", "emg.model.decoder_hidden_size=8"], 5, "is of another run");
    let text = runs.path().join("text.safetensors");
    fs::write(&text, "nothing of the kind").unwrap();
    predict(
        &["a", "--data", &data, "--out", "p", "--weights", text.to_str().unwrap()],
        5,
        "name a safetensors file of this model",
    );
    // Recordings of another number of channels.
    let other = folder();
    let file = hdf5::File::create(other.path().join("s.h5")).unwrap();
    let group = file.create_group("emg2pose").unwrap();
    group.new_dataset::<f32>().shape([4000, 8]).create("timeseries").unwrap().write_raw(&[0.5f32; 32_000]).unwrap();
    drop((group, file));
    predict(&["a", "--data", other.path().to_str().unwrap(), "--out", "p"], 4, "at least 16 expected");
    // Other weights or windows than those of the parts that are there.
    done(runs.path(), &["predict", "a", "--data", &data, "--out", "p", "--ranks", "1"]);
    predict(&["a", "--data", &data, "--out", "p", "--set", "emg.predict_stride=50"], 2, "made with other data");
    let weights = newest(&a).join("model.safetensors").display().to_string();
    let file = runs.path().join("copy.safetensors");
    fs::copy(&weights, &file).unwrap();
    predict(&["a", "--data", &data, "--out", "p", "--weights", file.to_str().unwrap()], 2, "made with other weights");
    // A run without checkpoints.
    fs::remove_dir_all(a.path.join("checkpoints")).unwrap();
    predict(&["a", "--data", &data, "--out", "q"], 5, "holds no checkpoint: train first");
    refused(runs.path(), &["evaluate", "a"], 5, "holds no checkpoint: train first");
    let ended =
        done(runs.path(), &["predict", "a", "--data", &data, "--out", "q", "--weights", file.to_str().unwrap()]);
    assert!(ended.out.contains("copy.safetensors"), "{ended}");
}

#[test]
fn a_full_disk_ends_a_prediction_and_the_same_command_continues() {
    let (runs, _) = trained(&[]);
    let data = runs.path().join("long").display().to_string();
    let mut made = Command::new(rank_program());
    made.args(["sample-data", "--task", "emg", "--sessions", "1", "--seconds", "16", "--out", &data]);
    assert_eq!(run(&mut made, runs.path()).code, Some(0));
    // A limit on the size of files stands for a disk without room: records fit, parts of some 16,000 rows do not.
    let mut command = Command::new("bash");
    let script = "ulimit -f 1100; exec \"$@\"";
    command.args(["-c", script, "bash"]).arg(launch_program());
    command
        .args(["predict", "a", "--data", &data, "--out", "p", "--ranks", "1", "--runs-dir", "runs"])
        .current_dir(runs.path());
    let ended = run(&mut command, runs.path());
    assert_eq!(ended.code, Some(4), "{ended}");
    assert!(ended.err.contains("cannot be written") && ended.err.contains("the same command continues"), "{ended}");
    assert!(outputs(&runs.path().join("p")).is_empty(), "no output is there in part");
    done(runs.path(), &["predict", "a", "--data", &data, "--out", "p", "--ranks", "1"]);
    assert_eq!(outputs(&runs.path().join("p")).len(), 1);
}

#[test]
fn a_pass_needs_less_memory_than_its_plan_says_and_no_more_than_training() {
    let (runs, a) = trained(&[]);
    let data = sample_data().display().to_string();
    let plan = done(runs.path(), &["predict", "a", "--data", &data, "--out", "p", "--dry-run"]);
    assert!(plan.out.contains("at a time on each") && !plan.out.contains("staging slots "), "{plan}");
    assert!(!runs.path().join("p").exists());
    done(runs.path(), &["predict", "a", "--data", &data, "--out", "p", "--ranks", "1"]);
    let read = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let plan: spec::plan::Plan = serde_json::from_value(read(runs.path().join("p/.predict/plan.json"))).unwrap();
    let summary = read(runs.path().join("p/.predict/summary.json"));
    let peak = summary["peak_own_bytes_per_rank"][0].as_u64().unwrap();
    assert!(peak > 0 && peak <= plan.rank_bytes(), "{peak} of {}", plan.rank_bytes());
    let training: spec::plan::Plan = serde_json::from_value(read(a.path.join("plan.json"))).unwrap();
    assert!(plan.rank_bytes() < training.rank_bytes());
    assert!(!read_lines(&runs.path().join("p/.predict/memory.rank0.jsonl")).is_empty());
}

/// A deblurring run of two steps on tiny frames: its folder, and its data.
fn deblurring() -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let data = folder.path().join("clips");
    small_data(&data);
    let words = ["--ranks", "1", "--set", "train.max_steps=2", "--set", "log.plots=false", "--set", "log.images=0"];
    let (ended, _) = baseline(folder.path(), &data, "d", &words);
    assert_eq!(ended.code, Some(0), "{ended}");
    (folder, data)
}

#[test]
fn restored_frames_have_the_names_of_the_inputs_and_are_equal_on_one_and_three_ranks() {
    let (runs, data) = deblurring();
    // Blurred frames with spikes alone, under other folders.
    let inputs = runs.path().join("inputs");
    let mut frames = Vec::new();
    for sequence in fs::read_dir(data.join("test")).unwrap().map(|entry| entry.unwrap().path()) {
        let name = sequence.file_name().unwrap().to_str().unwrap().to_owned();
        for part in ["blur", "spike"] {
            let to = inputs.join("site").join(&name).join(part);
            fs::create_dir_all(&to).unwrap();
            for file in fs::read_dir(sequence.join(part)).unwrap().map(|entry| entry.unwrap().path()) {
                fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
                if part == "blur" {
                    frames.push(PathBuf::from("site").join(&name).join(file.file_name().unwrap()));
                }
            }
        }
    }
    frames.sort();
    let data = inputs.display().to_string();
    let predict = |out: &str, ranks: &str| {
        done(runs.path(), &["predict", "d", "--data", &data, "--out", out, "--ranks", ranks]);
        outputs(&runs.path().join(out))
    };
    let one = predict("one", "1");
    assert_eq!(one.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), frames);
    let mut reader = png::Decoder::new(std::io::Cursor::new(&one[0].1)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    let first = inputs.join(frames[0].parent().unwrap()).join("blur").join(frames[0].file_name().unwrap());
    let blurred = fs::File::open(first).unwrap();
    let size = png::Decoder::new(std::io::BufReader::new(blurred)).read_info().unwrap().info().size();
    assert_eq!((info.width, info.height), size, "whole frames");
    let three = predict("three", "3");
    assert!(one == three, "three ranks");
    let sequence = inputs.join("site").read_dir().unwrap().next().unwrap().unwrap().path();
    done(runs.path(), &["predict", "d", "--data", sequence.to_str().unwrap(), "--out", "single", "--ranks", "1"]);
    let name = PathBuf::from("site").join(sequence.file_name().unwrap());
    for (file, bytes) in outputs(&runs.path().join("single")) {
        let same = one.iter().find(|(other, _)| *other == name.parent().unwrap().join(&file)).unwrap();
        assert!(same.1 == bytes, "{}", file.display());
    }
    fs::create_dir(runs.path().join("nothing")).unwrap();
    refused(
        runs.path(),
        &["predict", "d", "--data", "nothing", "--out", "x"],
        4,
        "no sequence: expected folders that hold a folder blur",
    );
}

#[test]
fn a_deblurring_run_is_evaluated_on_its_splits_and_on_other_data_alike() {
    let (runs, data) = deblurring();
    let evaluate = |words: &[&str]| -> Value {
        let ended = done(runs.path(), &[&["evaluate", "d", "--json", "--weights", "last"], words].concat());
        serde_json::from_str(&ended.out).unwrap()
    };
    let val = evaluate(&["--ranks", "1"]);
    let records = read_lines(&runs.path().join("runs/d/metrics.jsonl"));
    let last = records.iter().rev().find(|record| record.get("val.psnr_rgb").is_some()).unwrap();
    assert_eq!(val["metrics"]["val.psnr_rgb"], last["val.psnr_rgb"]);
    let data = data.display().to_string();
    let test = evaluate(&["--split", "test", "--ranks", "2", "--set", "data.max_val_windows=0"]);
    let other = evaluate(&["--data", &data, "--ranks", "2"]);
    assert_eq!(test["metrics"]["test.psnr_rgb"], other["metrics"]["data.psnr_rgb"], "a root's test split");
    let folder = format!("{data}/train");
    let train = evaluate(&["--data", &folder, "--ranks", "1"]);
    assert_ne!(train["metrics"]["data.psnr_rgb"], other["metrics"]["data.psnr_rgb"]);
}
