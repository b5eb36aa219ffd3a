//! Looks at made-up samples: what is said, and how often.

use super::*;
use crate::watch::Planned;
use host::machine::{GroupNow, MemoryNow, Probe};
use spec::contract::Effect;
use std::sync::Mutex;

#[derive(Default)]
struct Log {
    said: Mutex<Vec<String>>,
    orders: Mutex<Vec<Relief>>,
    cache: Mutex<CacheNow>,
    stops: Mutex<u32>,
}

impl Hands for Log {
    fn say(&self, text: &str) {
        self.said.lock().unwrap().push(text.into());
    }
    fn job_bytes(&self, _bytes: u64) {}
    fn relieve(&self, _order: u64, action: &Relief) {
        self.orders.lock().unwrap().push(action.clone());
    }
    fn stop(&self) {
        *self.stops.lock().unwrap() += 1;
    }
    fn cache(&self) -> Option<CacheNow> {
        Some(*self.cache.lock().unwrap())
    }
    fn resize_cache(&self, bytes: u64) -> u64 {
        let mut cache = self.cache.lock().unwrap();
        (cache.wanted_bytes, cache.resident_bytes) = (bytes, bytes);
        bytes
    }
}

const GIB: u64 = 1 << 30;

fn spec() -> WatchSpec {
    let planned = Planned {
        budget_bytes: 8 * GIB,
        job_bytes: 4 * GIB,
        rank_bytes: GIB,
        threads: 4,
        micro_batch: 2,
        ..Planned::default()
    };
    WatchSpec { warn: true, response: true, planned, ..WatchSpec::silent() }
}

fn sample(used: u64) -> Sample {
    let group = GroupNow { version: 1, used_bytes: used, limit_bytes: Some(16 * GIB), ..GroupNow::default() };
    let memory =
        MemoryNow { total_bytes: 64 * GIB, available_bytes: 60 * GIB, group: Some(group), ..Default::default() };
    let rank = ProcessNow { rss_bytes: GIB, own_bytes: GIB / 2, pss_bytes: GIB, ..ProcessNow::default() };
    Sample { memory, ranks: vec![rank], ..Sample::default() }
}

/// One look, as [`Watch::look`] takes it, at a sample that was made up.
fn see(watch: &mut Watch, sample: Sample, now: f64) {
    let cache = watch.hands.cache().unwrap();
    watch.remember(&sample);
    watch.find_leaks(&sample, now);
    let scales = watch.scales(&sample);
    watch.warn(&scales, &sample, now);
    watch.settle_due(&cache, now);
    watch.respond(&scales, &sample, &cache, now);
    watch.remember_fullest(&sample, false, now);
    watch.findings.last = Some(sample);
}

fn watch<'a>(spec: &'a WatchSpec, log: &'a Log) -> Watch<'a> {
    Watch::new(spec, &[(0, std::process::id() as i32)], MemoryMeter::new(&Probe::default(), None), log)
}

#[test]
fn injected_values_give_note_warning_and_danger_once_each() {
    let (spec, log) = (WatchSpec { response: false, ..spec() }, Log::default());
    let mut watch = watch(&spec, &log);
    see(&mut watch, sample(GIB), 0.0);
    assert_eq!(*log.said.lock().unwrap(), Vec::<String>::new());
    for (n, tenths) in [115, 131, 150, 150, 131, 150, 115].into_iter().cycle().take(400).enumerate() {
        see(&mut watch, sample(tenths * GIB / 10), 1.0 + 0.5 * n as f64);
    }
    let said = log.said.lock().unwrap().join("\n");
    for mark in ["🟡 note: 71.9% of the cgroup limit", "🟠 warning: ", "🔴 critical: 93.8% of the cgroup limit"] {
        assert_eq!(said.matches(mark).count(), 1, "{said}");
    }
    // The same rise again and again is no news for ten minutes.
    assert!(said.matches("critical").count() == 1, "{said}");
    assert!(said.contains("other programs took"), "{said}");
}

#[test]
fn pressure_climbs_the_ladder_with_bytes_before_and_after_and_stops_cleanly() {
    let (spec, log) = (spec(), Log::default());
    *log.cache.lock().unwrap() = CacheNow { capacity_bytes: GIB, wanted_bytes: GIB, resident_bytes: GIB };
    let mut watch = watch(&spec, &log);
    see(&mut watch, sample(GIB), 0.0);
    for n in 0..1000 {
        see(&mut watch, sample(159 * GIB / 10), 1.0 + 0.1 * f64::from(n));
        for order in 1..=watch.orders {
            let (uss_before_bytes, uss_after_bytes) = (900 << 20, 800 << 20);
            let (text, effect) = ("done".into(), Effect::Halved { micro_batch: [2, 1], accumulation: [1, 2] });
            let relieved = Relieved { order, step: 1, uss_before_bytes, uss_after_bytes, text, effect };
            watch.take(Told::Relieved { rank: 0, relieved }, 1.0 + 0.1 * f64::from(n));
        }
    }
    let orders = log.orders.lock().unwrap();
    assert!(
        matches!(
            orders[..],
            [
                Relief::PausePrefetch,
                Relief::Decoders { threads: 2 },
                Relief::TrimAllocators,
                Relief::HalveMicroBatch,
                Relief::Stop { .. }
            ]
        ),
        "{orders:?}"
    );
    let said = log.said.lock().unwrap().join("\n");
    for line in [
        "stays (micro-batch 2 → 1, accumulation 1 → 2): 900.0MB → 800.0MB",
        "memory: page cache shrinks: 1.0GB → 512.0MB",
        "99.4% of the cgroup limit after all that can be given back was given",
    ] {
        assert!(said.contains(line), "{line}\nis not in\n{said}");
    }
    assert!(watch.findings.stopped_for.as_ref().is_some_and(|reason| reason.contains("99.4%")));
    assert_eq!(*log.stops.lock().unwrap(), 1, "ranks that do not obey are asked by a signal, once");
}

#[test]
fn a_planned_job_that_fills_its_budget_says_nothing() {
    let log = Log::default();
    let mut spec = spec();
    (spec.planned.budget_bytes, spec.planned.job_bytes) = (8 * GIB, 8 * GIB);
    let mut watch = watch(&spec, &log);
    let mut full = sample(8 * GIB);
    full.cache_bytes = 7 * GIB;
    for n in 0..200 {
        see(&mut watch, full.clone(), 0.5 * f64::from(n));
    }
    assert_eq!(*log.said.lock().unwrap(), Vec::<String>::new());
    assert!(log.orders.lock().unwrap().is_empty());
}

#[test]
fn a_leaking_rank_is_named_once_with_slope_and_time_left() {
    let (spec, log) = (spec(), Log::default());
    let mut watch = watch(&spec, &log);
    for n in 0..400u64 {
        watch.take(Told::Step(n * 5), n as f64);
        let mut sample = sample(GIB);
        sample.ranks[0].own_bytes = (200 << 20) + n * (1 << 20);
        see(&mut watch, sample, n as f64);
    }
    let said = log.said.lock().unwrap();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("memory of rank 0 grows by 200.0 MiB per 1000 steps: a leak?"), "{said:?}");
    assert!(said[0].contains(" h)"), "{said:?}");
}

#[test]
fn of_several_that_change_in_one_look_each_is_told_and_normal_only_when_all_are() {
    let (spec, log) = (WatchSpec { response: false, ..spec() }, Log::default());
    let mut watch = watch(&spec, &log);
    see(&mut watch, sample(GIB), 0.0);
    let full = |group_gib: u64, available_gib: u64| {
        let mut sample = sample(group_gib * GIB);
        sample.memory.available_bytes = available_gib * GIB;
        sample
    };
    see(&mut watch, full(15, 15), 1.0);
    let said = std::mem::take(&mut *log.said.lock().unwrap());
    assert!(said[0].starts_with("🔴 critical: 93.8% of the cgroup limit"), "{said:?}");
    assert_eq!(said.iter().filter(|line| line.starts_with("🟡 note: system memory 76.6%")).count(), 1, "{said:?}");
    assert_eq!(said.iter().filter(|line| line.starts_with("   ")).count(), 1, "advice comes once: {said:?}");
    for second in 2..40 {
        see(&mut watch, full(15, 60), f64::from(second));
    }
    assert_eq!(*log.said.lock().unwrap(), Vec::<String>::new(), "the cgroup is critical still");
    for second in 40..80 {
        see(&mut watch, full(1, 60), f64::from(second));
    }
    let said = log.said.lock().unwrap();
    assert!(said.len() == 1 && said[0].starts_with("memory is back to normal: 6.2% of the cgroup limit"), "{said:?}");
}

#[test]
fn the_fullest_sample_before_a_kill_is_kept() {
    let (spec, log) = (spec(), Log::default());
    let mut watch = watch(&spec, &log);
    let used = |watch: &Watch| watch.findings.fullest.as_ref().unwrap().sample.memory.group.unwrap().used_bytes / GIB;
    for (second, gib) in [(0, 1), (1, 15), (2, 4)] {
        see(&mut watch, sample(gib * GIB), f64::from(second));
    }
    assert_eq!(used(&watch), 15);
    let mut killed = sample(2 * GIB);
    killed.ranks[0] = ProcessNow::default();
    (3..60).for_each(|second| see(&mut watch, killed.clone(), f64::from(second)));
    assert_eq!(used(&watch), 15, "what is left after the kill explains nothing");
    (60..80).for_each(|second| see(&mut watch, sample(3 * GIB), f64::from(second)));
    assert_eq!(used(&watch), 3, "of long ago is not of late");
}

#[test]
fn a_program_that_cannot_be_asked_to_stop_goes_on() {
    let mut spec = spec();
    spec.foreign = true;
    let log = Log::default();
    let mut watch = watch(&spec, &log);
    see(&mut watch, sample(GIB), 0.0);
    for n in 0..600 {
        see(&mut watch, sample(159 * GIB / 10), 1.0 + 0.1 * f64::from(n));
    }
    let said = log.said.lock().unwrap().join("\n");
    assert_eq!(said.matches("no process of the program takes SIGUSR1").count(), 1, "{said}");
    assert_eq!((*log.stops.lock().unwrap(), watch.findings.stopped_for.clone()), (0, None));
}
