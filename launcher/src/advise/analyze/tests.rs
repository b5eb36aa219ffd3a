//! Tests of the numbers of a run.

use super::super::log::MonitorSample;
use super::*;
use spec::contract::{Event, NodeRecord, Relief};

const PAUSED: &str = "memory: prefetching is paused: asked for, no rank has answered yet";

fn run() -> Run {
    let mut plan = Plan::default();
    let line = |name, bytes: u64, per_rank_bytes| BudgetLine { name, bytes, per_rank_bytes, ..BudgetLine::default() };
    plan.budget.lines = vec![
        line(LineId::Launcher, 6 << 20, None),
        line(LineId::Libraries, 200 << 20, None),
        line(LineId::Runtime, 160 << 20, Some(80 << 20)),
        line(LineId::Activations, 200 << 20, Some(100 << 20)),
        line(LineId::Heap, 120 << 20, Some(60 << 20)),
        line(LineId::StagingSlots, 40 << 20, Some(20 << 20)),
        line(LineId::PageCache, 1 << 30, None),
    ];
    plan.budget.lines[1].bound = true;
    plan.budget.page_cache_bytes = 1 << 30;
    let record = |t: u64, phase, mib: u64| MemoryRecord {
        t: t as f64,
        step: t,
        phase,
        uss_bytes: mib << 20,
        anon_bytes: mib << 20,
        anon_peak_bytes: (mib + 7) << 20,
        file_bytes: 70 << 20,
        held: Held {
            model_bytes: 4 << 20,
            slots_bytes: 20 << 20,
            staging_bytes: t << 20,
            tensors_bytes: (90 + t) << 20,
            ..Held::default()
        },
        cache_bytes: 512 << 20,
        system_used_bytes: 1 << 30,
        system_total_bytes: 4 << 30,
        ..Default::default()
    };
    let node = |t: u64, event| NodeRecord {
        t: t as f64,
        launcher_bytes: 5 << 20,
        job_bytes: (1 + t) << 30,
        event,
        ..Default::default()
    };
    Run {
        plan: Some(plan),
        memory: vec![
            vec![record(0, Phase::Train, 100), record(5, Phase::Train, 190), record(9, Phase::Val, 180)],
            vec![record(0, Phase::Train, 102), record(5, Phase::Train, 260), record(9, Phase::Val, 270)],
        ],
        node: vec![node(0, None), node(2, Some(Event::Unanswered { action: Relief::PausePrefetch }))],
        ..Run::default()
    }
}

#[test]
fn statistics_trend_and_peaks_by_phase() {
    let found = analyze(&run());
    assert_eq!((found.samples, found.duration_s), (2, 2.0));
    assert_eq!(found.used, Range { least: 1.0, mean: 2.0, most: 3.0 });
    assert_eq!(found.machine_percent.unwrap().most, 25.0);
    let peaks = [(Phase::Train, 260 << 20), (Phase::Val, 270 << 20)];
    assert_eq!(found.by_phase, peaks);
    assert_eq!(serde_json::to_value(&found).unwrap()["by_phase"]["val"], 270 << 20);
    assert_eq!(found.events, [(2.0, PAUSED.to_owned())]);
    assert!(matches!(found.growth, Growth::NotJudged { samples: 3, .. }));
}

#[test]
fn a_plan_is_held_against_the_start_it_is_of() {
    let mut again = run();
    for records in &mut again.memory {
        let second = records.iter().map(|record| MemoryRecord {
            t: record.t + 100.0,
            step: record.step + 9,
            uss_bytes: record.uss_bytes / 2,
            anon_bytes: record.anon_bytes / 2,
            anon_peak_bytes: record.anon_peak_bytes / 2,
            ..*record
        });
        let start = |t: f64| MemoryRecord { t, phase: Phase::Start, ..MemoryRecord::default() };
        let first = std::iter::once(start(-1.0)).chain(records.iter().copied());
        *records = first.chain([start(99.0)]).chain(second).collect();
    }
    again.summary = Some(spec::contract::Summary { restarts: 1, peak_node_bytes: 9 << 30, ..Default::default() });
    let late = NodeRecord { t: 102.0, launcher_bytes: 4 << 20, job_bytes: 1 << 30, ..Default::default() };
    again.node.push(late);
    let found = analyze(&again);
    let seen = |name: &str| found.checks.iter().find(|check| check.name == name).unwrap().measured_bytes >> 20;
    assert_eq!((seen("a rank, in all"), seen("launcher"), seen("all of the job")), (138, 4, 1 << 10));
    assert_eq!(found.events[0].0, 3.0, "since the first record of all");
    let text = found.to_string();
    assert!(text.contains("started 2 times: the last start beside its plan\n"), "{text}");
    assert!(text.contains(&format!("\n  1       3.0 s  {PAUSED}")), "{text}");
}

#[test]
fn the_fullest_device_is_shown_with_mean_and_most() {
    let sample = |percent: f64| MonitorSample { gpu_memory_percent: Some(percent), ..Default::default() };
    let log = Run { monitor: vec![sample(90.0), sample(97.5)], ..Run::default() };
    let text = analyze(&log).to_string();
    assert!(text.contains("GPU          mean 93.8, at most 97.5 % full"), "{text}");
    let gpu = |index, used_bytes| spec::contract::GpuUse { index, used_bytes, total_bytes: 100 };
    let record = NodeRecord { gpus: vec![gpu(0, 40), gpu(1, 60)], ..Default::default() };
    let watched = Run { node: vec![record], ..Run::default() };
    assert_eq!(analyze(&watched).gpu_percent.unwrap().most, 60.0);
}

#[test]
fn the_plan_is_held_against_the_truth_line_by_line() {
    let found = analyze(&run());
    let check = |name: &str| found.checks.iter().find(|check| check.name == name).unwrap().clone();
    let seen = |name: &str| (check(name).measured_bytes >> 20, check(name).verdict());
    assert_eq!(seen("runtime"), (78, Verdict::True));
    assert_eq!(seen("activations"), (90 + 9 - 4, Verdict::True));
    // 277 - 78 - what was held in that phase: 4 + 20 + 9; and without the tensors.
    assert_eq!(seen("heap"), (166 - 95, Verdict::TooSmall));
    assert_eq!(seen("staging slots"), (20, Verdict::True));
    assert_eq!(seen("libraries"), (70, Verdict::Bound));
    assert_eq!(seen("launcher"), (5, Verdict::TooLarge));
    assert_eq!(seen("page cache"), (512, Verdict::TooLarge));
    assert_eq!(seen("a rank, in all").0, 277);
    // The sampled sum is more than launcher, libraries, cache and both ranks.
    assert_eq!(seen("all of the job").0, 3 << 10);
    let text = found.to_string();
    assert!(text.contains("heap                    60.0 MiB    71.0 MiB  0.85  too small\n"), "{text}");
    assert!(text.contains(&format!("2.0 s  {PAUSED}")), "{text}");
    let json = serde_json::to_value(&found).unwrap();
    let named = |name: &str| json["checks"].as_array().unwrap().iter().find(|c| c["name"] == name).unwrap().clone();
    assert_eq!((&named("runtime")["verdict"], &named("libraries")["verdict"]), (&"true".into(), &"bound".into()));
    assert_eq!(named("launcher")["ratio"], 1.2);
}

#[test]
fn what_forked_ranks_have_in_common_counts_once() {
    let mut run = run();
    let lines = &mut run.plan.as_mut().unwrap().budget.lines;
    lines.push(BudgetLine { name: LineId::Interpreter, bytes: 50 << 20, ..BudgetLine::default() });
    run.node.clear();
    let found = analyze(&run);
    let seen = |name: &str| found.checks.iter().find(|check| check.name == name).unwrap().measured_bytes >> 20;
    assert_eq!((seen("runtime"), seen("a rank, in all")), (78 - 50, 277 - 50));
    let each: u64 = run.memory.iter().map(|of| of.iter().map(|r| r.anon_peak_bytes >> 20).max().unwrap() - 50).sum();
    assert_eq!(seen("all of the job"), 70 + 512 + 50 + each);
    // With an interpreter each, its bytes are the rank's.
    run.plan.as_mut().unwrap().budget.lines.last_mut().unwrap().per_rank_bytes = Some(50 << 20);
    let found = analyze(&run);
    let seen = |name: &str| found.checks.iter().find(|check| check.name == name).unwrap().measured_bytes >> 20;
    assert_eq!((seen("runtime"), seen("a rank, in all")), (78 - 50, 277));
}

#[test]
fn a_rank_that_never_trained_and_old_records_are_no_measure() {
    assert!(RankUse::of(&[MemoryRecord { phase: Phase::Other, anon_bytes: 9, ..Default::default() }], 0).is_none());
    let old = Run { memory: vec![vec![MemoryRecord { phase: Phase::Train, ..Default::default() }]], ..run() };
    let found = analyze(&old);
    assert!(found.checks.iter().any(|check| check.verdict() == Verdict::NotMeasured), "{:?}", found.checks);
    assert!(!found.checks.iter().any(|check| check.name == "a rank, in all"));
}

#[test]
fn a_monitors_log_and_nothing_at_all_are_analysed() {
    let sample = |t: f64, gb: f64| MonitorSample {
        elapsed_time: t,
        ram_used_gb: gb,
        ram_percent: 10.0 * gb,
        ..Default::default()
    };
    let log = Run { monitor: vec![sample(0.0, 4.0), sample(5.0, 6.0)], ..Run::default() };
    let found = analyze(&log);
    assert_eq!((found.used.mean, found.machine_percent.unwrap().most), (5.0, 60.0));
    assert_eq!(analyze(&Run::default()), Analysis::default());
}
