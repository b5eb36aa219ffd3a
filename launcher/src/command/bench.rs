//! `launch bench-memory`: what each memory feature saves on this machine, by short real runs with it off and on.

use super::{Error, here, io, rank_command, shown};
use crate::advise;
use crate::cli::{BenchMemoryArgs, SampleDataArgs};
use crate::contract::exit;
use crate::plan::bytes_text;
use serde::Serialize;
use std::path::Path;
use std::process::{Command, Stdio};

/// A saving that the guides promise, and how to have it or not.
struct Feature {
    name: &'static str,
    /// The guides' words.
    claim: &'static str,
    ranks: usize,
    /// Keys of both runs, then of the one without and of the one with it.
    common: &'static [&'static str],
    off: &'static [&'static str],
    on: &'static [&'static str],
}

const FEATURES: &[Feature] = &[
    Feature {
        name: "lazy loading",
        claim: "data set 4 GB → 50 MB",
        ranks: 1,
        common: &[],
        off: &["data.cache=pin"],
        on: &["data.cache=off", "data.chunk_cache_size=4194304"],
    },
    Feature {
        name: "sampled normalisation",
        claim: "2 GB → 100 MB",
        ranks: 1,
        common: &["data.normalize=true"],
        off: &["data.max_samples_for_normalize=100000000"],
        on: &["data.max_samples_for_normalize=5000"],
    },
    Feature {
        name: "online metrics",
        claim: "constant memory, +50 to 100 % speed",
        ranks: 1,
        common: &[],
        off: &["train.compute_metrics_online=false"],
        on: &["train.compute_metrics_online=true"],
    },
    Feature {
        name: "chunk cache",
        claim: "HDF5 2 to 5 × faster",
        ranks: 1,
        common: &["data.cache=off", "data.shuffle=false"],
        off: &["data.chunk_cache_size=0"],
        on: &["data.chunk_cache_size=67108864"],
    },
    Feature {
        name: "shared cache",
        claim: "290 → 50 GB",
        ranks: 2,
        common: &[],
        off: &["data.cache=off", "data.chunk_cache_size=1073741824"],
        on: &["data.cache=auto"],
    },
    Feature {
        name: "accumulation",
        claim: "4 → 1 GB",
        ranks: 1,
        common: &[],
        off: &["train.batch_size=64", "train.gradient_accumulation_steps=1"],
        on: &["train.batch_size=16", "train.gradient_accumulation_steps=4"],
    },
    Feature {
        name: "mixed precision",
        claim: "-50 % memory, 2 × speed",
        ranks: 1,
        common: &[],
        off: &["train.amp=off"],
        on: &["train.amp=bf16"],
    },
    Feature {
        name: "persistent workers",
        claim: "epoch start -50 %",
        ranks: 1,
        common: &["data.max_train_windows=256", "train.num_epochs=1000"],
        off: &["train.persistent_workers=false"],
        on: &["train.persistent_workers=true"],
    },
];

/// One run's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct Measured {
    peak_node_bytes: u64,
    /// Largest memory of a rank besides shared pages.
    peak_rank_bytes: u64,
    samples_per_s: f64,
}

/// A feature's row of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    feature: &'static str,
    claim: &'static str,
    off: Measured,
    on: Measured,
}

/// Measures and prints the table.
pub(super) fn bench_memory(args: &BenchMemoryArgs) -> Result<u8, Error> {
    let folder = std::env::temp_dir().join(format!("headroom-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(io(format!("cannot make {}", folder.display()), exit::INTERNAL))?;
    let rows = measure_all(args, &folder);
    let _ = std::fs::remove_dir_all(&folder);
    let rows = rows?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows).unwrap_or_default());
    } else {
        print!("{}", table(&rows));
    }
    Ok(exit::OK)
}

fn measure_all(args: &BenchMemoryArgs, folder: &Path) -> Result<Vec<Row>, Error> {
    let data = match &args.data {
        Some(data) => data.clone(),
        None => sample(&folder.join("data"))?,
    };
    let wanted = |feature: &&Feature| args.only.as_ref().is_none_or(|word| feature.name.contains(word.as_str()));
    let features: Vec<&Feature> = FEATURES.iter().filter(wanted).collect();
    if features.is_empty() {
        let names: Vec<&str> = FEATURES.iter().map(|feature| feature.name).collect();
        return Err(Error::Data(format!("no such feature; there are {}", names.join(", "))));
    }
    let row = |feature: &&Feature| {
        eprintln!("launch: {}: off, then on", feature.name);
        let run = |on| measure(feature, on, args.steps, &data, folder);
        Ok(Row { feature: feature.name, claim: feature.claim, off: run(false)?, on: run(true)? })
    };
    features.iter().map(row).collect()
}

fn sample(out: &Path) -> Result<std::path::PathBuf, Error> {
    let words = SampleDataArgs::of("emg", out, 42).words();
    let status = rank_command(&words)?.stdout(Stdio::null()).status();
    match status.map_err(io("cannot start rank", exit::INTERNAL))?.success() {
        true => Ok(out.to_path_buf()),
        false => Err(Error::Data(format!("no sample data at {}", shown(out)))),
    }
}

/// A run of the default model. Each has runs_dir and index of its own, so that none profits from another's.
fn measure(feature: &Feature, on: bool, steps: u64, data: &Path, folder: &Path) -> Result<Measured, Error> {
    let (exe, _) = here()?;
    let name = format!("{}-{}", feature.name.replace(' ', "-"), if on { "on" } else { "off" });
    let runs = folder.join(&name);
    let mut command = Command::new(exe);
    command.args(["--config", "default", "--name", &name, "--ranks", &feature.ranks.to_string()]);
    let (data, runs_dir) =
        (format!("data.dataset_path={}", data.display()), format!("log.runs_dir={}", runs.display()));
    let steps = format!("train.max_steps={steps}");
    let usual =
        [&data, &runs_dir, &steps, "data.stride=20", "data.max_val_windows=64", "log.plots=false", "log.save_every=0"];
    let last = if on { feature.on } else { feature.off };
    for set in usual.into_iter().chain(feature.common.iter().copied()).chain(last.iter().copied()) {
        command.args(["--set", set]);
    }
    let ended = command.stdin(Stdio::null()).output().map_err(io("cannot start launch", exit::INTERNAL))?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        return Err(Error::Data(format!("{name}: {}\n{}", ended.status, said.trim_end())));
    }
    let run = advise::Run::read(&runs.join(&name), Path::new(""))?;
    let summary = run.summary.unwrap_or_default();
    let own = run.memory.iter().flatten().map(|record| record.anon_bytes).max();
    Ok(Measured {
        peak_node_bytes: summary.peak_node_bytes,
        peak_rank_bytes: own.unwrap_or(0),
        samples_per_s: summary.samples_per_s,
    })
}

/// The table, 100 columns at most.
fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<22} {:>23}  {:>23}  {:>13}\n{:<22} {:>11} {:>11}  {:>11} {:>11}  {:>6} {:>6}\n",
        "", "node's peak", "a rank's own peak", "samples/s", "feature", "off", "on", "off", "on", "off", "on"
    );
    for row in rows {
        let size = |bytes: u64| bytes_text(bytes);
        text += &format!(
            "{:<22} {:>11} {:>11}  {:>11} {:>11}  {:>6.0} {:>6.0}\n  the guides: {}\n",
            row.feature,
            size(row.off.peak_node_bytes),
            size(row.on.peak_node_bytes),
            size(row.off.peak_rank_bytes),
            size(row.on.peak_rank_bytes),
            row.off.samples_per_s,
            row.on.samples_per_s,
            row.claim
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    #[test]
    fn item_71_every_features_keys_are_known_and_differ() {
        for feature in FEATURES {
            let set = |last: &[&str]| {
                let sets: Vec<String> = feature.common.iter().chain(last).map(|set| set.to_string()).collect();
                RawConfig::parse("task: emg\n", "default.yaml").unwrap().resolve("cpu", &sets).unwrap()
            };
            assert_ne!(set(feature.off), set(feature.on), "{}", feature.name);
        }
    }

    #[test]
    fn the_table_has_a_row_and_a_claim_for_each_feature() {
        let one = Measured { peak_node_bytes: 3 << 30, peak_rank_bytes: 300 << 20, samples_per_s: 701.4 };
        let row = |feature: &Feature| Row { feature: feature.name, claim: feature.claim, off: one, on: one };
        let rows: Vec<Row> = FEATURES.iter().map(row).collect();
        let text = table(&rows);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert_eq!(text.matches("3.00 GiB    3.00 GiB").count(), FEATURES.len(), "{text}");
        assert_eq!(text.matches("the guides:").count(), FEATURES.len());
    }
}
