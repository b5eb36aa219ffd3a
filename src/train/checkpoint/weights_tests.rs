use super::super::tests::{facts, tensors};
use super::super::{Checkpointer, Content};
use super::*;
use serde_json::json;
use std::fs;
use tch::{Device, Kind};

#[test]
fn words_are_read_and_written() {
    for word in ["best", "last", "ema", "ema:0.9999", "runs/a/model.safetensors"] {
        assert_eq!(word.parse::<Weights>().unwrap().to_string(), word);
    }
    assert_eq!("ema:0.9999".parse(), Ok(Weights::Ema(Some(0.9999))));
    for word in ["", "ema:", "ema:x", "ema:1", "ema:NaN"] {
        assert!(word.parse::<Weights>().is_err(), "{word}");
    }
}

/// Checkpoints `(step, best)` with these averages; the weights of a step are `step`, those of an average `step + rate`.
fn run(checkpoints: &[(u64, bool)], rates: &[f64]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = Checkpointer::open(dir.path(), 9).unwrap();
    for &(step, best) in checkpoints {
        let ema: Vec<_> = rates.iter().map(|rate| (*rate, tensors(step as f64 + rate))).collect();
        let content = Content {
            step,
            model: &tensors(step as f64),
            optimizer: &[],
            ema: &ema,
            rest: &[],
            facts: facts(),
            best,
            last: false,
            state: json!({}),
        };
        keeper.save(content).unwrap();
    }
    keeper.wait().unwrap();
    dir
}

/// A model of the checkpoints' tensors: those of a float type as f32, as a model holds them.
fn model() -> nn::VarStore {
    let vs = nn::VarStore::new(Device::Cpu);
    for (name, tensor) in tensors(0.0) {
        let trainable = tensor.kind() == Kind::Float;
        let tensor = if tensor.kind() == Kind::Half { tensor.to_kind(Kind::Float) } else { tensor };
        let mut path = vs.root();
        let (folder, leaf) = name.rsplit_once('.').unwrap_or(("", &name));
        folder.split('.').filter(|part| !part.is_empty()).for_each(|part| path = path.sub(part));
        let _ = path.add(leaf, tensor, trainable);
    }
    vs
}

fn value(vs: &nn::VarStore) -> f64 {
    vs.variables()["encoder.0.weight"].double_value(&[0, 0])
}

/// The value of the weights that a word stands for, and what the choice says of itself.
fn loaded(dir: &tempfile::TempDir, word: &str) -> (f64, String) {
    let chosen = choose(&word.parse().unwrap(), dir.path()).unwrap();
    let vs = model();
    load_into(&vs, &chosen).unwrap();
    assert_eq!(vs.variables()["count"].int64_value(&[]), value(&vs) as i64, "buffers come along");
    (value(&vs), chosen.to_string())
}

#[test]
fn words_lead_to_the_weights_that_they_mean() {
    let plain = run(&[(5, true), (10, false)], &[]);
    assert_eq!(loaded(&plain, "best"), (5.0, "model.safetensors of step 5".into()));
    assert_eq!(loaded(&plain, "last").0, 10.0);
    let one = run(&[(5, true), (10, false)], &[0.5]);
    assert_eq!(loaded(&one, "best"), (5.5, "ema.safetensors of step 5".into()));
    assert_eq!([loaded(&one, "last").0, loaded(&one, "ema").0, loaded(&one, "ema:0.5").0], [10.5; 3]);
    let several = run(&[(5, false), (10, true), (15, false)], &[0.75, 0.5]);
    assert_eq!(loaded(&several, "best").0, 10.75);
    assert_eq!(loaded(&several, "ema:0.5"), (15.5, "ema-0.5.safetensors of step 15".into()));
    assert_eq!(loaded(&several, several.path().join("step-5").to_str().unwrap()).0, 5.75);
    let file = several.path().join("step-5/model.safetensors");
    assert_eq!(loaded(&several, file.to_str().unwrap()), (5.0, file.display().to_string()));
}

#[test]
fn what_is_not_there_is_named_with_what_is() {
    let error = |dir: &Path, word: &str| choose(&word.parse().unwrap(), dir).unwrap_err().to_string();
    let empty = tempfile::tempdir().unwrap();
    assert!(error(empty.path(), "best").contains("there is no checkpoint"));
    let unmarked = run(&[(5, false)], &[]);
    assert!(error(unmarked.path(), "best").contains("no checkpoint is marked as the best"));
    assert!(error(unmarked.path(), "ema").ends_with("of step 5, has no average (train.ema_decay there: none)"));
    let several = run(&[(5, false)], &[0.75, 0.5]);
    let text = error(several.path(), "ema:0.9");
    assert!(
        text.contains("--weights ema:0.9: ") && text.ends_with("with rate 0.9 (train.ema_decay there: 0.75, 0.5)"),
        "{text}"
    );
}

#[test]
fn damaged_and_foreign_files_are_refused_and_change_nothing() {
    let dir = run(&[(5, true)], &[]);
    let path = dir.path().join("step-5/model.safetensors");
    let chosen = choose(&Weights::Best, dir.path()).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&path, &flipped).unwrap();
    let vs = model();
    let error = load_into(&vs, &chosen).unwrap_err().to_string();
    assert!(error.contains("it is damaged") && error.contains("--weights takes"), "{error}");
    fs::write(&path, &whole).unwrap();
    let other = nn::VarStore::new(Device::Cpu);
    let _ = other.root().zeros("half", &[4]);
    let error = load_into(&other, &chosen).unwrap_err().to_string();
    assert!(error.contains("half is Float [3] in the file, Float [4] in") && error.contains("unexpected"), "{error}");
    let missing = Chosen { path: dir.path().join("none.safetensors"), step: None, decay: None, facts: None };
    assert!(load_into(&vs, &missing).unwrap_err().to_string().contains("none.safetensors: read the weights: "));
    assert_eq!(value(&vs), 0.0);
}
