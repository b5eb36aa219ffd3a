//! Augmented images through the real data set, loader and page cache, without a model: one line of JSON.
//!
//! `images --data DATA [--batch 16] [--threads 2] [--imgsz 640] [--epochs 3] [--cache resized|encoded] [--cache-mib 1024: 0 for no page
//! cache] [--ranks 1]`: images per second of each epoch, and of the decoder alone.

use cache::client::{CacheClient, ClientSpec};
use cache::{CacheHost, HostPlan, PolicyKind};
use headroom::data::loader::{BatchPlanner, Loader, LoaderSpec, train_order};
use headroom::data::source::picture;
use headroom::task::yolo::data::{YoloFacts, open};
use headroom::task::{Datasets, Team};
use serde_json::json;
use spec::config::Config;
use spec::task::yolo::{ImageCache, YoloConfig};
use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Images that the decoder alone is measured with.
const DECODED: usize = 200;

/// The value of an option, or its default.
fn option<T: std::str::FromStr>(name: &str, default: T) -> Result<T> {
    let args: Vec<String> = std::env::args().collect();
    match args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)) {
        Some(value) => value.parse().map_err(|_| format!("{name} {value}: not understood").into()),
        None => Ok(default),
    }
}

fn config() -> Result<Config> {
    let mut config = spec::task::config("yolo");
    config.data.dataset_path = option("--data", String::new())?.into();
    config.train.batch_size = option("--batch", 16)?;
    let content = option("--cache", "resized".to_string())?;
    let imgsz = option("--imgsz", 640)?;
    config.with_section(|yolo: &mut YoloConfig| {
        yolo.imgsz = imgsz;
        yolo.cache = if content == "encoded" { ImageCache::Encoded } else { ImageCache::Resized };
    });
    Ok(config)
}

/// Images per second of one thread that only decodes.
fn decoder(facts: &YoloFacts) -> Result<f64> {
    let files: Vec<_> = facts.images[0].iter().take(DECODED).collect();
    let read = |path: &&std::path::PathBuf| -> Result<_> { Ok((picture::header(path)?, std::fs::read(path)?)) };
    let loaded: Vec<_> = files.iter().map(read).collect::<Result<_>>()?;
    let started = Instant::now();
    for ((header, bytes), path) in loaded.iter().zip(&files) {
        std::hint::black_box(picture::decode(path, bytes, header, 1)?);
    }
    Ok(files.len() as f64 / started.elapsed().as_secs_f64())
}

fn main() -> Result<()> {
    let config = config()?;
    let (threads, epochs, mib) = (option("--threads", 2)?, option("--epochs", 3u64)?, option("--cache-mib", 1024u64)?);
    let plan = HostPlan { capacity_bytes: mib << 20, policy: PolicyKind::named("pin").ok_or("pin")?, ranks: vec![0] };
    let mut host = (mib > 0).then(|| CacheHost::start(&plan, || None)).transpose()?;
    let cache = match &mut host {
        Some(host) => {
            let socket = host.take_socket(0).ok_or("no socket")?;
            let spec = ClientSpec { rank: 0, ahead_bytes: (mib << 20) / 4, verify: false };
            Some(CacheClient::connect(socket.into(), &File::from(host.memfd.try_clone()?), spec)?)
        }
        None => None,
    };
    let index = std::env::temp_dir().join(format!("images-bench-{}", std::process::id()));
    let team = Team { cache, ..Team::alone() };
    let Datasets { train, facts, notes, .. } = open(&config, &team, &index)?;
    let facts = facts.and_then(|facts| facts.downcast::<YoloFacts>().ok()).ok_or("no facts")?;
    let order = train_order(&*train, &config.data, config.seed)?;
    let spec =
        LoaderSpec { threads, slots: 2 * threads + 2, micro_batch: config.train.batch_size, ..LoaderSpec::default() };
    let mut loader = Loader::new(Arc::clone(&train), spec)?;
    let planner = BatchPlanner {
        order,
        global_batch: config.train.batch_size as u64,
        micro_batch: config.train.batch_size as u64,
        rank: 0,
        world_size: 1,
        drop_last: true,
        cut: Default::default(),
    };
    let mut rates = Vec::new();
    for epoch in 0..epochs {
        let (started, mut images) = (Instant::now(), 0);
        for batch in loader.run(planner.requests(epoch, 0))? {
            let batch = batch?;
            images += batch.len();
            std::hint::black_box(batch.field(0).first());
        }
        rates.push(images as f64 / started.elapsed().as_secs_f64());
    }
    let decoder = decoder(&facts)?;
    // It may not have been made.
    let _ = std::fs::remove_dir_all(Path::new(&index));
    println!("{}", json!({ "images": train.len(), "images_per_s": rates, "decoder_per_s": decoder, "notes": notes }));
    Ok(())
}
