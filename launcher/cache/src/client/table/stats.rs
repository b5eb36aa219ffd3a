//! Counts of a rank's reads.

/// Reads of this rank, by entry and sample: hits + misses + bypasses is their number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientStats {
    pub hits: u64,
    /// Reads of what this rank had to fill.
    pub misses: u64,
    pub bypasses: u64,
}

impl ClientStats {
    /// Share of reads that found their bytes; `None` before the first.
    pub fn hit_rate(&self) -> Option<f64> {
        let reads = self.hits + self.misses + self.bypasses;
        (reads > 0).then(|| self.hits as f64 / reads as f64)
    }
}
