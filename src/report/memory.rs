//! Memory of this process and this machine, sampled off the step thread.
//!
//! The printed line shows RSS, as the user's guides do. Records and peaks hold PSS as well: RSS summed over ranks
//! counts every shared page once per rank.

use super::records::RecordWriter;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use procfs::Current;
use spec::contract::{MemoryRecord, Phase};
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

const MIB: f64 = 1024.0 * 1024.0;
const GIB: f64 = 1024.0 * MIB;
/// Share of the machine's memory above which the line is followed by a warning.
const CRITICAL_PERCENT: f64 = 90.0;

/// Memory of this process and of the machine at one moment: a record in the making, without time, step and phase.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MemorySnapshot {
    pub record: MemoryRecord,
    /// The process uses a device, whose memory is in the record.
    pub on_device: bool,
}

impl Deref for MemorySnapshot {
    type Target = MemoryRecord;

    fn deref(&self) -> &MemoryRecord {
        &self.record
    }
}

impl DerefMut for MemorySnapshot {
    fn deref_mut(&mut self) -> &mut MemoryRecord {
        &mut self.record
    }
}

/// Memory by `/proc/self/status`, bytes; reading it costs microseconds.
#[derive(Clone, Copy)]
struct Status {
    peak: u64,
    anon: u64,
    file: u64,
    shmem: u64,
}

impl Status {
    fn read() -> Result<Self, procfs::ProcError> {
        let status = procfs::process::Process::myself()?.status()?;
        let bytes = |kib: Option<u64>| kib.unwrap_or(0) << 10;
        let (peak, anon) = (bytes(status.vmhwm), bytes(status.rssanon));
        Ok(Self { peak, anon, file: bytes(status.rssfile), shmem: bytes(status.rssshmem) })
    }

    fn rss(&self) -> u64 {
        self.anon + self.file + self.shmem
    }
}

impl MemorySnapshot {
    fn set_status(&mut self, now: Status) {
        self.rss_peak_bytes = now.peak;
        (self.anon_bytes, self.file_bytes) = (now.anon, now.file);
        // The kernel's peak is of all kinds together: exact where the other kinds did not grow after it, else too little.
        self.anon_peak_bytes = now.peak.saturating_sub(now.file + now.shmem).max(now.anon);
    }

    /// Fills in the process and the machine as they are now, without reading page tables: own memory is what grows and
    /// shrinks, and is exact; the number of processes that share a page is as old as `then`.
    fn see_since(&mut self, then: &MemorySnapshot) -> Result<(), procfs::ProcError> {
        let now = Status::read()?;
        let carried = |bytes: u64| (bytes + now.anon).saturating_sub(then.anon_bytes);
        (self.pss_bytes, self.uss_bytes) = (carried(then.pss_bytes), carried(then.uss_bytes));
        (self.rss_bytes, self.shared_bytes) = (now.rss(), then.shared_bytes);
        self.set_status(now);
        self.see_system()
    }

    /// Fills in the process and the machine as they are now.
    fn see(&mut self) -> Result<(), procfs::ProcError> {
        let rollup = procfs::process::Process::myself()?.smaps_rollup()?;
        let sum =
            |key: &str| -> u64 { rollup.memory_map_rollup.iter().filter_map(|map| map.extension.map.get(key)).sum() };
        (self.rss_bytes, self.pss_bytes) = (sum("Rss"), sum("Pss"));
        self.uss_bytes = sum("Private_Clean") + sum("Private_Dirty");
        self.shared_bytes = sum("Shared_Clean") + sum("Shared_Dirty");
        self.set_status(Status::read()?);
        self.see_system()
    }

    /// The first snapshot of a phase that begins now: nothing before it counts as its peak.
    fn at_its_peak(&self) -> Self {
        let mut now = *self;
        (now.rss_peak_bytes, now.anon_peak_bytes) = (self.rss_bytes, self.anon_bytes);
        now
    }

    fn see_system(&mut self) -> Result<(), procfs::ProcError> {
        let system = procfs::Meminfo::current()?;
        let available = system.mem_available.unwrap_or(system.mem_free);
        self.system_used_bytes = system.mem_total.saturating_sub(available);
        self.system_total_bytes = system.mem_total;
        Ok(())
    }
}

/// Memory of the machine that nothing uses, not even the kernel's file cache, bytes.
///
/// # Errors
/// `/proc` is missing.
pub fn free_bytes() -> Result<u64, procfs::ProcError> {
    Ok(procfs::Meminfo::current()?.mem_free)
}

/// The kernel's peak starts anew from what is resident now. Where it refuses, peaks are since the process began.
pub(crate) fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

impl MemorySnapshot {
    /// Reads `/proc/self/smaps_rollup`, `/proc/self/status` and `/proc/meminfo`; nothing of a device.
    ///
    /// # Errors
    /// `/proc` is missing or hides these files.
    pub fn take() -> Result<Self, procfs::ProcError> {
        let mut now = Self::default();
        now.see()?;
        Ok(now)
    }

    /// The guides' line; `tag` is `Step 100`, `After dataset creation`, … MB are MiB and GB are GiB, as there.
    pub fn line(&self, tag: &str) -> String {
        let mut line = format!(
            "[{tag}] Memory - Process: {:.1}MB ({:.1}%), System: {:.1}/{:.1}GB ({:.1}%)",
            self.rss_bytes as f64 / MIB,
            percent(self.rss_bytes, self.system_total_bytes),
            self.system_used_bytes as f64 / GIB,
            self.system_total_bytes as f64 / GIB,
            self.system_percent(),
        );
        if self.on_device {
            let (allocated, reserved) = (self.gpu_allocated_bytes as f64 / MIB, self.gpu_reserved_bytes as f64 / MIB);
            line += &format!(", GPU: {allocated:.1}MB allocated, {reserved:.1}MB reserved");
        }
        line
    }

    /// `GPU Memory: 8.00GB allocated, 9.00GB cached`; GB are GiB, as in the guides. `None` without a device.
    pub fn gpu_line(&self) -> Option<String> {
        let (allocated, cached) = (self.gpu_allocated_bytes as f64 / GIB, self.gpu_reserved_bytes as f64 / GIB);
        self.on_device.then(|| format!("GPU Memory: {allocated:.2}GB allocated, {cached:.2}GB cached"))
    }

    /// `Step 1000: CPU: 2048.5MB, GPU: 4096.2MB, GPU Cached: 1024.1MB`; without a device the first part alone. MB are MiB.
    pub fn step_line(&self, step: u64) -> String {
        let mut line = format!("Step {step}: CPU: {:.1}MB", self.rss_bytes as f64 / MIB);
        if self.on_device {
            let (allocated, cached) = (self.gpu_allocated_bytes as f64 / MIB, self.gpu_reserved_bytes as f64 / MIB);
            line += &format!(", GPU: {allocated:.1}MB, GPU Cached: {cached:.1}MB");
        }
        line
    }

    /// Two more lines when the machine is more than 90 % full.
    pub fn warning(&self) -> Option<[String; 2]> {
        (self.system_percent() > CRITICAL_PERCENT).then(|| {
            [
                format!("⚠️  WARNING: System memory usage is critically high ({:.1}%)!", self.system_percent()),
                "   Consider reducing CACHE_SIZE_GB or NUM_WORKERS in config.".into(),
            ]
        })
    }

    /// Share of the machine's memory that is in use, percent.
    pub fn system_percent(&self) -> f64 {
        percent(self.system_used_bytes, self.system_total_bytes)
    }
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

/// Largest values seen by a [`MemorySampler`], bytes, and what looking cost.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Peaks {
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    pub uss_bytes: u64,
    pub system_used_bytes: u64,
    pub gpu_allocated_bytes: u64,
    pub gpu_reserved_bytes: u64,
    pub samples: u64,
    /// Time spent on all samples, and on the longest one.
    pub sampling_s: f64,
    pub longest_sample_s: f64,
    /// The latest PSS, for the progress bar.
    pub last_pss_bytes: u64,
}

impl Peaks {
    fn add(&mut self, now: &MemorySnapshot, cost_s: f64) {
        self.rss_bytes = self.rss_bytes.max(now.rss_bytes);
        self.pss_bytes = self.pss_bytes.max(now.pss_bytes);
        self.uss_bytes = self.uss_bytes.max(now.uss_bytes);
        self.system_used_bytes = self.system_used_bytes.max(now.system_used_bytes);
        self.gpu_allocated_bytes = self.gpu_allocated_bytes.max(now.gpu_allocated_bytes).max(now.gpu_peak_bytes);
        self.gpu_reserved_bytes = self.gpu_reserved_bytes.max(now.gpu_reserved_bytes);
        self.samples += 1;
        self.sampling_s += cost_s;
        self.longest_sample_s = self.longest_sample_s.max(cost_s);
        self.last_pss_bytes = now.pss_bytes;
    }
}

enum Ask {
    /// A phase begins; the sender is dropped when the samples at its start are taken.
    Phase(Phase, Sender<()>),
    Print(String),
}

/// Takes a record every `period`, at each change of phase and whenever asked, on its own thread.
pub struct MemorySampler {
    asks: Option<Sender<Ask>>,
    /// No message: it would wake the thread at every step.
    step: Arc<AtomicU64>,
    peaks: Arc<Mutex<Peaks>>,
    thread: Option<JoinHandle<()>>,
}

impl MemorySampler {
    /// `records`: where records go. `probe`: fills in, for each record, what others know: device, page cache, and what is held
    /// since it was last asked. `print`: gets the lines that [`MemorySampler::print`] asks for.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        period: Duration,
        records: RecordWriter,
        probe: impl Fn(&mut MemorySnapshot) + Send + 'static,
        print: impl Fn(String) + Send + 'static,
    ) -> std::io::Result<Self> {
        let (asks, receiver) = unbounded();
        let peaks = Arc::<Mutex<Peaks>>::default();
        let step = Arc::<AtomicU64>::default();
        let mut room = Room {
            latest: None,
            step: step.clone(),
            phase: Phase::Start,
            records,
            probe: Box::new(probe),
            print: Box::new(print),
            peaks: peaks.clone(),
            complained: false,
        };
        let thread = std::thread::Builder::new().name("memory".into()).spawn(move || room.run(&receiver, period))?;
        Ok(Self { asks: Some(asks), step, peaks, thread: Some(thread) })
    }

    /// The step that records carry from now on; takes no sample.
    pub fn step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Begins a phase. Returns when the sample at its start is taken, a fraction of a millisecond: what comes after is not
    /// in that sample.
    pub fn phase(&self, phase: Phase) {
        let (done, taken) = unbounded();
        self.ask(Ask::Phase(phase, done));
        // An error: the thread has ended, and nobody answers.
        let _ = taken.recv();
    }

    /// Takes a sample and prints its line under `tag`, with the warning when there is cause.
    pub fn print(&self, tag: &str) {
        self.ask(Ask::Print(tag.into()));
    }

    /// Largest values so far.
    pub fn peaks(&self) -> Peaks {
        *lock(&self.peaks)
    }

    /// Takes the last sample, closes the records and yields the peaks.
    pub fn stop(mut self) -> Peaks {
        self.join();
        self.peaks()
    }

    fn ask(&self, ask: Ask) {
        if let Some(asks) = &self.asks {
            let _ = asks.send(ask);
        }
    }

    fn join(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for MemorySampler {
    fn drop(&mut self) {
        self.join();
    }
}

fn lock<T>(peaks: &Mutex<T>) -> MutexGuard<'_, T> {
    peaks.lock().unwrap_or_else(|e| e.into_inner())
}

/// Reading the page tables of a process costs about 10 ms per 500 MB: they are read again after so many times their
/// cost, however often a sample is asked for, so that looking takes a thousandth of a core at most. In between
/// samples are carried on.
const PACE_COSTS: u32 = 1000;

/// The latest snapshot, when it was taken and what it cost.
struct Latest {
    snapshot: MemorySnapshot,
    at: Instant,
    cost: Duration,
}

/// State of the sampling thread.
struct Room {
    latest: Option<Latest>,
    step: Arc<AtomicU64>,
    phase: Phase,
    records: RecordWriter,
    probe: Box<dyn Fn(&mut MemorySnapshot) + Send>,
    print: Box<dyn Fn(String) + Send>,
    peaks: Arc<Mutex<Peaks>>,
    complained: bool,
}

impl Room {
    fn run(&mut self, asks: &Receiver<Ask>, period: Duration) {
        let mut due = Instant::now();
        loop {
            match asks.recv_deadline(due) {
                Ok(Ask::Phase(phase, waiting)) => {
                    // The old phase's own end: the kernel's peak belongs to it.
                    let now = self.sample(Some(Duration::MAX));
                    forget_peak();
                    let ended = std::mem::replace(&mut self.phase, phase);
                    if let Some(now) = now {
                        if let (Some(gpu), Phase::FirstStep) = (now.gpu_line(), ended) {
                            (self.print)(gpu);
                        }
                        let mut first = now.at_its_peak();
                        (self.probe)(&mut first);
                        self.record(first);
                    }
                    drop(waiting);
                }
                Ok(Ask::Print(tag)) => {
                    if let Some(now) = self.sample(None) {
                        (self.print)(now.line(&tag));
                        now.warning().into_iter().flatten().for_each(|line| (self.print)(line));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.sample(None);
                    due = Instant::now() + period;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    self.sample(None);
                    return;
                }
            }
        }
    }

    /// Records what this process uses now. `old`: how old the last look at page tables may be.
    fn sample(&mut self, old: Option<Duration>) -> Option<MemorySnapshot> {
        let mut now = MemorySnapshot::default();
        (self.probe)(&mut now);
        match self.look(&mut now, old) {
            Ok(()) => {
                self.record(now);
                Some(now)
            }
            Err(error) => {
                self.complain(&format!("memory of this process is unknown: {error}"));
                None
            }
        }
    }

    fn record(&mut self, mut now: MemorySnapshot) {
        now.t = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        (now.step, now.phase) = (self.step.load(Ordering::Relaxed), self.phase);
        if let Err(error) = self.records.write(&now.record) {
            self.complain(&error.to_string());
        }
    }

    /// Fills in the process and the machine.
    fn look(&mut self, now: &mut MemorySnapshot, old: Option<Duration>) -> Result<(), procfs::ProcError> {
        let start = Instant::now();
        let fresh = |latest: &&Latest| latest.at.elapsed() < old.unwrap_or(latest.cost * PACE_COSTS);
        match self.latest.as_ref().filter(fresh) {
            Some(latest) => now.see_since(&latest.snapshot)?,
            None => {
                now.see()?;
                self.latest = Some(Latest { snapshot: *now, at: Instant::now(), cost: start.elapsed() });
            }
        }
        lock(&self.peaks).add(now, start.elapsed().as_secs_f64());
        Ok(())
    }

    fn complain(&mut self, text: &str) {
        if !std::mem::replace(&mut self.complained, true) {
            (self.print)(format!("warning: {text}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guide() -> MemorySnapshot {
        let record = MemoryRecord {
            rss_bytes: (15678.9 * MIB) as u64,
            system_used_bytes: (125.4 * GIB) as u64,
            system_total_bytes: (256.0 * GIB) as u64,
            ..Default::default()
        };
        MemorySnapshot { record, on_device: false }
    }

    #[test]
    fn the_line_has_the_guides_form() {
        let mut s = guide();
        let cpu = "[Step 100] Memory - Process: 15678.9MB (6.0%), System: 125.4/256.0GB (49.0%)";
        assert_eq!(s.line("Step 100"), cpu);
        (s.on_device, s.gpu_allocated_bytes, s.gpu_reserved_bytes) = (true, 8192 << 20, 9216 << 20);
        assert_eq!(s.line("Step 100"), format!("{cpu}, GPU: 8192.0MB allocated, 9216.0MB reserved"));
        assert!(s.line("After dataset creation").starts_with("[After dataset creation] Memory - Process: "));
    }

    #[test]
    fn the_gpu_line_has_the_guides_form() {
        let mut s = guide();
        assert_eq!((s.gpu_line(), s.step_line(1000).as_str()), (None, "Step 1000: CPU: 15678.9MB"));
        s.on_device = true;
        (s.gpu_allocated_bytes, s.gpu_reserved_bytes) = ((4096.2 * MIB) as u64, (1024.1 * MIB) as u64);
        assert_eq!(s.gpu_line().unwrap(), "GPU Memory: 4.00GB allocated, 1.00GB cached");
        s.rss_bytes = (2048.5 * MIB) as u64;
        assert_eq!(s.step_line(1000), "Step 1000: CPU: 2048.5MB, GPU: 4096.2MB, GPU Cached: 1024.1MB");
    }

    #[test]
    fn the_warning_comes_above_ninety_percent_only() {
        let mut s = guide();
        assert_eq!(s.warning(), None);
        s.system_used_bytes = (256.0 * GIB * 0.912) as u64;
        let [first, second] = s.warning().unwrap();
        assert_eq!(first, "⚠️  WARNING: System memory usage is critically high (91.2%)!");
        assert_eq!(second, "   Consider reducing CACHE_SIZE_GB or NUM_WORKERS in config.");
    }

    #[test]
    fn a_snapshot_sees_memory_that_this_process_touches() {
        // Other tests take and give back memory meanwhile: only this test's own part is certain.
        let held = vec![1u8; 256 << 20];
        let after = MemorySnapshot::take().unwrap();
        assert!(held.iter().all(|b| *b == 1));
        assert!(after.uss_bytes >= 256 << 20, "{after:?}");
        assert!(after.pss_bytes >= after.uss_bytes && after.pss_bytes <= after.rss_bytes, "{after:?}");
        assert!(after.system_used_bytes > 0 && after.system_used_bytes < after.system_total_bytes);
    }

    #[test]
    fn peaks_between_samples_belong_to_their_phase() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.rank0.jsonl");
        let records = RecordWriter::open(&path, None, drop).unwrap();
        let sampler = MemorySampler::start(Duration::from_secs(3600), records, |_| (), |_| ()).unwrap();
        sampler.phase(Phase::Train);
        let held = vec![1u8; 300 << 20];
        assert!(held.iter().all(|byte| *byte == 1));
        drop(held);
        sampler.phase(Phase::Val);
        sampler.stop();
        let text = std::fs::read_to_string(&path).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<MemoryRecord>(line).unwrap());
        let peak = records.filter(|record| record.phase == Phase::Train).map(|record| record.rss_peak_bytes).max();
        // Other tests use memory in either phase: only this test's own part is certain.
        assert!(peak.is_some_and(|peak| peak >= 300 << 20), "{text}");
    }

    #[test]
    fn the_sampler_records_phases_steps_and_peaks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory.rank0.jsonl");
        let (lines, printed) = unbounded();
        let probe = |now: &mut MemorySnapshot| {
            (now.cache_bytes, now.cache_hits, now.cache_misses, now.held.slots_bytes) = (5, 3, 2, 7);
        };
        let records = RecordWriter::open(&path, None, drop).unwrap();
        let period = Duration::from_secs(3600);
        let sampler = MemorySampler::start(period, records, probe, move |line| lines.send(line).unwrap()).unwrap();
        sampler.step(100);
        sampler.phase(Phase::Train);
        sampler.print("Step 100");
        let peaks = sampler.stop();
        let text = std::fs::read_to_string(&path).unwrap();
        let all: Vec<MemoryRecord> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        println!("{} samples, {:.3} ms each", peaks.samples, 1e3 * peaks.sampling_s / peaks.samples as f64);
        // The first record of a phase is the last of the one before.
        assert!((1..=all.len()).contains(&(peaks.samples as usize)), "{peaks:?}");
        assert!(all.len() >= 3 && all.iter().any(|r| r.step == 100 && r.phase == Phase::Train), "{text}");
        assert_eq!(all.iter().map(|r| r.pss_bytes).max(), Some(peaks.pss_bytes));
        assert_eq!((all[0].cache_bytes, all[0].cache_hits, all[0].cache_misses), (5, 3, 2));
        assert_eq!(all[0].held.slots_bytes, 7);
        assert!(all.iter().all(|r| r.anon_peak_bytes >= r.anon_bytes), "{text}");
        assert!(printed.try_iter().next().unwrap().starts_with("[Step 100] Memory - Process: "));
    }
}
