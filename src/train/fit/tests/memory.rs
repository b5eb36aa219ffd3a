//! Memory that runs out.

use super::*;
use crate::torch;

/// Rank 1 runs out of memory in its third step; the ranks' shares are 4 samples, one pass each.
fn fault_at(pass: usize, place: Place, job: &Job) -> Job {
    Job { faults: vec![vec![], vec![(pass, place)], vec![]], ..job.clone() }
}

/// A run of two steps as planned, then on from there with micro-batches of 2.
fn smaller_from_step_2(dir: &tempfile::TempDir) -> Vec<Ended> {
    run(&Job { steps: 2, ..Job::new(dir) });
    run(&Job { resume: Some(2), micro_batch: 2, ..Job::new(dir) })
}

#[test]
fn checklist_36_out_of_memory_halves_the_micro_batch_and_repeats_the_step_on_every_rank() {
    let [a, b, c, d] = [0; 4].map(|_| tempfile::tempdir().unwrap());
    let reference = run(&Job::new(&a));
    let smaller = smaller_from_step_2(&d);
    for (place, dir) in [(Place::Forward, &b), (Place::Backward, &c)] {
        let ranks = run(&fault_at(2, place, &Job::new(dir)));
        for (rank, (ended, plain)) in ranks.iter().zip(&reference).enumerate() {
            assert_eq!(ended.result.as_ref().unwrap().steps, 10, "{place:?}");
            assert_eq!(sizes(ended)[..5], [4, 4, 4, 2, 2], "rank {rank}: the third step again, in halves");
            assert_eq!(order(ended, &[2]), order(plain, &[]), "the order of samples stays");
            close(&ended.params, &plain.params, 1e-6);
            assert_eq!(ended.params, smaller[rank].params, "{place:?}: as if it had been 2 from that step on");
        }
        let (told, plain) = (&ranks[0].told, &reference[0].told);
        assert_eq!(losses(&ranks[0])[2..], losses(&smaller[0])[..]);
        let samples = |told: &Told| told.records.iter().map(|r| r.metrics["train.samples"]).collect::<Vec<_>>();
        assert_eq!(samples(told), samples(plain), "a failed attempt counts for no metric");
        let line = told.lines.iter().find(|line| line.contains("out of memory")).unwrap();
        assert!(line.starts_with("rank 1: out of memory at step 3 ("), "{line}");
        assert!(line.ends_with("micro-batch 4 → 2, accumulation 1 → 2; once more"), "{line}");
        assert!(line.contains("can't allocate memory"), "{line}");
    }
}

#[test]
fn checklist_36_the_ladder_goes_down_to_one_and_average_and_first_step_survive_it() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let plain = run(&Job { ema: Some(0.9), micro_batch: 1, ..Job::new(&a) });
    // The first step fails twice: on rank 2 with 4 samples, then on rank 0 in its second half.
    let faults = vec![vec![(2, Place::Backward)], vec![], vec![(0, Place::Backward)]];
    let ranks = run(&Job { ema: Some(0.9), faults, ..Job::new(&b) });
    for (ended, plain) in ranks.iter().zip(&plain) {
        assert_eq!(ended.result.as_ref().unwrap().metrics, plain.result.as_ref().unwrap().metrics);
        assert_eq!(ended.params, plain.params, "bit-equal to a run that began with 1");
    }
    assert_eq!(sizes(&ranks[0])[..7], [4, 2, 2, 1, 1, 1, 1]);
}

#[test]
fn out_of_memory_with_one_sample_is_an_error_after_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { micro_batch: 1, ..Job::new(&dir) };
    // Three steps of four passes are done.
    let ranks = run(&fault_at(13, Place::Forward, &job));
    for ended in &ranks {
        let error = ended.result.as_ref().err().unwrap();
        assert!(matches!(error, TrainError::OutOfMemory { step: 4, rank: 1, good: 3, .. }), "{error}");
        assert!(error.to_string().contains("step 4 on rank 1 with micro-batches of 1 sample"), "{error}");
        assert_eq!(ended.told.failures, [error.to_string()], "told before anything is given back, once");
    }
    let reference = run(&Job { resume: Some(3), ..job.clone() });
    assert_eq!(reference[0].result.as_ref().unwrap().steps, 10, "the checkpoint of the last good step goes on");
}

#[test]
fn a_halved_micro_batch_survives_a_resume_and_another_plan_wins() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let whole = run(&fault_at(2, Place::Forward, &Job::new(&a)));
    run(&fault_at(2, Place::Forward, &Job { steps: 5, ..Job::new(&b) }));
    let resumed = run(&Job { resume: Some(5), ..Job::new(&b) });
    assert_eq!(sizes(&resumed[0])[..4], [2, 2, 2, 2]);
    assert_eq!(resumed[0].params, whole[0].params, "bit-equal to the run that was not broken off");
    let wider = run(&Job { resume: Some(5), micro_batch: 3, ..Job::new(&b) });
    assert_eq!(sizes(&wider[0])[..4], [3, 1, 3, 1]);
    close(&wider[0].params, &whole[0].params, 1e-6);
}

#[test]
fn out_of_memory_in_evaluation_takes_smaller_batches() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let plain = run(&Job::new(&a));
    let ranks = run(&Job { most_in_evaluation: 3, ..Job::new(&b) });
    let told = &ranks[0].told.lines;
    assert!(told.iter().any(|line| line.ends_with("batches 8 → 4; once more")), "{told:?}");
    assert!(told.iter().any(|line| line.ends_with("batches 4 → 2; once more")), "{told:?}");
    assert_eq!(ranks[0].params, plain[0].params);
    let metrics = |ended: &Ended| ended.result.as_ref().unwrap().metrics.clone();
    for (name, value) in metrics(&plain[0]) {
        assert!((metrics(&ranks[0])[&name] - value).abs() < 1e-6, "{name}");
    }
    let none = tempfile::tempdir().unwrap();
    let ranks = run(&Job { most_in_evaluation: 0, ..Job::new(&none) });
    assert!(ranks.iter().all(|ended| matches!(ended.result, Err(TrainError::OutOfMemory { .. }))));
}

#[test]
fn caches_are_cleared_periodically_counted_and_change_nothing() {
    let [a, b] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let (plain, cleaned) = (run(&Job::new(&a)), run(&Job { cleanup_every: 3, ..Job::new(&b) }));
    let finished = cleaned[0].result.as_ref().unwrap();
    assert!(cleaned.iter().chain(&plain).all(|ended| ended.told.failures.is_empty()));
    assert_eq!((finished.cleanups, plain[0].result.as_ref().unwrap().cleanups), (3, 0));
    let lines = cleaned[0].told.lines.iter().filter(|line| *line == "Memory cleanup completed").count();
    assert_eq!(lines, 3);
    assert_eq!((&cleaned[0].params, losses(&cleaned[0])), (&plain[0].params, losses(&plain[0])));
}

/// Set in the process that the test below starts.
const ALONE: &str = "HEADROOM_TEST_ALONE";

#[test]
fn experiments_in_one_process_with_a_clean_up_between_stay_flat() {
    if std::env::var_os(ALONE).is_none() {
        // In a separate process: other tests take memory and give it back meanwhile.
        let path = module_path!().split_once("::").unwrap().1;
        let name = format!("{path}::experiments_in_one_process_with_a_clean_up_between_stay_flat");
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let output = alone.args(["--exact", &name, "--nocapture"]).env(ALONE, "1").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
        return print!("{text}");
    }
    let resident: Vec<u64> = (0..40)
        .map(|number| {
            let dir = tempfile::tempdir().unwrap();
            let ranks = run(&Job { ema: Some(0.9), ..Job::new(&dir) });
            assert!(ranks.iter().all(|ended| ended.result.as_ref().unwrap().steps == 10), "experiment {number}");
            drop(ranks);
            torch::release_caches();
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
        })
        .collect();
    let mean = |values: &[u64]| values.iter().sum::<u64>() / values.len() as u64;
    let (early, late) = (mean(&resident[10..20]), mean(&resident[30..]));
    println!("resident after experiments 10 to 20: {early} bytes, 30 to 40: {late}");
    assert!(late < early + (1 << 20), "{resident:?}");
}
