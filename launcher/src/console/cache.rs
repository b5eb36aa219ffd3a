//! The page cache's lines at the end of a run, in the form of the user's guide.

use spec::contract::cache::CacheStats;

const MIB: f64 = (1u64 << 20) as f64;

/// Four lines without a line break at their end; MB are MiB. What had to be read counts as a miss, stored or not.
pub fn cache_stats(source: &str, stats: &CacheStats) -> String {
    let (used, capacity) = (stats.used_bytes as f64 / MIB, stats.capacity_bytes as f64 / MIB);
    let (rate, misses) = (100.0 * stats.hit_rate().unwrap_or(0.0), stats.misses + stats.bypasses);
    format!(
        "[{source}] Cache Stats:\n  - Size: {} items\n  - Memory: {used:.1} / {capacity:.1} MB\n  \
         - Hit Rate: {rate:.2}% ({} hits / {misses} misses)",
        stats.entries, stats.hits
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_the_guide() {
        let stats = CacheStats {
            capacity_bytes: 51_200 << 20,
            used_bytes: (49_876 << 20) + 300_000,
            entries: 374,
            hits: 8245,
            misses: 1000,
            bypasses: 755,
            evictions: 3,
        };
        let text = cache_stats("SpikeDeblurDataset", &stats);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "[SpikeDeblurDataset] Cache Stats:",
                "  - Size: 374 items",
                "  - Memory: 49876.3 / 51200.0 MB",
                "  - Hit Rate: 82.45% (8245 hits / 1755 misses)"
            ]
        );
        assert!(cache_stats("emg", &CacheStats::default()).ends_with("Hit Rate: 0.00% (0 hits / 0 misses)"));
    }
}
