//! EMG windows through the real data set, loader and page cache, without a model: one line of JSON.
//!
//! `loader --data DIR [--ranks 1] [--threads 2] [--batch 64] [--slots 6] [--window 500] [--stride 50] [--epochs 2]
//! [--samples N: at most so many of an epoch per rank] [--cache-share 1.0: of the decoded training data, 0: no page cache]
//! [--policy auto|pin|lru|next_use] [--entries auto|chunk|sample] [--shuffle global|block] [--shuffle-window 64]
//! [--chunk-cache-mb 64] [--memcpy 1] [--hits 1]`
//!
//! Ranks are threads here, each with its own client of a page cache that this process hosts; they step together, as
//! ranks that add up gradients do. `--per-chunk N`: windows of an N-th of a chunk, and the clairvoyant optimum of this
//! very order beside the chunks that were decoded.

#[allow(dead_code)]
mod simulate;

use cache::client::{CacheClient, ClientSpec};
use cache::{CacheHost, HostPlan, PolicyKind};
use headroom::data::loader::{BatchPlanner, Loader, LoaderSpec, Order, train_order};
use headroom::data::source::hdf5::Reader;
use headroom::data::{BatchAhead, DataError, Dataset, FieldSpec, ReadRequest, Scratch};
use headroom::task::Team;
use headroom::task::emg::data::{EmgData, WindowKeys, open_datasets};
use serde_json::{Value, json};
use simulate::{Grain, Trace, Walk};
use spec::config::{CacheEntries, CachePolicy, DataConfig, ShuffleMode};
use spec::contract::cache::CacheStats;
use spec::task::emg::EmgConfig;
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const SEED: u64 = 42;
/// Larger than any processor's cache.
const MEMCPY_SOURCE_BYTES: usize = 256 << 20;

struct Options {
    data: String,
    ranks: usize,
    batch: usize,
    epochs: u64,
    samples: u64,
    cache_share: f64,
    policy: PolicyKind,
    per_chunk: usize,
    memcpy: bool,
    hits: bool,
    loader: LoaderSpec,
    config: WindowKeys,
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
    let data = value("--data", "");
    if data.is_empty() {
        return Err("--data FOLDER is missing".into());
    }
    let name = value("--policy", "auto");
    let policy = if name == "auto" { Some(PolicyKind::NextUse) } else { PolicyKind::named(&name) };
    let cache_share: f64 = value("--cache-share", "1.0").parse()?;
    let cache = match policy.ok_or("--policy takes auto, pin, lru or next_use")? {
        _ if cache_share <= 0.0 => CachePolicy::Off,
        PolicyKind::Pin => CachePolicy::Pin,
        PolicyKind::Lru => CachePolicy::Lru,
        PolicyKind::NextUse => CachePolicy::NextUse,
    };
    let (batch, threads) = (number("--batch", "64")?, number("--threads", "2")?);
    let emg = EmgConfig { window_size: number("--window", "500")?, skip_ik_failures: false, ..EmgConfig::default() };
    let order = DataConfig {
        dataset_path: data.clone().into(),
        stride: number("--stride", "50")?,
        // As many files for training as there can be.
        split_ratio: [0.98, 0.01, 0.01],
        shuffle_mode: if value("--shuffle", "global") == "block" { ShuffleMode::Block } else { ShuffleMode::Global },
        shuffle_window: number("--shuffle-window", "64")?,
        chunk_cache_size: (number("--chunk-cache-mb", "64")? as u64) << 20,
        cache,
        cache_entries: match value("--entries", "auto").as_str() {
            "chunk" => CacheEntries::Chunk,
            "sample" => CacheEntries::Sample,
            _ => CacheEntries::Auto,
        },
        ..DataConfig::default()
    };
    Ok(Options {
        data,
        ranks: number("--ranks", "1")?.max(1),
        batch,
        epochs: number("--epochs", "2")? as u64,
        samples: number("--samples", "0")? as u64,
        cache_share,
        policy: policy.unwrap_or(PolicyKind::NextUse),
        per_chunk: number("--per-chunk", "0")?,
        memcpy: number("--memcpy", "0")? > 0,
        hits: number("--hits", "0")? > 0,
        loader: LoaderSpec { threads, slots: number("--slots", "6")?, micro_batch: batch, ..LoaderSpec::default() },
        config: WindowKeys { data: order, emg },
    })
}

fn alone(bytes: &[u8]) -> std::result::Result<Vec<Vec<u8>>, DataError> {
    Ok(vec![bytes.to_vec()])
}

fn open(config: &WindowKeys, index: &Path, cache: Option<Arc<CacheClient>>) -> Result<EmgData> {
    Ok(open_datasets(
        config,
        SEED,
        &Team { rank: 0, world_size: 1, gather: &alone, cache, kept: None, stages: Default::default() },
        index,
    )?)
}

/// Training files, and the entries they have and bytes of them.
fn extent(reader: &Reader, train: &dyn Dataset) -> (Vec<String>, u64, u64) {
    let (mut files, mut entries, mut bytes) = (Vec::new(), 0, 0);
    let named = |n: usize| train.describe(n).split(" rows").next().unwrap_or_default().to_owned();
    let mut first = 0;
    let pages = train.pages().unwrap_or_default();
    let used: Vec<String> = pages.sequences.iter().map(|start| named(*start as usize)).collect();
    for (n, table) in reader.tables().iter().enumerate() {
        let name = table.path.file_name().unwrap_or_default().to_string_lossy();
        if used.get(first).is_some_and(|used| *used == name) {
            first += 1;
            files.push(table.path.to_string_lossy().into_owned());
            entries += reader.entries(n);
            bytes += (0..reader.entries(n)).map(|entry| reader.entry_bytes(n, entry) as u64).sum::<u64>();
        }
    }
    (files, entries, bytes)
}

/// One rank's measurements of an epoch.
struct Epoch {
    samples: u64,
    seconds: f64,
    wait_s: f64,
    decoded: u64,
    read_bytes: u64,
}

struct Rank {
    data: EmgData,
    order: Order,
    loader: Loader,
}

impl Rank {
    fn epoch(&mut self, options: &Options, epoch: u64, rank: usize, together: &Barrier) -> Result<Epoch> {
        let planner = BatchPlanner {
            order: self.order.clone(),
            global_batch: (options.batch * options.ranks) as u64,
            micro_batch: options.batch as u64,
            rank: rank as u64,
            world_size: options.ranks as u64,
            drop_last: true,
            cut: Default::default(),
        };
        let steps = match options.samples {
            0 => planner.steps_per_epoch(),
            most => planner.steps_per_epoch().min(most.div_ceil(options.batch as u64)),
        };
        let before = self.data.reader.stats();
        let (started, mut samples, mut wait_s) = (Instant::now(), 0, 0.0);
        let mut stream = self.loader.run(planner.requests(epoch, 0).take(steps as usize))?;
        while let Some(batch) = stream.next() {
            let batch = batch?;
            samples += batch.len() as u64;
            std::hint::black_box(batch.field(0).first());
            drop(batch);
            wait_s += stream.last_wait_s();
            if options.ranks > 1 {
                together.wait();
            }
        }
        drop(stream);
        let after = self.data.reader.stats();
        Ok(Epoch {
            samples,
            seconds: started.elapsed().as_secs_f64(),
            wait_s,
            decoded: after.decoded_chunks - before.decoded_chunks,
            read_bytes: after.bytes - before.bytes,
        })
    }
}

/// Bytes per second that `threads` loops of memcpy move, a sample at a time from random places into batch slots.
fn memcpy(threads: usize, batch: usize, sample_bytes: usize) -> f64 {
    let source = vec![1u8; MEMCPY_SOURCE_BYTES];
    let started = Instant::now();
    let copies = (2usize << 30) / sample_bytes;
    std::thread::scope(|scope| {
        for thread in 0..threads.max(1) {
            let source = &source;
            scope.spawn(move || {
                let mut slot = vec![0u8; 4 * batch * sample_bytes];
                let mut state = thread as u64;
                for (copy, place) in (0..copies).zip((0..4 * batch).cycle()) {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let from = ((state >> 33) as usize + copy) % (source.len() - sample_bytes);
                    slot[place * sample_bytes..][..sample_bytes].copy_from_slice(&source[from..from + sample_bytes]);
                }
                std::hint::black_box(&slot);
            });
        }
    });
    (copies * sample_bytes * threads.max(1)) as f64 / started.elapsed().as_secs_f64()
}

/// Microseconds per sample of a data set whose entries are all cached: announce as far ahead as the loader does, read, retire, with the
/// directory's round trips, on one thread. With windows of few rows it is the cost of a lookup that hits.
fn hit_us(options: &Options, rank: &Rank) -> Result<f64> {
    let train = &rank.data.datasets.train;
    let mut slots: Vec<Vec<u8>> = train.fields().iter().map(|field| vec![0; field.sample_bytes()]).collect();
    let mut scratch = Scratch::default();
    // The last epoch, whose every entry is known.
    let epoch = options.epochs - 1;
    let order = rank.order.epoch(epoch);
    let ids: Vec<u64> = (0..train.len() as u64).filter_map(|position| order.at(position)).collect();
    let batches: Vec<BatchAhead> = ids.chunks(options.batch).map(|ids| BatchAhead { epoch, ids }).collect();
    let ahead = (2 * options.loader.slots).min(batches.len());
    batches[..ahead].iter().for_each(|batch| train.announce(*batch));
    let started = Instant::now();
    for (n, batch) in batches.iter().enumerate() {
        batches.get(n + ahead).into_iter().for_each(|next| train.announce(*next));
        for id in batch.ids {
            let mut out: Vec<&mut [u8]> = slots.iter_mut().map(Vec::as_mut_slice).collect();
            train.read(ReadRequest { epoch, index: *id as usize }, &mut out, &mut scratch)?;
        }
        train.retire(*batch);
    }
    Ok(1e6 * started.elapsed().as_secs_f64() / ids.len() as f64)
}

/// The least chunks per chunk and epoch that any policy could read, walking this order one sample at a time.
fn optimum(options: &Options, order: &Order, chunks: u64, capacity: u64) -> Option<f64> {
    let per_chunk = options.per_chunk;
    let whole = per_chunk > 0 && order.len == chunks * per_chunk as u64;
    let samples = (0..options.epochs).flat_map(|epoch| {
        let order = order.epoch(epoch);
        (0..chunks * per_chunk as u64).filter_map(move |position| order.at(position)).map(|sample| sample as u32)
    });
    whole.then(|| Trace::of(samples.collect(), chunks as usize, per_chunk).optimum(capacity as usize))
}

/// An epoch of all ranks.
fn together(options: &Options, epoch: u64, ranks: &mut [Rank]) -> Result<Vec<Epoch>> {
    let barrier = Barrier::new(ranks.len());
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (rank, own) in ranks.iter_mut().enumerate() {
            let barrier = &barrier;
            threads.push(scope.spawn(move || {
                own.epoch(options, epoch, rank, barrier).unwrap_or_else(|error| {
                    // Returning would leave the others at the barrier.
                    eprintln!("rank {rank}: {error}");
                    std::process::exit(1)
                })
            }));
        }
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a rank panicked".into())).collect()
    })
}

fn total(stats: &CacheStats, before: &CacheStats) -> Value {
    json!({
        "hits": stats.hits - before.hits,
        "misses": stats.misses - before.misses,
        "bypasses": stats.bypasses - before.bypasses,
        "used_bytes": stats.used_bytes,
    })
}

/// Reads per chunk and epoch of a trace of 16 samples per chunk with a quarter cached, through the directory alone.
fn simulated() -> Value {
    let trace = Trace::shuffled(4000, 16, 4, SEED);
    let walk = Walk { world_size: 3, batch: 4, ahead: 2 };
    let reads = |policy, grain| trace.walk(policy, 1000, grain, walk).per_chunk_and_epoch;
    json!({ "simulated": {
        "lru": reads(PolicyKind::Lru, Grain::Chunk),
        "next_use by chunk": reads(PolicyKind::NextUse, Grain::Chunk),
        "clairvoyant optimum by chunk": trace.optimum(1000),
        "next_use by sample": reads(PolicyKind::NextUse, Grain::Sample),
    }})
}

fn main() -> Result<()> {
    if std::env::args().any(|arg| arg == "--simulate") {
        println!("{}", simulated());
        return Ok(());
    }
    let options = options()?;
    let index = Path::new(&options.data).with_extension("index");
    std::fs::create_dir_all(&index)?;
    // Opened once without a cache: how much there is to keep; and the scan is in the index for the ranks.
    let plain = open(&options.config, &index, None)?;
    let (files, entries, bytes) = extent(&plain.reader, &*plain.datasets.train);
    let sample_bytes: usize = plain.datasets.train.fields().iter().map(FieldSpec::sample_bytes).sum();
    let memcpy = options.memcpy.then(|| memcpy(options.loader.threads, options.batch, sample_bytes));
    let capacity_entries = (options.cache_share * entries as f64).round() as u64;
    let capacity_bytes = capacity_entries * bytes.div_ceil(entries.max(1)).next_multiple_of(64);
    let ids: Vec<u32> = (0..options.ranks as u32).collect();
    let plan = HostPlan { capacity_bytes, policy: options.policy, ranks: ids };
    let mut host = (capacity_bytes > 0).then(|| CacheHost::start(&plan, || None)).transpose()?;
    while host.as_ref().is_some_and(|host| host.present_bytes() < capacity_bytes) {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let mut ranks = Vec::new();
    for rank in 0..options.ranks {
        let client = match &mut host {
            Some(host) => {
                let socket = host.take_socket(rank as u32).ok_or("no socket")?;
                let ahead_bytes = capacity_bytes / (2 * options.ranks as u64);
                let spec = ClientSpec { rank: rank as u32, ahead_bytes, verify: false };
                Some(CacheClient::connect(socket.into(), &File::from(host.memfd.try_clone()?), spec)?)
            }
            None => None,
        };
        let data = open(&options.config, &index, client)?;
        let order = train_order(&*data.datasets.train, &options.config.data, SEED)?;
        let loader = Loader::new(Arc::clone(&data.datasets.train), options.loader.clone())?;
        ranks.push(Rank { data, order, loader });
    }
    let least = optimum(&options, &ranks[0].order, entries, capacity_entries);
    let (mut epochs, mut before) = (Vec::new(), CacheStats::default());
    for epoch in 0..options.epochs {
        let parts = together(&options, epoch, &mut ranks)?;
        let samples: u64 = parts.iter().map(|part| part.samples).sum();
        let seconds = parts.iter().map(|part| part.seconds).fold(0.0, f64::max);
        // The last releases are still on their way.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let stats = host.as_ref().map(CacheHost::stats);
        epochs.push(json!({
            "samples": samples,
            "seconds": seconds,
            "samples_per_s": samples as f64 / seconds,
            "bytes_per_s": samples as f64 * sample_bytes as f64 / seconds,
            "wait_s": parts.iter().map(|part| part.wait_s).sum::<f64>(),
            "decoded_chunks": parts.iter().map(|part| part.decoded).sum::<u64>(),
            "read_bytes": parts.iter().map(|part| part.read_bytes).sum::<u64>(),
            "cache": stats.map(|stats| total(&stats, &before)),
        }));
        before = stats.unwrap_or_default();
    }
    let hit_us = (options.hits && options.epochs > 0).then(|| hit_us(&options, &ranks[0])).transpose()?;
    let line = json!({
        "files": files, "windows": plain.datasets.train.len(), "entries": entries, "entry_bytes": bytes,
        "capacity_bytes": capacity_bytes, "memcpy_bytes_per_s": memcpy, "optimum": least, "hit_us": hit_us,
        "epochs": epochs,
    });
    println!("{line}");
    Ok(())
}
