//! Losses of a short run, kept: a refactor must not change them.
//!
//! `HEADROOM_BLESS=1 cargo test --release golden` rewrites the file after a change that is meant.

use crate::support::Runs;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::{Deserialize, Serialize};
use std::path::Path;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden_losses.json");
/// Kernels of libtorch, oneDNN and MKL, pinned as far as their switches go.
const PINNED: [(&str, &str); 4] = [
    ("ATEN_CPU_CAPABILITY", "avx2"),
    ("ONEDNN_MAX_CPU_ISA", "AVX2"),
    ("MKL_CBWR", "AVX2"),
    ("MKL_ENABLE_INSTRUCTIONS", "AVX2"),
];

#[derive(Serialize, Deserialize)]
struct Golden {
    /// Vendor, model and vector units: what may choose another kernel or another order of addends.
    cpu: String,
    /// Losses of steps 1, 2, …: quick_demo's model, one rank, one thread, dropout on.
    losses: Vec<f64>,
}

fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim()).to_string()
    };
    let flags = value("flags");
    let units = ["avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_tile"];
    let units: Vec<&str> = units.into_iter().filter(|unit| flags.split(' ').any(|flag| flag == *unit)).collect();
    format!("{} family {} model {}: {}", value("vendor_id"), value("cpu family"), value("model\t"), units.join(" "))
}

/// Runs `work` on one core: a rank takes as many threads as there are cores to share.
fn on_one_core<T>(work: impl FnOnce() -> T) -> T {
    let all = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|&core| all.is_set(core)).unwrap();
    let mut one = CpuSet::new();
    one.set(first);
    sched_setaffinity(None, &one).unwrap();
    let result = work();
    sched_setaffinity(None, &all).unwrap();
    result
}

fn losses() -> Vec<f64> {
    let runs = Runs::new(&[
        "data.window_size=500",
        "model.decoder_hidden_size=64",
        "model.dropout=0.1",
        "model.tds_stages=[{in_conv_kernel: 5, in_conv_stride: 4, num_blocks: 1, channels: 4, feature_width: 4, kernel_width: 11}]",
        "train.batch_size=16",
        "train.optimizer=adam",
        "train.max_steps=12",
    ]);
    let mut command = runs.command(&["--ranks", "1", "--name", "golden"]);
    command.envs(PINNED);
    let ended = on_one_core(|| crate::support::run(&mut command, runs.path()));
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.out.contains("1 compute thread each"), "{ended}");
    runs.run("golden").losses()
}

#[test]
fn golden_losses_are_what_they_were() {
    let found = Golden { cpu: cpu(), losses: losses() };
    if std::env::var_os("HEADROOM_BLESS").is_some() {
        std::fs::write(FILE, serde_json::to_string_pretty(&found).unwrap() + "\n").unwrap();
        return;
    }
    let text = std::fs::read_to_string(Path::new(FILE)).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    assert_eq!(found.losses.len(), golden.losses.len());
    if found.cpu == golden.cpu {
        assert_eq!(found.losses, golden.losses, "meant? HEADROOM_BLESS=1 rewrites {FILE}");
    }
    for (step, (a, b)) in found.losses.iter().zip(&golden.losses).enumerate() {
        assert!((a - b).abs() <= 1e-4 * b, "step {}: {a}, was {b}; meant? HEADROOM_BLESS=1 rewrites {FILE}", step + 1);
    }
}
