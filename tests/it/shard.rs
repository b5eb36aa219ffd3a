//! `ddp.shard_optimizer`: ranks divide the optimizer's state among themselves, and nothing else changes.

use crate::support::{Runs, run};
use serde_json::Value;

const DIVIDED: &str = "ddp.shard_optimizer=true";

fn state_bytes(run: &crate::support::Run) -> (u64, u64) {
    let plan: Value = serde_json::from_slice(&std::fs::read(run.path.join("plan.json")).unwrap()).unwrap();
    let lines = plan["budget"]["lines"].as_array().unwrap();
    let line = lines.iter().find(|line| line["name"] == "model state").unwrap();
    let held = crate::support::read_lines(&run.path.join("memory.rank0.jsonl"));
    let most = held.iter().filter_map(|record| record["held"]["model_bytes"].as_u64()).max().unwrap();
    (line["per_rank_bytes"].as_u64().unwrap(), most)
}

#[test]
fn a_divided_optimizer_gives_the_same_bits_in_less_memory_and_its_checkpoints_are_read_either_way() {
    for (ranks, optimizer) in [("1", "adamw"), ("2", "adamw"), ("3", "adamw"), ("2", "sgd")] {
        let optimizer = format!("train.optimizer={optimizer}");
        let runs =
            Runs::new(&[&optimizer, "train.gradient_clip_norm=0.5", "log.save_every_steps=10", "log.keep_last=5"]);
        let whole = runs.finish("whole", &["--ranks", ranks]);
        let divided = runs.finish("divided", &["--ranks", ranks, "--set", DIVIDED]);
        for file in ["model.safetensors", "optimizer.safetensors"] {
            for step in [10, 20] {
                assert_eq!(
                    divided.tensors(step, file),
                    whole.tensors(step, file),
                    "{file} of {ranks} ranks, {optimizer}"
                );
            }
        }
        if optimizer.ends_with("sgd") {
            continue;
        }
        // To step 10 one way, to step 20 the other.
        for (name, first, then) in [("there", DIVIDED, "ddp.shard_optimizer=false"), ("back", "seed=7", DIVIDED)] {
            runs.finish(name, &["--ranks", ranks, "--set", first, "--set", "train.max_steps=10"]);
            let resumed = runs.finish(name, &["--ranks", ranks, "--set", then, "--resume", "auto"]);
            for file in ["model.safetensors", "optimizer.safetensors"] {
                assert_eq!(resumed.tensors(20, file), whole.tensors(20, file), "{name}: {file} of {ranks} ranks");
            }
        }
        let ((planned, held), (all_planned, all_held)) = (state_bytes(&divided), state_bytes(&whole));
        let world: u64 = ranks.parse().unwrap();
        // Weights and gradients stay, the two moments are divided; slices begin on cache lines.
        assert_eq!(planned, all_planned / 2 + (all_planned / 2).div_ceil(world), "{ranks} ranks");
        let right = all_held / 2 + (all_held / 2).div_ceil(world);
        assert!(held.abs_diff(right) <= right / 20, "{ranks} ranks: {held} of {all_held}");
        let mut analyze = std::process::Command::new(crate::support::launch_program());
        let told = run(analyze.arg("analyze").arg(&divided.path), runs.path());
        assert!(told.code == Some(0) && told.out.contains("model state"), "{told}");
    }
}
