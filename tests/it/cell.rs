//! Task `cell` through the real programs: all stages, however many ranks, stopped and resumed; and the guide's checklist.

use crate::support::{Run, Runs, assert_same_checkpoint, distance, read_tensors, sample_cells};
use headroom::data::source::h5ad;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Small networks and few steps; every stage crosses several epochs. All that a checkpoint of this task can hold is in it.
const TINY: &str = r#"
task: cell
seed: 7
data: {split_ratio: [0.8, 0.1, 0.1]}
cell:
  latents: f32
  autoencoder: {hidden: [24, 16], latent: 8, dropout: 0.1}
  unet: {hidden: [16, 12, 8], dropout: 0.1}
  classifier: {hidden: [16, 12, 8]}
  diffusion: {steps: 40, noise_schedule: cosine, schedule_sampler: loss-second-moment, learn_sigma: true}
  sample: {num_samples: 20, per_class: 4, start_guide_steps: 20}
train:
  batch_size: 24
  num_epochs: 100000
  max_steps: 30
  learning_rate: 2.0e-3
  sync_batchnorm: true
  restore_best_weights: false
  num_workers: 1
log: {log_every: 1, memory_every: 1000, plots: false, save_every: 0, save_every_steps: 7}
stages:
  diffusion: {train: {max_steps: 60, ema_decay: [0.9, 0.5]}}
  sample: {train: {batch_size: 10}}
"#;

const STAGES: [&str; 5] = ["autoencoder", "latents", "diffusion", "classifier", "sample"];
/// Those that train, and their last step.
pub const TRAINED: [(&str, u64); 3] = [("autoencoder", 30), ("diffusion", 60), ("classifier", 30)];

pub fn runs(sets: &[&str]) -> Runs {
    Runs::of(TINY, sample_cells(), sets)
}

pub fn stage(run: &Run, name: &str) -> Run {
    Run { path: run.path.join(name) }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

fn latents(run: &Run) -> Vec<f32> {
    let bytes = fs::read(run.path.join("latents/latents.bin")).unwrap();
    // 8 numbers and a class.
    let rows = bytes.chunks_exact(8 * 4 + 2);
    assert!(rows.remainder().is_empty() && rows.len() > 250);
    rows.flat_map(|row| crate::support::floats(&row[..32])).collect()
}

/// All stages on one rank, as the guide's `train.sh` (checklist 73); what they leave is whole and can be read.
#[test]
fn checklist_73_one_command_leads_from_counts_to_generated_cells_that_are_read_back() {
    let runs = runs(&["log.images=1"]);
    let run = runs.finish("whole", &["--ranks", "1"]);
    for name in STAGES {
        assert_eq!(stage(&run, name).summary()["status"], "finished", "{name}");
    }
    for (name, steps) in TRAINED {
        assert_eq!(stage(&run, name).steps(), (1..=steps).collect::<Vec<_>>(), "{name}");
    }
    let facts = json(&run.path.join("latents/latents.json"));
    assert_eq!((&facts["latent"], &facts["kind"]), (&Value::from(8), &Value::from("f32")));
    let classes: Vec<String> = serde_json::from_value(facts["classes"].clone()).unwrap();
    assert_eq!(classes.len(), 5);
    let lengths = latents(&run).chunks(8).map(|row| row.iter().map(|x| x * x).sum::<f32>()).collect::<Vec<_>>();
    assert!(lengths.iter().all(|length| (length - 1.0).abs() < 1e-5), "latents have length 1");
    assert_eq!(lengths.len(), facts["cells"].as_u64().unwrap() as usize);

    let sample = run.path.join("sample");
    let wanted = h5ad::Wanted { matrix: "X".into(), label: Some("celltype".into()) };
    let file = h5ad::open(&sample.join("generated.h5ad"), &wanted).unwrap();
    assert_eq!((file.matrix.cells, file.genes.len() as u64), (40, facts["genes"].as_u64().unwrap()));
    let labels = file.labels.unwrap();
    let of = |cell: usize| labels.names.get(labels.codes[cell] as usize).cloned();
    assert!((0..20).all(|cell| of(cell).is_none()), "the first 20 cells are unguided");
    let guided: Vec<String> = (20..40).map(|cell| of(cell).unwrap()).collect();
    assert_eq!(guided.chunks(4).map(|four| four[0].clone()).collect::<Vec<_>>(), classes);
    let metrics = json(&sample.join("metrics.json"));
    for key in ["gene_mean_spearman", "mmd", "guided_share", "variance_within_types"] {
        assert!(metrics[key].is_number(), "{key}: {metrics}");
    }
    assert_eq!(metrics["type_share"].as_object().unwrap().len(), 5);
    assert!(fs::read(sample.join("cells.png")).unwrap().starts_with(b"\x89PNG"));
    let last = stage(&run, "diffusion")
        .metrics()
        .into_iter()
        .rev()
        .find(|record| record["val"].is_object() || record.get("val.loss").is_some());
    let last = last.unwrap().to_string();
    for key in ["loss_q0", "mse_q3", "vb_q1"] {
        assert!(last.contains(key), "{key} in {last}");
    }
}

/// Draws are functions of (seed, step, cell), statistics of batch norm and losses of steps are those of all ranks: every
/// stage is the same on every number of ranks, the sampler of steps included. By SGD: where a gradient is next to nothing,
/// AdamW makes a whole step of its rounding.
#[test]
fn one_two_and_three_ranks_are_equal_in_every_stage() {
    let runs = runs(&[]);
    let words = |ranks: usize| {
        let set = || "--set".to_string();
        let batch = format!("train.batch_size={}", 24 / ranks);
        ["--ranks".into(), ranks.to_string(), set(), batch, set(), "train.optimizer=sgd".into()]
    };
    let run = |ranks: usize| {
        let words = words(ranks);
        runs.finish(&format!("ranks{ranks}"), &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let one = run(1);
    for ranks in [2, 3] {
        let other = run(ranks);
        for (name, steps) in TRAINED {
            let (a, b) = (stage(&other, name), stage(&one, name));
            let tensors = |run: &Run| {
                let mut tensors = run.tensors(steps, "model.safetensors");
                tensors.retain(|name, _| !name.ends_with("num_batches_tracked"));
                tensors
            };
            let found = distance(&tensors(&a), &tensors(&b));
            println!("{ranks} ranks, {name}: {:.1e} of the norm ({})", found.norm, found.worst);
            assert!(found.norm < 1e-5, "{ranks} ranks, {name}: {:e} in {}", found.norm, found.worst);
            for (step, (a, b)) in a.losses().iter().zip(b.losses()).enumerate() {
                assert!(
                    (a - b).abs() <= 1e-5 * b.abs().max(1.0),
                    "{ranks} ranks, {name}: loss {a} against {b} at step {}",
                    step + 1
                );
            }
        }
        let far = latents(&other).iter().zip(latents(&one)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-4, "{ranks} ranks: latents differ by {far}");
        let share = |run: &Run| json(&run.path.join("sample/metrics.json"))["mmd"].as_f64().unwrap();
        assert!((share(&other) - share(&one)).abs() < 1e-2, "{} against {}", share(&other), share(&one));
    }
}

/// Killed in the middle of each stage that trains, and resumed each time: the same bits as never having stopped.
#[test]
fn killed_in_each_stage_and_resumed_a_run_ends_with_the_same_bits() {
    let runs = runs(&[]);
    let reference = runs.finish("reference", &["--ranks", "2"]);
    let run = runs.run("killed");
    let mut words = vec!["--ranks", "2"];
    for (name, steps) in TRAINED {
        let mut running = runs.start("killed", &words);
        let at = stage(&run, name);
        assert!(running.until("steps", || at.steps_so_far() > steps as usize / 3), "{name} ended before it was killed");
        running.signal(Signal::KILL);
        running.wait();
        assert!(at.steps_so_far() < steps as usize, "{name} ended before it was killed");
        words = vec!["--ranks", "2", "--resume", "auto"];
    }
    runs.finish("killed", &words);
    for (name, steps) in TRAINED {
        assert_same_checkpoint(&stage(&run, name), &stage(&reference, name), steps, name);
        assert_eq!(stage(&run, name).losses(), stage(&reference, name).losses(), "{name}");
    }
    for file in ["latents/latents.bin", "latents/parts.bin", "sample/metrics.json", "sample/cells.png"] {
        assert_eq!(fs::read(run.path.join(file)).unwrap(), fs::read(reference.path.join(file)).unwrap(), "{file}");
    }
    // The history of losses by which steps are drawn is in the checkpoint: resumed draws are those of the unbroken run.
    let state: Vec<PathBuf> =
        fs::read_dir(stage(&run, "diffusion").checkpoint(60)).unwrap().map(|e| e.unwrap().path()).collect();
    let has = |file: &PathBuf| {
        file.extension().is_some_and(|ext| ext == "safetensors")
            && read_tensors(file).keys().any(|name| name.ends_with("step_losses"))
    };
    assert!(state.iter().any(has), "{state:?}");
}

/// A stage alone needs those before it, and says so.
#[test]
fn a_stage_without_those_before_it_says_what_to_run() {
    let runs = runs(&[]);
    let ended = runs.train("alone", &["--ranks", "1", "--stage", "diffusion"]);
    assert_ne!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("autoencoder") || ended.err.contains("latents"), "{ended}");
}

/// Checklist 22: micro-batches give the result of the whole batch, in each stage that trains by cells alone.
#[test]
fn checklist_22_micro_batches_equal_the_whole_batch_for_the_diffusion_network() {
    let runs = runs(&["train.sync_batchnorm=false"]);
    let stages = |name: &str, micro: &[&str]| {
        let mut words = vec!["--ranks", "1"];
        words.extend(micro);
        runs.finish(name, &words)
    };
    let whole = stages("whole", &[]);
    let micro = stages("micro", &["--set", "stages.diffusion.train.microbatch=5"]);
    let (a, b) = (stage(&micro, "diffusion"), stage(&whole, "diffusion"));
    let found = distance(&a.tensors(60, "model.safetensors"), &b.tensors(60, "model.safetensors"));
    println!("micro-batches of 5, 5, 5, 5 and 4: {:.1e} of the norm ({})", found.norm, found.worst);
    assert!(found.norm < 1e-5, "{:e} in {}", found.norm, found.worst);
}

/// Checklist 56: the allocator's setting reaches the ranks and is said.
#[test]
fn checklist_56_the_allocators_setting_is_passed_and_echoed() {
    let runs = runs(&["train.max_steps=1"]);
    let mut command = runs.command(&["--name", "allocator", "--ranks", "1", "--stage", "autoencoder"]);
    command.env("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64");
    let ended = crate::support::run(&mut command, runs.path());
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64"), "{ended}");
}

/// `launch predict` for cells of other files: one output per file, every cell, the same on one and three ranks.
#[test]
fn predictions_for_other_cells_are_equal_on_one_and_three_ranks() {
    let runs = runs(&[]);
    let run = runs.finish("trained", &["--ranks", "1"]);
    let predict = |ranks: &str| {
        let out = runs.path().join(format!("out{ranks}"));
        let mut command = std::process::Command::new(crate::support::launch_program());
        command
            .args(["predict"])
            .arg(&run.path)
            .arg("--data")
            .arg(sample_cells())
            .arg("--out")
            .arg(&out)
            .args(["--ranks", ranks]);
        let ended = crate::support::run(&mut command, runs.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        let wanted = h5ad::Wanted { matrix: "X".into(), label: Some("celltype".into()) };
        let file = h5ad::open(&out.join("cells.h5ad"), &wanted).unwrap();
        assert_eq!(file.matrix.cells, 300, "no cell is left out");
        file.labels.unwrap()
    };
    assert_eq!(predict("1"), predict("3"));
}
