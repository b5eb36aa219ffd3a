//! Runs made up, healthy and not.

use super::*;
use crate::advise::MonitorSample;
use spec::contract::{
    CacheMode, CacheSummary, Cause, CgroupMemory, Effect, Ended, Event, Level, MemoryRecord, MetricsRecord, NodeRecord,
    Program, Relief, RunStatus, Summary,
};
use spec::plan::Plan;

fn healthy() -> Run {
    let mut plan = Plan::default();
    plan.budget.total_bytes = 10 << 30;
    let record = |i: u64| MetricsRecord {
        step: i,
        step_s: 0.1,
        data_wait_s: 0.001,
        samples_per_s: 1000.0,
        ..Default::default()
    };
    let memory = |i: u64| MemoryRecord { step: i, uss_bytes: (200 << 20) + (i % 7) * 4096, ..Default::default() };
    let cache = CacheSummary { policy: CacheMode::Pin, hits: 900, misses: 100, ..Default::default() };
    Run {
        plan: Some(plan),
        summary: Some(Summary {
            status: RunStatus::Finished,
            epochs: 3,
            peak_node_bytes: 1 << 30,
            cache,
            ..Default::default()
        }),
        metrics: (0..100).map(record).collect(),
        memory: vec![(0..400).map(memory).collect()],
        ..Run::default()
    }
}

fn kinds(run: &Run) -> Vec<&'static str> {
    let found = doctor(run, Language::En);
    assert_eq!(found.len(), doctor(run, Language::Zh).len());
    assert!(found.iter().all(|f| !f.symptom.is_empty() && !f.cause.is_empty() && !f.change.is_empty()));
    found.iter().map(|f| f.kind).collect()
}

#[test]
fn a_healthy_run_has_no_findings() {
    assert_eq!(kinds(&healthy()), Vec::<&str>::new());
    assert_eq!(kinds(&Run::default()), Vec::<&str>::new());
}

#[test]
fn each_symptom_is_told_with_its_cause() {
    let mut run = healthy();
    run.metrics.iter_mut().for_each(|r| r.data_wait_s = 0.05);
    assert_eq!(kinds(&run), ["data_wait"]);

    let mut run = healthy();
    run.summary.as_mut().unwrap().cache =
        CacheSummary { policy: CacheMode::Lru, hits: 10, misses: 90, ..Default::default() };
    assert_eq!(kinds(&run), ["hit_rate"]);
    assert!(doctor(&run, Language::En)[0].change.starts_with("data.cache: auto keeps"));
    run.summary.as_mut().unwrap().epochs = 1;
    assert_eq!(kinds(&run), Vec::<&str>::new());

    let mut run = healthy();
    run.memory[0].iter_mut().enumerate().for_each(|(i, r)| r.uss_bytes = (200 + i as u64) << 20);
    assert_eq!(kinds(&run), ["leak"]);

    let mut run = healthy();
    run.metrics[60..].iter_mut().for_each(|r| r.samples_per_s = 300.0);
    assert_eq!(kinds(&run), ["slower"]);

    let mut run = healthy();
    let killed = Ended { code: 137, words: "rank 1 failed: SIGKILL\nthe kernel killed it".into(), ..ended(40) };
    fail(&mut run, Ended { for_memory: true, ..killed.clone() });
    run.node.push(NodeRecord { level: Level::Critical, ..Default::default() });
    assert_eq!(kinds(&run), ["oom", "pressure"]);
    fail(&mut run, killed);
    assert_eq!(kinds(&run), ["killed", "pressure"]);
    let found = &doctor(&run, Language::En)[0];
    assert!(found.change.contains("SIGKILL") && !found.change.contains("memory.budget"), "{found:?}");
}

fn ended(step: u64) -> Ended {
    Ended { step: Some(step), code: 7, words: "rank 0 failed: the loss is NaN".into(), ..Ended::default() }
}

fn fail(run: &mut Run, how: Ended) {
    let summary = run.summary.as_mut().unwrap();
    (summary.status, summary.reason) = (RunStatus::Failed, Some(how.words.clone()));
    summary.ended = vec![how];
}

#[test]
fn how_a_run_ended_comes_first() {
    let mut run = healthy();
    fail(&mut run, ended(2));
    let found = &doctor(&run, Language::En)[0];
    assert_eq!((found.kind, found.cause.as_str()), ("failed", "rank 0 failed: the loss is NaN"));
    assert_eq!(found.symptom, "a rank failed at step 2, and the run ended (code 7)");
    assert!(found.change.contains("train.learning_rate"), "{found:?}");

    let summary = run.summary.as_mut().unwrap();
    (summary.status, summary.restarts, summary.reason) = (RunStatus::Finished, 1, None);
    summary.ended[0] = Ended { code: 137, for_memory: true, ..ended(40) };
    summary.reduced = vec!["train.microbatch: 8 → 4".into()];
    let found = &doctor(&run, Language::En)[0];
    assert!(found.symptom.ends_with("at step 40 (code 137) in attempt 1; the run was started again"), "{found:?}");
    assert!(found.change.starts_with("it went on with less: train.microbatch: 8 → 4; "), "{found:?}");

    let mut run = healthy();
    let summary = run.summary.as_mut().unwrap();
    (summary.status, summary.steps) = (RunStatus::Stopped, 30);
    assert_eq!(kinds(&run), Vec::<&str>::new(), "stopped by a person");
    run.summary.as_mut().unwrap().reason = Some("cgroup limit is 98.0% full".into());
    assert_eq!(kinds(&run), ["stopped"]);

    run.summary = None;
    run.open_ended = true;
    assert_eq!(kinds(&run), ["unfinished"]);
    assert!(
        doctor(&run, Language::En)[0].symptom.ends_with("records reach step 99"),
        "{:?}",
        doctor(&run, Language::En)
    );
    run.living = true;
    assert_eq!(kinds(&run), Vec::<&str>::new());
}

/// A record of the node in a cgroup of 1200 MiB.
fn node(t: f64, level: Level, job_mib: u64, used_mib: u64) -> NodeRecord {
    let cgroup = CgroupMemory { used_bytes: used_mib << 20, limit_bytes: Some(1200 << 20), ..Default::default() };
    NodeRecord {
        t,
        level,
        job_bytes: job_mib << 20,
        system_total_bytes: 24 << 30,
        system_available_bytes: 20 << 30,
        cgroup: Some(cgroup),
        ..Default::default()
    }
}

#[test]
fn who_took_the_memory_is_told_by_the_records() {
    let mut run = healthy();
    run.node = vec![
        node(0.0, Level::Normal, 10, 40),
        node(2.0, Level::Normal, 430, 470),
        node(4.0, Level::Critical, 435, 1180),
    ];
    let largest = Some(Program { name: "hog".into(), pid: 42, bytes: 700 << 20 });
    let cause = Cause::Others { grown_bytes: 715 << 20, largest };
    run.node[2].event = Some(Event::Level { changes: Vec::new(), cause });
    let found = &doctor(&run, Language::En)[0];
    // 1180 - 435 beside it, 30 at the start.
    assert!(found.cause.starts_with("other programs in the job's cgroup took 715.0 MiB more than at"), "{found:?}");
    let said =
        "\nthe watch said: other programs took 715.0MB since the start, the largest is hog (pid 42, 700.0MB): end it";
    assert!(found.cause.contains(said), "{found:?}");
    assert!(doctor(&run, Language::Zh)[0].cause.contains("最大的是 hog (pid 42, 700.0MB)"), "text is the reader's");
    assert!(found.change.starts_with("end them"), "{found:?}");

    let mut run = healthy();
    run.node = vec![node(0.0, Level::Normal, 10, 40), node(4.0, Level::Critical, 1100, 1150)];
    run.plan.as_mut().unwrap().budget.total_bytes = 1000 << 20;
    let found = &doctor(&run, Language::En)[0];
    assert!(found.cause.starts_with("the job itself used 1.07 GiB of its budget of 1000.0 MiB"), "{found:?}");

    run.node = vec![node(0.0, Level::Warning, 10, 1000)];
    run.summary.as_mut().unwrap().peak_node_bytes = 10 << 20;
    let found = &doctor(&run, Language::En)[0];
    assert!(found.cause.starts_with("other programs held 990.0 MiB of 1.17 GiB from the start"), "{found:?}");
}

#[test]
fn waiting_that_the_watch_caused_is_no_reason_for_more_threads() {
    let mut run = healthy();
    let event = |t: f64, action| {
        let done = Event::Relieved { action, effect: Effect::Done, before_bytes: 200 << 20, after_bytes: 180 << 20 };
        NodeRecord { event: Some(done), ..node(t, Level::Normal, 10, 40) }
    };
    run.metrics.iter_mut().enumerate().for_each(|(i, record)| record.t = i as f64);
    run.metrics[50..].iter_mut().for_each(|record| (record.data_wait_s, record.samples_per_s) = (0.09, 300.0));
    assert_eq!(kinds(&run), ["data_wait", "slower"]);
    assert!(doctor(&run, Language::En)[0].change.contains("num_workers and"));
    run.node = vec![event(49.5, Relief::PausePrefetch)];
    assert_eq!(kinds(&run), ["data_wait", "slower"]);
    for found in doctor(&run, Language::En) {
        assert!(found.cause.starts_with("the watch held prefetching back"), "{found:?}");
        assert!(!found.change.contains("num_workers"), "{found:?}");
    }
    // Let go soon: what came after is the loader's own.
    run.node.push(event(60.0, Relief::Resume));
    assert!(doctor(&run, Language::En)[0].change.contains("num_workers and"));
}

#[test]
fn without_any_cache_more_threads_are_not_the_first_thing() {
    let mut run = healthy();
    run.metrics.iter_mut().for_each(|r| r.data_wait_s = 0.05);
    let plan = run.plan.as_mut().unwrap();
    plan.budget.cache_policy = CacheMode::Off;
    plan.budget.lines = vec![spec::plan::BudgetLine::default()];
    let found = &doctor(&run, Language::En)[0];
    assert!(found.cause.contains("the page cache is off") && found.change.starts_with("data.cache: auto"), "{found:?}");
}

#[test]
fn a_monitors_log_is_judged_too() {
    let sample = |i: u32| MonitorSample {
        elapsed_time: 5.0 * f64::from(i),
        ram_used_gb: 8.0 + 0.02 * f64::from(i),
        ram_percent: 50.0,
        gpu_memory_percent: Some(97.5),
        ..Default::default()
    };
    let log = Run { monitor: (0..300).map(sample).collect(), ..Run::default() };
    assert_eq!(kinds(&log), ["pressure", "leak"]);
    assert_eq!(doctor(&log, Language::En)[0].symptom, "memory was nearly full: GPU 97.5 %");
}

#[test]
fn one_file_is_one() {
    let mut run = healthy();
    run.summary.as_mut().unwrap().files_skipped = 1;
    assert_eq!(doctor(&run, Language::En)[0].symptom, "1 file was left out");
}
