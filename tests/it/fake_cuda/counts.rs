//! What a step costs, counted on the model and held to `budget.json`; and what must hold in every step.

use super::model::{Job, Report};
use crate::support::{folder, rank_program, run, sample_data};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// Launches of a step as it is written, nodes of the recorded one, launches of a step that replays it.
const BUDGET: &str = "tests/it/fake_cuda/budget.json";
const CASES: [(&str, usize); 5] = [("net", 1), ("net", 3), ("emg", 1), ("emg", 3), ("deblur", 1)];
/// Workspaces of cuBLAS: part of the plan's line for CUDA itself, which measures as nothing on the model.
const WORKSPACE: u64 = 16 << 20;
const STEPS: &str = "train.max_steps=10";

/// Sequences of frames for the deblurring task.
fn frames() -> PathBuf {
    static FRAMES: OnceLock<TempDir> = OnceLock::new();
    let made = FRAMES.get_or_init(|| {
        let out = folder();
        let mut command = Command::new(rank_program());
        command.args(["sample-data", "--task", "deblur", "--out"]).arg(out.path().join("data"));
        let ended = run(&mut command, out.path());
        assert_eq!(ended.code, Some(0), "{ended}");
        out
    });
    made.path().join("data")
}

const COMMON: &[&str] = &[
    STEPS,
    "train.num_epochs=1000",
    "train.gradient_accumulation_steps=1",
    "train.microbatch=null",
    "train.warmup_accumulation=false",
    "train.early_stopping=false",
    "train.restore_best_weights=false",
    "train.ema_decay=0.999",
    "train.num_workers=1",
    "log.log_every=1000",
    "log.memory_every=1000",
    "log.save_every=0",
];

fn config(text: &str) -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(folder);
    let path = folder.path().join(format!("{:x}.yaml", text.len()));
    std::fs::write(&path, text).unwrap();
    path
}

/// A job of `name` on `ranks` devices.
pub fn job(name: &str, ranks: usize, sets: &[&str]) -> Job {
    let gpus = ranks.to_string();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (config, data, own): (PathBuf, PathBuf, &[&str]) = match name {
        "net" => (
            config("task: emg\n"),
            sample_data().to_owned(),
            &[
                "train.batch_size=8",
                "data.stride=5",
                "emg.window_size=200",
                "emg.model.decoder_num_layers=1",
                "emg.model.decoder_hidden_size=16",
                "data.max_val_windows=8",
            ],
        ),
        "emg" => (config("task: emg\n"), sample_data().to_owned(), &["train.batch_size=64", "data.max_val_windows=8"]),
        _ => (
            root.join("configs/baseline.yaml"),
            frames(),
            &[
                "deblur.vrt.dims=[8,8,8,8,8,8,8,8]",
                "deblur.vrt.depths=[1,1,1,1,1,1,1,1]",
                "deblur.vrt.independent_groups=[7]",
                "deblur.vrt.deform_groups=2",
                "deblur.vrt.tsa_heads=2",
                "deblur.vrt.fuse_heads=2",
                "deblur.vrt.heads=2",
                "deblur.vrt.window=[2,8,8]",
                "deblur.voxel_bins=4",
                "deblur.spike_h=48",
                "deblur.spike_w=64",
                "data.cache_size_gb=0.5",
                "deblur.clip_len=3",
                "deblur.crop_size=32",
                "deblur.val_crop_size=32",
                "train.batch_size=1",
                "train.warmup_steps=0",
                "data.max_val_windows=1",
                "log.images=0",
            ],
        ),
    };
    let (config, data) = (config.display().to_string(), format!("data.dataset_path={}", data.display()));
    let words = ["--gpus", &gpus, "--config", &config, "--set", &data];
    Job::new(ranks, &words).set(COMMON).set(own).set(sets)
}

/// One run, and what must hold whatever it computes.
fn counted(name: &str, ranks: usize, graph: &str) -> BTreeMap<u64, Report> {
    let case = format!("{name}, {ranks} ranks, cuda_graph {graph}");
    let done = job(name, ranks, &[&format!("train.cuda_graph={graph}")]).run();
    assert_eq!(done.ended.code, Some(0), "{case}: {}", done.ended);
    let (plan, reports) = (done.plan(), done.reports());
    assert_eq!(reports.len(), ranks, "{case}: {}", done.text());
    let lines = plan["budget"]["gpu"]["lines"].as_array().unwrap();
    let planned: u64 = lines.iter().map(|line| line["bytes"].as_u64().unwrap()).sum();
    for (rank, report) in &reports {
        let at = format!("{case}, rank {rank}");
        assert_eq!(report.list("contexts"), [rank.to_string()], "{at}: contexts on other devices");
        assert_eq!(report.most("pageable"), 0, "{at}: copies of pageable memory in a step");
        assert_eq!(report.most("syncs"), 0, "{at}: the host waits for the device in a step");
        assert_eq!(report.most("mallocs"), 0, "{at}: the device is asked for memory after the first steps");
        assert_eq!(report.most("events"), 0, "{at}: events made in a step");
        assert_eq!(report.list("problems"), Vec::<String>::new(), "{at}");
        assert_eq!(report.list("hazards"), Vec::<String>::new(), "{at}: accesses that nothing orders");
        assert!(report.captures().iter().all(|capture| capture["valid"] == true), "{at}: {:?}", report.captures());
        assert_eq!(report.captures().len(), usize::from(graph != "off"), "{at}: {}", done.text());
        let inits = u64::from(ranks > 1);
        let ends = ["inits", "finalized", "destroyed", "aborted"].map(|end| report.number(end));
        assert_eq!(ends, [inits, inits, inits, 0], "{at}: how the communicator ended");
        let held = report.number("most_device_bytes");
        assert!(held <= planned + WORKSPACE, "{at}: {held} bytes reserved, {planned} planned");
    }
    reports
}

/// Launches, nodes and launches of a replay; the same on all ranks.
fn figures(name: &str, ranks: usize) -> Value {
    let off = counted(name, ranks, "off");
    let graph = counted(name, ranks, "on");
    let nodes = graph[&0].captures()[0]["nodes"].as_u64().unwrap();
    let figures = json!({
        "launches": off[&0].most("launches"),
        "nodes": nodes,
        "replay": graph[&0].most("launches"),
        "device_mib": off[&0].number("most_device_bytes") >> 20,
        "device_mib_graph": graph[&0].number("most_device_bytes") >> 20,
    });
    assert!(graph.values().all(|report| report.captures()[0]["nodes"].as_u64() == Some(nodes)), "{name}");
    figures
}

#[test]
fn a_step_costs_what_the_budget_says_and_waits_for_nothing() {
    let budget = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(BUDGET)).unwrap();
    let budget: Value = serde_json::from_slice(&budget).unwrap();
    let mut wrong = Vec::new();
    println!(
        "{:8} {:>5} {:>9} {:>6} {:>7} {:>8} {:>8}",
        "model", "ranks", "launches", "nodes", "replay", "MiB", "MiB graph"
    );
    for (name, ranks) in CASES {
        let found = figures(name, ranks);
        let number = |key: &str| found[key].as_u64().unwrap();
        let [launches, nodes, replay, mib, mib_graph] =
            ["launches", "nodes", "replay", "device_mib", "device_mib_graph"].map(number);
        println!("{name:8} {ranks:>5} {launches:>9} {nodes:>6} {replay:>7} {mib:>8} {mib_graph:>8}");
        for key in ["launches", "nodes", "replay"] {
            let most = budget[name][&ranks.to_string()][key].as_u64().unwrap_or(0);
            if number(key) > most || number(key) * 20 < most * 19 {
                wrong.push(format!("{name}, {ranks} ranks: {} {key}, {most} in budget.json", number(key)));
            }
        }
    }
    // Counts of a large model with several ranks follow from these; that nothing waits there is seen once.
    counted("deblur", 3, "on");
    assert!(
        wrong.is_empty(),
        "more than the budget slows training down; what is well below it belongs into tests/it/fake_cuda/budget.json: {wrong:#?}"
    );
}
