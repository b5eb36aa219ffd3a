//! Sizes of EMG recordings for a plan, from the sizes of files: no file is opened.

use super::data::fields;
use crate::data::source::find_files;
use crate::data::{DataError, FieldSpec};
use crate::task::outline::{Outline, SCRATCH_BYTES};
use spec::config::Config;
use spec::contract::{CacheMode, DataSizes};

/// Decoded recordings over files on disk. Source: the full data set, 575 GiB of rows in 431 GiB of files (1.34), rounded up.
const DECODED_OVER_DISK: u64 = 2;

/// Bytes of a decoded chunk, about: a page of rows of a file without chunks, and chunks are of like size.
const CHUNK_BYTES: u64 = 512 << 10;

/// Shapes by the config; bytes by the files below `data.dataset_path`, 0 where nothing is there.
pub fn outline(config: &Config) -> Result<Outline, DataError> {
    let fields = fields(&config.section()).to_vec();
    of_fields(config, fields.clone(), fields)
}

/// The same for recordings to predict for: their angles are not read.
pub fn predict_outline(config: &Config) -> Result<Outline, DataError> {
    let [emg, angles] = fields(&config.section());
    of_fields(config, vec![emg.clone(), angles], vec![emg])
}

fn of_fields(config: &Config, train: Vec<FieldSpec>, val: Vec<FieldSpec>) -> Result<Outline, DataError> {
    let data = &config.data;
    let found = find_files(&data.dataset_path, &["h5", "hdf5"]).unwrap_or_default().files;
    let bytes: u64 = found.iter().filter_map(|path| std::fs::metadata(path).ok()).map(|file| file.len()).sum();
    let sample: usize = train.iter().map(|field| field.sample_bytes()).sum();
    let sizes = DataSizes {
        // Chunks; where the cache is short of room windows, or parts of them in two chunks.
        entry_bytes: [CHUNK_BYTES / 2, (sample as u64 / 2).min(CHUNK_BYTES / 2)],
        scratch_bytes: SCRATCH_BYTES,
        chunk_bytes: Some(CHUNK_BYTES),
        useful_bytes: bytes.saturating_mul(DECODED_OVER_DISK),
        useful: format!("{} data set × {DECODED_OVER_DISK}", spec::plan::bytes_text(bytes)),
        useful_is_exact: false,
        // One chunk of a session serves many windows, so the policy that looks ahead.
        auto_policy: CacheMode::NextUse,
        facts: Vec::new(),
    };
    Ok(Outline::new(train, val, sizes))
}
