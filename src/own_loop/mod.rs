//! Memory for people who write their own training loop: lines, reports, cleaning up, and running out of it in order.
//!
//! ```
//! use headroom::own_loop::{MemoryMonitor, with_memory_guard};
//! use std::time::Duration;
//! use tch::{Device, Kind, Tensor};
//!
//! let mut monitor = MemoryMonitor::new(100);
//! monitor.start(Duration::from_secs(1))?;
//! for step in 0..=200 {
//!     let loss = with_memory_guard(|| Tensor::ones([64], (Kind::Float, Device::Cpu)).sum(Kind::Float))?;
//!     assert_eq!(loss.double_value(&[]), 64.0);
//!     monitor.log_memory_usage(step); // a line at 0, 100 and 200
//! }
//! println!("{}", monitor.report());
//! println!("{} bytes given back", monitor.force_cleanup().released_bytes());
//! monitor.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Architecture invariant: nothing here is needed to train; `rank` has its own sampler.

mod guard;
mod statistics;

pub use guard::{MemorySummary, OutOfMemory, SUGGESTIONS, explain, with_memory_guard};

use crate::report::memory::MemorySnapshot;
use crate::torch;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use serde::Serialize;
use spec::config::Language;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const MIB: f64 = 1024.0 * 1024.0;
const GIB: f64 = 1024.0 * MIB;
/// Samples kept for the trend, the newest.
const HISTORY: usize = 1024;
/// The kernel did not say what this process uses.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("memory of this process is unknown: {0}; is /proc mounted?")]
    Proc(#[from] procfs::ProcError),
    #[error("no thread for the memory monitor: {0}")]
    Thread(#[from] std::io::Error),
}

/// Memory of machine, process and device. GB are GiB, MB are MiB.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct MemoryInfo {
    pub ram_total_gb: f64,
    pub ram_used_gb: f64,
    pub ram_percent: f64,
    pub process_rss_mb: f64,
    pub process_pss_mb: f64,
    pub process_uss_mb: f64,
    /// Absent without a device, and before its first use.
    pub gpu: Option<GpuInfo>,
}

/// Memory that libtorch's allocator holds on the device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GpuInfo {
    pub allocated_mb: f64,
    pub reserved_mb: f64,
    pub max_allocated_mb: f64,
}

/// Effects of a clean-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleanup {
    pub rss_before_bytes: u64,
    pub rss_after_bytes: u64,
}

impl Cleanup {
    pub fn released_bytes(&self) -> u64 {
        self.rss_before_bytes.saturating_sub(self.rss_after_bytes)
    }
}

fn snapshot() -> Result<MemorySnapshot, procfs::ProcError> {
    let mut now = MemorySnapshot::take()?;
    if let Some(gpu) = torch::device_memory(0) {
        now.on_device = true;
        (now.gpu_allocated_bytes, now.gpu_reserved_bytes) = (gpu.allocated_bytes, gpu.reserved_bytes);
        now.gpu_peak_bytes = gpu.peak_bytes;
    }
    Ok(now)
}

/// Peaks and samples so far.
#[derive(Default)]
struct Seen {
    /// When, and RSS in bytes.
    history: VecDeque<(Instant, u64)>,
    peak_bytes: u64,
    steps: u64,
}

impl Seen {
    fn add(&mut self, now: &MemorySnapshot) {
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back((Instant::now(), now.rss_bytes));
        self.peak_bytes = self.peak_bytes.max(now.rss_bytes);
    }

    /// Slope of the least-squares line through the history, MiB per minute. `None`: fewer than three samples.
    fn trend(&self) -> Option<f64> {
        let (first, n) = (self.history.front()?.0, self.history.len() as f64);
        let points = || self.history.iter().map(|(at, rss)| ((*at - first).as_secs_f64() / 60.0, *rss as f64 / MIB));
        let (t, y) = points().fold((0.0, 0.0), |(t, y), point| (t + point.0 / n, y + point.1 / n));
        let (over, under) = points().fold((0.0, 0.0), |(over, under), point| {
            (over + (point.0 - t) * (point.1 - y), under + (point.0 - t).powi(2))
        });
        (self.history.len() >= 3 && under > 0.0).then(|| over / under)
    }
}

struct Background {
    /// Dropped to end the thread.
    end: Sender<()>,
    thread: JoinHandle<()>,
}

/// Watches this process's memory, on demand and in the background.
pub struct MemoryMonitor {
    log_interval: u64,
    seen: Arc<Mutex<Seen>>,
    print: Box<dyn Fn(&str) + Send + Sync>,
    background: Option<Background>,
}

impl MemoryMonitor {
    /// `log_interval`: steps between the lines of [`MemoryMonitor::log_memory_usage`]; 0: none. Lines go to stdout.
    pub fn new(log_interval: u64) -> Self {
        Self { log_interval, seen: Arc::default(), print: Box::new(|line| println!("{line}")), background: None }
    }

    /// The same, its lines given to `print`.
    pub fn printing_to(mut self, print: impl Fn(&str) + Send + Sync + 'static) -> Self {
        self.print = Box::new(print);
        self
    }

    /// Samples every `period` on a separate thread; does nothing while one runs.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(&mut self, period: Duration) -> Result<(), MonitorError> {
        if self.background.is_some() {
            return Ok(());
        }
        let (end, ended) = bounded(0);
        let seen = Arc::clone(&self.seen);
        let sample = move || {
            loop {
                if let Ok(now) = snapshot() {
                    locked(&seen).add(&now);
                }
                if let Err(RecvTimeoutError::Disconnected) = ended.recv_timeout(period) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("monitor".into()).spawn(sample)?;
        self.background = Some(Background { end, thread });
        Ok(())
    }

    /// Ends the sampling; does nothing where none runs. What was seen stays.
    pub fn stop(&mut self) {
        if let Some(Background { end, thread }) = self.background.take() {
            drop(end);
            let _ = thread.join();
        }
    }

    pub fn is_running(&self) -> bool {
        self.background.is_some()
    }

    /// Call it at every step: at multiples of the interval it prints `Step 1000: CPU: 2048.5MB, GPU: …` and returns it.
    pub fn log_memory_usage(&self, step: u64) -> Option<String> {
        locked(&self.seen).steps = step;
        if self.log_interval == 0 || !step.is_multiple_of(self.log_interval) {
            return None;
        }
        let line = self.look().ok()?.step_line(step);
        (self.print)(&line);
        Some(line)
    }

    /// # Errors
    /// The kernel does not say.
    pub fn get_memory_info(&self) -> Result<MemoryInfo, MonitorError> {
        let now = self.look()?;
        Ok(MemoryInfo {
            ram_total_gb: now.system_total_bytes as f64 / GIB,
            ram_used_gb: now.system_used_bytes as f64 / GIB,
            ram_percent: now.system_percent(),
            process_rss_mb: now.rss_bytes as f64 / MIB,
            process_pss_mb: now.pss_bytes as f64 / MIB,
            process_uss_mb: now.uss_bytes as f64 / MIB,
            gpu: now.on_device.then(|| GpuInfo {
                allocated_mb: now.gpu_allocated_bytes as f64 / MIB,
                reserved_mb: now.gpu_reserved_bytes as f64 / MIB,
                max_allocated_mb: now.gpu_peak_bytes as f64 / MIB,
            }),
        })
    }

    /// Describes RAM, this process, the device and the trend in a few lines.
    pub fn report(&self) -> String {
        let info = match self.get_memory_info() {
            Ok(info) => info,
            Err(error) => return error.to_string(),
        };
        let gpu = info.gpu.map_or_else(
            || "none in use".to_owned(),
            |gpu| {
                let GpuInfo { allocated_mb, reserved_mb, max_allocated_mb } = gpu;
                format!(
                    "{allocated_mb:.1} MB allocated, {reserved_mb:.1} MB reserved, {max_allocated_mb:.1} MB at most"
                )
            },
        );
        let seen = locked(&self.seen);
        let trend = seen.trend().map_or_else(
            || "too few samples".to_owned(),
            |slope| format!("{slope:+.2} MB per minute over {} samples", seen.history.len()),
        );
        format!(
            "RAM: {:.1} of {:.1} GB ({:.1}%)\nProcess: {:.1} MB resident, {:.1} MB its own, {:.1} MB at most\n\
             GPU: {gpu}\nTrend: {trend}",
            info.ram_used_gb,
            info.ram_total_gb,
            info.ram_percent,
            info.process_rss_mb,
            info.process_uss_mb,
            seen.peak_bytes as f64 / MIB
        )
    }

    /// All that kernel and allocator say, asked anew: `System memory: …`, and with a device `GPU memory: …` with every
    /// statistic of the allocator, by PyTorch's names; in Chinese `系统内存: …` and `GPU内存: …`. Bytes and counts.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn statistics(&self, language: Language) -> Result<Vec<String>, MonitorError> {
        statistics::lines(language, &self.look()?)
    }

    /// Releases what allocators keep for speed, and says what that gave.
    pub fn force_cleanup(&self) -> Cleanup {
        let resident = || self.look().map_or(0, |now| now.rss_bytes);
        let rss_before_bytes = resident();
        torch::release_caches();
        Cleanup { rss_before_bytes, rss_after_bytes: resident() }
    }

    /// The same, with the line `Memory cleanup completed`.
    pub fn cleanup_memory(&self) -> Cleanup {
        let done = self.force_cleanup();
        (self.print)("Memory cleanup completed");
        done
    }

    /// Where memory stands, as the guides' programs print it.
    pub fn summary(&self) -> MemorySummary {
        let Ok(now) = self.look() else { return MemorySummary::default() };
        let seen = locked(&self.seen);
        MemorySummary::of(&now, seen.peak_bytes, seen.steps)
    }

    fn look(&self) -> Result<MemorySnapshot, MonitorError> {
        let now = snapshot()?;
        locked(&self.seen).add(&now);
        Ok(now)
    }
}

impl Drop for MemoryMonitor {
    fn drop(&mut self) {
        self.stop();
    }
}

fn locked(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    // Sums and a queue: whole after any panic.
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn silent(log_interval: u64) -> (MemoryMonitor, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&lines);
        (MemoryMonitor::new(log_interval).printing_to(move |line| into.lock().unwrap().push(line.to_owned())), lines)
    }

    #[test]
    fn the_background_monitor_starts_and_stops_once() {
        let (mut monitor, _) = silent(1);
        monitor.stop();
        for _ in 0..2 {
            monitor.start(Duration::from_millis(1)).unwrap();
            let thread = monitor.background.as_ref().unwrap().thread.thread().id();
            monitor.start(Duration::from_secs(3600)).unwrap();
            assert_eq!(monitor.background.as_ref().unwrap().thread.thread().id(), thread, "the same thread");
            let before = locked(&monitor.seen).history.len();
            while locked(&monitor.seen).history.len() < before + 3 {
                std::thread::sleep(Duration::from_millis(1));
            }
            monitor.stop();
            monitor.stop();
            assert!(!monitor.is_running());
        }
        let (mut patient, _) = silent(1);
        patient.start(Duration::from_secs(3600)).unwrap();
        // Dropped: ends at once, not after its period.
    }

    #[test]
    fn memory_info_has_the_guides_keys() {
        let (monitor, _) = silent(1);
        let info = monitor.get_memory_info().unwrap();
        assert!(info.ram_total_gb > info.ram_used_gb && info.ram_used_gb > 0.0, "{info:?}");
        assert!((info.ram_percent - 100.0 * info.ram_used_gb / info.ram_total_gb).abs() < 1e-9);
        assert!(info.process_uss_mb > 1.0 && info.process_rss_mb >= info.process_uss_mb, "{info:?}");
        let json = serde_json::to_value(info).unwrap();
        for key in ["ram_total_gb", "ram_used_gb", "ram_percent", "gpu"] {
            assert!(json.get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn the_report_tells_ram_gpu_and_trend() {
        let (monitor, _) = silent(1);
        assert!(monitor.report().contains("Trend: too few samples"));
        for _ in 0..3 {
            monitor.get_memory_info().unwrap();
        }
        let report = monitor.report();
        let starts: Vec<&str> = report.lines().map(|line| line.split(' ').next().unwrap()).collect();
        assert_eq!(starts, ["RAM:", "Process:", "GPU:", "Trend:"], "{report}");
        assert!(report.contains("MB per minute over 5 samples"), "{report}");
    }

    #[test]
    fn the_trend_is_the_slope_of_a_rising_series() {
        let start = Instant::now();
        let series = |step_mib: u64| Seen {
            history: (0..100).map(|n| (start + Duration::from_secs(n), (500 + n * step_mib) << 20)).collect(),
            ..Seen::default()
        };
        assert!((series(2).trend().unwrap() - 120.0).abs() < 1e-6);
        assert!(series(0).trend().unwrap().abs() < 1e-9);
        assert_eq!(Seen::default().trend(), None);
    }

    #[test]
    fn a_forced_clean_up_tells_what_it_gave_back() {
        let (monitor, _) = silent(1);
        let blocks: Vec<Vec<u8>> = (0..4000).map(|_| vec![1; 32 << 10]).collect();
        let last = blocks.last().cloned();
        drop(blocks);
        let done = monitor.force_cleanup();
        // Other tests take memory meanwhile.
        assert!(done.released_bytes() > 60 << 20, "{done:?}");
        drop(last);
    }

    #[test]
    fn a_line_comes_at_multiples_of_the_interval_only() {
        let (monitor, lines) = silent(100);
        let logged: Vec<u64> = (0..=250).filter(|step| monitor.log_memory_usage(*step).is_some()).collect();
        assert_eq!(logged, [0, 100, 200]);
        let lines_so_far = lines.lock().unwrap().clone();
        assert_eq!(lines_so_far.len(), 3);
        assert!(lines_so_far[1].starts_with("Step 100: CPU: ") && lines_so_far[1].ends_with("MB"), "{lines_so_far:?}");
        monitor.cleanup_memory();
        assert_eq!(lines.lock().unwrap().last().unwrap(), "Memory cleanup completed");
        let summary = monitor.summary();
        assert_eq!(summary.step_count, 250);
        assert!(summary.max_memory_used_mb >= summary.current_cpu_mb && summary.current_cpu_mb > 1.0, "{summary}");
        assert_eq!(silent(0).0.log_memory_usage(0), None);
    }
}
