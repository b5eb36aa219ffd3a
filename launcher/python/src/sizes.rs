//! How long samples are, as far as was seen: room is asked for before they are decoded.

use std::sync::atomic::{AtomicU64, Ordering};

/// Before anything was seen.
const FIRST_BYTES: u64 = 4096;

/// Lengths of the samples of one data set.
#[derive(Default)]
pub struct Sizes {
    count: AtomicU64,
    total: AtomicU64,
    largest: AtomicU64,
}

impl Sizes {
    pub fn saw(&self, bytes: usize) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.total.fetch_add(bytes as u64, Ordering::Relaxed);
        self.largest.fetch_max(bytes as u64, Ordering::Relaxed);
    }

    /// The largest sample seen, but at most twice the mean: a longer one asks again.
    pub fn guess(&self) -> u64 {
        let (count, total) = (self.count.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed));
        match total.checked_div(count) {
            None => FIRST_BYTES,
            Some(mean) => self.largest.load(Ordering::Relaxed).min(2 * mean).max(64),
        }
    }
}
