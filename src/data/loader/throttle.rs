//! How much a loader may do ahead of need, set from outside while it runs.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Shared by every loader of a rank and whoever watches memory. Fresh ones allow everything.
#[derive(Debug, Default)]
pub struct Throttle {
    paused: AtomicBool,
    /// Most loader threads that read; 0: all of them.
    decoders: AtomicUsize,
    /// How often threads were asked to give their buffers back.
    trims: AtomicU64,
}

impl Throttle {
    /// On: no batch is begun before the consumer waits for it, and slots that come back give their memory back.
    pub fn pause(&self, on: bool) {
        self.paused.store(on, Ordering::Relaxed);
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Lets at most so many threads of each loader read, one at least; `None`: all. The others wait without buffers.
    pub fn decoders(&self, threads: Option<usize>) {
        self.decoders.store(threads.map_or(0, |n| n.max(1)), Ordering::Relaxed);
    }

    /// True if the thread with this place among its loader's threads may read.
    pub(super) fn may_read(&self, place: usize) -> bool {
        match self.decoders.load(Ordering::Relaxed) {
            0 => true,
            most => place < most,
        }
    }

    pub(super) fn trim(&self) {
        self.trims.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn trims(&self) -> u64 {
        self.trims.load(Ordering::Relaxed)
    }
}
