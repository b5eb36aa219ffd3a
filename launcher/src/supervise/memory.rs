//! Peaks of memory over a job, sampled beside it.

use super::Watcher;
use procfs::process::Process;
use rustix::process::Pid;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

const EVERY: Duration = Duration::from_millis(500);
/// Reading the page tables of ranks takes cores from training: at most a fiftieth of one.
const SPARED: u32 = 50;

/// Proportional set sizes, bytes: shared pages count once over the job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peaks {
    /// In the order of the job's ranks.
    pub pss_bytes_per_rank: Vec<u64>,
    /// Of the sum over all ranks and the launcher.
    pub node_bytes: u64,
    pub launcher_bytes: u64,
}

impl Peaks {
    /// To what `other` has reached.
    pub(super) fn raise(&mut self, other: &Peaks) {
        self.pss_bytes_per_rank.resize(self.pss_bytes_per_rank.len().max(other.pss_bytes_per_rank.len()), 0);
        for (peak, new) in self.pss_bytes_per_rank.iter_mut().zip(&other.pss_bytes_per_rank) {
            *peak = (*peak).max(*new);
        }
        self.node_bytes = self.node_bytes.max(other.node_bytes);
        self.launcher_bytes = self.launcher_bytes.max(other.launcher_bytes);
    }
}

/// Samples until `stop` is dropped. Ranks that have ended count nothing.
pub fn sample(pids: &[Pid], watcher: &dyn Watcher, stop: &Receiver<()>) -> Peaks {
    let mut peaks = Peaks { pss_bytes_per_rank: vec![0; pids.len()], ..Peaks::default() };
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    // The first sample soon, so that short jobs have one too.
    let mut wait = EVERY / 10;
    while stop.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
        let start = Instant::now();
        let launcher = pss_bytes(own);
        let mut node = launcher;
        for (peak, pid) in peaks.pss_bytes_per_rank.iter_mut().zip(pids) {
            let now = pss_bytes(pid.as_raw_nonzero().get());
            *peak = now.max(*peak);
            node += now;
        }
        peaks.launcher_bytes = peaks.launcher_bytes.max(launcher);
        peaks.node_bytes = peaks.node_bytes.max(node);
        watcher.memory(node);
        wait = EVERY.max(start.elapsed() * SPARED);
    }
    peaks
}

/// 0 for a process that has ended or may not be read.
fn pss_bytes(pid: i32) -> u64 {
    let rollup = Process::new(pid).and_then(|process| process.smaps_rollup());
    let map = rollup.ok().and_then(|rollup| rollup.memory_map_rollup.into_iter().next());
    map.and_then(|map| map.extension.map.get("Pss").copied()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_is_seen_and_a_missing_process_is_nothing() {
        let own = pss_bytes(std::process::id() as i32);
        assert!((100 << 10..4 << 30).contains(&own), "{own} bytes");
        assert_eq!(pss_bytes(i32::MAX), 0);
    }
}
