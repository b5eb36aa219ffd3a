//! `launch bench-memory`: what each memory feature saves on this machine, by short real runs with it off and on.

use super::helper::Helpers;
use super::{Error, here, io, print, rank_command, shown};
use crate::advise;
use crate::cli::{BenchMemoryArgs, CliError, SampleDataArgs};
use host::machine::dataset_facts;
use serde::Serialize;
use spec::contract::{MemoryRecord, Phase, exit};
use spec::plan::bytes_text;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The config of all runs.
const CONFIG: &str = "default";
/// Records' phase in which data sets are opened.
const OPENING: Phase = Phase::Start;

/// A saving that the guides promise, and how to have it or not.
struct Feature {
    name: &'static str,
    /// The guides' words.
    claim: &'static str,
    ranks: usize,
    /// Phase whose memory is compared; `None` compares all.
    phase: Option<Phase>,
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
        phase: None,
        common: &[],
        off: &["data.cache=pin"],
        on: &["data.cache=off", "data.chunk_cache_size=4194304"],
    },
    Feature {
        name: "sampled normalisation",
        claim: "2 GB → 100 MB",
        ranks: 1,
        phase: Some(OPENING),
        common: &["emg.normalize=true"],
        off: &["emg.max_samples_for_normalize=100000000"],
        on: &["emg.max_samples_for_normalize=5000"],
    },
    Feature {
        name: "online metrics",
        claim: "constant memory, +50 to 100 % speed",
        ranks: 1,
        phase: None,
        common: &[],
        off: &["train.compute_metrics_online=false"],
        on: &["train.compute_metrics_online=true"],
    },
    Feature {
        name: "chunk cache",
        claim: "HDF5 2 to 5 × faster",
        ranks: 1,
        phase: None,
        common: &["data.cache=off", "data.shuffle=false"],
        off: &["data.chunk_cache_size=0"],
        on: &["data.chunk_cache_size=67108864"],
    },
    Feature {
        name: "shared cache",
        claim: "290 → 50 GB",
        ranks: 2,
        phase: None,
        common: &[],
        off: &["data.cache=off", "data.chunk_cache_size=1073741824"],
        on: &["data.cache=auto"],
    },
    Feature {
        name: "accumulation",
        claim: "4 → 1 GB",
        ranks: 1,
        phase: None,
        common: &[],
        off: &["train.batch_size=64", "train.gradient_accumulation_steps=1"],
        on: &["train.batch_size=16", "train.gradient_accumulation_steps=4"],
    },
    Feature {
        name: "mixed precision",
        claim: "-50 % memory, 2 × speed",
        ranks: 1,
        phase: None,
        common: &[],
        off: &["train.amp=off"],
        on: &["train.amp=bf16"],
    },
    Feature {
        name: "persistent workers",
        claim: "epoch start -50 %",
        ranks: 1,
        phase: None,
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
    ranks: usize,
    /// Phase of the records behind `peak_rank_bytes`; `None` means all.
    phase: Option<Phase>,
    off: Measured,
    on: Measured,
}

/// State shared by the runs.
struct Bench<'a> {
    helpers: Helpers,
    folder: &'a Path,
    data: PathBuf,
    steps: u64,
}

/// Measures, and prints each row when it is known.
pub(super) fn bench_memory(args: &BenchMemoryArgs) -> Result<u8, Error> {
    let features = wanted(args.only.as_deref())?;
    let folder = std::env::temp_dir().join(format!("headroom-bench-{}", std::process::id()));
    let helpers = Helpers::take().map_err(io("cannot take signals", exit::INTERNAL))?;
    std::fs::create_dir_all(&folder).map_err(io(format!("cannot make {}", folder.display()), exit::INTERNAL))?;
    let data = args.data.clone().unwrap_or_else(|| folder.join("data"));
    let mut bench = Bench { helpers, folder: &folder, data, steps: args.steps };
    let measured = bench.measure_all(args, &features);
    let _ = std::fs::remove_dir_all(&folder);
    // Errors of a run that was asked to end are not errors of the bench.
    if let Some(code) = bench.helpers.asked_to_end() {
        return Ok(code);
    }
    let rows = measured?;
    if args.json {
        print::out(serde_json::to_string_pretty(&rows).unwrap_or_default())?;
    }
    Ok(exit::OK)
}

/// Features whose name contains `word`.
fn wanted(word: Option<&str>) -> Result<Vec<&'static Feature>, CliError> {
    let fits = |feature: &&Feature| word.is_none_or(|word| feature.name.contains(word));
    let found: Vec<&Feature> = FEATURES.iter().filter(fits).collect();
    if found.is_empty() {
        let names: Vec<&str> = FEATURES.iter().map(|feature| feature.name).collect();
        let word = word.unwrap_or_default();
        return Err(CliError::Usage(format!("--only {word}: no such feature; there are {}", names.join(", "))));
    }
    Ok(found)
}

impl Bench<'_> {
    fn measure_all(&mut self, args: &BenchMemoryArgs, features: &[&Feature]) -> Result<Vec<Row>, Error> {
        if args.data.is_none() {
            self.sample()?;
        }
        let tell = |text: String| if args.json { Ok(()) } else { print::out(text) };
        tell(head(self.steps, dataset_facts(&self.data).bytes, args.data.as_deref()))?;
        let mut rows = Vec::new();
        for feature in features {
            let (off, on) = (self.measure(feature, false)?, self.measure(feature, true)?);
            let Feature { name: feature, claim, ranks, phase, .. } = **feature;
            let row = Row { feature, claim, ranks, phase, off, on };
            tell(line(&row))?;
            rows.push(row);
        }
        Ok(rows)
    }

    fn sample(&mut self) -> Result<(), Error> {
        let words = SampleDataArgs::of("emg", &self.data, 42).words();
        let status = self.helpers.run(rank_command(&words)?.stdin(Stdio::null()).stdout(Stdio::null()));
        match status.map_err(io("cannot start rank", exit::INTERNAL))?.success() {
            true => Ok(()),
            false => Err(Error::Data(format!("no sample data at {}", shown(&self.data)))),
        }
    }

    /// Makes one run with a runs_dir and an index of its own, so that no run profits from another's.
    fn measure(&mut self, feature: &Feature, on: bool) -> Result<Measured, Error> {
        let (exe, _) = here()?;
        let name = format!("{}-{}", feature.name.replace(' ', "-"), if on { "on" } else { "off" });
        let runs = self.folder.join(&name);
        let mut command = Command::new(exe);
        command.args(["--config", CONFIG, "--name", &name, "--ranks", &feature.ranks.to_string()]);
        let (data, runs_dir) =
            (format!("data.dataset_path={}", self.data.display()), format!("log.runs_dir={}", runs.display()));
        let steps = format!("train.max_steps={}", self.steps);
        let usual = [
            &data,
            &runs_dir,
            &steps,
            "data.stride=20",
            "data.max_val_windows=64",
            "log.plots=false",
            "log.save_every=0",
        ];
        let last = if on { feature.on } else { feature.off };
        for set in usual.into_iter().chain(feature.common.iter().copied()).chain(last.iter().copied()) {
            command.args(["--set", set]);
        }
        let said = self.folder.join("said.txt");
        let file = File::create(&said).map_err(io(format!("cannot make {}", said.display()), exit::INTERNAL))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let status = self.helpers.run(&mut command).map_err(io("cannot start launch", exit::INTERNAL))?;
        if !status.success() {
            let said = std::fs::read_to_string(&said).unwrap_or_default();
            return Err(Error::Data(format!("{name}: {status}\n{}", said.trim_end())));
        }
        let run = advise::Run::read(&runs.join(&name), Path::new(""))?;
        let summary = run.summary.unwrap_or_default();
        // The figures are read by now; runs are not kept.
        let _ = std::fs::remove_dir_all(&runs);
        Ok(Measured {
            peak_node_bytes: summary.peak_node_bytes,
            peak_rank_bytes: own_peak(&run.memory, feature.phase),
            samples_per_s: summary.samples_per_s,
        })
    }
}

/// Most memory of a rank besides shared pages; of one phase, by the kernel's peak between the records.
fn own_peak(memory: &[Vec<MemoryRecord>], phase: Option<Phase>) -> u64 {
    let records = memory.iter().flatten();
    let most = match phase {
        None => records.map(|record| record.anon_bytes).max(),
        Some(phase) => {
            let of_phase = records.filter(|record| record.phase == phase);
            of_phase.map(|record| record.anon_bytes.max(record.anon_peak_bytes)).max()
        }
    };
    most.unwrap_or(0)
}

/// Description of the runs and the table's head, 100 columns at most.
fn head(steps: u64, data_bytes: u64, data: Option<&Path>) -> String {
    let data = data.map_or("sample data".into(), |path| shown(path).to_string());
    let size = bytes_text(data_bytes);
    format!(
        "config {CONFIG}, {steps} steps with and without each, once; data: {data}, {size}\n\n{:<25} {:>21}  {:>22}  {:>13}\n\
         {:<25} {:>10} {:>10}  {:>11} {:>10}  {:>6} {:>6}",
        "", "node's peak", "a rank's own peak", "samples/s", "feature", "off", "on", "off", "on", "off", "on"
    )
}

fn line(row: &Row) -> String {
    let ranks = if row.ranks > 1 { format!(", {} ranks", row.ranks) } else { String::new() };
    let while_opening = if row.phase == Some(OPENING) { "; own peak: while data sets are opened" } else { "" };
    format!(
        "{:<25} {:>10} {:>10}  {:>11} {:>10}  {:>6.0} {:>6.0}\n  the guides: {}{while_opening}",
        format!("{}{ranks}", row.feature),
        bytes_text(row.off.peak_node_bytes),
        bytes_text(row.on.peak_node_bytes),
        bytes_text(row.off.peak_rank_bytes),
        bytes_text(row.on.peak_rank_bytes),
        row.off.samples_per_s,
        row.on.samples_per_s,
        row.claim
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_features_keys_are_known_and_differ() {
        for feature in FEATURES {
            let set = |last: &[&str]| {
                let sets: Vec<String> = feature.common.iter().chain(last).map(|set| set.to_string()).collect();
                spec::task::parse_config("task: emg\n", "default.yaml").unwrap().resolve("cpu", &sets).unwrap()
            };
            assert_ne!(set(feature.off), set(feature.on), "{}", feature.name);
        }
    }

    #[test]
    fn the_table_has_a_row_and_a_claim_for_each_feature() {
        let one = Measured { peak_node_bytes: 3 << 30, peak_rank_bytes: 300 << 20, samples_per_s: 701.4 };
        let row = |feature: &Feature| {
            let Feature { name, claim, ranks, phase, .. } = *feature;
            line(&Row { feature: name, claim, ranks, phase, off: one, on: one })
        };
        let rows: Vec<String> = FEATURES.iter().map(row).collect();
        let text = format!("{}\n{}", head(20, 80 << 20, None), rows.join("\n"));
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert!(text.starts_with("config default, 20 steps") && text.contains("sample data, 80.0 MiB\n"), "{text}");
        assert_eq!(text.matches("3.00 GiB   3.00 GiB").count(), FEATURES.len(), "{text}");
        assert_eq!(text.matches("the guides:").count(), FEATURES.len());
        assert!(text.contains("\nshared cache, 2 ranks "), "{text}");
    }

    #[test]
    fn a_features_peak_is_that_of_its_phase() {
        let record = |phase, anon_bytes, anon_peak_bytes| MemoryRecord {
            phase,
            anon_bytes,
            anon_peak_bytes,
            ..Default::default()
        };
        let memory = [vec![record(OPENING, 100, 180)], vec![record(OPENING, 110, 120), record(Phase::Train, 300, 310)]];
        assert_eq!((own_peak(&memory, None), own_peak(&memory, Some(OPENING))), (300, 180));
    }

    #[test]
    fn an_unknown_feature_is_a_usage_error_that_names_those_there_are() {
        assert_eq!(wanted(Some("cache")).unwrap().len(), 2);
        let error = wanted(Some("nosuch")).err().unwrap().to_string();
        assert!(error.starts_with("--only nosuch: no such feature; there are lazy loading, "), "{error}");
    }
}
