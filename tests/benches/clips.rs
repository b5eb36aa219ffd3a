//! Clips through the real data set, loader and page cache, without a model: one line of JSON.
//!
//! `clips --data DIR [--ranks 3] [--threads 4] [--slots 6] [--crop 256] [--clip 5] [--epochs 4] [--voxels 0|1: widen and
//! voxelise every batch, as a model would ask] [--cache-share 1.0: of the entries of training, 0: no page cache]
//! [--policy pin|lru|next_use]`
//! `clips --make DIR [--sequences 3] [--frames 16] [--height 720] [--width 1280]` writes sample sequences.
//! `clips --simulate FRAMES --frame-bytes N --capacity-bytes N --policy pin` walks whole epochs of that many frames
//! through the real directory, without bytes.
//!
//! Ranks are threads here, each with its own client of a page cache that this process hosts; they step together.

use cache::client::{CacheClient, ClientSpec};
use cache::{CacheHost, Directory, HostPlan, PolicyKind};
use headroom::data::loader::{BatchPlanner, HostBatch, Loader, LoaderSpec, Order, Shuffle, train_order};
use headroom::data::source::video::image::ImageSize;
use headroom::data::source::video::{SpikeInput, VideoSpec};
use headroom::data::{DataError, FieldSpec};
use headroom::task::Team;
use headroom::task::deblur::data::voxel::{VoxelSpec, Voxeliser, frames};
use headroom::task::deblur::data::{ClipData, ClipSpec, open_clips};
use headroom::task::deblur::sample::{SampleSpec, write_sample_data};
use serde_json::{Value, json};
use spec::config::{CachePolicy, DataConfig};
use spec::contract::cache::{CacheStats, FromDirectory, Grant, Item, ToDirectory};
use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::time::Instant;
use tch::Tensor;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const SEED: u64 = 42;
/// Noise of a camera, levels of 255, so that files are as large as a camera's.
const NOISE: f64 = 1.5;
/// Frames of each sequence where a data set is simulated, as GoPro's have on average.
const SIMULATED_SEQUENCE: u64 = 101;

/// The value of an option, or its default.
fn option<T: std::str::FromStr>(name: &str, default: T) -> Result<T> {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)) {
        Some(value) => value.parse().map_err(|_| format!("{name} {value}: not understood").into()),
        None => Ok(default),
    }
}

fn policy() -> Result<PolicyKind> {
    let name = option("--policy", "pin".to_string())?;
    Ok(PolicyKind::named(&name).ok_or("--policy takes pin, lru or next_use")?)
}

fn alone(bytes: &[u8]) -> std::result::Result<Vec<Vec<u8>>, DataError> {
    Ok(vec![bytes.to_vec()])
}

struct Options {
    ranks: usize,
    epochs: u64,
    voxels: bool,
    share: f64,
    policy: PolicyKind,
    loader: LoaderSpec,
    spec: ClipSpec,
    order: DataConfig,
}

fn options() -> Result<Options> {
    let (threads, slots) = (option("--threads", 4)?, option("--slots", 6)?);
    let (height, width) = (option("--spike-h", 360)?, option("--spike-w", 640)?);
    let data: String = option("--data", String::new())?;
    let video = VideoSpec::new(Path::new(&data), SpikeInput::Dat { encoding: None, height, width });
    let spec = ClipSpec { clip_len: option("--clip", 5)?, ..ClipSpec::new(video, Some(option("--crop", 256)?)) };
    let policy = policy()?;
    let cache = if policy == PolicyKind::NextUse { CachePolicy::NextUse } else { CachePolicy::Pin };
    Ok(Options {
        ranks: option("--ranks", 3)?,
        epochs: option("--epochs", 4)?,
        voxels: option("--voxels", 0)? > 0,
        share: option("--cache-share", 1.0)?,
        policy,
        loader: LoaderSpec { threads, slots, micro_batch: 1, ..LoaderSpec::default() },
        spec,
        order: DataConfig { cache, ..DataConfig::default() },
    })
}

struct Rank {
    data: ClipData,
    order: Order,
    loader: Loader,
    voxeliser: Voxeliser,
    fields: Vec<FieldSpec>,
}

impl Rank {
    fn open(options: &Options, cache: Option<Arc<CacheClient>>) -> Result<Self> {
        let team = Team { rank: 0, world_size: 1, gather: &alone, cache, kept: None, stages: Default::default() };
        let data = open_clips(&options.spec, SEED, &team, Some(&options.order))?;
        let order = train_order(&*data.datasets.train, &options.order, SEED)?;
        let loader = Loader::new(Arc::clone(&data.datasets.train), options.loader.clone())?;
        let spikes = data.frames.spikes().ok_or("no spikes")?.size();
        let spec = VoxelSpec { bins: 32, log1p: true, norm: None };
        let voxeliser = Voxeliser::new(spec, spikes.width, data.frames.image().width);
        let fields = data.datasets.train.fields().to_vec();
        Ok(Self { data, order, loader, voxeliser, fields })
    }

    /// Clips of this rank's part of an epoch, and the seconds they took.
    fn epoch(&mut self, options: &Options, epoch: u64, rank: usize, together: &Barrier) -> Result<(u64, f64)> {
        let planner = BatchPlanner {
            order: self.order.clone(),
            global_batch: options.ranks as u64,
            micro_batch: 1,
            rank: rank as u64,
            world_size: options.ranks as u64,
            drop_last: true,
            cut: Default::default(),
        };
        let (voxeliser, fields) = (self.voxeliser, &self.fields);
        let (started, mut samples) = (Instant::now(), 0);
        let mut stream = self.loader.run(planner.requests(epoch, 0))?;
        for batch in &mut stream {
            let batch = batch?;
            samples += batch.len() as u64;
            if options.voxels {
                widen(&batch, fields, voxeliser);
            }
            std::hint::black_box(batch.field(0).first());
            drop(batch);
            together.wait();
        }
        Ok((samples, started.elapsed().as_secs_f64()))
    }
}

/// Input that a model would get: frames and voxels as f32.
fn widen(batch: &HostBatch, fields: &[FieldSpec], voxeliser: Voxeliser) {
    let tensor = |n: usize| {
        let shape = std::iter::once(batch.len()).chain(fields[n].shape.iter().copied());
        Tensor::from_slice(batch.field(n)).view(shape.map(|n| n as i64).collect::<Vec<_>>().as_slice())
    };
    let (blur, sharp) = (frames(&tensor(0)), frames(&tensor(1)));
    let (h, w) = (fields[0].shape[1] as i64, fields[0].shape[2] as i64);
    let _ = std::hint::black_box((blur, sharp, voxeliser.voxels(&tensor(2), h, w)));
}

/// An epoch of all ranks: clips, and seconds of the slowest.
fn together(options: &Options, epoch: u64, ranks: &mut [Rank]) -> Result<(u64, f64)> {
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
        let mut all = (0, 0.0f64);
        for thread in threads {
            let (samples, seconds) = thread.join().map_err(|_| "a rank panicked")?;
            all = (all.0 + samples, all.1.max(seconds));
        }
        Ok(all)
    })
}

fn measure(options: &Options) -> Result<Value> {
    // Opened once without a cache: how much there is to keep.
    let plain = Rank::open(options, None)?;
    let clips = plain.data.datasets.train.len();
    let frame_bytes = plain.data.frames.frame_bytes();
    let used = clips + plain.data.datasets.train.pages().map_or(0, |p| p.sequences.len()) * (options.spec.clip_len - 1);
    let entry_bytes = used as u64 * frame_bytes;
    drop(plain);
    let capacity_bytes = ((options.share * entry_bytes as f64) as u64).next_multiple_of(4096);
    let plan = HostPlan { capacity_bytes, policy: options.policy, ranks: (0..options.ranks as u32).collect() };
    let mut host = (options.share > 0.0).then(|| CacheHost::start(&plan, || None)).transpose()?;
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
        ranks.push(Rank::open(options, client)?);
    }
    let decoded = |ranks: &[Rank]| ranks.iter().map(|rank| rank.data.frames.stats().decoded).sum::<u64>();
    let (mut epochs, mut before, mut files) = (Vec::new(), CacheStats::default(), 0);
    for epoch in 0..options.epochs {
        let (samples, seconds) = together(options, epoch, &mut ranks)?;
        // The last releases are still on their way.
        std::thread::sleep(std::time::Duration::from_millis(20));
        let stats = host.as_ref().map(CacheHost::stats).unwrap_or_default();
        let (hits, others) =
            (stats.hits - before.hits, stats.misses + stats.bypasses - before.misses - before.bypasses);
        let now = decoded(&ranks);
        epochs.push(json!({
            "samples": samples, "seconds": seconds, "samples_per_s": samples as f64 / seconds,
            "hits": hits, "others": others, "decoded": now - files, "used_bytes": stats.used_bytes,
        }));
        (before, files) = (stats, now);
    }
    Ok(json!({
        "clips": clips, "frames": used, "frame_bytes": frame_bytes, "entry_bytes": entry_bytes,
        "capacity_bytes": capacity_bytes, "epochs": epochs,
    }))
}

fn make(out: &str) -> Result<()> {
    let size = ImageSize { height: option("--height", 720)?, width: option("--width", 1280)? };
    let sequences = [option("--sequences", 3)?, 0, 1];
    let spec = SampleSpec { sequences, frames: option("--frames", 16)?, size, noise: NOISE, ..SampleSpec::default() };
    Ok(write_sample_data(Path::new(out), &spec)?)
}

/// Epochs of random clips through the directory: hits and lookups from the second epoch on. A rank holds the clips of
/// `AHEAD` steps, as a loader does.
fn simulate(frame_count: u64) -> Result<Value> {
    const AHEAD: usize = 12;
    let (clip_len, ranks, epochs) = (option("--clip", 5u64)?, option("--ranks", 3u64)?, option("--epochs", 3u64)?);
    let (frame_bytes, capacity) = (option("--frame-bytes", 0u64)?, option("--capacity-bytes", 0u64)?);
    let policy = policy()?;
    let per_sequence = SIMULATED_SEQUENCE - clip_len + 1;
    let clips = frame_count / SIMULATED_SEQUENCE * per_sequence;
    let order = Order { len: clips, seed: SEED, shuffle: Shuffle::Global };
    let first_frame = |clip: u64| clip / per_sequence * SIMULATED_SEQUENCE + clip % per_sequence;
    let at: Vec<u64> = (0..epochs + 1)
        .flat_map(|epoch| {
            let order = order.epoch(epoch);
            (0..clips).filter_map(move |position| order.at(position))
        })
        .map(first_frame)
        .collect();
    let mut uses: Vec<Vec<u64>> = vec![Vec::new(); frame_count as usize];
    for (position, first) in at.iter().enumerate() {
        (*first..first + clip_len).for_each(|frame| uses[frame as usize].push(position as u64));
    }
    let next_use = |frame: u64, after: u64| {
        let uses = &uses[frame as usize];
        uses.get(uses.partition_point(|position| *position <= after)).copied().unwrap_or(u64::MAX)
    };
    let mut directory = Directory::new(capacity, policy);
    let mut replies = Vec::new();
    let mut held = vec![VecDeque::new(); ranks as usize];
    let mut before = CacheStats::default();
    for position in 0..clips * epochs {
        if position == clips {
            before = directory.stats();
        }
        let rank = (position % ranks) as u32;
        let first = at[position as usize];
        let items: Vec<Item> = (first..first + clip_len)
            .map(|frame| Item { key: frame, bytes: frame_bytes, next_use: next_use(frame, position), offer: false })
            .collect();
        replies.clear();
        let asked = ToDirectory::Acquire { ticket: 0, items: items.clone() };
        directory.handle(rank, &asked, &mut replies).map_err(|fault| format!("{fault:?}"))?;
        let grants = match replies.pop() {
            Some((_, FromDirectory::Granted { grants, .. })) => grants,
            other => return Err(format!("{other:?} after Acquire").into()),
        };
        let with = |wanted: &dyn Fn(&Grant) -> bool| -> Vec<(u64, u64)> {
            let chosen = items.iter().zip(&grants).filter(|(_, grant)| wanted(grant));
            chosen.map(|(item, _)| (item.key, item.next_use)).collect()
        };
        let filled = with(&|grant| matches!(grant, Grant::Fill { .. })).into_iter().map(|(key, _)| key).collect();
        held[rank as usize].push_back(with(&|grant| !matches!(grant, Grant::Bypass)));
        let mut say = |message| directory.handle(rank, &message, &mut replies).map_err(|fault| format!("{fault:?}"));
        say(ToDirectory::Publish { keys: filled })?;
        if held[rank as usize].len() > AHEAD
            && let Some(keys) = held[rank as usize].pop_front()
        {
            say(ToDirectory::Release { keys })?;
        }
    }
    let after = directory.stats();
    let lookups = |s: &CacheStats| s.hits + s.misses + s.bypasses;
    let hit_rate = (after.hits - before.hits) as f64 / (lookups(&after) - lookups(&before)) as f64;
    Ok(json!({ "clips": clips, "hit_rate": hit_rate, "used_bytes": after.used_bytes, "evictions": after.evictions }))
}

fn main() -> Result<()> {
    let out: String = option("--make", String::new())?;
    if !out.is_empty() {
        return make(&out);
    }
    let frames: u64 = option("--simulate", 0)?;
    if frames > 0 {
        println!("{}", simulate(frames)?);
        return Ok(());
    }
    tch::set_num_threads(1);
    println!("{}", measure(&options()?)?);
    Ok(())
}
