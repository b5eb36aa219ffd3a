//! Which order the configuration asks for.

use super::{Order, Paged, Shuffle};
use crate::data::{DataError, Dataset, Pages};
use spec::config::{DataConfig, ShuffleMode};
use std::sync::Arc;

/// The order of `dataset` in training, by `data.shuffle`, `data.shuffle_mode` and `data.shuffle_window`.
///
/// # Errors
/// Pages or sequences are asked for, and the data set has none.
pub fn train_order(dataset: &dyn Dataset, data: &DataConfig, seed: u64) -> Result<Order, DataError> {
    order_of(dataset.len() as u64, data, seed, || dataset.pages())
}

/// [`train_order`] for a data set of `len` samples that is still being made.
///
/// # Errors
/// As [`train_order`].
pub fn order_of(
    len: u64,
    data: &DataConfig,
    seed: u64,
    pages: impl FnOnce() -> Option<Pages>,
) -> Result<Order, DataError> {
    let shuffle = match data.shuffle_mode {
        _ if !data.shuffle => Shuffle::Off,
        ShuffleMode::Global => Shuffle::Global,
        mode => {
            let pages = pages().ok_or_else(|| {
                DataError::setting(
                    "data.shuffle_mode",
                    "samples of this task share no pages: set data.shuffle_mode: global",
                )
            })?;
            let paged = match mode {
                ShuffleMode::Grouped => Paged::new(&pages.sequences, len, 1, true),
                ShuffleMode::GroupedShuffled => Paged::new(&pages.sequences, len, 1, false),
                _ => Paged::new(&pages.pages, len, data.shuffle_window, false),
            };
            Shuffle::Paged(Arc::new(paged))
        }
    };
    Ok(Order { len, seed, shuffle })
}
