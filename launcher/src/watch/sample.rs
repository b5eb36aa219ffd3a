//! One look at the node and at every rank, from outside, at a cost that training does not feel.
//!
//! `smaps_rollup` (PSS, USS) walks a process's page tables: about 10 ms per 500 MB. It is read rarely, and what RSS has
//! grown by since (`statm`, microseconds) carries it on in between: anonymous memory, which is what grows, is exact.

use host::machine::{GpuMeter, MemoryMeter, MemoryNow, Resident, Shares, descendants, place_of};
use spec::contract::{CgroupMemory, GpuUse, RankMemory};
use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

/// Share of a core that reading page tables may take: one in so many; and under pressure, or while a process starts.
const SPARED: u32 = 1000;
const SPARED_IN_A_HURRY: u32 = 50;
/// RSS that moved by this share of itself, one in so many, since page tables were read: the process has just started, say.
const MOVED: u64 = 8;
/// Page tables are read no more often than this.
const LEAST_PAUSE: Duration = Duration::from_millis(100);

/// A process that is watched.
#[derive(Clone, Debug)]
struct Subject {
    pid: i32,
    /// PSS, USS and shared bytes as last read, and anonymous and shared pages of `statm` at that moment.
    read: Shares,
    then: Resident,
    /// Number and count of ranks by its environment, where it descends from a rank.
    place: Option<(u32, u32)>,
}

/// One process at one moment, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessNow {
    pub rss_bytes: u64,
    pub pss_bytes: u64,
    /// PSS without shared memory.
    pub own_bytes: u64,
    pub uss_bytes: u64,
    pub shared_bytes: u64,
}

impl ProcessNow {
    /// Counts another process of the same rank.
    fn add(&mut self, other: &Self) {
        self.rss_bytes += other.rss_bytes;
        self.pss_bytes += other.pss_bytes;
        self.own_bytes += other.own_bytes;
        self.uss_bytes += other.uss_bytes;
        self.shared_bytes += other.shared_bytes;
    }

    /// Without a part of it.
    fn less(&self, part: &Self) -> Self {
        Self {
            rss_bytes: self.rss_bytes.saturating_sub(part.rss_bytes),
            pss_bytes: self.pss_bytes.saturating_sub(part.pss_bytes),
            own_bytes: self.own_bytes.saturating_sub(part.own_bytes),
            uss_bytes: self.uss_bytes.saturating_sub(part.uss_bytes),
            shared_bytes: self.shared_bytes.saturating_sub(part.shared_bytes),
        }
    }
}

/// The node at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// Seconds since the Unix epoch.
    pub t: f64,
    pub memory: MemoryNow,
    pub launcher: ProcessNow,
    /// In the order of the job's ranks; all zero: it has ended.
    pub ranks: Vec<ProcessNow>,
    /// Ranks that the one rank of this job has started itself (torchrun's, say), by their numbers: parts of it.
    pub inner: Vec<(u32, ProcessNow)>,
    /// Memory behind the page cache.
    pub cache_bytes: u64,
    pub gpus: Vec<GpuUse>,
}

impl Sample {
    /// All processes of the job and the page cache, shared pages once.
    pub fn job_bytes(&self) -> u64 {
        self.cache_bytes + self.launcher.own_bytes + self.ranks.iter().map(|rank| rank.own_bytes).sum::<u64>()
    }

    /// Sum of PSS over the job's processes.
    pub fn pss_bytes(&self) -> u64 {
        self.launcher.pss_bytes + self.ranks.iter().map(|rank| rank.pss_bytes).sum::<u64>()
    }

    /// How full the node is, or the cgroup that binds: the fuller of the two, 0 to 1.
    pub fn share(&self) -> f64 {
        let memory = &self.memory;
        let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let node = ratio(memory.total_bytes.saturating_sub(memory.available_bytes), memory.total_bytes);
        let group = memory.group.and_then(|group| Some(ratio(group.used_bytes, group.limit_bytes?)));
        group.map_or(node, |group| group.max(node))
    }

    /// True if a cgroup's limit binds.
    pub fn is_limited(&self) -> bool {
        self.memory.group.is_some_and(|group| group.limit_bytes.is_some())
    }

    /// Physical memory that others use on the node.
    pub fn others_bytes(&self) -> u64 {
        let used = self.memory.total_bytes.saturating_sub(self.memory.available_bytes);
        used.saturating_sub(self.job_bytes())
    }

    /// The same within the cgroup that binds.
    pub fn others_in_group_bytes(&self) -> Option<u64> {
        self.memory.group.map(|group| group.used_bytes.saturating_sub(self.job_bytes()))
    }

    /// The cgroup as in `memory.node.jsonl`.
    pub fn cgroup(&self) -> Option<CgroupMemory> {
        self.memory.group.map(|group| CgroupMemory {
            version: group.version,
            used_bytes: group.used_bytes,
            limit_bytes: group.limit_bytes,
            oom_kills: group.oom_kills,
            high_events: group.high_events,
            max_events: group.max_events,
        })
    }

    /// The ranks as in `memory.node.jsonl`; `numbers`: of the ranks.
    pub fn ranks(&self, numbers: &[u32]) -> Vec<RankMemory> {
        let one = |rank: u32, now: &ProcessNow| RankMemory {
            rank,
            rss_bytes: now.rss_bytes,
            pss_bytes: now.pss_bytes,
            uss_bytes: now.uss_bytes,
            shared_bytes: now.shared_bytes,
        };
        if let ([_, ..], [all], [number]) = (&self.inner[..], &self.ranks[..], numbers) {
            // What started them is the first rank itself (Lightning), or counts with it (torchrun).
            let mut parts: BTreeMap<u32, ProcessNow> = self.inner.iter().copied().collect();
            let rest = self.inner.iter().fold(*all, |rest, (_, part)| rest.less(part));
            parts.entry(*number).or_default().add(&rest);
            return parts.iter().map(|(rank, now)| one(*rank, now)).collect();
        }
        numbers.iter().zip(&self.ranks).map(|(rank, now)| one(*rank, now)).collect()
    }
}

/// Takes samples.
pub struct Sampler {
    meter: MemoryMeter,
    gpu: Option<GpuMeter>,
    launcher: Subject,
    ranks: Vec<Subject>,
    /// Processes that descend from each rank; `None`: ranks start none, or their memory is their own.
    families: Option<Vec<Vec<Subject>>>,
    /// Time and cost of the last reading of page tables. `None` means never.
    read: Option<(Instant, Duration)>,
}

impl Sampler {
    /// `pids`: of the ranks.
    pub fn new(meter: MemoryMeter, gpu: Option<GpuMeter>, pids: &[i32]) -> Self {
        let subject = Subject::new;
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let ranks = pids.iter().map(|pid| subject(*pid)).collect();
        Self { meter, gpu, launcher: subject(own), ranks, families: None, read: None }
    }

    /// Counts with each rank the processes that it starts.
    pub fn with_families(self) -> Self {
        Self { families: Some(self.ranks.iter().map(|_| Vec::new()).collect()), ..self }
    }

    /// Adds to each rank what descends from it now.
    fn add_families(&mut self, ranks: &mut [ProcessNow], whole: bool) {
        for ((family, rank), now) in self.families.iter_mut().flatten().zip(&self.ranks).zip(ranks) {
            if now.rss_bytes == 0 {
                continue;
            }
            let pids = descendants(rank.pid);
            family.retain(|subject| pids.contains(&subject.pid));
            let known: Vec<i32> = family.iter().map(|subject| subject.pid).collect();
            let fresh = pids.into_iter().filter(|pid| !known.contains(pid));
            family.extend(fresh.map(Subject::new));
            family.iter_mut().for_each(|subject| now.add(&subject.look(whole)));
        }
    }

    /// Ranks that the one rank has started itself, by number: processes whose environment names another count of ranks.
    fn inner(&mut self, whole: bool) -> Vec<(u32, ProcessNow)> {
        let (Some([family]), [rank]) = (self.families.as_deref_mut(), &mut self.ranks[..]) else { return Vec::new() };
        rank.place = rank.place.or_else(|| place_of(rank.pid));
        let outer = rank.place.map(|(_, world)| world);
        // A process that was just forked has its parent's environment until it becomes another program.
        let undecided = |place: Option<(u32, u32)>| place.map(|(_, world)| world) == outer || place.is_none();
        for subject in family.iter_mut().filter(|subject| whole || undecided(subject.place)) {
            subject.place = place_of(subject.pid);
        }
        let mut found = BTreeMap::<u32, ProcessNow>::new();
        for subject in family.iter_mut() {
            if let Some((rank, world)) = subject.place
                && Some(world) != outer
            {
                found.entry(rank).or_default().add(&subject.look(false));
            }
        }
        found.into_iter().collect()
    }

    /// `cache_bytes`: memory behind the page cache. `hurried`: read page tables more often.
    pub fn take(&mut self, cache_bytes: u64, hurried: bool) -> Sample {
        let began = Instant::now();
        let whole = self.read.is_none_or(|(at, cost)| {
            let waited = |costs: u32| at.elapsed() >= (cost * costs).max(LEAST_PAUSE);
            waited(SPARED) || waited(SPARED_IN_A_HURRY) && (hurried || self.ranks.iter().any(Subject::has_moved))
        });
        let launcher = self.launcher.look(whole);
        let mut ranks: Vec<ProcessNow> = self.ranks.iter_mut().map(|rank| rank.look(whole)).collect();
        self.add_families(&mut ranks, whole);
        let inner = self.inner(whole);
        if whole {
            self.read = Some((began, began.elapsed()));
        }
        let gpus = self.gpu.as_ref().map(GpuMeter::read).unwrap_or_default();
        let gpu = |(index, used_bytes, total_bytes)| GpuUse { index, used_bytes, total_bytes };
        Sample {
            t: unix_time(),
            memory: self.meter.read(),
            launcher,
            ranks,
            inner,
            cache_bytes,
            gpus: gpus.into_iter().map(gpu).collect(),
        }
    }
}

impl Subject {
    fn new(pid: i32) -> Self {
        Self { pid, read: Shares::default(), then: Resident::default(), place: None }
    }

    fn has_moved(&self) -> bool {
        Resident::of(self.pid).is_some_and(|now| now.rss.abs_diff(self.then.rss) > self.then.rss / MOVED)
    }

    fn look(&mut self, whole: bool) -> ProcessNow {
        let Some(now) = Resident::of(self.pid).filter(|now| now.rss > 0) else {
            return ProcessNow::default();
        };
        if (whole || self.read.pss == 0)
            && let Some(read) = Shares::of(self.pid)
        {
            (self.read, self.then) = (read, now);
        }
        let Shares { pss, pss_shmem, uss, shared } = self.read;
        let grown = |bytes: u64| (bytes + now.anonymous).saturating_sub(self.then.anonymous);
        let own_bytes = grown(pss.saturating_sub(pss_shmem));
        // A moment later than `statm`: no part is more than the whole.
        let pss_bytes = grown(pss).min(now.rss);
        let uss_bytes = grown(uss).min(pss_bytes);
        ProcessNow { rss_bytes: now.rss, pss_bytes, own_bytes, uss_bytes, shared_bytes: shared }
    }
}

/// Seconds since the Unix epoch.
pub fn unix_time() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::machine::Probe;

    fn sampler(pids: &[i32]) -> Sampler {
        Sampler::new(MemoryMeter::new(&Probe::default(), None), None, pids)
    }

    #[test]
    fn own_memory_is_seen_and_a_missing_process_is_nothing() {
        let mut sampler = sampler(&[i32::MAX]);
        let sample = sampler.take(0, false);
        let own = sample.launcher;
        assert!((100 << 10..4 << 30).contains(&own.pss_bytes), "{own:?}");
        assert!(own.uss_bytes <= own.pss_bytes && own.pss_bytes <= own.rss_bytes, "{own:?}");
        assert_eq!(sample.ranks, [ProcessNow::default()]);
        assert!(sample.memory.total_bytes > sample.memory.available_bytes && sample.others_bytes() > 0);
    }

    #[test]
    fn growth_between_two_readings_of_the_page_tables_is_carried_on() {
        let mut sampler = sampler(&[]);
        sampler.take(0, false);
        sampler.read = Some((Instant::now(), Duration::from_secs(60)));
        // Other tests take and give back memory meanwhile: only a lot is certain.
        let before = sampler.take(0, false).launcher;
        let held = std::hint::black_box(vec![1u8; 512 << 20]);
        let after = sampler.take(0, false).launcher;
        assert!(held.iter().all(|byte| *byte == 1));
        assert!(after.uss_bytes > before.uss_bytes + (256 << 20), "{before:?} {after:?}");
        assert!(after.pss_bytes > before.pss_bytes + (256 << 20), "{before:?} {after:?}");
    }

    #[test]
    fn what_a_rank_starts_counts_as_its_own() {
        let mut shell = std::process::Command::new("sh").args(["-c", "sleep 60 & wait"]).spawn().unwrap();
        let pid = shell.id() as i32;
        let began = Instant::now();
        while descendants(pid).is_empty() {
            assert!(began.elapsed() < Duration::from_secs(60));
        }
        let alone = sampler(&[pid]).take(0, false).ranks[0];
        let family = sampler(&[pid]).with_families().take(0, false).ranks[0];
        descendants(pid).into_iter().filter_map(rustix::process::Pid::from_raw).for_each(|child| {
            rustix::process::kill_process(child, rustix::process::Signal::KILL).unwrap();
        });
        shell.kill().unwrap();
        shell.wait().unwrap();
        assert!(family.rss_bytes > alone.rss_bytes && alone.rss_bytes > 0, "{family:?} {alone:?}");
        assert!(family.pss_bytes <= family.rss_bytes);
    }

    #[test]
    fn ranks_inside_a_rank_are_named_by_their_own_numbers() {
        let now = |bytes| ProcessNow { rss_bytes: bytes, pss_bytes: bytes, ..ProcessNow::default() };
        let sample =
            |inner: &[(u32, ProcessNow)]| Sample { ranks: vec![now(100)], inner: inner.to_vec(), ..Sample::default() };
        let listed = |inner: &[(u32, ProcessNow)]| -> Vec<(u32, u64)> {
            sample(inner).ranks(&[0]).into_iter().map(|rank| (rank.rank, rank.pss_bytes)).collect()
        };
        assert_eq!(
            listed(&[(0, now(30)), (1, now(50))]),
            [(0, 50), (1, 50)],
            "what started them counts with the first"
        );
        assert_eq!(listed(&[(1, now(50))]), [(0, 50), (1, 50)], "it is the first");
        assert_eq!(listed(&[]), [(0, 100)]);
    }

    #[test]
    fn cost_of_a_sample() {
        let mut sampler = sampler(&[std::process::id() as i32; 3]);
        sampler.take(0, false);
        sampler.read = Some((Instant::now(), Duration::from_secs(60)));
        let began = Instant::now();
        (0..50).for_each(|_| drop(sampler.take(0, false)));
        let each = began.elapsed() / 50;
        println!(
            "a sample without page tables: {each:?}, {:.3} % of a core at two per second",
            each.as_secs_f64() * 200.0
        );
    }
}
