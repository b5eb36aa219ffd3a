//! Which order the configuration asks for.

use crate::data::loader::{Order, Paged, Shuffle};
use crate::data::{DataError, Dataset};
use launcher::config::{Config, ShuffleMode};
use std::sync::Arc;

/// The order of `dataset` in training, by `data.shuffle`, `data.shuffle_mode` and `data.shuffle_window`.
///
/// # Errors
/// Pages or sequences are asked for, and the data set has none.
pub fn train_order(dataset: &dyn Dataset, config: &Config) -> Result<Order, DataError> {
    let (data, len) = (&config.data, dataset.len() as u64);
    let shuffle = match data.shuffle_mode {
        _ if !data.shuffle => Shuffle::Off,
        ShuffleMode::Global => Shuffle::Global,
        mode => {
            let pages = dataset.pages().ok_or_else(|| {
                DataError::Other("samples of this task share no pages: set data.shuffle_mode: global".into())
            })?;
            let paged = match mode {
                ShuffleMode::Grouped => Paged::new(&pages.sequences, len, 1, true),
                ShuffleMode::GroupedShuffled => Paged::new(&pages.sequences, len, 1, false),
                _ => Paged::new(&pages.pages, len, data.shuffle_window, false),
            };
            Shuffle::Paged(Arc::new(paged))
        }
    };
    Ok(Order { len, seed: config.seed, shuffle })
}
