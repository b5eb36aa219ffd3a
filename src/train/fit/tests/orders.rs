//! Orders from outside, on ranks that get them at different times.

use super::*;

/// Gives `action` to each rank after its own number of steps.
fn after(steps: [u64; 3], number: u64, action: Relief) -> impl Fn(usize, Event, &Controls) + Sync {
    move |rank, event, controls| {
        if matches!(event, Event::Step(step) if step == steps[rank]) {
            controls.order(number, action.clone());
        }
    }
}

#[test]
fn ranks_that_are_ordered_at_different_times_halve_at_the_same_step() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let plain = run(&Job::new(&a));
    let ranks = run_with(&Job::new(&b), &after([1, 3, 2], 7, Relief::HalveMicroBatch));
    for (ended, plain) in ranks.iter().zip(&plain) {
        // Rank 1 hears of it after step 3: step 4 agrees, step 5 is the first in halves.
        assert_eq!(sizes(ended)[..6], [4, 4, 4, 4, 2, 2]);
        assert_eq!(order(ended, &[]), order(plain, &[]));
        close(&ended.params, &plain.params, 1e-6);
        let answers = &ended.told.answers;
        assert_eq!(answers.len(), 1, "{answers:?}");
        assert_eq!((answers[0].order, answers[0].step), (7, 4));
        assert_eq!(answers[0].text, "micro-batch 4 → 2, accumulation 1 → 2");
    }
}

#[test]
fn a_halving_at_the_end_of_an_epoch_holds_in_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    // Epochs of four steps: the fourth agrees.
    let ranks = run_with(&Job::new(&dir), &after([3; 3], 1, Relief::HalveMicroBatch));
    assert!(ranks.iter().all(|ended| sizes(ended)[..6] == [4, 4, 4, 4, 2, 2]));
}

#[test]
fn an_order_that_some_ranks_never_get_is_done_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { steps: 30, ..Job::new(&dir) };
    let ranks = run_with(&job, &after([2, u64::MAX, u64::MAX], 3, Relief::HalveMicroBatch));
    for ended in &ranks {
        let changed = sizes(ended).iter().position(|&n| n == 2).unwrap();
        // Noted before step 3 (after 2 steps), overdue 20 steps later.
        assert_eq!(changed, 23);
    }
    assert_eq!(ranks.iter().map(|ended| ended.told.answers.len()).collect::<Vec<_>>(), [1, 0, 0]);
}

#[test]
fn orders_to_the_loader_are_answered_and_change_no_result() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let plain = run(&Job::new(&a));
    let all = [Relief::PausePrefetch, Relief::Decoders { threads: 1 }, Relief::TrimAllocators, Relief::Resume];
    let orders = all.clone();
    let ranks = run_with(&Job::new(&b), &move |_, event, controls| {
        if let Event::Step(step) = event
            && let Some(action) = orders.get(step as usize)
        {
            controls.order(100 + step, action.clone());
        }
        // The first one comes during a validation: epochs have four steps, and the run ends with one.
        if matches!(event, Event::Phase(Phase::Val)) {
            controls.order(99, Relief::PausePrefetch);
        }
    });
    for (ended, plain) in ranks.iter().zip(&plain) {
        assert_eq!(ended.params, plain.params);
        let numbers: Vec<u64> = ended.told.answers.iter().map(|answer| answer.order).collect();
        assert_eq!(numbers, [101, 102, 103, 99, 99, 99]);
        assert!(ended.told.answers.iter().all(|answer| !answer.text.is_empty() && answer.uss_after_bytes > 0));
    }
}

#[test]
fn a_stop_says_why_and_leaves_a_checkpoint() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let plain = run(&Job::new(&a));
    let stop = Relief::Stop { reason: "memory is at 99 %".into() };
    // Only rank 2 hears of it.
    let ranks = run_with(&Job::new(&b), &after([u64::MAX, u64::MAX, 5], 1, stop));
    for ended in &ranks {
        let finished = ended.result.as_ref().unwrap();
        assert_eq!((finished.status, finished.steps), (Status::Stopped, 6));
        assert_eq!(finished.reason.as_deref(), Some("memory is at 99 %"));
    }
    assert_eq!(ranks[2].told.answers[0].text, "stopped, with a checkpoint");
    let resumed = run(&Job { resume: Some(6), ..Job::new(&b) });
    assert_eq!(resumed[0].params, plain[0].params);
}

#[test]
fn a_stop_in_validation_ends_it_early_and_a_resume_does_it_again() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let job = Job { ema: Some(0.9), ..Job::new(&a) };
    let plain = run(&job);
    let job = Job { dir: b.path().into(), ..job };
    let in_validation = |rank: usize, event: Event, controls: &Controls| {
        if rank == 1 && matches!(&event, Event::Phase(Phase::Val)) {
            controls.order(1, Relief::Stop { reason: String::new() });
        }
    };
    let stopped = run_with(&job, &in_validation);
    for ended in &stopped {
        let finished = ended.result.as_ref().unwrap();
        assert_eq!((finished.status, finished.steps), (Status::Stopped, 4), "no step more");
        assert!(!finished.metrics.keys().any(|name| name.starts_with("val.")), "{:?}", finished.metrics);
    }
    let records = &stopped[0].told.records;
    assert_eq!(records.iter().map(|record| record.step).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let state: LoopState = checkpoint::load(&b.path().join("step-4")).unwrap().state().unwrap();
    assert_eq!((state.step, state.recorded_step()), (4, 3));

    let resumed = run(&Job { resume: Some(4), ..job });
    assert_eq!(resumed[0].params, plain[0].params);
    let comparable = |record: &MetricsRecord| (record.step, record.loss, record.metrics.clone());
    let plain_records: Vec<_> = plain[0].told.records[3..].iter().map(comparable).collect();
    assert_eq!(resumed[0].told.records.iter().map(comparable).collect::<Vec<_>>(), plain_records);
    assert_eq!(resumed[0].result.as_ref().unwrap().metrics, plain[0].result.as_ref().unwrap().metrics);
}

#[test]
fn a_stop_in_the_test_split_stops_and_a_resume_tests() {
    let dir = tempfile::tempdir().unwrap();
    let stopped = run_with(&Job::new(&dir), &|rank, event, controls| {
        if rank == 0 && matches!(&event, Event::Phase(Phase::Test)) {
            controls.order(1, Relief::Stop { reason: "enough".into() });
        }
    });
    assert!(stopped.iter().all(|ended| ended.result.as_ref().unwrap().status == Status::Stopped));
    let resumed = run(&Job { resume: Some(10), ..Job::new(&dir) });
    let finished = resumed[0].result.as_ref().unwrap();
    assert_eq!(finished.status, Status::Finished);
    assert!(finished.metrics.contains_key("test.loss"));
    assert!(resumed[0].seen.is_empty(), "no step is trained again");
}
