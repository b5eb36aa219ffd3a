//! Cells of an `.h5ad` through the real data set, loader and page cache, densified and log1p'd, without a model: one line of JSON.
//!
//! `cells --data FILE [--threads 1] [--batch 128] [--slots 6] [--epochs 2] [--samples N: at most so many of an epoch]
//! [--cache-share 1.0: of all entries, 0: no page cache] [--policy pin|lru|next_use] [--shuffle global|block] [--shuffle-window 64]
//! [--copy auto|always|off] [--chunk-cache-mb 64] [--label celltype] [--matrix X] [--dense 1]`
//!
//! `cpu_s` is that of the whole process, the directory's thread included. Entropies are in bits: of the labels and of the files
//! of a batch, on average, beside those of batches drawn at random.

use cache::client::{CacheClient, ClientSpec};
use cache::{CacheHost, HostPlan, PolicyKind};
use headroom::data::Dataset;
use headroom::data::loader::{BatchPlanner, Loader, LoaderSpec, mix, train_order};
use headroom::task::Team;
use headroom::task::cell::data::{CellData, open_cells};
use headroom::task::cell::densify::{Scale, dense, labels};
use headroom::train::to_tensors;
use serde_json::json;
use spec::config::{CachePolicy, Config, ShuffleMode};
use spec::task::cell::{CellConfig, CopyPolicy};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

struct Options {
    config: Config,
    loader: LoaderSpec,
    epochs: u64,
    samples: u64,
    cache_share: f64,
    policy: PolicyKind,
    dense: bool,
}

fn options() -> Result<Options> {
    let args: Vec<String> = std::env::args().collect();
    let value = |name: &str, default: &str| -> String {
        let at = args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
        at.cloned().unwrap_or_else(|| default.to_owned())
    };
    let number = |name: &str, default: &str| -> Result<usize> {
        value(name, default).parse().map_err(|_| format!("{name} takes a number").into())
    };
    let mut config = spec::task::config("cell");
    config.data.dataset_path = value("--data", "").into();
    if config.data.dataset_path.as_os_str().is_empty() {
        return Err("--data FILE is missing".into());
    }
    config.data.split_ratio = [0.98, 0.01, 0.01];
    config.data.shuffle_mode =
        if value("--shuffle", "global") == "block" { ShuffleMode::Block } else { ShuffleMode::Global };
    config.data.shuffle_window = number("--shuffle-window", "64")?;
    config.data.chunk_cache_size = (number("--chunk-cache-mb", "64")? as u64) << 20;
    let cache_share: f64 = value("--cache-share", "1.0").parse()?;
    let policy = PolicyKind::named(&value("--policy", "pin")).ok_or("--policy takes pin, lru or next_use")?;
    config.data.cache = match policy {
        _ if cache_share <= 0.0 => CachePolicy::Off,
        PolicyKind::Pin => CachePolicy::Pin,
        PolicyKind::Lru => CachePolicy::Lru,
        PolicyKind::NextUse => CachePolicy::NextUse,
    };
    let label = value("--label", "celltype");
    let copy = match value("--copy", "auto").as_str() {
        "auto" => CopyPolicy::Auto,
        "always" => CopyPolicy::Always,
        "off" => CopyPolicy::Off,
        _ => return Err("--copy takes auto, always or off".into()),
    };
    config.with_section(|cell: &mut CellConfig| {
        cell.label = (!label.is_empty()).then_some(label);
        cell.matrix = value("--matrix", "X");
        cell.copy = copy;
    });
    let (batch, threads) = (number("--batch", "128")?, number("--threads", "1")?);
    Ok(Options {
        config,
        loader: LoaderSpec { threads, slots: number("--slots", "6")?, micro_batch: batch, ..LoaderSpec::default() },
        epochs: number("--epochs", "2")? as u64,
        samples: number("--samples", "0")? as u64,
        cache_share,
        policy,
        dense: number("--dense", "1")? > 0,
    })
}

/// CPU seconds of this process so far.
fn cpu_s() -> f64 {
    let now = procfs::process::Process::myself().and_then(|process| process.stat());
    now.map_or(0.0, |stat| (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
}

/// Bits of the shares of `counts`.
fn entropy(counts: &BTreeMap<u64, u64>) -> f64 {
    let all: u64 = counts.values().sum();
    counts.values().map(|count| *count as f64 / all as f64).map(|share| -share * share.log2()).sum()
}

fn counted(items: impl Iterator<Item = u64>) -> BTreeMap<u64, u64> {
    let mut counts = BTreeMap::new();
    items.for_each(|item| *counts.entry(item).or_default() += 1);
    counts
}

/// Mean entropy of batches, by the key of each sample.
fn mixed(batches: &[Vec<u64>], key: impl Fn(u64) -> u64) -> f64 {
    batches.iter().map(|batch| entropy(&counted(batch.iter().map(|id| key(*id))))).sum::<f64>()
        / batches.len().max(1) as f64
}

fn main() -> Result<()> {
    let options = options()?;
    let Options { config, loader: spec, cache_share, .. } = &options;
    tch::set_num_threads(1);
    let index = config.data.dataset_path.with_extension("index");
    std::fs::create_dir_all(&index)?;
    let begun = Instant::now();
    let plain = open_cells(config, &Team::alone(), &index)?;
    let open_s = begun.elapsed().as_secs_f64();
    let entry_bytes: u64 =
        plain.store.files.iter().flat_map(|file| &file.bytes).map(|bytes| u64::from(*bytes).next_multiple_of(64)).sum();
    let capacity_bytes = (cache_share * entry_bytes as f64) as u64;
    let plan = HostPlan { capacity_bytes, policy: options.policy, ranks: vec![0] };
    let mut host = (capacity_bytes > 0).then(|| CacheHost::start(&plan, || None)).transpose()?;
    while host.as_ref().is_some_and(|host| host.present_bytes() < capacity_bytes) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let client = match &mut host {
        Some(host) => {
            let socket = host.take_socket(0).ok_or("no socket")?;
            let spec = ClientSpec { rank: 0, ahead_bytes: capacity_bytes / 2, verify: false };
            Some(CacheClient::connect(socket.into(), &File::from(host.memfd.try_clone()?), spec)?)
        }
        None => None,
    };
    let totals = plain.totals;
    let data = if client.is_some() {
        drop(plain);
        open_cells(config, &Team { cache: client, ..Team::alone() }, &index)?
    } else {
        plain
    };
    let order = train_order(&*data.splits[0], &config.data, config.seed)?;
    let mut loader = Loader::new(Arc::clone(&data.datasets.train), spec.clone())?;
    let mut epochs = Vec::new();
    let mut seen: Vec<Vec<u64>> = Vec::new();
    for epoch in 0..options.epochs {
        let planner = BatchPlanner {
            order: order.clone(),
            global_batch: spec.micro_batch as u64,
            micro_batch: spec.micro_batch as u64,
            rank: 0,
            world_size: 1,
            drop_last: true,
            cut: Default::default(),
        };
        let steps = match options.samples {
            0 => planner.steps_per_epoch(),
            most => planner.steps_per_epoch().min(most.div_ceil(spec.micro_batch as u64)),
        };
        let (before, cpu, started) = (data.store.reader.reader().stats(), cpu_s(), Instant::now());
        let (samples, sum) =
            read(&options, &data, loader.run(planner.requests(epoch, 0).take(steps as usize))?, &mut seen)?;
        let (seconds, cpu, after) =
            (started.elapsed().as_secs_f64(), cpu_s() - cpu, data.store.reader.reader().stats());
        epochs.push(json!({
            "samples": samples, "seconds": seconds, "samples_per_s": samples as f64 / seconds, "cpu_s": cpu,
            "samples_per_cpu_s": samples as f64 / cpu, "read_bytes": after.0 - before.0, "decoded_chunks": after.1 - before.1, "sum": sum,
        }));
    }
    let line = json!({
        "cells": data.facts.cells, "genes": data.facts.genes.len(), "values": totals.values, "most": data.facts.most,
        "entry_bytes": entry_bytes, "bytes_per_cell": entry_bytes as f64 / data.facts.cells as f64,
        "bytes_per_value": entry_bytes as f64 / totals.values as f64, "capacity_bytes": capacity_bytes, "open_s": open_s,
        "entropy": entropies(&data, &seen, spec.micro_batch), "epochs": epochs,
    });
    println!("{line}");
    Ok(())
}

/// Reads an epoch; the number of samples, and the sum of all expression.
fn read(
    options: &Options,
    data: &CellData,
    stream: headroom::data::loader::BatchStream,
    seen: &mut Vec<Vec<u64>>,
) -> Result<(u64, f64)> {
    let scale = Scale { target_sum: 1e4, log1p: true };
    let genes = data.facts.genes.len() as i64;
    let (mut samples, mut sum) = (0, 0.0);
    for (n, batch) in stream.enumerate() {
        let batch = batch?;
        samples += batch.len() as u64;
        if options.dense {
            let tensors = to_tensors(&batch, tch::Device::Cpu);
            let x = dense(&tensors, genes, &scale);
            let _ = std::hint::black_box((&x, labels(&tensors)));
            if n == 0 {
                sum = x.sum(tch::Kind::Double).double_value(&[]);
            }
        }
        if seen.len() < 200 {
            seen.push(batch.sample_ids().to_vec());
        }
    }
    Ok((samples, sum))
}

/// Of batches as they came, and of as many random ones.
fn entropies(data: &CellData, seen: &[Vec<u64>], batch: usize) -> serde_json::Value {
    let train = &data.splits[0];
    let len = train.len() as u64;
    let random: Vec<Vec<u64>> =
        (0..200u64).map(|n| (0..batch as u64).map(|k| mix(mix(n) ^ k) % len.max(1)).collect()).collect();
    let row = |id: u64| train.row(id).unwrap_or(0);
    let label = |id: u64| data.store.labels.get(row(id) as usize).map_or(0, |label| u64::from(*label));
    let file = |id: u64| data.store.place(row(id)).map_or(0, |place| place.file as u64);
    let page = |id: u64| data.store.place(row(id)).map_or(0, |place| place.key);
    json!({
        "labels": mixed(seen, label), "labels_random": mixed(&random, label),
        "files": mixed(seen, file), "files_random": mixed(&random, file),
        "entries": mixed(seen, page), "entries_random": mixed(&random, page),
    })
}
