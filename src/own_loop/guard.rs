//! Memory that ran out: an error with a summary and suggestions, in the guides' words.

use super::snapshot;
use crate::report::memory::MemorySnapshot;
use crate::torch::{self, TorchError};
use serde::Serialize;
use std::fmt;

const MIB: f64 = 1024.0 * 1024.0;
/// Suggestions after memory ran out, in this order. A smaller micro-batch needs less memory.
pub const SUGGESTIONS: [&str; 4] = [
    "1. Reduce --batch_size",
    "2. Set a smaller positive --microbatch",
    "3. Use --use_fp16 for half precision",
    "4. Reduce model size",
];

/// Where memory stands, by the keys of the users' guides; MB are MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MemorySummary {
    pub current_cpu_mb: f64,
    pub current_gpu_mb: f64,
    pub max_memory_used_mb: f64,
    pub step_count: u64,
    pub gpu_cached_mb: f64,
    pub gpu_max_allocated_mb: f64,
}

impl fmt::Display for MemorySummary {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(
            f,
            "{{'current_cpu_mb': {:.0}, 'current_gpu_mb': {:.0}, 'max_memory_used_mb': {:.0}, 'step_count': {}, \
             'gpu_cached_mb': {:.0}, 'gpu_max_allocated_mb': {:.0}}}",
            self.current_cpu_mb,
            self.current_gpu_mb,
            self.max_memory_used_mb,
            self.step_count,
            self.gpu_cached_mb,
            self.gpu_max_allocated_mb
        )
    }
}

impl MemorySummary {
    /// Memory of this process now; zeros where that is unknown.
    pub fn now() -> Self {
        snapshot().map_or_else(|_| Self::default(), |now| Self::of(&now, now.rss_peak_bytes, 0))
    }

    pub(super) fn of(now: &MemorySnapshot, peak_bytes: u64, step_count: u64) -> Self {
        let mib = |bytes: u64| bytes as f64 / MIB;
        Self {
            current_cpu_mb: mib(now.rss_bytes),
            current_gpu_mb: mib(now.gpu_allocated_bytes),
            max_memory_used_mb: mib(peak_bytes.max(now.rss_bytes)),
            step_count,
            gpu_cached_mb: mib(now.gpu_reserved_bytes),
            gpu_max_allocated_mb: mib(now.gpu_peak_bytes),
        }
    }
}

/// Memory ran out within [`with_memory_guard`]; caches are released already.
#[derive(Clone, Debug, thiserror::Error)]
#[error("out of memory: {message}")]
pub struct OutOfMemory {
    /// The first line of what the allocator said.
    pub message: String,
    /// After the work was given up, before the caches were released.
    pub summary: MemorySummary,
}

impl OutOfMemory {
    /// Error, summary and suggestions, one line each.
    pub fn explanation(&self) -> Vec<String> {
        explain(&self.message, &self.summary)
    }
}

/// The guides' words for memory that ran out, one line each.
pub fn explain(message: &str, summary: &MemorySummary) -> Vec<String> {
    let mut lines = vec![
        format!("❌ Memory Error: {message}"),
        format!("💾 Memory Summary: {summary}"),
        "💡 Suggestions:".to_owned(),
    ];
    lines.extend(SUGGESTIONS.iter().map(|line| format!("   {line}")));
    lines
}

/// Runs `work`. Where libtorch runs out of memory within it, on the device or on the host, the cause and the remedy are
/// printed to stderr, caches are released, and the error is returned instead of a panic. Other panics continue.
///
/// # Errors
/// [`OutOfMemory`].
pub fn with_memory_guard<T>(work: impl FnOnce() -> T) -> Result<T, OutOfMemory> {
    guarded(work, |line| eprintln!("{line}"))
}

fn guarded<T>(work: impl FnOnce() -> T, print: impl Fn(&str)) -> Result<T, OutOfMemory> {
    torch::catch_out_of_memory(work).map_err(|error| {
        let message = if let TorchError::OutOfMemory { message } = error { message } else { error.to_string() };
        let error = OutOfMemory { message, summary: MemorySummary::now() };
        error.explanation().iter().for_each(|line| print(line));
        torch::release_caches();
        error
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn the_guard_explains_cleans_up_and_turns_out_of_memory_into_an_error() {
        let printed = RefCell::new(Vec::new());
        let print = |line: &str| printed.borrow_mut().push(line.to_owned());
        let sum = guarded(|| Tensor::ones([8], (Kind::Float, Device::Cpu)).sum(Kind::Float), print);
        assert_eq!(sum.unwrap().double_value(&[]), 8.0);
        assert!(printed.borrow().is_empty());

        // Free pages in the middle of the heap go back by a clean-up alone. Other tests take memory meanwhile, so more than once.
        let fails = || {
            printed.borrow_mut().clear();
            let mut last = None;
            let body = || {
                let blocks: Vec<Vec<u8>> = (0..4000).map(|_| vec![1; 32 << 10]).collect();
                last = blocks.last().cloned();
                drop(blocks);
                Tensor::empty([1 << 50], (Kind::Float, Device::Cpu))
            };
            let error = guarded(body, print).unwrap_err();
            let less = error.summary.current_cpu_mb > MemorySummary::now().current_cpu_mb + 60.0;
            drop(last);
            (error, less)
        };
        let (error, less) = (0..20).map(|_| fails()).find(|(_, less)| *less).unwrap_or_else(fails);
        assert!(error.to_string().contains("can't allocate memory"), "{error}");
        assert!(less, "{} → {}", error.summary, MemorySummary::now());

        assert_eq!(*printed.borrow(), error.explanation());
        let kinds: Vec<String> = printed.borrow().iter().map(|line| line.chars().take(6).collect()).collect();
        assert_eq!(kinds[..3], ["❌ Memo", "💾 Memo", "💡 Sugg"].map(|kind| kind.chars().take(6).collect::<String>()));
        let other = std::panic::catch_unwind(|| with_memory_guard(|| panic!("something else")));
        assert_eq!(other.unwrap_err().downcast_ref::<&str>(), Some(&"something else"));
    }

    #[test]
    fn four_suggestions_follow_error_and_summary() {
        let summary = MemorySummary {
            current_cpu_mb: 8192.0,
            current_gpu_mb: 11000.0,
            max_memory_used_mb: 8200.6,
            step_count: 1000,
            gpu_cached_mb: 1024.1,
            gpu_max_allocated_mb: 11500.0,
        };
        assert_eq!(
            explain("CUDA out of memory", &summary),
            [
                "❌ Memory Error: CUDA out of memory",
                "💾 Memory Summary: {'current_cpu_mb': 8192, 'current_gpu_mb': 11000, 'max_memory_used_mb': 8201, \
                 'step_count': 1000, 'gpu_cached_mb': 1024, 'gpu_max_allocated_mb': 11500}",
                "💡 Suggestions:",
                "   1. Reduce --batch_size",
                "   2. Set a smaller positive --microbatch",
                "   3. Use --use_fp16 for half precision",
                "   4. Reduce model size"
            ]
        );
    }
}
