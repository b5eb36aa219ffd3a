//! The same training however it is divided, and the same bits when nothing differs.

use crate::support::{Ended, Run, Running, Runs, assert_same_checkpoint, distance, folder};
use serde_json::json;
use std::fs;
use std::process::Command;

/// One way to take a global batch of 12: ranks, batch, accumulation, micro-batch.
const DIVISIONS: [(&str, usize, usize, usize, Option<usize>); 6] = [
    ("three ranks", 3, 4, 1, None),
    ("accumulation", 1, 4, 3, None),
    ("micro-batches of five, five and two", 1, 12, 1, Some(5)),
    ("two ranks, micro-batches of four and two", 2, 6, 1, Some(4)),
    ("two ranks with accumulation", 2, 2, 3, None),
    ("three ranks, micro-batches of three and one", 3, 4, 1, Some(3)),
];

fn words(ranks: usize, batch: usize, accumulation: usize, micro: Option<usize>) -> Vec<String> {
    let mut words = vec!["--ranks".into(), ranks.to_string()];
    let mut set = |key: &str, value: usize| words.extend(["--set".into(), format!("train.{key}={value}")]);
    set("batch_size", batch);
    set("gradient_accumulation_steps", accumulation);
    micro.into_iter().for_each(|micro| set("microbatch", micro));
    words
}

fn finish(runs: &Runs, name: &str, words: &[String]) -> Run {
    runs.finish(name, &words.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Parameters of step 20 within `norm` per tensor and `element` of the tensor's largest value.
///
/// The sum of a gradient's addends rounds differently in another order: relative errors of 1e-7 per step. SGD hands them
/// on as they are. Adam divides by the root of the second moment: an element whose gradient is zero but for rounding
/// moves by up to the learning rate in either direction, so single elements may differ by more than the whole does. A
/// wrong weight of a sample would change every gradient by percents: 20 steps of 2e-3 would make 1e-2 of it.
fn assert_close(run: &Run, reference: &Run, norm: f64, element: f64, what: &str) {
    let found = distance(&run.tensors(20, "model.safetensors"), &reference.tensors(20, "model.safetensors"));
    println!("{what}: {:.1e} of the norm ({}), {:.1e} of the largest element", found.norm, found.worst, found.element);
    assert!(found.norm <= norm, "{what}: {:e} in {}", found.norm, found.worst);
    assert!(found.element <= element, "{what}: {:e}", found.element);
    for (step, (a, b)) in run.losses().iter().zip(reference.losses()).enumerate() {
        assert!((a - b).abs() <= 1e-5 * b, "{what}: loss {a} against {b} at step {}", step + 1);
    }
}

fn all_divisions_agree(sets: &[&str], norm: f64, element: f64) {
    let runs = Runs::new(sets);
    let reference = finish(&runs, "reference", &words(1, 12, 1, None));
    assert_eq!(reference.steps(), (1..=20).collect::<Vec<_>>());
    let moved = distance(&reference.tensors(20, "model.safetensors"), &first_weights(&runs));
    assert!(moved.norm > 1e-2, "20 steps changed the weights by {:e} only", moved.norm);
    for (number, (what, ranks, batch, accumulation, micro)) in DIVISIONS.into_iter().enumerate() {
        let run = finish(&runs, &format!("r{number}"), &words(ranks, batch, accumulation, micro));
        assert_close(&run, &reference, norm, element, what);
    }
}

/// After one step at a rate of (almost) nothing.
fn first_weights(runs: &Runs) -> crate::support::Tensors {
    let mut words = words(1, 12, 1, None);
    words.extend(["--set".into(), "train.max_steps=1".into(), "--set".into(), "train.learning_rate=1e-30".into()]);
    finish(runs, "first", &words).tensors(1, "model.safetensors")
}

#[test]
fn ranks_accumulation_and_micro_batches_are_equal_with_adamw() {
    all_divisions_agree(&["train.gradient_clip_norm=1.0"], 1e-5, 1e-4);
}

#[test]
fn ranks_accumulation_and_micro_batches_are_equal_with_sgd() {
    let sgd = ["train.optimizer=sgd", "train.momentum=0.9", "train.learning_rate=0.1", "train.gradient_clip_norm=0.0"];
    all_divisions_agree(&sgd, 1e-5, 1e-5);
}

#[test]
fn the_same_run_twice_is_the_same_bits_whatever_loads_it() {
    let runs = Runs::new(&["model.dropout=0.2", "train.ema_decay=0.9"]);
    let reference = runs.finish("threads1", &["--ranks", "3"]);
    for (name, workers) in [("again", "1"), ("threads0", "0"), ("threads2", "2")] {
        let workers = format!("train.num_workers={workers}");
        let run = runs.finish(name, &["--ranks", "3", "--set", &workers]);
        assert_same_checkpoint(&run, &reference, 20, name);
        assert_eq!(run.losses(), reference.losses(), "{name}");
    }
    let other = runs.finish("other", &["--ranks", "3", "--set", "model.dropout=0.0"]);
    assert_ne!(other.losses(), reference.losses(), "dropout changes nothing: this test could not fail");
}

/// Starts the job of a `launch` run as `world` ranks with the environment that torchrun sets, and no launcher of ours.
fn by_hand(job: &serde_json::Value, world: usize, port: u16) -> Vec<Ended> {
    let folder = folder();
    let path = folder.path().join("job.json");
    fs::write(&path, job.to_string()).unwrap();
    let start = |rank: usize| {
        let mut command = Command::new(crate::support::rank_program());
        for (name, value) in [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", world)]
        {
            command.env(name, value.to_string());
        }
        command.env("GROUP_RANK", "0").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env("HEADROOM_JOB", &path);
        Running::start(&mut command, folder.path())
    };
    let ranks: Vec<Running> = (0..world).map(start).collect();
    ranks.into_iter().map(Running::wait).collect()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn ranks_of_another_launcher_train_even_where_they_do_not_divide_the_batch() {
    let runs = Runs::new(&[]);
    let reference = finish(&runs, "reference", &words(1, 12, 1, None));
    let mut job: serde_json::Value =
        serde_json::from_slice(&fs::read(reference.path.join("job.json")).unwrap()).unwrap();
    job["plan"]["batch"]["micro_batch"] = json!(2);
    job["plan"]["topology"]["threads_per_rank"] = json!(1);
    // Five ranks take 3, 3, 2, 2 and 2 samples: two micro-batches on some, one on others.
    for world in [2, 5] {
        let run = runs.run(&format!("world{world}"));
        fs::create_dir_all(&run.path).unwrap();
        job["run_dir"] = json!(run.path);
        let ranks = by_hand(&job, world, free_port());
        for (rank, ended) in ranks.iter().enumerate() {
            assert_eq!(ended.code, Some(0), "{ended}");
            let told = ended.out.matches("Cache Stats").count();
            assert_eq!(told, usize::from(rank == 0), "{ended}");
        }
        assert_eq!(run.steps(), (1..=20).collect::<Vec<_>>());
        assert_close(&run, &reference, 1e-5, 1e-4, &format!("{world} ranks by hand"));
    }
}

#[test]
fn a_rank_whose_peers_never_come_says_so() {
    let runs = Runs::new(&["train.max_steps=1"]);
    let reference = runs.finish("reference", &[]);
    let mut job: serde_json::Value =
        serde_json::from_slice(&fs::read(reference.path.join("job.json")).unwrap()).unwrap();
    job["config"]["train"]["step_timeout"] = json!(0.2);
    let folder = folder();
    let path = folder.path().join("job.json");
    fs::write(&path, job.to_string()).unwrap();
    let mut command = Command::new(crate::support::rank_program());
    command.env("RANK", "0").env("WORLD_SIZE", "2").env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "2");
    command.env("MASTER_PORT", free_port().to_string()).env("HEADROOM_JOB", &path);
    let ended = crate::support::run(&mut command, folder.path());
    assert_eq!(ended.code, Some(6), "{ended}");
    assert!(ended.err.contains("1 of the node's 2 ranks"), "{ended}");
}
