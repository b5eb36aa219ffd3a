use super::save::check_room;
use super::*;
use serde_json::json;
use spec::contract::Weights;
use std::fs;
use tch::{Device, Kind, Tensor};

pub(super) fn facts() -> Facts {
    Facts { model: "emg 16→20".into(), global_batch: 12, seed: 7, world_size: 3 }
}

pub(super) fn tensors(value: f64) -> Vec<(String, Tensor)> {
    let f = |shape: &[i64], kind| Tensor::full(shape, value, (kind, Device::Cpu));
    vec![
        ("encoder.0.weight".into(), f(&[4, 3], Kind::Float)),
        ("encoder.0.bias".into(), f(&[4], Kind::Float)),
        ("half".into(), f(&[3], Kind::Half)),
        ("count".into(), f(&[], Kind::Int64)),
        ("empty".into(), f(&[0, 2], Kind::Float)),
    ]
}

fn save(keeper: &mut Checkpointer, step: u64, best: bool) -> Result<(), CheckpointError> {
    save_as(keeper, step, (best, false))
}

fn save_as(keeper: &mut Checkpointer, step: u64, (best, keep): (bool, bool)) -> Result<(), CheckpointError> {
    let (model, optimizer, ema) = (tensors(step as f64), tensors(2.0), [(0.999, tensors(3.0))]);
    let state = json!({"epoch": 2, "lr": 0.1 + 0.2, "best": null});
    let content = Content {
        step,
        model: &model,
        optimizer: &optimizer,
        ema: &ema,
        rest: &[],
        facts: facts(),
        best,
        state,
        last: false,
        keep,
    };
    keeper.save(content)?;
    keeper.wait()
}

fn steps(dir: &Path) -> Vec<u64> {
    list(dir).unwrap().into_iter().map(|(step, _)| step).collect()
}

fn saved() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 3).unwrap();
    save(&mut keeper, 5, false).unwrap();
    let path = dir.path().join("step-5");
    (dir, path)
}

fn error_of(path: &Path) -> String {
    load(path).unwrap_err().to_string()
}

#[test]
fn what_is_saved_is_loaded_bit_for_bit() {
    let (dir, path) = saved();
    let loaded = load(&path).unwrap();
    assert_eq!((loaded.step, &loaded.facts), (5, &facts()));
    assert_eq!(loaded.state["lr"].as_f64().unwrap().to_bits(), (0.1f64 + 0.2).to_bits());
    let target = tensors(0.0);
    apply(&path, &loaded.model, &target).unwrap();
    for ((name, got), (_, want)) in target.iter().zip(&tensors(5.0)) {
        assert!(got.equal(want) && got.kind() == want.kind(), "{name}");
    }
    assert_eq!((loaded.ema[0].0, loaded.ema[0].1.len(), loaded.rest.len()), (Some(0.999), 5, 0));
    assert!(path.join("ema.safetensors").exists(), "the name that a single average has always had");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no sibling stays");
}

#[test]
fn saving_does_not_see_later_changes_and_the_same_step_may_be_saved_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 3).unwrap();
    let model = vec![("w".to_owned(), Tensor::from_slice(&[1f32; 100_000]))];
    for value in [1.0, 2.0] {
        let mut w = model[0].1.shallow_clone();
        let _ = w.fill_(value);
        let content = Content {
            step: 1,
            model: &model,
            optimizer: &[],
            ema: &[],
            rest: &[],
            facts: facts(),
            best: false,
            last: false,
            keep: false,
            state: json!({}),
        };
        keeper.save(content).unwrap();
        let _ = w.fill_(9.0);
        keeper.wait().unwrap();
        let loaded = load(&dir.path().join("step-1")).unwrap();
        assert_eq!(loaded.model[0].1.double_value(&[99_999]), value);
        assert!(loaded.ema.is_empty());
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn pruning_keeps_the_last_the_newest_and_the_best() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 2).unwrap();
    for (step, best) in [(1, true), (2, true), (10, false), (11, false), (12, false)] {
        save(&mut keeper, step, best).unwrap();
    }
    assert_eq!(steps(dir.path()), [2, 11, 12]);
    let mut keeper = Checkpointer::open(dir.path(), 0).unwrap();
    save(&mut keeper, 13, false).unwrap();
    assert_eq!(steps(dir.path()), [2, 13]);
    save(&mut keeper, 14, true).unwrap();
    assert_eq!(steps(dir.path()), [14]);
}

#[test]
fn what_is_kept_for_good_is_never_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 1).unwrap();
    for step in 1..=6 {
        save_as(&mut keeper, step, (step == 3, step % 2 == 1 && step < 5)).unwrap();
    }
    assert_eq!(steps(dir.path()), [1, 3, 6]);
}

#[test]
fn pruning_after_a_resume_from_an_earlier_step_keeps_what_was_just_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 2).unwrap();
    for step in [10, 20, 30] {
        save(&mut keeper, step, false).unwrap();
    }
    assert_eq!(steps(dir.path()), [20, 30]);
    save(&mut keeper, 15, false).unwrap();
    assert_eq!(steps(dir.path()), [15, 30]);
}

#[test]
fn what_an_interrupted_save_left_is_removed_at_start() {
    let (dir, path) = saved();
    let stale = dir.path().join(".step-6.tmp-4242");
    fs::create_dir(&stale).unwrap();
    fs::write(stale.join(MODEL), b"half").unwrap();
    Checkpointer::open(dir.path(), 3).unwrap();
    assert!(!stale.exists() && path.exists());
}

#[test]
fn a_truncated_file_a_flipped_bit_and_missing_parts_are_named() {
    let (_dir, path) = saved();
    let model = path.join(MODEL);
    let whole = fs::read(&model).unwrap();
    fs::write(&model, &whole[..whole.len() - 1]).unwrap();
    assert!(error_of(&path).contains("it was cut or changed"), "{}", error_of(&path));
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&model, &flipped).unwrap();
    assert!(error_of(&path).contains("it is damaged"), "{}", error_of(&path));
    fs::remove_file(&model).unwrap();
    assert!(error_of(&path).contains("model.safetensors: the file is missing"), "{}", error_of(&path));
    fs::write(&model, &whole).unwrap();
    load(&path).unwrap();

    let manifest = path.join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"epoch\": 2", "\"epoch\": 3")).unwrap();
    assert!(error_of(&path).contains("checksum"), "{}", error_of(&path));
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(error_of(&path).contains("the manifest is damaged"), "{}", error_of(&path));
    fs::remove_file(&manifest).unwrap();
    assert!(error_of(&path).contains("the manifest is missing"), "{}", error_of(&path));
}

#[test]
fn another_model_another_batch_and_another_seed_are_refused_but_another_world_size_is_not() {
    let (_dir, path) = saved();
    let loaded = load(&path).unwrap();
    loaded.check_facts(&Facts { world_size: 1, ..facts() }).unwrap();
    let error = loaded.check_facts(&Facts { global_batch: 16, world_size: 4, ..facts() }).unwrap_err().to_string();
    assert!(error.contains("global batch is 12 (on 3 ranks), this run's is 16 (on 4 ranks)"), "{error}");
    let error = loaded.check_facts(&Facts { model: "emg 16→8".into(), seed: 8, ..facts() }).unwrap_err().to_string();
    assert!(
        error.contains(
            "its model differs: it is emg 16→20, this run's is emg 16→8; keep the model as it was; its seed is 7"
        ),
        "{error}"
    );

    let mut other = tensors(0.0);
    other[0].1 = Tensor::zeros([4, 5], (Kind::Float, Device::Cpu));
    other[1].0 = "encoder.1.bias".into();
    let error = apply(&path, &loaded.model, &other).unwrap_err().to_string();
    for part in [
        "encoder.0.weight is Float [4, 3] in the file, Float [4, 5] in this run's model",
        "missing encoder.1.bias Float [4]",
        "unexpected encoder.0.bias Float [4]",
    ] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(other[2].1.double_value(&[0]), 0.0, "nothing is copied");
}

#[test]
fn a_disk_that_fills_up_leaves_earlier_checkpoints_whole() {
    let (dir, path) = saved();
    let mut keeper = Checkpointer::open(dir.path(), 1).unwrap();
    // Writes to /dev/full fail as on a full disk: here in the middle of the second file.
    let sibling = dir.path().join(format!(".step-6.tmp-{}", std::process::id()));
    fs::create_dir(&sibling).unwrap();
    std::os::unix::fs::symlink("/dev/full", sibling.join(OPTIMIZER)).unwrap();
    let error = save(&mut keeper, 6, true).unwrap_err().to_string();
    assert!(error.contains("step-6: no room for the checkpoint: "), "{error}");
    assert!(error.contains("bytes needed") && error.contains("available"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing of the failed save stays");
    load(&path).unwrap();
    save(&mut keeper, 6, true).unwrap();
}

#[test]
fn a_disk_that_is_too_small_is_found_before_writing() {
    check_room(Path::new("c/step-1"), 10, 10).unwrap();
    let error = check_room(Path::new("c/step-1"), 11, 10).unwrap_err().to_string();
    assert!(error.starts_with("c/step-1: no room for the checkpoint: 11 bytes needed, 10 available"), "{error}");
}

#[test]
fn a_failed_save_is_told_at_the_next_call() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("checkpoints");
    let mut keeper = Checkpointer::open(&folder, 1).unwrap();
    fs::remove_dir(&folder).unwrap();
    let content = || Content {
        step: 1,
        model: &[],
        optimizer: &[],
        ema: &[],
        rest: &[],
        facts: facts(),
        best: false,
        last: false,
        keep: false,
        state: json!({}),
    };
    keeper.save(content()).unwrap();
    assert!(matches!(keeper.save(content()), Err(CheckpointError::Io { .. })));
    keeper.wait().unwrap();
}

#[test]
fn weights_of_half_width_become_f32() {
    let (_dir, path) = saved();
    let weights = load_weights(&path.join(MODEL)).unwrap();
    let kind = |name: &str| weights.iter().find(|(n, _)| n == name).unwrap().1.kind();
    assert_eq!((kind("half"), kind("count")), (Kind::Float, Kind::Int64));
    fs::write(path.join("x"), b"not safetensors").unwrap();
    let error = load_weights(&path.join("x")).unwrap_err().to_string();
    assert!(error.contains("is no safetensors file"), "{error}");
}

/// Usage by a PyTorch user: `safetensors.torch.save_file(model.state_dict(), path)`, then `train.init_from: path`. The
/// fixture holds weights and outputs of the PyTorch model.
#[test]
fn weights_from_pytorch_give_pytorchs_outputs() {
    use crate::task::emg::EmgNet;
    use crate::task::emg::loss::Loss;
    use spec::task::emg::{EmgLoss, EmgModel, TdsStage};
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/emg_golden.safetensors");
    let golden = Tensor::read_safetensors(fixture).unwrap();
    let part = |prefix: &str| -> Vec<(String, Tensor)> {
        let named =
            golden.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.shallow_clone())));
        named.collect()
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    Tensor::write_safetensors(&part("quick_demo/param/"), &path).unwrap();

    let stage = TdsStage {
        in_conv_kernel: 5,
        in_conv_stride: 4,
        num_blocks: 1,
        channels: 4,
        feature_width: 4,
        kernel_width: 11,
    };
    let config =
        EmgModel { tds_stages: vec![stage], decoder_hidden_size: 64, decoder_num_layers: 1, ..EmgModel::default() };
    let vs = tch::nn::VarStore::new(Device::Cpu);
    let net = EmgNet::new(&config, Loss { kind: EmgLoss::MseMae, mae_weight: 0.5 }, 500, &vs.root());
    let params: Vec<_> = vs.variables().into_iter().collect();
    apply(&path, &load_weights(&path).unwrap(), &params).unwrap();
    let data: std::collections::HashMap<_, _> = part("quick_demo/").into_iter().collect();
    let far = (net.predict(&data["emg"], false) - &data["prediction"]).abs().max().double_value(&[]);
    assert!(far < 1e-5, "{far}");

    // A file of another model is refused by name.
    Tensor::write_safetensors(&part("mlp/param/"), &path).unwrap();
    let error = apply(&path, &load_weights(&path).unwrap(), &params).unwrap_err().to_string();
    assert!(error.contains("decoder.lstm.weight_hh_l0"), "{error}");
}

#[test]
fn the_split_is_kept_verified_and_may_be_missing() {
    use crate::data::split::{Print, SplitList, Unit};
    let (dir, path) = saved();
    assert_eq!(load(&path).unwrap().split, None, "as older checkpoints are");
    let unit = Unit { name: "s0.hdf5".into(), prints: vec![Print(7)], splits: [true, false, false], rows: None };
    let list = SplitList { units: vec![unit] };
    let mut keeper = Checkpointer::open(dir.path(), 3).unwrap().with_split(Some(&list)).unwrap();
    for step in [6, 7] {
        save(&mut keeper, step, false).unwrap();
        assert_eq!(load(&dir.path().join(format!("step-{step}"))).unwrap().split, Some(list.clone()));
    }
    let file = dir.path().join("step-7").join(SPLIT);
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("s0", "s1")).unwrap();
    assert!(error_of(&dir.path().join("step-7")).contains("split.json: its checksum is"));
    fs::remove_file(&file).unwrap();
    assert!(error_of(&dir.path().join("step-7")).contains("split.json: the file is missing"));
}

fn chosen(folder: &Path, weights: &str) -> Result<(u64, f64), String> {
    let chosen = choose(folder, &weights.parse().unwrap()).map_err(|error| error.to_string())?;
    let value = chosen.tensors.iter().find(|(name, _)| name == "encoder.0.bias").unwrap().1.double_value(&[0]);
    Ok((chosen.step.unwrap_or(0), value))
}

#[test]
fn weights_are_chosen_as_the_command_line_names_them() {
    let run = tempfile::tempdir().unwrap();
    let checkpoints = run.path().join("checkpoints");
    let nothing = chosen(run.path(), "best").unwrap_err();
    assert!(
        nothing.ends_with("checkpoints: holds no checkpoint: train first, or name a file with --weights FILE"),
        "{nothing}"
    );
    let mut keeper = Checkpointer::open(&checkpoints, 9).unwrap();
    for (step, best) in [(1, true), (2, true), (3, false)] {
        save(&mut keeper, step, best).unwrap();
    }
    // Each checkpoint's average is 3, as validation used it.
    assert_eq!(chosen(run.path(), "best"), Ok((2, 3.0)));
    assert_eq!(chosen(run.path(), "last"), Ok((3, 3.0)));
    fs::write(run.path().join("job.json"), r#"{"config": {"train": {"ema_decay": 0.999}}}"#).unwrap();
    assert_eq!(chosen(run.path(), "ema:0.999"), Ok((2, 3.0)));
    let other = chosen(run.path(), "ema:0.5").unwrap_err();
    assert!(other.contains("keeps the average with decay 0.999, not 0.5: use --weights ema:0.999"), "{other}");
    // A file is what it is: here the weights themselves, in halves.
    let file = run.path().join("halves.safetensors");
    let halves: Vec<(String, Tensor)> =
        tensors(7.0).into_iter().map(|(name, tensor)| (name, tensor.to_kind(Kind::Half))).collect();
    Tensor::write_safetensors(&halves, &file).unwrap();
    let of_file = choose(run.path(), &Weights::File(file)).unwrap();
    assert_eq!((of_file.step, of_file.tensors[0].1.kind()), (None, Kind::Float));
    assert_eq!(split_of_run(run.path(), &Weights::Best).unwrap(), None);
    // The newest whole one counts; a damaged file is named.
    fs::write(checkpoints.join("step-3/state.json"), "half").unwrap();
    assert_eq!(chosen(run.path(), "last"), Ok((2, 3.0)));
    let averaged = checkpoints.join("step-2/ema.safetensors");
    let mut bytes = fs::read(&averaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&averaged, bytes).unwrap();
    let damaged = chosen(run.path(), "best").unwrap_err();
    assert!(damaged.contains("step-2/ema.safetensors") && damaged.contains("it is damaged"), "{damaged}");
}
